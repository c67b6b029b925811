"""Memory budget: which models are loaded, on demand; unloaded when unused or when another one needs the room.

A model whose plan says `load = "demand"` is started by its first request, which waits for it. Past the memory budget
the model that was used longest ago goes first: it takes no new request, finishes those it has, and its process ends, so
that its memory is back for certain. A pinned model stays. An engine that is moved, or has a canary, is left alone. An
overflow engine starts only where there is room beside what is loaded, and goes before any model does.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import lru_cache

from engines.errors import BadInput, EngineError, SwitchyardError
from engines.fit import Fit, estimate
from engines.model.free_memory import FreeMemory, free_memory
from engines.model.header import read_header
from engines.units import size
from engines.yard.client import Say
from engines.yard.engine.launch_spec import LaunchSpec
from engines.yard.engine.unit import Unit
from engines.yard.orders import Order
from engines.yard.route import Route
from engines.yard.yard import Yard

SHARE_BACK = 0.75  # of what the stopped engine held, as Ollama waits for; the rest is the driver's own
POLL_S = 0.25
SETTLES_S = 2.0  # where NVML does not report how much a process holds
QUIET_S = 10.0  # how long a model that has work may keep another one waiting before it finishes what it has
LOOK_S = 1.0


class OverBudget(SwitchyardError):
    """The model does not fit into the memory budget beside those that stay."""


class MemoryHeld(SwitchyardError):
    """A stopped engine's memory did not come back in time."""


