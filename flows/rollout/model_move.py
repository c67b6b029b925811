"""A migration under way: what its models share, and where each of them stands in the yard and in the records.

The yard has the truth about traffic, the records about what was found and decided; nothing that matters is held here.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engines.errors import SwitchyardError
from engines.yard.client import YardClient
from flows.rollout.orders import Orders
from flows.rollout.yards import Yards, stage
from migrations.plan import ModelPlan, Plan
from tasks.evidence.rehearsal import OpenStage, engine_of, room, route_of
from tasks.records.journal import RunJournal
from tasks.records.tables import Arm, Step, StepState
from tasks.verdicts.verdict import CheckResult, Verdict, gate, reasons

POLL_S = 5.0
SETTLE_S = 0.5
Say = Callable[[str], None]
Judge = Callable[[Sequence[Mapping[str, Any]], str, str], list[CheckResult]]  # samples, incumbent, candidate
Do = Callable[[str, str, Callable[[], None]], None]  # model, step, its work


class Closed(Exception):
    """The model does not move; its checks, or the text, say why."""


@dataclass(frozen=True, kw_only=True)
class MovePhase:
    """What differs between the two phases that move traffic."""

    name: str
    kind: str  # of its runs in the records
    evaluation: str  # whose gate has to be open, and how one comes by it
    advice: str
    refusal: Callable[[ModelMove], str | None] = lambda _: None  # why the model cannot move yet, whatever its gate
    drills: Callable[[ModelMove], None] | None = None  # tried on a yard of its own before any traffic moves

    @property
    def gate_check(self) -> str:
        """The check on the gate of its evaluation."""
        return self.evaluation.removeprefix("the ").replace(" ", "_") + ".gate"


@dataclass(kw_only=True)
class Migration:
    """What all models of a migration share; `do` is called with each step, `judge` judges a canary's live requests."""

    phase: MovePhase
    plan: Plan
    orders: Orders
    yards: Yards
    run: RunJournal
    judge: Judge
    say: Say
    do: Do
    poll_s: float = POLL_S
    next_turns: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # by model: measured for its approval
    yard_started: dict[str, Any] | None = None  # by this migration

    def __post_init__(self) -> None:
        self.client = YardClient(self.yards.home)
        self.incumbent, self.candidate = self.plan.incumbent.name, self.plan.candidate.name


