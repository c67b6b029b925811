"""`/props` as llama.cpp's server answers it, whichever engine serves."""

from __future__ import annotations

import asyncio
import contextlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from engines.errors import BadInput
from engines.model.header import read_header
from engines.settings import NO_FILE
from engines.yard.engine.connection import Gone
from engines.yard.engine.unit import Unit


async def props(unit: Unit) -> dict[str, Any]:
    """The engine's own `/props`, completed with what clients read there where the engine reports none.

    `n_ctx` is the context of one sequence: as the engine reports it, else as configured, at most what the model was
    trained for. A model that is not loaded has it too: clients read it before their first request.
    """
    found: dict[str, Any] = {}
    if unit.state.serves:
        with contextlib.suppress(Gone, ValueError):
            async with unit.connection.ask("GET", "/props", timeout_s=5) as answer:
                own = json.loads(await answer.read()) if answer.status == 200 else {}
                found = own if isinstance(own, dict) else {}
    if "default_generation_settings" in found and "model_path" in found:
        return found
    trained = await asyncio.to_thread(_trained_context, unit.spec.gguf)
    settings = unit.spec.settings
    configured = unit.context_tokens or (settings.context_tokens and settings.context_tokens // settings.sequences)
    limits = [limit for limit in (configured, trained) if limit]
    known = {
        "default_generation_settings": {"n_ctx": min(limits, default=None)},
        "total_slots": unit.slots,
        "model_alias": unit.spec.model_id,
        "model_path": "" if unit.spec.gguf == NO_FILE else str(unit.spec.gguf),
        "modalities": {"vision": False, "audio": False},
        "build_info": f"{unit.engine} {unit.spec.version}",
    }
    return {**known, **found}


@lru_cache(maxsize=16)
def _trained_context(gguf: Path) -> int | None:
    try:
        return read_header(gguf).context_length
    except BadInput:
        return None