class MemoryBudget:
    """The models of one yard; one is loaded or unloaded at a time."""

    def __init__(self, yard: Yard) -> None:
        self._yard = yard
        self._one = asyncio.Lock()
        self._waking: dict[str, asyncio.Task[None]] = {}

    def admit(self, route: Route) -> None:
        """Take a new model in: loaded as far as the budget goes, or unloaded until its first request."""
        route.unloaded = route.load == "demand" or self._yard.settings.memory_budget_mib is not None
        if not route.unloaded:
            self._yard.bring_up(route)
        elif route.load == "start":
            self._wake_soon(route, evict=False)

    def wake(self, route: Route) -> None:
        """Load the model of a request that has come, if it is not loaded."""
        route.used_at = time.monotonic()
        if route.unloaded:
            self._wake_soon(route, evict=True)

    async def load(self, order: Order, _: Say) -> str:
        """Load a model now, and return once it serves. Raises OverBudget, EngineError."""
        route = self._yard.route_of(order.model)
        async with self._one:
            await self._load(route, evict=True)
        return f"{route.model_id} is loaded: {route.serving.engine}"

    async def unload(self, order: Order, _: Say) -> str:
        """End a model's engines once their requests are done. Raises BadInput for one that is moved or has a canary."""
        route = self._yard.route_of(order.model)
        canary = route.state.canary
        if route.moving or route.holding or canary:
            what = route.moving or (f"a canary on {canary.engine}" if canary else "being drained")
            raise BadInput(f"{route.model_id} is busy with {what}; unload it after that")
        async with self._one:
            return await self._unload(route, "ordered")

    async def start_overflow(self, route: Route, unit: Unit) -> str:
        """Start an overflow engine beside the one that serves, where there is room for it; else why not."""
        async with self._one:
            if not await fits_beside(unit, route.serving):
                return f"{unit.engine} does not fit beside {route.serving.engine}: see `switchyard preflight`"
            budget_mib, held = self._yard.settings.memory_budget_mib, self._held_bytes()
            _, need = await asyncio.to_thread(needed_bytes, unit, _with_file(unit.spec, route.serving.spec))
            if budget_mib is not None and need + held > budget_mib * 2**20:
                return f"{unit.engine} needs {size(need)}, and {size(held)} of yard.memory_budget_mib are taken"
            unit.want()
        return ""

    async def _end_overflow(self, why: str) -> bool:
        """End one overflow engine, once its requests are done; False where there is none."""
        for route in self._yard.routes.values():
            unit = route.overflow
            if unit is not None and unit.child is not None and not unit.spec.url and not route.moving:
                route.overflow_refused = f"its memory was needed: {why}"
                self._yard.events.note("yard", route.model_id, route.overflow_refused, engine=unit.engine)
                await unit.idle()
                await unit.stop()
                return True
        return False

    async def run(self) -> None:
        """Unload what was not used for `unload_after_s`, and what turned out larger than estimated; until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            async with self._one:
                settings, held = self._yard.settings, self._held_bytes()
                is_over = settings.memory_budget_mib is not None and held > settings.memory_budget_mib * 2**20
                why = f"{size(held)} are held, more than was estimated"
                if is_over and await self._end_overflow(why):
                    continue
                found = [route for route in self._yard.routes.values() if self._may_go(route) and _is_quiet(route)]
                if not found:
                    continue
                oldest = min(found, key=lambda route: route.used_at)
                unused_s = time.monotonic() - oldest.used_at
                if settings.unload_after_s is not None and unused_s > settings.unload_after_s:
                    await self._unload(oldest, f"not used for {unused_s:.0f} s")
                elif is_over:
                    await self._unload(oldest, why)

    # --- how

    def _wake_soon(self, route: Route, *, evict: bool) -> None:
        if route.model_id not in self._waking:
            task = asyncio.create_task(self._wake(route, evict=evict), name=f"load {route.model_id}")
            self._waking[route.model_id] = task
            task.add_done_callback(lambda _: self._waking.pop(route.model_id, None))

    async def _wake(self, route: Route, *, evict: bool) -> None:
        async with self._one:
            try:
                await self._load(route, evict=evict)
            except OverBudget as why:
                self._yard.events.note("incident" if evict else "yard", route.model_id, str(why))
                route.refuse_waiting(str(why))
            except EngineError as error:  # a fallback may serve; else its requests wait for the restart, or are refused
                self._yard.log.warning("%s: %s", route.model_id, error)

    async def _load(self, route: Route, *, evict: bool) -> None:
        if not route.unloaded:
            return
        await self._make_room(route, evict=evict)
        route.unloaded = False
        self._yard.bring_up(route)
        await route.serving.ready(first_try=True)  # a restart of its own must not keep other models waiting

    async def _make_room(self, route: Route, *, evict: bool) -> None:
        budget_mib = self._yard.settings.memory_budget_mib
        if budget_mib is None:
            return
        least, need = await asyncio.to_thread(needed_bytes, route.serving)
        budget = budget_mib * 2**20
        while need + self._held_bytes() > budget:
            if await self._end_overflow(f"{route.model_id} is loaded"):
                continue
            victim = await self._victim(route) if evict and least <= budget else None
            if victim is None and evict and least + self._held_bytes() <= budget:
                return  # it may fit: it is tried, and from then on its own measure counts
            if victim is None:
                raise OverBudget(
                    f"{route.model_id} needs {size(need)}, and {size(self._held_bytes())} of the budget of "
                    f"{size(budget)} are taken by models that stay; raise yard.memory_budget_mib, or unload one"
                )
            await self._unload(victim, f"{route.model_id} needs the room")

    async def _victim(self, route: Route) -> Route | None:
        """The one used longest ago, quiet ones first; where all are busy, one has QUIET_S to become quiet."""
        until = time.monotonic() + QUIET_S
        while True:
            found = [other for other in self._yard.routes.values() if other is not route and self._may_go(other)]
            found.sort(key=lambda other: other.used_at)
            quiet = [other for other in found if _is_quiet(other)]
            if quiet or not found or time.monotonic() > until:
                return next(iter(quiet or found), None)
            await asyncio.sleep(LOOK_S / 4)

    def _may_go(self, route: Route) -> bool:
        return not (route.unloaded or route.pin or route.moving or route.holding or route.state.canary) and any(
            unit.child is not None and not unit.spec.url for unit in route.units.values()
        )

    async def _unload(self, route: Route, why: str) -> str:
        if route.unloaded:
            return f"{route.model_id} is not loaded"
        began, route.holding = time.monotonic(), True
        try:
            await asyncio.gather(*(unit.idle() for unit in route.units.values()))
            units = [unit for unit in route.units.values() if unit.child is not None]
            held = sum(unit.stats.memory_bytes or 0 for unit in units)
            known = [unit.stats.vram_bytes for unit in units if unit.stats.vram_bytes is not None]
            vram = sum(known) if known else None
            before = await asyncio.to_thread(free_memory)
            route.unloaded = True
            for unit in route.units.values():
                await unit.stop()
            with contextlib.suppress(SwitchyardError):
                await memory_back(vram, before, self._yard.settings.memory_back_s)
        finally:
            route.holding = False
        done = f"unloaded ({why}) after {time.monotonic() - began:.1f} s; {size(held)} of RAM"
        done += f" and {size(vram)} of VRAM" if vram else ""
        self._yard.events.note("move", route.model_id, f"{done} are back")
        if route.waiting:
            self.wake(route)
        return f"{route.model_id} is {done} are back"

    def _held_bytes(self) -> int:
        units = [unit for route in self._yard.routes.values() for unit in route.units.values()]
        return sum(needed_bytes(unit)[1] for unit in units if unit.child is not None or unit.given_up is not None)


def estimate_of(spec: LaunchSpec) -> Fit | None:
    """Whether an engine fits into the memory that is free now; None where its file cannot be read. Blocks."""
    try:
        hosted = spec.form == "hosted"
        return estimate(
            read_header(spec.gguf), spec.settings, spec.kind, own=spec.own, memory=free_memory(), hosted=hosted
        )
    except SwitchyardError:
        return None


async def fits_beside(unit: Unit, serving: Unit) -> bool:
    """Room for both: by the estimate, or for twice what the serving engine holds where there is no estimate."""
    if unit.spec.url:
        return True
    fit = await asyncio.to_thread(estimate_of, _with_file(unit.spec, serving.spec))
    if fit is not None and fit.verdict != "unknown":
        return fit.verdict == "fits"
    free, held = await asyncio.to_thread(free_memory), serving.stats
    return _holds(free.ram_bytes, held.memory_bytes) and (
        held.vram_bytes is None or _holds(free.vram_bytes, held.vram_bytes)
    )


def _holds(free: int | None, held: int | None) -> bool:
    return free is not None and held is not None and free > 2 * held


def _with_file(spec: LaunchSpec, other: LaunchSpec) -> LaunchSpec:
    """The spec with the other one's file in place of a directory with the same weights, which has no header."""
    return spec.model_copy(update={"gguf": other.gguf}) if spec.gguf.is_dir() else spec


