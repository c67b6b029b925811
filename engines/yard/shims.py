"""What makes each engine look as the incumbent did: small changes to requests, answers and streams.

llama.cpp's server is the reference, for its clients must not notice a move. An engine whose answers need no change gets
a `Shim` that passes everything on untouched.
"""

from __future__ import annotations

import json
from typing import Any

import aiohttp

from engines.yard.openai import Call
from engines.yard.unit import Unit


class Shim:
    """Passes on as it is, under the name that the engine knows the model by."""

    changes_streams = False

    def __init__(self, call: Call, served_name: str) -> None:
        self.call = call
        self._served_name = served_name

    def request(self) -> bytes:
        """The body for the engine."""
        if self.call.model == self._served_name:
            return self.call.raw
        return json.dumps({**self.call.body, "model": self._served_name}).encode()

    def whole(self, status: int, data: bytes) -> tuple[int, bytes]:
        """An answer in one piece."""
        return status, data

    def event(self, chunk: bytes) -> bytes:
        """A piece of a stream."""
        return chunk


def shim_for(unit: Unit, call: Call) -> Shim:
    """The changes that this engine needs for this request."""
    return Shim(call, unit.driver.served_name(unit.recipe.installation, unit.recipe.model_id))


async def props(unit: Unit, http: aiohttp.ClientSession) -> dict[str, Any]:
    """llama.cpp's `/props` of the engine itself, or what a client reads of it: the context of one sequence."""
    try:
        timeout = aiohttp.ClientTimeout(total=5)
        async with http.get(f"{unit.base_url}/props", headers=unit.headers, timeout=timeout) as answer:
            if answer.status == 200:
                found: dict[str, Any] = await answer.json()
                return found
    except (aiohttp.ClientError, TimeoutError, ValueError):
        pass
    return {
        "default_generation_settings": {"n_ctx": unit.context_tokens},
        "total_slots": unit.slots,
        "model_path": str(unit.recipe.gguf),
    }
