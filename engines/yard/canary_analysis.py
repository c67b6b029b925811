"""Canary analysis: a canary is judged on live traffic every few seconds, and rolled back when it fails.

The judge is passed in: what counts as worse is not the yard's decision. It sees the requests since the canary was
ordered. FAIL takes the canary out at once; PASS is noted once and stays in the status: promoting is somebody else's
decision. A canary whose engine is out of restarts is taken out without a judge.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from engines.errors import SwitchyardError
from engines.yard.metrics import LiveSample
from engines.yard.moves import Moves
from engines.yard.orders import CanaryOrder
from engines.yard.route import Route
from engines.yard.state import Canary
from engines.yard.yard import Yard

KEPT = 20_000  # requests of one canary; the judge's blocks count from its beginning, so the first ones are kept
JUDGE_SHARE = 20  # the next judgement waits this many times what the last one took: a twentieth of a core at most


@dataclass
class _Analysis:
    canary: Canary
    kept: list[LiveSample] = field(default_factory=list)
    last: LiveSample | None = None  # the newest one that was judged
    ready: bool = False
    broken: bool = False
    not_before: float = 0.0


class CanaryAnalysis:
    def __init__(self, yard: Yard, moves: Moves) -> None:
        self._yard = yard
        self._moves = moves
        self._cases: dict[str, _Analysis] = {}
        self._ending: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Judge every canary every `canary_judge_s`, until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._yard.settings.canary_judge_s):
                    await self._yard.look_at_canaries.wait()
            self._yard.look_at_canaries.clear()
            for route in list(self._yard.routes.values()):
                await self._look(route)

    async def _look(self, route: Route) -> None:
        case = self._case(route)
        # while the incumbent is out of order its traffic is the fallback's, which is no comparison
        if case is None or route.moving is not None or route.fallback is not None or self._yard.stopping:
            return
        unit = route.units.get(case.canary.engine)
        if unit is None or unit.budget.exhausted:
            why = f"{case.canary.engine} cannot be kept up: {unit.why if unit else 'it is gone'}"
            self._show(route, case, {"verdict": "FAIL", "why": why})
            self._take_out(route, case, why)
            return
        judged = await self._judged(route, case)
        if judged is None or route.state.canary is not case.canary:
            return
        self._show(route, case, judged)
        if judged["verdict"] == "FAIL":
            self._take_out(route, case, judged["why"])
        elif judged["verdict"] == "PASS" and not case.ready:
            case.ready = True
            what = f"canary is ready to promote at {case.canary.weight:.0%}: `switchyard promote {route.model_id}`"
            engine = case.canary.engine
            self._yard.events.note("canary", route.model_id, what, engine=engine, notify="candidate ready")

    def _case(self, route: Route) -> _Analysis | None:
        """The case of the canary that is on now; an order, of the same weight too, begins a new one."""
        canary = route.state.canary
        if canary is None:
            self._cases.pop(route.model_id, None)
            return None
        case = self._cases.get(route.model_id)
        if case is None or case.canary is not canary:
            case = self._cases[route.model_id] = _Analysis(canary)
            self._yard.canary_verdicts.pop(route.model_id, None)
        return case

    async def _judged(self, route: Route, case: _Analysis) -> dict[str, Any] | None:
        """The judge's verdict on all requests so far; None when there is nothing new, or no judge."""
        judge, samples = self._yard.judge_canary, self._samples(route, case)
        began = time.monotonic()
        if judge is None or not samples or samples[-1] is case.last or began < case.not_before:
            return None
        case.last = samples[-1]
        try:
            rows = [vars(sample) for sample in samples]
            found = await asyncio.to_thread(judge, rows, route.state.serving, case.canary.engine)
            judged = {**found, "verdict": str(found["verdict"]), "why": str(found["why"])}
            case.broken = False
        except Exception as error:
            judged = {"verdict": "ERROR", "why": f"the judge of the canary failed: {type(error).__name__}: {error}"}
            if not case.broken:
                self._yard.events.note("incident", route.model_id, judged["why"], engine=case.canary.engine)
            case.broken = True
        case.not_before = time.monotonic() + JUDGE_SHARE * (time.monotonic() - began)
        return {**judged, "requests": dict(Counter(sample.engine for sample in samples))}

    def _samples(self, route: Route, case: _Analysis) -> list[LiveSample]:
        """The first KEPT requests since the order, and of those behind them the ones that the yard remembers."""
        since = case.canary.since or 0.0
        newer = [sample for sample in self._yard.samples[route.model_id] if sample.at >= since]
        if case.kept:
            # by place, not by time: two requests may end in one tick of the clock
            places = [place for place, sample in enumerate(newer) if sample is case.kept[-1]]
            newer = newer[places[0] + 1 :] if places else [s for s in newer if s.at > case.kept[-1].at]
        room = max(KEPT - len(case.kept), 0)
        case.kept += newer[:room]
        return case.kept + newer[room:]

    def _show(self, route: Route, case: _Analysis, judged: dict[str, Any]) -> None:
        canary = case.canary
        about = {"engine": canary.engine, "weight": canary.weight, "since": canary.since, "at": time.time()}
        self._yard.canary_verdicts[route.model_id] = {**about, **judged}

    def _take_out(self, route: Route, case: _Analysis, why: str) -> None:
        """Roll the canary back, beside the loop: its last requests may take a while to end."""
        engine = case.canary.engine
        what = f"the canary failed and is taken out: {why}"
        self._yard.events.note("incident", route.model_id, what, engine=engine, notify="rollback")
        task = asyncio.create_task(self._end(route, case))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _end(self, route: Route, case: _Analysis) -> None:
        engine = case.canary.engine
        try:
            await self._moves.canary(CanaryOrder(model=route.model_id, to=engine), lambda _: None)
        except SwitchyardError as error:
            case.last = None  # judged again at the next turn
            self._yard.events.note("incident", route.model_id, f"the canary stays for now: {error}", engine=engine)
