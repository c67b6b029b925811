"""The whole migration as a table of contents: four phases, a gate and an approval between each, model by model.

    evaluate     every model of the plan, where no verdict on just this is on record
    subprocess   a model whose gate is open, or overridden by name and with a reason
    native       a model that the candidate serves
    deprecate    the incumbent, once nothing needs it

One model may be native while another stays where it is. Nothing that matters is held here: killed, suspended for an
answer, or started again, it asks the records what was measured and decided, and the yard who serves, and goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect.exceptions import Pause
from prefect.runtime import deployment, flow_run

from engines.errors import SwitchyardError
from engines.home import home as default_home
from engines.registry import driver, native_driver
from engines.yard.client import YardClient
from engines.yard.state import StateFile
from flows.deprecate import deprecate
from flows.evaluate import evaluate
from flows.experiment_lock import alone
from flows.native_phase import to_native
from flows.progress import progress
from flows.reconcile import reconcile
from flows.rollout.approval import Answer, Asks, Question, asks, in_prefect, nobody
from flows.rollout.orders import Orders
from flows.rollout.phase_one import PhaseOne, phase_one
from flows.subprocess_phase import to_subprocess
from migrations.plan import ModelPlan, Plan
from tasks.evidence.environment import machine_environment
from tasks.evidence.rehearsal import route_of
from tasks.evidence.unmeasured import models_to_retry
from tasks.records.payload import plan_hash
from tasks.records.store import Records, open_records
from tasks.records.tables import Decision, Run
from tasks.verdicts.verdict import CheckResult, Verdict, reasons, worst

KIND = "whole"
NOBODY = "-"  # of what concerns no single model
Say = Callable[[str], None]
Outcome = dict[str, Any]


@dataclass(frozen=True)
class Phases:
    """What carries out each phase; a model's move takes the plan's path as well, retirement who approves it and why."""

    evaluate: Callable[[Plan, str | None], Outcome]
    subprocess: Callable[[Plan, Path, Orders], Outcome]
    native: Callable[[Plan, Path, Orders], Outcome]
    deprecate: Callable[[Plan, str, str], Outcome]
    version: Callable[[Plan], str]  # of the candidate, as found here: another one's verdict does not count


def _version(plan: Plan) -> str:
    return driver(plan.candidate.engine).find(plan.candidate.form, plan.candidate.binary).version


# as plain functions of the one flow: a subflow cannot be suspended for an answer
REAL = Phases(evaluate.fn, to_subprocess, to_native, deprecate, _version)


class Waits(Exception):
    """Nobody answered a question; its text says which, and how to."""


class Whole:
    """All four phases of one plan."""

    def __init__(
        self,
        plan: Plan,
        path: Path,
        folder: Path,
        records: Records,
        *,
        orders: Orders | None = None,
        ask: Asks = nobody,
        phases: Phases = REAL,
        say: Say = lambda _: None,
        flow_run_id: str | None = None,
    ) -> None:
        self.plan, self.path, self.home, self.records = plan, path, folder, records
        self.orders = (orders or Orders()).checked(plan)
        self.ask, self.phases, self.say = ask, phases, say
        self.incumbent, self.candidate = plan.incumbent.engine, plan.candidate.engine
        native = native_driver(self.candidate)
        self.native = native.name if native and "native" in plan.migrate.phases else None
        self.models = [plan.model(name) for name in self.orders.models] or list(plan.models)
        self._flow_run_id = flow_run_id
        self._run: Run | None = None
        self._ends: dict[str, Outcome] = {}
        self._retired: Outcome | None = None

    def run(self) -> Outcome:
        """What it came to, as plain JSON. Whatever is raised, the yard goes on serving."""
        with alone(self.home, "a migration"):
            for line in reconcile(self.home, self.records):
                self.say(line)
            try:
                self._evaluate()
                for model in self.models:
                    self._ends[model.id] = self._moved(model)
                self._retired = self._deprecate()
            except SwitchyardError as error:
                self._finish("failed", error=str(error))
                raise
            except BaseException as error:  # Ctrl-C, Prefect's cancellation, and its suspension for an answer
                waits = isinstance(error, Pause)
                self._finish("interrupted", error="waits for an answer" if waits else type(error).__name__)
                raise
            return self._concluded()

    def _concluded(self) -> Outcome:
        verdicts = {name: Verdict(end["verdict"]) for name, end in self._ends.items()}
        if self._retired is not None:
            verdicts[NOBODY] = Verdict(self._retired["verdict"])
        verdict = worst(verdicts.values())
        waits = next((end["why"] for end in self._ends.values() if end["result"] == "waits for approval"), None)
        if self._retired is not None and self._retired["result"] == "waits for approval":
            waits = waits or self._retired["why"]
        self._finish("interrupted" if waits or self._broken() else "done", verdict=verdict, error=waits)
        return {
            "run_id": self._run.id if self._run else None,
            "plan": self.plan.name,
            "phase": "all",
            "verdict": verdict.value,
            "models": list(self._ends.values()),
            "retirement": self._retired,
            "decisions": [_told(made) for made in (self.records.decisions(self._run.id) if self._run else ())],
        }

    def _broken(self) -> list[str]:
        """Models of which a phase broke off, with the reason: the next start goes on, and does not ask again."""
        return [f"{end['model']}: {end['why']}" for end in self._ends.values() if end["verdict"] == Verdict.ERROR]

    # --- 1: evaluate

    def _evaluate(self) -> None:
        """Nothing where every model has a verdict on just this plan, file and engine; else what is missing of it."""
        waiting = [model for model in self.models if self._stands(model) == self.incumbent]
        known = [self._verdict(model) for model in waiting]
        again = next(
            (found.run_id for found, model in zip(known, waiting, strict=True) if self._part(found, model)), None
        )
        if again is None and all(found.verdict for found in known):
            return
        self._journal()
        unfinished = self.records.unfinished(self.plan.model_dump(mode="json"))
        self.phases.evaluate(self.plan, unfinished.id if unfinished else again)

    def _part(self, found: PhaseOne, model: ModelPlan) -> bool:
        """Whether the evaluation behind a verdict lacks a check of this model that a resumed run would carry out."""
        open_ended = found.verdict in (Verdict.ERROR, Verdict.INCONCLUSIVE)
        if found.run_id is None or not open_ended or model.id in self.orders.override:
            return False
        run = self.records.find_run(found.run_id)
        same = run.plan_hash == plan_hash(self.plan.model_dump(mode="json"))  # another plan is not resumed
        return same and model.id in models_to_retry(self.records, run.id)

    def _verdict(self, model: ModelPlan) -> PhaseOne:
        return phase_one(self.records, self.plan, model, self.phases.version(self.plan))

    def _stands(self, model: ModelPlan) -> str:
        """The engine to which the model is committed: by the yard, else by what the yard wrote down."""
        try:
            return str(route_of(YardClient(self.home), model.id)["committed"])
        except SwitchyardError:
            stored = StateFile(self.home / "yard").read().models.get(model.id)
            return stored.serving if stored else self.incumbent

    # --- 2 and 3: the moves of one model

    def _moved(self, model: ModelPlan) -> Outcome:
        """How far the model came, and why no further."""
        done = ["evaluate"]
        try:
            for phase, target in (("subprocess", self.candidate), ("native", self.native)):
                if target is None or phase not in self.plan.migrate.phases:
                    continue
                stands = self._stands(model) in (target, self.native)
                if shut := self._rest(phase, model) if stands else self._phase(phase, model):
                    return self._end(model, done, **shut)
                done.append(phase)
        except Waits as waits:
            return self._end(
                model, done, verdict=Verdict.INCONCLUSIVE.value, result="waits for approval", why=str(waits)
            )
        why = f"{self._stands(model)} serves {model.id}"
        return self._end(model, done, verdict=Verdict.PASS.value, result="migrated", why=why)

    def _end(self, model: ModelPlan, done: list[str], *, verdict: str, result: str, why: str) -> Outcome:
        stands = self._stands(model)
        return {
            "model": model.id,
            "verdict": verdict,
            "result": result,
            "why": why,
            "phases_done": done,
            "serving": stands,
        }

    def _phase(self, phase: str, model: ModelPlan) -> Outcome | None:
        """One phase of one model, asked for where the plan or the verdict wants it; why it did not happen, or None."""
        known = self._verdict(model) if phase == "subprocess" else None
        overridden = False
        if known is not None and not known.open:
            by_order = model.id in self.orders.override
            if not by_order and known.verdict is not Verdict.INCONCLUSIVE:
                verdict = known.verdict or Verdict.INCONCLUSIVE
                why = f"it stays on {self._stands(model)}: {known.why}"
                return {"verdict": verdict.value, "result": "stays", "why": why}
            overridden = True
            if by_order:
                self._decide(model.id, phase, Answer(True, self.orders.who, self.orders.reason))
        if shut := self._approved(phase, model, known, must_ask=overridden):
            return shut
        return self._carried_out(phase, model, overridden=overridden)

    def _rest(self, phase: str, model: ModelPlan) -> Outcome | None:
        """What is left of a phase that was ended when its model had moved; its own run knows what."""
        run = self._unfinished()
        begun = run is not None and any(
            step.step == phase and step.state != "done" for step in self.records.steps(run.id, model.id)
        )
        return self._carried_out(phase, model, overridden=False) if begun else None

    def _carried_out(self, phase: str, model: ModelPlan, *, overridden: bool) -> Outcome | None:
        """The phase of one model, recorded before and after; why it came to no good end, or None."""
        outcome = self._move(phase, model, overridden=overridden)
        end = next(found for found in outcome["models"] if found["model"] == model.id)
        if end["verdict"] == "PASS":
            return None
        return {"verdict": end["verdict"], "result": f"{phase}: {end['result']}", "why": end["why"]}

    def _move(self, phase: str, model: ModelPlan, *, overridden: bool) -> Outcome:
        who, reason = self._decided_by(self._decision(model.id, phase))
        override = (model.id,) if overridden else ()
        changes = {"models": (model.id,), "override": override, "who": who, "reason": reason}
        orders = self.orders.model_copy(update=changes)
        move = self.phases.subprocess if phase == "subprocess" else self.phases.native
        self._journal()
        self._put(model.id, phase, "intent")
        outcome = move(self.plan, self.path, orders)
        self._put(model.id, phase, "done" if outcome["verdict"] == "PASS" else "failed", run=outcome["run_id"])
        return outcome

    def _decided_by(self, given: Decision | None) -> tuple[str, str]:
        """Who decides in this phase, and why: who approved it; and who left out a canary or a rehearsal, if another."""
        asked = self.orders
        if given is None:
            return asked.who, asked.reason
        if given.who == asked.who or not (asked.without_canary or asked.without_rehearsal):
            return given.who, given.why
        return f"{asked.who}, approved by {given.who}", f"{asked.reason}; {given.why}"

    # --- approvals

    def _approved(self, phase: str, model: ModelPlan, known: PhaseOne | None, *, must_ask: bool) -> Outcome | None:
        """None when the phase may begin; else how it stays. Raises Waits when nobody answered."""
        if self.plan.migrate.approve == "auto" and not must_ask:
            return None
        to = self.candidate if phase == "subprocess" else self.native
        what = f"Move {model.id} from {self._stands(model)} to {to}"
        return self._answered(phase, model.id, what, known)

    def _answered(self, phase: str, model_id: str, what: str, known: PhaseOne | None) -> Outcome | None:
        given = self._decision(model_id, phase)
        if given is None:
            self._journal()
            answer = self.ask(self._question(phase, model_id, what, known))
            if answer is None:
                raise Waits(f"{what}? Nobody was there to answer: {_how_to(phase)}")
            if not answer.go_on:
                if answer.who:
                    self._decide(model_id, f"{phase}, no", answer)
                why = f"{answer.who or 'the person asked'} said no{f': {answer.reason}' if answer.reason else ''}"
                return {"verdict": Verdict.INCONCLUSIVE.value, "result": "stays", "why": why}
            self._decide(model_id, phase, answer)
        return None

    def _question(self, phase: str, model_id: str, what: str, known: PhaseOne | None) -> Question:
        checks = tuple(result for result in (known.checks if known else ()) if result.required)
        shut = reasons(checks)
        return Question(
            phase=phase,
            model=model_id,
            what=what,
            verdict=(known.verdict if known else None) or Verdict.PASS,
            checks=tuple(shut) + tuple(check for check in checks if check not in shut),
            report=self._report(known),
            wait_s=self.plan.migrate.wait_hours * 3600,
        )

    def _report(self, known: PhaseOne | None) -> str | None:
        return self.records.find_run(known.run_id).report_path if known and known.run_id else None

    def _decide(self, model_id: str, phase: str, answer: Answer) -> None:
        self.records.put_decision(self._journal().id, model_id, phase, who=answer.who, why=answer.reason)

    def _decision(self, model_id: str, phase: str) -> Decision | None:
        run = self._unfinished()
        made = self.records.decisions(run.id, model_id) if run else []
        return next((decision for decision in reversed(made) if decision.kind == phase), None)

    # --- 4: deprecate

    def _deprecate(self) -> Outcome | None:
        """The incumbent retired, or who still needs it; None where the plan leaves that out."""
        if "deprecate" not in self.plan.migrate.phases or self.orders.models:
            return None
        if broken := self._broken():
            why = f"not before this is mended: {'; '.join(broken)}"
            return {
                "engine": self.incumbent,
                "result": "not retired",
                "verdict": Verdict.INCONCLUSIVE.value,
                "why": why,
            }
        given = self._decision(NOBODY, "deprecate")
        who, why = (given.who, given.why) if given else ("", "")
        outcome = self.phases.deprecate(self.plan, who, why)
        if outcome["result"] != "waits for approval":
            return outcome
        checks = tuple(CheckResult.model_validate(check) for check in outcome["checks"])
        known = PhaseOne(True, "", None, Verdict.PASS, tuple(c for c in checks if c.verdict is Verdict.PASS))
        try:
            no = self._answered("deprecate", NOBODY, f"Retire {self.incumbent}", known)
        except Waits as waits:
            return {**outcome, "why": str(waits)}
        if no:
            return {**outcome, **no, "result": "not retired"}
        given = self._decision(NOBODY, "deprecate")
        assert given is not None
        return self.phases.deprecate(self.plan, given.who, given.why)

    # --- the journal: opened with the first thing that is done or asked; a finished migration writes nothing

    def _journal(self) -> Run:
        if self._run is None and self._unfinished() is None:
            plan = self.plan.model_dump(mode="json")
            self._run = self.records.start_run(
                KIND, self.plan.name, plan, environment=machine_environment(), flow_run_id=self._flow_run_id
            )
        assert self._run is not None
        return self._run

    def _unfinished(self) -> Run | None:
        """The run to go on with, taken over, where there is one."""
        if self._run is None:
            found = self.records.unfinished(self.plan.model_dump(mode="json"), kind=KIND)
            if found is not None:
                self.say(f"going on with run {found.id}")
                self._run = self.records.resume_run(found.id, flow_run_id=self._flow_run_id)
        return self._run

    def _put(self, model_id: str, step: str, state: Any, **detail: Any) -> None:
        self.records.put_step(self._journal().id, model_id, step, state, detail)

    def _finish(self, status: Any, **how: Any) -> None:
        if self._run is not None:
            self.records.finish_run(self._run.id, status, **how)


def _told(made: Decision) -> dict[str, Any]:
    return {"model": made.model_id, "kind": made.kind, "who": made.who, "why": made.why, "at": made.at.isoformat()}


def _how_to(phase: str) -> str:
    return f"the same command with --yes --who NAME --reason TEXT approves it ({phase})"


def publish(outcome: Outcome) -> None:
    """How far every model came, as a Prefect artifact of the run."""
    from prefect.artifacts import create_table_artifact

    rows = [
        {**{name: model[name] for name in ("model", "result", "serving", "verdict", "why")}}
        for model in outcome["models"]
    ]
    if (retired := outcome["retirement"]) is not None:
        end = {"model": f"({retired['engine']})", "result": retired["result"], "serving": "-"}
        rows.append({**end, "verdict": retired["verdict"], "why": retired["why"]})
    create_table_artifact(
        key="switchyard-migration", table=rows, description=f"Run {outcome['run_id']}: {outcome['verdict']}"
    )


def migrated(plan: Plan, path: Path, orders: Orders) -> Outcome:
    """All four phases of `plan`, which `path` holds, under the records and a Prefect run: the outcome, published."""
    folder = default_home()
    with open_records() as records:
        outcome = Whole(
            plan,
            path,
            folder,
            records,
            orders=orders,
            ask=in_prefect if deployment.id and asks.get() is nobody else asks.get(),
            say=progress.get().say,
            flow_run_id=flow_run.id,
        ).run()
    publish(outcome)
    return outcome
