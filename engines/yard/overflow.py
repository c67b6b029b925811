"""Overflow: a second engine takes new conversations of a model while too many requests wait for the first.

A route decides who takes which conversation (see `Route`); here the second engine is kept up and ended. It starts once
the first one serves and where memory holds both, and nothing waits for it: absent, loading or dead, it is as if there
were none.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from engines.errors import BadInput, EngineError
from engines.units import number_of
from engines.yard.client import Say
from engines.yard.engine.health import Health
from engines.yard.engine.unit import Unit
from engines.yard.memory_budget import MemoryBudget
from engines.yard.orders import OverflowOrder
from engines.yard.route import Route
from engines.yard.shadow import Shadow
from engines.yard.yard import Yard

LOOK_S = 1.0


class Overflow:
    def __init__(self, yard: Yard, shadow: Shadow, memory_budget: MemoryBudget) -> None:
        self._yard = yard
        self._shadow = shadow
        self._memory_budget = memory_budget
        self._started: dict[Unit, Route] = {}
        self._not_before: dict[Route, float] = {}  # when one that found no room is tried again

    async def order(self, order: OverflowOrder, say: Say) -> str:
        """Let the second engine take conversations, and bring it up; or (`on` false) no more, and end it."""
        route = self._yard.route_of(order.model)
        config = route.overflow_config
        if config is None:
            raise BadInput(
                f"{route.model_id} names no second engine: write [models.overflow] with engine and waiting under the "
                "model in the plan, then `switchyard reload`"
            )
        self._yard.commit(route, overflow=order.on)
        self._yard.events.note("move", route.model_id, f"overflow {'on' if order.on else 'off'}", engine=config.engine)
        if not order.on:
            if (unit := route.units.get(config.engine)) is not None:
                say(f"{unit.engine} finishes {number_of(len(unit.in_flight), 'request')}")
                await self._end(route, unit)
            return f"{route.model_id}: {route.serving.engine} serves all of it"
        self._not_before.pop(route, None)
        await self._look(route, again=True)
        unit = route.overflow
        if unit is None or route.overflow_refused or self._why_not_now(route):
            return f"{route.model_id}: the overflow is on, but {self._why_closed(route, config.engine)}"
        if not unit.state.serves:
            say(f"starting {unit.engine} {unit.spec.version}")
            try:
                await unit.ready(self._yard.settings.move_s, first_try=True)
            except EngineError as error:
                return f"{route.model_id}: the overflow is on, but {error}"
        waiting = number_of(config.waiting, "waiting request")
        return f"{route.model_id}: {unit.engine} takes new conversations beyond {waiting}"

    async def run(self) -> None:
        """Keep the second engines up, and end those that are none any more; until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            for route in list(self._yard.routes.values()):
                await self._look(route)
            for unit, route in list(self._started.items()):
                if route.moving is None and not route.needs(unit) and not unit.in_flight:
                    await self._end(route, unit)

    def status(self, route: Route) -> dict[str, Any] | None:
        """What `switchyard status` shows, with `why` it takes nothing now; None where the plan has none."""
        config = route.overflow_config
        if config is None:
            return None
        return {
            "engine": config.engine,
            "waiting": config.waiting,
            "on": route.state.overflow,
            "takes": route.open_overflow is not None,
            "conversations": route.overflowed,
            "why": self._why_closed(route, config.engine),
        }

    # --- how

    async def _look(self, route: Route, *, again: bool = False) -> None:
        """Start the second engine where it is not up; one that has spent its restarts only `again`, by order."""
        unit = route.overflow
        if unit is None or self._why_not_now(route):
            return
        if unit.state is not Health.STOPPED and not (again and unit.budget.exhausted):
            return
        if time.monotonic() < self._not_before.get(route, 0):
            return
        refused, serving = await self._memory_budget.start_overflow(route, unit), route.serving
        if not refused:
            self._started[unit] = route
            self._not_before.pop(route, None)
        elif serving.stats.memory_bytes is not None or serving.spec.url:  # else what that holds is not known yet
            if route not in self._not_before:
                self._yard.events.note("incident", route.model_id, f"no overflow: {refused}", engine=unit.engine)
            self._not_before[route] = time.monotonic() + self._yard.settings.try_again_s
        route.overflow_refused = refused

    def _why_not_now(self, route: Route) -> str:
        """Why the second engine is not started now; '' where it may be."""
        if route.unloaded or route.holding or route.moving:
            return f"{route.model_id} is {route.moving or ('not loaded' if route.unloaded else 'held')}"
        if not route.serving.state.serves:
            return f"{route.serving.engine} is {route.serving.state}"
        return ""

    def _why_closed(self, route: Route, engine: str) -> str:
        unit = route.units.get(engine)
        if route.open_overflow is not None:
            return ""
        if not route.state.overflow:
            return "it is ordered off"
        if unit is None:
            return f"{engine} is not on this machine, or retired"
        if unit is route.serving:
            return f"{engine} serves"
        if route.state.canary is not None:
            return "a canary is judged"
        return route.overflow_refused or self._why_not_now(route) or f"{engine} is {unit.state}: {unit.why}"

    async def _end(self, route: Route, unit: Unit) -> None:
        """End an engine that nothing else needs, when its requests are done."""
        self._started.pop(unit, None)
        if not self._is_needed(route, unit):
            await unit.idle()
            if not self._is_needed(route, unit):
                await unit.stop()

    def _is_needed(self, route: Route, unit: Unit) -> bool:
        canary = route.state.canary
        is_canary = canary is not None and canary.engine == unit.engine
        return is_canary or route.needs(unit) or self._shadow.goes_to(route, unit.engine)