def needed_bytes(unit: Unit, spec: LaunchSpec | None = None) -> tuple[int, int]:
    """What an engine holds, at least and expected: as measured, else as estimated, else the size of its file.

    `spec` is the one to estimate by, where that is not its own. The weights that it serves from the mapped file count
    in each case; what is measured is private.
    """
    if unit.spec.url:  # others run it: what it holds is not ours to give
        return 0, 0
    if unit.stats.held_bytes is not None:
        held = unit.stats.held_bytes + _mapped_bytes(unit.spec.model_dump_json())
        return held, held
    if (fit := estimate_of(spec or unit.spec)) is not None and fit.needs:
        return sum(need.low for need in fit.needs), sum(need.expected for need in fit.needs)
    given = unit.spec.gguf
    n_bytes = sum(file.stat().st_size for file in (given.iterdir() if given.is_dir() else (given,)))
    return n_bytes, n_bytes


@lru_cache(maxsize=64)  # asked every second
def _mapped_bytes(spec: str) -> int:
    fit = estimate_of(LaunchSpec.model_validate_json(spec))
    return sum(need.mapped for need in fit.needs) if fit else 0


def _is_quiet(route: Route) -> bool:
    return not route.waiting and not any(unit.in_flight for unit in route.units.values())


async def memory_back(vram_held: int | None, before: FreeMemory, within_s: float) -> str:
    """Wait until a stopped engine's memory is back; what came back since `before`, in words.

    RAM is back with the end of the process. VRAM is the driver's to give back: raises MemoryHeld when it does not.
    """
    if before.vram_bytes is None:
        return "its memory is back: the process is gone, and there is no GPU"
    began, seen = time.monotonic(), 0
    while True:
        waited, last = time.monotonic() - began, seen
        free = await asyncio.to_thread(free_memory)
        seen = max((free.vram_bytes or 0) - before.vram_bytes, 0)
        if vram_held is not None and seen >= SHARE_BACK * vram_held:
            return f"VRAM is back: {size(seen)} of {size(vram_held)} after {waited:.1f} s"
        if vram_held is None and waited >= SETTLES_S and seen == last:
            return f"VRAM has settled {waited:.1f} s after the stop, {size(seen)} more are free"
        if waited > within_s:
            raise MemoryHeld(
                f"only {size(seen)} of {size(vram_held or 0)} of VRAM came back within {waited:.0f} s; "
                "`nvidia-smi` shows who holds it"
            )
        await asyncio.sleep(POLL_S)
