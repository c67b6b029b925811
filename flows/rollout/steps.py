"""One migration under way: what each step of the subprocess phase does, recorded before and after.

The yard holds the truth about traffic, the records about what was found and decided; this holds nothing that matters.
Killed at any line and started again, it asks both and goes on: a step that is done is done again only where the yard
says that its effect is gone.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

from engines.errors import BadInput, EngineNotFound, SwitchyardError
from engines.yard.client import YardClient, public_address, wait_until_serving
from flows.experiment_lock import alone
from flows.orchestrator.run import flow_run_id
from flows.rollout import yards as yard_processes
from flows.rollout.orders import Orders
from flows.rollout.phase_one import phase_one
from flows.rollout.yards import Yards
from migrations.plan import ModelPlan, Plan
from tasks.evidence.environment import machine_environment
from tasks.evidence.rehearsal import OpenStage, engine_of, judge_rehearsal, measure_rehearsal, one_token, room, route_of
from tasks.records.store import Records
from tasks.records.tables import Run, Step
from tasks.verdicts.verdict import CheckResult, Verdict, gate, not_measured, reasons, worst

POLL_S = 5.0
SETTLE_S = 0.5
Say = Callable[[str], None]
Judge = Callable[[Sequence[Mapping[str, Any]], str, str], list[CheckResult]]  # samples, incumbent, candidate
Do = Callable[[str, str, Callable[[], None]], None]


class Closed(Exception):
    """The model does not move; its checks, or the text, say why."""


def plainly(_model: str, _step: str, work: Callable[[], None]) -> None:
    """Do the work of a step, and nothing around it."""
    work()


class Migration:
    """The subprocess phase of one plan. `do` is called with each step; `judge` judges a canary's live requests."""

    phase: ClassVar[str] = "subprocess"
    kind: ClassVar[str] = "migrate"  # of its runs in the records
    evaluation: ClassVar[str] = "phase 1"  # whose gate has to be open, and how one comes by it
    advice: ClassVar[str] = "run `switchyard evaluate`"

    def __init__(
        self,
        plan: Plan,
        yards: Yards,
        records: Records,
        judge: Judge,
        *,
        orders: Orders | None = None,
        say: Say = lambda _: None,
        do: Do = plainly,
        poll_s: float = POLL_S,
    ) -> None:
        self.plan = plan
        self.yards = yards
        self.records = records
        self.judge = judge
        self.orders = (orders or Orders()).checked(plan)
        self.say = say
        self.do = do
        self.poll_s = poll_s
        self.client = YardClient(yards.home)
        self.models = [plan.model(name) for name in self.orders.models] or list(plan.models)
        self.incumbent, self.candidate = plan.incumbent.engine, plan.candidate.engine
        self.started: dict[str, Any] | None = None
        self._run: Run | None = None
        self._results: dict[str, dict[str, CheckResult]] = {model.id: {} for model in self.models}
        self._ends: dict[str, dict[str, str]] = {}

    # --- from start to end

    def run(self) -> dict[str, Any]:
        """What it came to, as plain JSON. Raises BadInput and EngineError; whatever is raised, the yard serves."""
        with alone(self.yards.home, "a migration"):
            if self._finished():
                return self.outcome()
            self._run = self._opened()
            try:
                self._phases()
            except SwitchyardError as error:
                self.records.finish_run(self.run_id, "failed", error=str(error))
                raise
            except BaseException as error:  # Ctrl-C and Prefect's cancellation are no Exceptions
                self.records.finish_run(self.run_id, "interrupted", error=type(error).__name__)
                raise
            return self._concluded()

    @property
    def run_id(self) -> str:
        """The id of the run that records this migration."""
        assert self._run is not None
        return self._run.id

    def outcome(self) -> dict[str, Any]:
        """Models with their verdicts, checks, steps and decisions, and what to do next."""
        models = [self._model_outcome(model.id) for model in self.models]
        verdict = worst(Verdict(model["verdict"]) for model in models)
        return {
            "run_id": self._run.id if self._run else None,
            "plan": self.plan.name,
            "phase": self.phase,
            "verdict": verdict.value,
            "models": models,
            "yard_started": self.started,
        }

    def _phases(self) -> None:
        waiting = [model for model in self.models if not self._has_moved(model.id)]
        closed = [model for model in waiting if not self._precondition(model)]
        if closed:
            for model in self.models:
                if model not in waiting:
                    self._already(model.id)
                elif model not in closed:
                    self._end(
                        model.id, Verdict.INCONCLUSIVE, "not moved", "another model's gate is shut: nothing moves"
                    )
            return
        self.do("yard", "serves", self._ensure_yard)
        for model in self.models:
            try:
                self._migrate(model)
            except Closed as shut:
                verdict = self._gate(model.id)
                self._end(model.id, verdict, "not moved", str(shut))

    def _concluded(self) -> dict[str, Any]:
        outcome = self.outcome()
        verdict = Verdict(outcome["verdict"])
        for model_id, results in self._results.items():
            self.records.drop_checks(self.run_id, model_id)
            self.records.put_checks(self.run_id, model_id, results.values())
        # what is not settled yet is gone on with: a rehearsal that passed is not done again
        unsettled = verdict in (Verdict.INCONCLUSIVE, Verdict.ERROR)
        why = next((end["why"] for end in self._ends.values() if end["verdict"] == verdict), None)
        self.records.finish_run(
            self.run_id, "interrupted" if unsettled else "done", verdict=verdict, error=why if unsettled else None
        )
        return outcome

    def _migrate(self, model: ModelPlan) -> None:
        if self._state(model.id, "rollback") == "intent":
            self._recall(model.id)
            self._roll_back(model.id, "it was rolling back when it was ended")
        if self._has_moved(model.id):
            self._recall(model.id)
        else:
            self.do(model.id, "rehearsal", lambda: self._rehearse(model))
            self._require_open(model.id)
            self._drills(model)
            self._canaries(model.id)
        self.do(model.id, "promote", lambda: self._promote(model.id))

    @property
    def _gate_check(self) -> str:
        return self.evaluation.removeprefix("the ").replace(" ", "_") + ".gate"

    def _drills(self, model: ModelPlan) -> None:
        """What else a phase tries on a yard of its own before any traffic moves."""

    # --- 1: the gate of phase 1

    def _precondition(self, model: ModelPlan) -> bool:
        """True when the model may move; else a line in the outcome says why not and what to do."""
        recipe = self.yards.recipes(model.id).get(self.candidate)
        if recipe is None:
            absent = self.yards.absent(model.id).get(self.candidate)
            raise EngineNotFound(absent or f"{self.candidate} was not found", engine=self.candidate)
        found = phase_one(self.records, self.plan, model, recipe.version)
        if found.open:
            self._record(model.id, CheckResult(check=self._gate_check, verdict=Verdict.PASS, why=found.why))
            self._put_step(model.id, "precondition", "done", phase_1_run=found.run_id)
            return True
        decided = self._decision(model.id, "override", given=model.id in self.orders.override)
        if decided is None:
            why = f"the gate of {self.evaluation} is shut: {found.why}"
            self._record(model.id, CheckResult(check=self._gate_check, verdict=Verdict.FAIL, why=why))
            self._put_step(model.id, "precondition", "failed", why=why)
            advice = f"{self.advice}, or add --override {model.id} --who NAME --reason TEXT"
            self._end(model.id, Verdict.FAIL, "gate closed", f"{why}; {advice}")
            return False
        why = f"overridden by {decided}; {found.why}"
        self._record(model.id, not_measured(self._gate_check, why, required=False))
        self._put_step(model.id, "precondition", "done", override=decided, phase_1_run=found.run_id)
        return True

    # --- 2: a yard

    def _ensure_yard(self) -> None:
        names = [model.id for model in self.models]
        if not self.client.runs():
            self._put_step("-", "yard", "intent")
            self.started = yard_processes.start_detached(self.yards, names, self.say)
        elif differs := self.yards.differs():
            raise BadInput(differs)
        else:
            wait_until_serving(self.client, names, say=self.say)
        for model in self.models:
            engine_of(route_of(self.client, model.id), self.candidate)
        self._put_step("-", "yard", "done", pid=self.client.status()["pid"], started=self.started)

    # --- 3: the fallback rehearsed

    def _rehearse(self, model: ModelPlan) -> None:
        versions = {engine: recipe.version for engine, recipe in self.yards.recipes(model.id).items()}
        if decided := self._decision(model.id, "without-rehearsal", given=self.orders.without_rehearsal):
            self._record(model.id, not_measured("rehearsal", f"left out by {decided}", required=False))
            self._put_step(model.id, "rehearsal", "done", left_out=decided)
            return
        step = self._step(model.id, "rehearsal")
        if step and step.state == "done" and step.detail.get("versions") == versions:
            self._recall(model.id, step.detail["checks"])
            return
        self._put_step(model.id, "rehearsal", "intent", versions=versions)
        evidence = self._rehearsed(model)
        self.records.put_evidence(self.run_id, model.id, "both", "rehearsal", evidence)
        limits = self.plan.limits
        results = judge_rehearsal(evidence, kill_detect_s=limits.kill_detect_s, recover_s=limits.recover_s)
        self._record(model.id, *results)
        state = "done" if gate(results) is Verdict.PASS else "failed"
        checks = [result.check for result in results]
        self._put_step(model.id, "rehearsal", state, versions=versions, checks=checks)

    def _rehearsed(self, model: ModelPlan) -> dict[str, Any]:
        recipes = self.yards.recipes(model.id)
        if self.incumbent not in recipes:
            absent = self.yards.absent(model.id).get(self.incumbent, "it was not found")
            return {"not_rehearsed": f"there is no fallback on this machine: {self.incumbent}: {absent}"}
        route = route_of(self.client, model.id)
        serving = engine_of(route, route["serving"])
        form, why = room(recipes, serving["memory_bytes"], serving["vram_bytes"])
        self.say(why)
        if not form:
            advice = "free some memory, or add --without-rehearsal --who NAME --reason TEXT"
            return {"not_rehearsed": f"{why}; {advice}"}
        stage = self._stage(model)
        return {**measure_rehearsal(stage, candidate=self.candidate, form=form, say=self.say), "room": why}

    def _stage(self, model: ModelPlan) -> OpenStage:
        return functools.partial(
            yard_processes.stage,
            self.yards,
            model.id,
            incumbent=self.incumbent,
            candidate=self.candidate,
            say=self.say,
        )

    def _require_open(self, model_id: str) -> None:
        """Go on while nothing that is required keeps the gate shut; raises Closed."""
        shut = reasons(list(self._results[model_id].values()))
        if shut:
            raise Closed("; ".join(f"{result.check}: {result.why}" for result in shut))

    # --- 4: the canary

    def _canaries(self, model_id: str) -> None:
        if decided := self._decision(model_id, "without-canary", given=self.orders.without_canary):
            self._record(model_id, not_measured("canary", f"left out by {decided}", required=False))
            self._put_step(model_id, "canary", "done", left_out=decided)
            return
        earlier: list[dict[str, Any]] = []
        for weight in self.plan.canary.steps:
            take = functools.partial(self._canary, model_id, weight, earlier)
            self.do(model_id, f"canary {weight:.0%}", take)
            self._require_open(model_id)

    def _canary(self, model_id: str, weight: float, earlier: list[dict[str, Any]]) -> None:
        """One share of the traffic, watched and judged; its requests join the `earlier` ones. What fails goes back."""
        step = self._step(model_id, _canary_step(weight))
        here = self._settled(model_id)["canary"] or {"engine": None, "weight": 0.0}
        if step and step.state == "done" and here["engine"] == self.candidate and here["weight"] >= weight:
            self._recall(model_id, step.detail["checks"])
            earlier += self._recorded_samples(model_id, weight)
            return
        try:
            since, restarts = self._at_weight(model_id, weight, step, here)
            samples, trouble = self._watched(model_id, weight, since, restarts, earlier)
            self._conclude_canary(model_id, weight, since, samples, trouble, earlier)
        except BaseException:
            # live traffic on an engine that nobody judges: it goes back, whatever happened
            with contextlib.suppress(SwitchyardError):
                self._take_out(model_id)
            raise
        earlier += samples

    def _at_weight(self, model_id: str, weight: float, step: Step | None, here: Mapping[str, Any]) -> tuple[float, int]:
        """Since when (s since the epoch) the canary has had this weight, and the candidate's restarts at that time."""
        same = here["engine"] == self.candidate and here["weight"] == weight
        if same and step and step.state == "intent" and "since" in step.detail:
            return float(step.detail["since"]), int(step.detail["restarts"])
        self._put_step(model_id, _canary_step(weight), "intent", weight=weight)
        try:
            self.client.order("canary", self.say, model=model_id, to=self.candidate, weight=weight)
        except SwitchyardError as error:
            why = f"{error}; to move without a canary: --without-canary --who NAME --reason TEXT"
            self._record(model_id, CheckResult(check="canary.starts", verdict=Verdict.ERROR, why=why))
            self._put_step(model_id, _canary_step(weight), "failed", why=str(error))
            raise Closed(why) from error
        since, restarts = time.time(), engine_of(route_of(self.client, model_id), self.candidate)["restarts"]
        self._put_step(model_id, _canary_step(weight), "intent", weight=weight, since=since, restarts=restarts)
        return since, restarts

    def _watched(
        self, model_id: str, weight: float, since: float, restarts: int, earlier: Sequence[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], str | None]:
        """The live requests of a step until there is nothing more to wait for; and what broke it off."""
        steps, seen = self.plan.canary, list[dict[str, Any]]()
        while True:
            last = seen[-1]["at"] if seen else since
            # the yard remembers the latest few thousand only: they are collected as they come
            fresh = [_nameless(sample) for sample in self.client.samples(model_id) if sample["at"] > last]
            seen += fresh
            answered = self._answered(seen)
            left_s = since + steps.max_minutes * 60 - time.time()
            self.say(
                f"{answered} answers by {self.candidate} ({steps.min_requests} at least), {left_s / 60:.0f} min left"
            )
            if trouble := self._trouble(model_id, weight, since, restarts):
                return seen, trouble
            began = time.monotonic()
            if left_s <= 0 or (fresh and self._decided(weight, answered, [*earlier, *seen])):
                return seen, None
            # looking may not cost more than a twentieth of a core
            time.sleep(min(max(self.poll_s, 20 * (time.monotonic() - began)), max(left_s, 0)))

    def _decided(self, weight: float, answered: int, samples: Sequence[dict[str, Any]]) -> bool:
        """Whether a step is over: failed at any time; else a share needs some answers, and the last one a verdict."""
        if not self._answered(samples):
            return False
        verdict = gate(self._judged(samples))
        if verdict in (Verdict.FAIL, Verdict.ERROR):
            return True
        is_last = weight == self.plan.canary.steps[-1]
        return answered >= self.plan.canary.min_requests and (verdict is Verdict.PASS or not is_last)

    def _answered(self, samples: Sequence[Mapping[str, Any]]) -> int:
        return sum(sample["engine"] == self.candidate for sample in samples)

    def _judged(self, samples: Sequence[dict[str, Any]]) -> list[CheckResult]:
        return self.judge(samples, self.incumbent, self.candidate)

    def _trouble(self, model_id: str, weight: float, since: float, restarts: int) -> str | None:
        """Why there is nothing more to wait for: the candidate broke down, or somebody took the canary out."""
        status = self.client.status()
        route = next(route for route in status["models"] if route["id"] == model_id)
        engine = engine_of(route, self.candidate)
        said = [
            incident["what"]
            for incident in status["incidents"]
            if incident["model"] == model_id and incident["at"] >= since and incident.get("engine") == self.candidate
        ]
        if engine["restarts"] > restarts or engine["state"] in ("dead", "wedged", "failing"):
            return f"{self.candidate} broke down: {said[-1] if said else engine['why']}"
        canary = route["canary"]
        if canary and canary["engine"] == self.candidate and canary["weight"] == weight:
            return None
        return said[-1] if said else "the canary was changed by hand while it was watched"

    def _conclude_canary(
        self,
        model_id: str,
        weight: float,
        since: float,
        samples: list[dict[str, Any]],
        trouble: str | None,
        earlier: Sequence[dict[str, Any]],
    ) -> None:
        self.records.put_evidence(
            self.run_id,
            model_id,
            "both",
            "canary",
            {"weight": weight, "since": since, "until": time.time(), "trouble": trouble, "samples": samples},
            key=f"{weight:g}",
        )
        results = self._canary_results(samples, trouble, earlier)
        verdict = gate(results)
        is_last = weight == self.plan.canary.steps[-1]
        goes_on = verdict is Verdict.INCONCLUSIVE and self._answered(samples) >= self.plan.canary.min_requests
        if verdict is Verdict.PASS or (goes_on and not is_last):
            # a smaller share is judged again with what follows: only the last word is the gate's
            checks = [result.check for result in results] if is_last else []
            self._record(model_id, *(results if is_last else ()))
            self._put_step(model_id, _canary_step(weight), "done", verdict=verdict.value, checks=checks)
            return
        self._record(model_id, *results)
        if verdict is Verdict.FAIL:
            self._roll_back(model_id, "; ".join(f"{result.check}: {result.why}" for result in reasons(results)))
        self._take_out(model_id)
        self._put_step(model_id, _canary_step(weight), "failed", verdict=verdict.value)

    def _canary_results(
        self, samples: Sequence[dict[str, Any]], trouble: str | None, earlier: Sequence[dict[str, Any]]
    ) -> list[CheckResult]:
        """The checks on every live request since the canary began, and on whether this share had enough of them."""
        if trouble:
            return [CheckResult(check="canary.keeps_serving", verdict=Verdict.FAIL, why=trouble)]
        steps, answered = self.plan.canary, self._answered(samples)
        judged = self._judged([*earlier, *samples]) if answered else []
        if gate(judged) is Verdict.FAIL or answered >= steps.min_requests:
            return judged
        why = (
            f"{self.candidate} answered {answered or 'no'} requests within {steps.max_minutes:g} minutes, "
            f"{steps.min_requests} are needed: use the model meanwhile, raise canary.max_minutes in the plan, or add "
            "--without-canary --who NAME --reason TEXT"
        )
        return [*judged, not_measured("canary.requests", why, limit=steps.min_requests, unit="requests")]

    def _recorded_samples(self, model_id: str, weight: float) -> list[dict[str, Any]]:
        found = self.records.get_evidence(self.run_id, model_id, "both", "canary", key=f"{weight:g}")
        return list(found.payload["samples"]) if found else []

    # --- 5: all of it

    def _promote(self, model_id: str) -> None:
        """The candidate serves, seen by a last real token; else the incumbent is put back."""
        before = self._settled(model_id)
        if self._moved(before) and self._state(model_id, "promote") in (None, "done"):
            self._already(model_id)
            return
        if not self._moved(before):
            self._put_step(model_id, "promote", "intent", undo=before["committed"])
            try:
                self.client.order("promote", self.say, model=model_id, to=self.candidate)
            except SwitchyardError as error:
                self._take_out(model_id)
                self._record(model_id, CheckResult(check="promote.move", verdict=Verdict.ERROR, why=str(error)))
                self._put_step(model_id, "promote", "failed", why=str(error))
                raise Closed(str(error)) from error
        token = one_token(self._address(), model_id, self.yards.key, wait_s=self.yards.settings.wait_s)
        route = route_of(self.client, model_id)
        serves = token["answered"] and self._moved(route) and route["fallback"] is None
        why = f"one real token in {token['took_s']:.2f} s" if token["answered"] else f"no token: {token['error']}"
        why += f"; {route['serving']} serves"
        verdict = Verdict.PASS if serves else Verdict.FAIL
        self._record(model_id, CheckResult(check="promote.token", verdict=verdict, why=why))
        if not serves:
            self._roll_back(model_id, why)
        self._put_step(model_id, "promote", "done", token=token, serving=route["serving"], undo=route["undo"])
        self._end(model_id, Verdict.PASS, "promoted", why)

    def _roll_back(self, model_id: str, why: str) -> None:
        """The route as it was before, and Closed: a migration that failed is over."""
        self._put_step(model_id, "rollback", "intent", why=why)
        route = self._settled(model_id)
        if route["canary"] or self._moved(route):
            self.say(self.client.order("rollback", self.say, model=model_id))
        for step in self.records.steps(self.run_id, model_id):
            if step.state == "intent" and step.step != "rollback":
                self._put_step(model_id, step.step, "failed", **{**step.detail, "why": why})
        self._put_step(model_id, "rollback", "done", why=why, serving=route_of(self.client, model_id)["serving"])
        if self._gate(model_id) is not Verdict.FAIL:  # found in the records of a run that was killed
            self._record(model_id, CheckResult(check="rollback", verdict=Verdict.FAIL, why=why))
        raise Closed(f"rolled back: {why}")

    def _take_out(self, model_id: str) -> None:
        if route_of(self.client, model_id)["canary"]:
            self.say(self.client.order("canary", self.say, model=model_id, to=self.candidate, weight=0))

    # --- what the yard says

    def _settled(self, model_id: str) -> dict[str, Any]:
        """The route once no move is under way: a move goes on in the yard when the flow that ordered it is gone."""
        while (route := route_of(self.client, model_id))["moving"]:
            self.say(f"the yard is still busy: {route['moving']}")
            time.sleep(SETTLE_S)
        return route

    def _moved(self, route: Mapping[str, Any]) -> bool:
        return bool(route["committed"] == self.candidate)

    def _has_moved(self, model_id: str) -> bool:
        """True when a yard runs and has committed the model to the candidate."""
        try:
            return self._moved(self._settled(model_id))
        except SwitchyardError:
            return False

    def _finished(self) -> bool:
        """True when every model moved and no run of this plan is open: then nothing is changed."""
        if self._unfinished() is not None or not all(self._has_moved(model.id) for model in self.models):
            return False
        for model in self.models:
            self._already(model.id)
        return True

    def _already(self, model_id: str) -> None:
        """The end of a model that was moved before: nothing is changed, but a fallback in force is no success."""
        fallback = route_of(self.client, model_id)["fallback"]
        if fallback:
            why = f"{self.candidate} was promoted and is out of order; {fallback} serves: see `switchyard status`"
            self._end(model_id, Verdict.ERROR, "fallen back", why)
        else:
            self._end(model_id, Verdict.PASS, "already promoted", f"{self.candidate} serves it already")

    def _address(self) -> str:
        return public_address(self.client.status()["address"])

    # --- records

    def _opened(self) -> Run:
        """The run to go on with: the one of this plan that did not get done, else a new one."""
        unfinished = self._unfinished()
        if unfinished is not None:
            self.say(f"going on with run {unfinished.id}")
            return self.records.resume_run(unfinished.id, flow_run_id=flow_run_id())
        plan = self.plan.model_dump(mode="json")
        return self.records.start_run(
            self.kind, self.plan.name, plan, environment=machine_environment(), flow_run_id=flow_run_id()
        )

    def _unfinished(self) -> Run | None:
        """The run of this plan that did not get done here; another host's yard is another migration."""
        return self.records.unfinished(self.plan.model_dump(mode="json"), kind=self.kind)

    def _step(self, model_id: str, name: str) -> Step | None:
        return next((step for step in self.records.steps(self.run_id, model_id) if step.step == name), None)

    def _state(self, model_id: str, name: str) -> str | None:
        step = self._step(model_id, name)
        return step.state if step else None

    def _put_step(self, model_id: str, name: str, state: Any, **detail: Any) -> None:
        self.records.put_step(self.run_id, model_id, name, state, detail)

    def _record(self, model_id: str, *results: CheckResult) -> None:
        self._results[model_id] |= {result.check: result for result in results}
        self.records.put_checks(self.run_id, model_id, results)

    def _recall(self, model_id: str, checks: Collection[str] | None = None) -> None:
        """Results of an earlier start of this run count again: those of a step that is done, or all of them."""
        stored = self.records.checks(self.run_id).get(model_id, [])
        wanted = [result for result in stored if checks is None or result.check in checks]
        self._results[model_id] |= {result.check: result for result in wanted}

    def _decision(self, model_id: str, kind: str, *, given: bool) -> str | None:
        """Who decided it and why, recorded now or by an earlier start of the same run; None when nobody did."""
        if given:
            self.records.put_decision(self.run_id, model_id, kind, who=self.orders.who, why=self.orders.reason)
        made = [decision for decision in self.records.decisions(self.run_id, model_id) if decision.kind == kind]
        return f"{made[-1].who}: {made[-1].why}" if made else None

    def _gate(self, model_id: str) -> Verdict:
        return gate(list(self._results[model_id].values()))

    def _end(self, model_id: str, verdict: Verdict, result: str, why: str) -> None:
        self._ends[model_id] = {"verdict": verdict.value, "result": result, "why": why}

    def _model_outcome(self, model_id: str) -> dict[str, Any]:
        steps = self.records.steps(self._run.id, model_id) if self._run else []
        decisions = self.records.decisions(self._run.id, model_id) if self._run else []
        return {
            "model": model_id,
            **self._ends[model_id],
            "checks": [result.model_dump(mode="json") for result in self._results[model_id].values()],
            "steps": [
                {"step": step.step, "state": step.state, "at": step.at.isoformat(), "detail": step.detail}
                for step in steps
            ],
            "decisions": [
                {"kind": made.kind, "who": made.who, "why": made.why, "at": made.at.isoformat()} for made in decisions
            ],
        }


def _canary_step(weight: float) -> str:
    return f"canary {weight:g}"


def _nameless(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The sample with its conversation known by a number only: how a conversation begins is its user's own."""
    begins = str(sample["conversation"])
    digest = hashlib.sha256(begins.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return {**sample, "conversation": digest if begins else ""}
