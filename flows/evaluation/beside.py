"""Whether an evaluation's engines fit into memory beside those that the yard has loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from engines.errors import BadInput, SwitchyardError
from engines.fit import Fit, estimate
from engines.model.free_memory import FreeMemory, free_memory
from engines.model.header import Header, read_header
from engines.units import size
from engines.yard.client import YardClient
from flows.experiment_lock import Refused
from migrations.plan import Plan
from migrations.plan_file import load_plan, plan_path


class DoesNotFit(Refused):
    """An evaluation would take memory that the engines in service need."""


def lacking(plan: Plan, home: Path) -> str | None:
    """The largest lack of memory for an evaluation of `plan` beside what the yard has loaded, on one line.

    None where every engine fits (one runs at a time), and where no yard has an engine loaded.
    """
    loaded = _loaded(home)
    if not loaded:
        return None
    return lack(plan, _readable(plan), loaded, free_memory())


def lack(
    plan: Plan, headers: Mapping[str, Header], loaded: Sequence[tuple[str, str, int]], free: FreeMemory
) -> str | None:
    """The largest lack of `free` memory beside `loaded`: (model, engine, bytes held) of the yard's engines.

    Weights that the yard's engines map count as free for the system, yet they serve; an engine that maps the same file
    needs them no second time.
    """
    held, lacks = sum(n_bytes for _, _, n_bytes in loaded), list[tuple[int, str]]()
    mapped = _mapped_of(plan, headers, loaded, free)
    free = _less(free, sum(mapped.values()))
    for model_id, header in headers.items():
        for engine in (plan.incumbent.name, plan.candidate.name):
            fit = _estimate(plan, model_id, header, engine, free)
            if fit.verdict == "unknown" and (free.ram_bytes or 0) < 2 * held:
                lacks.append((0, f"cannot say whether {model_id} on {engine} fits beside the yard: {fit.why}"))
            for need in fit.needs:
                more = need.expected - min(need.mapped, mapped.get(model_id, 0))
                if need.free is not None and (missing := more - need.free) > 0:
                    room = f"{size(more)} of {need.device.upper()}, {size(need.free)} is free"
                    line = f"{model_id} on {engine} needs {room} beside what the yard serves ({size(held)})"
                    lacks.append((missing, f"{line}: {size(missing)} is missing"))
    return max(lacks)[1] if lacks else None


def free_beside(home: Path, gguf: Path, mapped: int = 0) -> FreeMemory:
    """What a further process may take beside the engines that the yard of `home` has loaded.

    Of its own `mapped` bytes, those of a `gguf` that is served already are in memory and needed no second time.
    """
    free = free_memory()
    if not (loaded := _loaded(home)):
        return free
    plan = load_plan(plan_path(None, home))
    held = _mapped_of(plan, _readable(plan), loaded, free)
    shared = [min(mapped, n_bytes) for model, n_bytes in held.items() if plan.model(model).gguf.samefile(gguf)]
    return _less(free, sum(held.values()) - max(shared, default=0))


def _mapped_of(
    plan: Plan, headers: Mapping[str, Header], loaded: Sequence[tuple[str, str, int]], free: FreeMemory
) -> dict[str, int]:
    """Bytes of each loaded model that its engine serves from the mapped file."""
    return {
        model: sum(need.mapped for need in _estimate(plan, model, headers[model], engine, free).needs)
        for model, engine, _ in loaded
        if model in headers and engine in plan.kinds
    }


def _less(free: FreeMemory, n_bytes: int) -> FreeMemory:
    return free if free.ram_bytes is None else replace(free, ram_bytes=max(0, free.ram_bytes - n_bytes))


def _readable(plan: Plan) -> dict[str, Header]:
    """The headers of the plan's models; one that cannot be read is never started."""
    headers: dict[str, Header] = {}
    for model in plan.models:
        with contextlib.suppress(BadInput):
            headers[model.id] = read_header(model.gguf)
    return headers


def _estimate(plan: Plan, model_id: str, header: Header, engine: str, memory: FreeMemory) -> Fit:
    own = plan.own_args(model_id, engine)
    return estimate(header, plan.settings_for(model_id), plan.kinds[engine], own=own, memory=memory)


def _loaded(home: Path) -> list[tuple[str, str, int]]:
    """(model, engine, bytes held) of every engine that the yard has loaded."""
    try:
        routes = YardClient(home).status()["models"]
    except SwitchyardError:
        return []
    sizes = [
        (r["id"], e["engine"], (e["memory_bytes"] or 0) + (e["vram_bytes"] or 0)) for r in routes for e in r["engines"]
    ]
    return [one for one in sizes if one[2]]