@dataclass(eq=False)
class ModelMove:
    """One model of a migration: its route in the yard, its rows, and the results that count for its gate."""

    migration: Migration
    model: ModelPlan
    results: dict[str, CheckResult] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.id, self.run, self.say = self.model.id, self.migration.run, self.migration.say
        self.client, self.candidate = self.migration.client, self.migration.candidate

    # --- its rows

    def step(self, name: str) -> Step | None:
        """Where a step stands; None before it began."""
        return self.run.step(self.id, name)

    def put(self, name: str, state: StepState, **detail: Any) -> None:
        """Store where a step stands."""
        self.run.put_step(self.id, name, state, **detail)

    def record(self, *results: CheckResult) -> None:
        """Store results, which count for the gate from now on."""
        self.results |= {result.check: result for result in results}
        self.run.put_checks(self.id, results)

    def recall(self, checks: Collection[str] | None = None) -> None:
        """Let results of an earlier start of this run count again: those of a step that is done, or all of them."""
        stored = self.run.checks(self.id)
        self.results |= {result.check: result for result in stored if checks is None or result.check in checks}

    def drill(
        self,
        name: str,
        arm: Arm,
        measure: Callable[[], dict[str, Any]],
        judge: Callable[[dict[str, Any]], list[CheckResult]],
        **detail: Any,
    ) -> None:
        """Carry a drill out, once for the same `detail`: its evidence and its results are stored under its name."""
        step = self.step(name)
        if step and step.state == "done" and detail.items() <= step.detail.items():
            self.recall(step.detail["checks"])
            return
        self.put(name, "intent", **detail)
        evidence = measure()
        self.run.records.put_evidence(self.run.id, self.id, arm, name, evidence)
        results = judge(evidence)
        self.record(*results)
        passed, checks = gate(results) is Verdict.PASS, [result.check for result in results]
        self.put(name, "done" if passed else "failed", **detail, checks=checks)

    def decision(self, kind: str, *, given: bool) -> str | None:
        """Who decided it and why, now or in an earlier start of the same run; None when nobody did."""
        if given:
            orders = self.migration.orders
            self.run.put_decision(self.id, kind, who=orders.who, why=orders.reason)
        made = [decision for decision in self.run.decisions(self.id) if decision.kind == kind]
        return f"{made[-1].who}: {made[-1].why}" if made else None

    def verdict(self) -> Verdict:
        """Verdict of its gate so far."""
        return gate(list(self.results.values()))

    def require_open(self) -> None:
        """Raise Closed when something that is required keeps the gate shut."""
        if shut := reasons(list(self.results.values())):
            raise Closed("; ".join(f"{result.check}: {result.why}" for result in shut))

    def end(self, verdict: Verdict, result: str, why: str) -> None:
        """Note how the model's move ended."""
        self.ended = {"verdict": verdict.value, "result": result, "why": why}

    def end_as_before(self) -> None:
        """End of a model that was moved before: nothing is changed, but a fallback in force is no success."""
        if fallback := self.route()["fallback"]:
            why = f"{self.candidate} was promoted and is out of order; {fallback} serves: see `switchyard status`"
            self.end(Verdict.ERROR, "fallen back", why)
        else:
            self.end(Verdict.PASS, "already promoted", f"{self.candidate} serves it already")

    def outcome(self) -> dict[str, Any]:
        """How it ended, with its checks, steps and decisions."""
        return {
            "model": self.id,
            **self.ended,
            "checks": [result.model_dump(mode="json") for result in self.results.values()],
            "steps": [
                {"step": step.step, "state": step.state, "at": step.at.isoformat(), "detail": step.detail}
                for step in self.run.steps(self.id)
            ],
            "decisions": [
                {"kind": made.kind, "who": made.who, "why": made.why, "at": made.at.isoformat()}
                for made in self.run.decisions(self.id)
            ],
        }

    # --- its route in the yard

    def route(self) -> dict[str, Any]:
        """Its route, as the yard reports it now."""
        return route_of(self.client, self.id)

    def settled(self) -> dict[str, Any]:
        """Its route once no move is under way: one continues in the yard when the flow that ordered it is gone."""
        while (route := self.route())["moving"]:
            self.say(f"the yard is still busy: {route['moving']}")
            time.sleep(SETTLE_S)
        return route

    def is_on_candidate(self, route: Mapping[str, Any]) -> bool:
        """Whether the route is committed to the candidate."""
        return bool(route["committed"] == self.candidate)

    def has_moved(self) -> bool:
        """Whether a yard runs and has committed the model to the candidate."""
        try:
            return self.is_on_candidate(self.settled())
        except SwitchyardError:
            return False

    def take_canary_out(self) -> None:
        """End the canary where there is one."""
        if self.route()["canary"]:
            self.say(self.client.order("canary", self.say, model=self.id, to=self.candidate, weight=0))

    def roll_back(self, why: str) -> None:
        """Put the route back as it was before, and raise Closed: a migration that failed is over."""
        self.put("rollback", "intent", why=why)
        route = self.settled()
        if route["canary"] or self.is_on_candidate(route):
            self.say(self.client.order("rollback", self.say, model=self.id))
        for step in self.run.steps(self.id):
            if step.state == "intent" and step.step != "rollback":
                self.put(step.step, "failed", **{**step.detail, "why": why})
        self.put("rollback", "done", why=why, serving=self.route()["serving"])
        if self.verdict() is not Verdict.FAIL:  # found in the records of a run that was killed
            self.record(CheckResult(check="rollback", verdict=Verdict.FAIL, why=why))
        raise Closed(f"rolled back: {why}")

    # --- a yard of its own beside it

    def room(self) -> tuple[str, str]:
        """The form of a rehearsal that fits beside what serves (empty: none), and why."""
        route = self.route()
        serving = engine_of(route, route["serving"])
        return room(self.migration.yards.model(self.id).specs, serving["memory_bytes"], serving["vram_bytes"])

    def stage(self) -> OpenStage:
        """Opens a yard for the rehearsal."""
        shared = self.migration
        return functools.partial(
            stage, shared.yards, self.id, incumbent=shared.incumbent, candidate=self.candidate, say=self.say
        )
