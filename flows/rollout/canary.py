"""The canary: growing shares of live conversations on the candidate, each judged; what fails goes back."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from engines.errors import SwitchyardError
from engines.units import number_of
from flows.evaluation.estimate import canary_most_s, spelled
from flows.progress import progress
from flows.rollout.model_move import Closed, ModelMove
from tasks.evidence.rehearsal import engine_of
from tasks.records.tables import Step
from tasks.verdicts.verdict import CheckResult, Verdict, gate, not_measured, reasons


def canaries(move: ModelMove) -> None:
    """Every share of the plan in turn; raises Closed where one keeps the gate shut."""
    migration = move.migration
    if decided := move.decision("without-canary", given=migration.orders.without_canary):
        move.record(not_measured("canary", f"left out by {decided}", required=False))
        move.put("canary", "done", left_out=decided)
        return
    earlier: list[dict[str, Any]] = []
    for weight in migration.plan.canary.steps:
        migration.do(move.id, f"canary {weight:.0%}", functools.partial(_take, move, weight, earlier))
        move.require_open()


def _take(move: ModelMove, weight: float, earlier: list[dict[str, Any]]) -> None:
    """One share, watched and judged unless it was; its requests join the `earlier` ones."""
    share = CanaryShare(move, weight, earlier)
    step, here = move.step(share.name), move.settled()["canary"] or {"engine": None, "weight": 0.0}
    if step and step.state == "done" and here["engine"] == move.candidate and here["weight"] >= weight:
        move.recall(step.detail["checks"])
        found = move.run.records.get_evidence(move.run.id, move.id, "both", "canary", key=f"{weight:g}")
        earlier += found.payload["samples"] if found else []
        return
    steps = move.migration.plan.canary
    rest = f"; with the shares after it {spelled(canary_most_s(steps, weight))}" if weight < steps.steps[-1] else ""
    progress.get().note(f"{move.id}: canary {weight:.0%} takes up to {spelled(60 * steps.max_minutes)}{rest}")
    try:
        share.begin(step, here)
        share.conclude(share.watch())
    except BaseException:
        # live traffic on an engine that nobody judges: it goes back, whatever happened
        with contextlib.suppress(SwitchyardError):
            move.take_canary_out()
        raise
    earlier += share.samples


class CanaryShare:
    """One share of a model's conversations on the candidate, judged together with those of `earlier` shares."""

    def __init__(self, move: ModelMove, weight: float, earlier: Sequence[dict[str, Any]]) -> None:
        self.move, self.weight, self.earlier = move, weight, earlier
        self.name = f"canary {weight:g}"
        self.steps = move.migration.plan.canary
        self.is_last = weight == self.steps.steps[-1]
        self.samples: list[dict[str, Any]] = []
        self.open: list[str] = []  # checks of the last judgement that more traffic has to settle
        self.since, self.restarts = 0.0, 0  # since when (s since the epoch), and the candidate's restarts by then

    def begin(self, step: Step | None, here: Mapping[str, Any]) -> None:
        """Order the share, unless it is in force already; raises Closed where the yard refuses it."""
        move, weight = self.move, self.weight
        same = here["engine"] == move.candidate and here["weight"] == weight
        if same and step and step.state == "intent" and "since" in step.detail:
            self.since, self.restarts = float(step.detail["since"]), int(step.detail["restarts"])
            return
        move.put(self.name, "intent", weight=weight)
        try:
            move.client.order("canary", move.say, model=move.id, to=move.candidate, weight=weight)
        except SwitchyardError as error:
            why = f"{error}; to move without a canary: --without-canary --who NAME --reason TEXT"
            move.record(CheckResult(check="canary.starts", verdict=Verdict.ERROR, why=why))
            move.put(self.name, "failed", why=str(error))
            raise Closed(why) from error
        self.since, self.restarts = time.time(), engine_of(move.route(), move.candidate)["restarts"]
        move.put(self.name, "intent", weight=weight, since=self.since, restarts=self.restarts)

    def watch(self) -> str | None:
        """Collect the live requests until there is nothing more to wait for; what broke the share off, or None."""
        move = self.move
        while True:
            last = self.samples[-1]["at"] if self.samples else self.since
            # the yard remembers the latest few thousand only: they are collected as they come
            fresh = [_anonymous(sample) for sample in move.client.samples(move.id) if sample["at"] > last]
            self.samples += fresh
            left_s = self.since + self.steps.max_minutes * 60 - time.time()
            answers = f"{number_of(self._answered(self.samples), 'answer')} by {move.candidate}"
            still = f"; open: {', '.join(self.open)}" if self.open else ""
            move.say(f"{answers} ({self.steps.min_requests} at least), {left_s / 60:.0f} min left{still}")
            if trouble := self._trouble():
                return trouble
            began = time.monotonic()
            if left_s <= 0 or (fresh and self._is_decided()):
                return None
            # looking may not cost more than a twentieth of a core
            time.sleep(min(max(move.migration.poll_s, 20 * (time.monotonic() - began)), max(left_s, 0)))

    def conclude(self, trouble: str | None) -> None:
        """Judge and record the share; one that failed is rolled back, one that lacks traffic taken out."""
        move = self.move
        seen = {"weight": self.weight, "since": self.since, "until": time.time(), "trouble": trouble}
        move.run.records.put_evidence(
            move.run.id, move.id, "both", "canary", {**seen, "samples": self.samples}, key=f"{self.weight:g}"
        )
        results = self._results(trouble)
        verdict = gate(results)
        has_enough = verdict is Verdict.INCONCLUSIVE and self._answered(self.samples) >= self.steps.min_requests
        if verdict is Verdict.PASS or (has_enough and not self.is_last):
            # a smaller share is judged again with what follows: only the last judgement is the gate's
            if self.is_last:
                move.record(*results)
            checks = [result.check for result in results] if self.is_last else []
            move.put(self.name, "done", verdict=verdict.value, checks=checks)
            return
        move.record(*results)
        if verdict is Verdict.FAIL:
            move.roll_back("; ".join(f"{result.check}: {result.why}" for result in reasons(results)))
        move.take_canary_out()
        move.put(self.name, "failed", verdict=verdict.value)

    def _results(self, trouble: str | None) -> list[CheckResult]:
        """The checks on every live request since the canary began, and on whether this share had enough of them."""
        if trouble:
            return [CheckResult(check="canary.keeps_serving", verdict=Verdict.FAIL, why=trouble)]
        answered, wanted = self._answered(self.samples), self.steps.min_requests
        judged = self._judged() if answered else []
        if gate(judged) is Verdict.FAIL or answered >= wanted:
            return judged
        requests = number_of(answered, "request") if answered else "no requests"
        why = (
            f"{self.move.candidate} answered {requests} within {self.steps.max_minutes:g} "
            f"minutes, {wanted} are needed: use the model meanwhile, raise canary.max_minutes in the plan, or add "
            "--without-canary --who NAME --reason TEXT"
        )
        return [*judged, not_measured("canary.requests", why, limit=wanted, unit="requests")]

    def _is_decided(self) -> bool:
        """Whether the share is over: failed at any time; else it needs some answers, and the last one a verdict."""
        if not self._answered([*self.earlier, *self.samples]):
            return False
        results = self._judged()
        verdict = gate(results)
        undecided = [one.check for one in results if one.required and one.verdict is Verdict.INCONCLUSIVE]
        self.open = [check.removeprefix("canary.") for check in undecided]
        if verdict in (Verdict.FAIL, Verdict.ERROR):
            return True
        enough = self._answered(self.samples) >= self.steps.min_requests
        return enough and (verdict is Verdict.PASS or not self.is_last)

    def _judged(self) -> list[CheckResult]:
        migration = self.move.migration
        return migration.judge([*self.earlier, *self.samples], migration.incumbent, migration.candidate)

    def _answered(self, samples: Sequence[Mapping[str, Any]]) -> int:
        return sum(sample["engine"] == self.move.candidate for sample in samples)

    def _trouble(self) -> str | None:
        """Why there is nothing more to wait for: the candidate broke down, or somebody took the canary out."""
        model_id, candidate = self.move.id, self.move.candidate
        status = self.move.client.status()
        route = next(route for route in status["models"] if route["id"] == model_id)
        engine = engine_of(route, candidate)
        said = [
            incident["what"]
            for incident in status["incidents"]
            if incident["model"] == model_id and incident["at"] >= self.since and incident.get("engine") == candidate
        ]
        if engine["restarts"] > self.restarts or engine["state"] in ("dead", "wedged", "failing"):
            return f"{candidate} broke down: {said[-1] if said else engine['why']}"
        canary = route["canary"]
        if canary and canary["engine"] == candidate and canary["weight"] == self.weight:
            return None
        return said[-1] if said else "the canary was changed by hand while it was watched"


def _anonymous(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The sample with its conversation known by a number only: how a conversation begins is its user's own."""
    begins = str(sample["conversation"])
    digest = hashlib.sha256(begins.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return {**sample, "conversation": digest if begins else ""}
