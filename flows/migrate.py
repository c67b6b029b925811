"""The whole migration as a table of contents: four phases, a gate and an approval between each, model by model.

    evaluate     every model of the plan, where no verdict on just this is on record
    subprocess   a model whose gate is open, or overridden by name and with a reason
    native       a model that the candidate serves
    deprecate    the incumbent, once nothing needs it

One model may be native while another stays where it is. Nothing that matters is held here: killed, suspended for an
answer or restarted, it reads from the records what was measured and decided, from the yard who serves, and resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect.exceptions import Pause
from prefect.runtime import deployment

from engines.driver import Installation, native_of
from engines.errors import SwitchyardError
from engines.home import home as default_home
from engines.notify import notify
from engines.registry import native_driver
from engines.yard.client import YardClient
from engines.yard.state import StateFile
from flows.deprecate import deprecate
from flows.evaluate import evaluate
from flows.evaluation.estimate import migration_estimate
from flows.experiment_lock import alone
from flows.native_phase import to_native
from flows.orchestrator.artifacts import put_table, worst_first
from flows.orchestrator.run import run_journal
from flows.progress import progress
from flows.reconcile import reconcile
from flows.rollout.approval import Asks, Question, asks, in_prefect, nobody
from flows.rollout.orders import Orders
from flows.rollout.phase_one import PhaseOne, engines_here, phase_one
from flows.subprocess_phase import next_turn, to_subprocess
from migrations.plan import ModelPlan, Plan
from tasks.evidence.next_turn import judge_next_turn
from tasks.evidence.rehearsal import route_of
from tasks.evidence.unmeasured import models_to_retry
from tasks.records.journal import RunJournal
from tasks.records.payload import plan_hash
from tasks.records.store import Records, open_records
from tasks.records.tables import Decision
from tasks.verdicts.verdict import CheckResult, Verdict, reasons, worst

KIND = "whole"
NOBODY = "-"  # of what concerns no single model
WAITS = "waits for approval"
Say = Callable[[str], None]
Json = dict[str, Any]


@dataclass(frozen=True)
class Phases:
    """What carries out each phase: all but retirement take the plan's path, retirement who approves it and why."""

    evaluate: Callable[[Plan, str | None, Path], Json]
    subprocess: Callable[[Plan, Path, Orders, Mapping[str, Json]], Json]
    native: Callable[[Plan, Path, Orders], Json]
    deprecate: Callable[[Plan, str, str], Json]
    found: Callable[[Plan], Sequence[Installation]]  # as `engines_here`: verdicts on other engines do not count
    next_turn: Callable[[Plan, Path, str], Json] = lambda *_: {}  # what a model's move costs its conversations


REAL = Phases(  # as plain functions of the one flow: a subflow cannot be suspended for an answer
    evaluate=lambda plan, resume, path: evaluate.fn(plan, resume, command=("switchyard", "evaluate", str(path))),
    subprocess=to_subprocess,
    native=to_native,
    deprecate=deprecate,
    found=engines_here,
    next_turn=next_turn,
)


class Waits(Exception):
    """Nobody answered a question; its text names it, and how to answer."""


def migrated(plan: Plan, path: Path, orders: Orders) -> Json:
    """All four phases of `plan`, which `path` holds, under the records and a Prefect run: the outcome, published."""
    with open_records() as records:
        outcome = migrate_all(
            plan,
            path,
            default_home(),
            records,
            orders=orders,
            ask=in_prefect if deployment.id and asks.get() is nobody else asks.get(),
            say=progress.get().say,
        )
    publish(outcome)
    return outcome


def migrate_all(
    plan: Plan,
    path: Path,
    home: Path,
    records: Records,
    *,
    orders: Orders,
    ask: Asks = nobody,
    phases: Phases = REAL,
    say: Say = lambda _: None,
) -> Json:
    """All four phases: the result as plain JSON. Whatever is raised, the yard keeps serving.

    The run begins with the first thing that is done or asked: a migration that is finished writes nothing.
    """
    orders.checked(plan)

    def interrupted_by(error: BaseException) -> str:  # Prefect suspends the run for an answer by an exception
        return "waits for an answer" if isinstance(error, Pause) else type(error).__name__

    with alone(home, "a migration"):
        reconcile(home, records, say)
        asked = plan.model_dump(mode="json")
        with run_journal(records, KIND, asked, say=say, interrupted_by=interrupted_by) as run:
            whole = WholeMigration(plan, path, home, run, orders, ask, phases)
            whole.evaluate()
            ends = [whole.move(model) for model in whole.models]
            return whole.conclude(ends, whole.deprecate(ends))


class WholeMigration:
    """All four phases of one plan, with what was decided on the way."""

    def __init__(
        self, plan: Plan, path: Path, home: Path, run: RunJournal, orders: Orders, ask: Asks, phases: Phases
    ) -> None:
        self.plan, self.path, self.home, self.run = plan, path, home, run
        self.orders, self.ask, self.phases = orders, ask, phases
        self.models = orders.chosen(plan)
        self.incumbent, self.candidate = plan.incumbent.name, plan.candidate.name
        native = native_driver(plan.candidate.engine)
        self.native = native_of(self.candidate) if native and "native" in plan.migrate.phases else None

    # --- 1: evaluate

    def evaluate(self) -> None:
        """Nothing where every model has a verdict on just this plan, file and engine; else what is missing of it."""
        waiting = [(self._verdict(model), model) for model in self.models if self._serving(model) == self.incumbent]
        again = next((found.run_id for found, model in waiting if self._is_incomplete(found, model)), None)
        measures = again is not None or not all(found.verdict for found, _ in waiting)
        stays = {model.id for found, model in waiting if not measures and self._stays(found, model)}
        self._say_how_long([model for model in self.models if model.id not in stays], measures)
        if measures:
            self.run.begin()
            unfinished = self.run.records.unfinished(self.plan.model_dump(mode="json"))
            self.phases.evaluate(self.plan, unfinished.id if unfinished else again, self.path)

    def _say_how_long(self, models: Sequence[ModelPlan], measures: bool) -> None:
        """What is left for the models that may move, on one line; none where nothing is left."""
        phases: dict[str, list[ModelPlan]] = {"evaluate": list(self.plan.models) if measures else []}
        for phase, target in (("subprocess", self.candidate), ("native", self.native)):
            ends = {target, self.native}
            waits = [model for model in models if self._serving(model) not in ends]
            phases[phase] = waits if target and phase in self.plan.migrate.phases else []
        if any(phases.values()):
            asked = {"rehearsal": not self.orders.without_rehearsal, "canary": not self.orders.without_canary}
            progress.get().note(f"{self.plan.name}: {migration_estimate(self.plan, phases, **asked)}")

    def _is_incomplete(self, found: PhaseOne, model: ModelPlan) -> bool:
        """Whether the evaluation behind a verdict lacks a check of this model that a resumed run would carry out."""
        open_ended = found.verdict in (Verdict.ERROR, Verdict.INCONCLUSIVE)
        if found.run_id is None or not open_ended or model.id in self.orders.override:
            return False
        run = self.run.records.find_run(found.run_id)
        same = run.plan_hash == plan_hash(self.plan.model_dump(mode="json"))  # another plan is not resumed
        return same and model.id in models_to_retry(self.run.records, run.id)

    def _stays(self, found: PhaseOne, model: ModelPlan) -> bool:
        """Whether a verdict keeps the model on the incumbent: a person may approve one that is INCONCLUSIVE."""
        return not found.open and found.verdict is not Verdict.INCONCLUSIVE and model.id not in self.orders.override

    def _verdict(self, model: ModelPlan) -> PhaseOne:
        found = self.phases.found(self.plan)
        builds = {one.engine: one.build for one in found}
        return phase_one(self.run.records, self.plan, model, found[0].version, builds)

    def _serving(self, model: ModelPlan) -> str:
        """The engine to which the model is committed: by the yard, else by what the yard wrote down."""
        try:
            return str(route_of(YardClient(self.home), model.id)["committed"])
        except SwitchyardError:
            stored = StateFile(self.home / "yard").read().models.get(model.id)
            return stored.serving if stored else self.incumbent

    # --- 2 and 3: the moves of one model

    def move(self, model: ModelPlan) -> Json:
        """How far the model came, and why no further."""
        done, end = ["evaluate"], None
        for phase, target in (("subprocess", self.candidate), ("native", self.native)):
            if target is None or phase not in self.plan.migrate.phases:
                continue
            try:
                if self._serving(model) not in (target, self.native):
                    end = self._phase(phase, target, model)
                # a phase that was ended when its model had moved: its own run knows what is left of it
                elif (step := self.run.step(model.id, phase)) and step.state != "done":
                    end = self._carried_out(phase, model, overridden=False)
            except Waits as waits:
                end = {"verdict": Verdict.INCONCLUSIVE.value, "result": WAITS, "why": str(waits)}
            if end is not None:
                break
            done.append(phase)
        serving = self._serving(model)
        end = end or {"verdict": Verdict.PASS.value, "result": "migrated", "why": f"{serving} serves {model.id}"}
        return {"model": model.id, **end, "phases_done": done, "serving": serving}

    def _phase(self, phase: str, target: str, model: ModelPlan) -> Json | None:
        """One phase of one model, asked for where the plan or the verdict wants it; why it did not happen, or None."""
        known = self._verdict(model) if phase == "subprocess" else None
        overridden = known is not None and not known.open
        if known is not None and overridden:
            if self._stays(known, model):
                verdict = known.verdict or Verdict.INCONCLUSIVE
                why = f"it stays on {self._serving(model)}: {known.why}"
                return {"verdict": verdict.value, "result": "stays", "why": why}
            if model.id in self.orders.override:
                self.run.put_decision(model.id, phase, who=self.orders.who, why=self.orders.reason)
        if overridden or self.plan.migrate.approve == "ask":
            what = f"Move {model.id} from {self._serving(model)} to {target}"
            if refused := self._refused(phase, model.id, what, known):
                return refused
        return self._carried_out(phase, model, overridden=overridden)

    def _carried_out(self, phase: str, model: ModelPlan, *, overridden: bool) -> Json | None:
        """The phase of one model, recorded before and after; why it did not pass, or None."""
        asked, given = self.orders, self._decision(model.id, phase)
        who, reason = asked.who, asked.reason
        if given and (given.who == who or not (asked.without_canary or asked.without_rehearsal)):
            who, reason = given.who, given.why
        elif given:  # another one left out a canary or a rehearsal
            who, reason = f"{who}, approved by {given.who}", f"{reason}; {given.why}"
        override = (model.id,) if overridden else ()
        changes = {"models": (model.id,), "override": override, "who": who, "reason": reason}
        orders = asked.model_copy(update=changes)
        self.run.put_step(model.id, phase, "intent")
        if phase == "subprocess":
            outcome = self.phases.subprocess(self.plan, self.path, orders, self._next_turns(model.id))
        else:
            outcome = self.phases.native(self.plan, self.path, orders)
        passed = outcome["verdict"] == "PASS"
        self.run.put_step(model.id, phase, "done" if passed else "failed", run=outcome["run_id"])
        end = next(found for found in outcome["models"] if found["model"] == model.id)
        if end["verdict"] == "PASS":
            return None
        return {"verdict": end["verdict"], "result": f"{phase}: {end['result']}", "why": end["why"]}

    # --- approvals

    def _refused(self, phase: str, model_id: str, what: str, known: PhaseOne | None) -> Json | None:
        """None when a person approves the phase, now or before; else why it stays. Raises Waits without an answer."""
        if self._decision(model_id, phase) is not None:
            return None
        self._tell(phase, model_id, what)
        answer = self.ask(self._question(phase, model_id, what, known))
        if answer is None:
            how = f"the same command with --yes --who NAME --reason TEXT approves it ({phase})"
            raise Waits(f"{what}? Nobody was there to answer: {how}")
        if answer.approved or answer.who:
            kind = phase if answer.approved else f"{phase}, no"
            self.run.put_decision(model_id, kind, who=answer.who, why=answer.reason)
        if answer.approved:
            return None
        why = f"{answer.who or 'the person asked'} said no{f': {answer.reason}' if answer.reason else ''}"
        return {"verdict": Verdict.INCONCLUSIVE.value, "result": "stays", "why": why}

    def _tell(self, phase: str, model_id: str, what: str) -> None:
        """Notify people of a question that waits in Prefect, once: the run begins anew when it is answered."""
        asked = f"{phase}, asked"
        if self.ask is in_prefect and self.plan.notify.is_used and self.run.step(model_id, asked) is None:
            notify(self.plan.notify, "approval waiting", model_id, f"{what}? The form is in Prefect's UI")
            self.run.put_step(model_id, asked, "done")

    def _question(self, phase: str, model_id: str, what: str, known: PhaseOne | None) -> Question:
        checks = tuple(result for result in (known.checks if known else ()) if result.required)
        shut = reasons(checks)
        return Question(
            phase=phase,
            model=model_id,
            what=what,
            verdict=(known.verdict if known else None) or Verdict.PASS,
            checks=tuple(shut) + tuple(check for check in checks if check not in shut),
            report=self.run.records.find_run(known.run_id).report_path if known and known.run_id else None,
            wait_s=self.plan.migrate.wait_hours * 3600,
            costs=lambda: self._costs(phase, model_id),
        )

    def _costs(self, phase: str, model_id: str) -> list[str]:
        """What the move costs the next turn of a conversation, measured once a run beside what serves."""
        if phase != "subprocess":
            return []
        step = self.run.step(model_id, "next turn")
        seen = step.detail if step else self.phases.next_turn(self.plan, self.path, model_id)
        if step is None:
            self.run.put_step(model_id, "next turn", "done", **seen)
        return [judge_next_turn(seen).why] if seen else []

    def _next_turns(self, model_id: str) -> dict[str, Json]:
        """What was measured for the question, where it could be: it is not measured twice."""
        step = self.run.step(model_id, "next turn")
        return {} if step is None or "failed" in step.detail else {model_id: step.detail}

    def _decision(self, model_id: str, phase: str) -> Decision | None:
        made = reversed(self.run.decisions(model_id))
        return next((decision for decision in made if decision.kind == phase), None)

    # --- 4: deprecate

    def deprecate(self, ends: Sequence[Json]) -> Json | None:
        """The incumbent retired, or who still needs it; None where the plan leaves that out."""
        if "deprecate" not in self.plan.migrate.phases or self.orders.models:
            return None
        if broken := _broken(ends):
            why = f"not before this is fixed: {'; '.join(broken)}"
            verdict = Verdict.INCONCLUSIVE.value
            return {"engine": self.incumbent, "result": "not retired", "verdict": verdict, "why": why}
        given = self._decision(NOBODY, "deprecate")
        outcome = self.phases.deprecate(self.plan, given.who if given else "", given.why if given else "")
        if outcome["result"] != WAITS:
            return outcome
        checks = tuple(CheckResult.model_validate(check) for check in outcome["checks"])
        known = PhaseOne("", None, Verdict.PASS, tuple(c for c in checks if c.verdict is Verdict.PASS))
        try:
            refused = self._refused("deprecate", NOBODY, f"Retire {self.incumbent}", known)
        except Waits as waits:
            return {**outcome, "why": str(waits)}
        if refused:
            return {**outcome, **refused, "result": "not retired"}
        given = self._decision(NOBODY, "deprecate")
        assert given is not None
        return self.phases.deprecate(self.plan, given.who, given.why)

    def conclude(self, ends: Sequence[Json], retired: Json | None) -> Json:
        """The result of all models, recorded; what broke off or waits for an answer is resumed by the next start."""
        verdict = worst(Verdict(end["verdict"]) for end in (*ends, retired) if end)
        waits = next((end["why"] for end in (*ends, retired) if end and end["result"] == WAITS), None)
        if self.run.has_begun:
            self.run.finish("interrupted" if waits or _broken(ends) else "done", verdict=verdict, error=waits)
        return {
            "run_id": self.run.known_id,
            "plan": self.plan.name,
            "phase": "all",
            "verdict": verdict.value,
            "models": list(ends),
            "retirement": retired,
            "decisions": [
                {"model": made.model_id, "kind": made.kind, "who": made.who, "why": made.why, "at": made.at.isoformat()}
                for made in self.run.decisions()
            ],
        }


def _broken(ends: Sequence[Json]) -> list[str]:
    """Models of which a phase broke off, with the reason: the next start resumes them, and does not ask again."""
    return [f"{end['model']}: {end['why']}" for end in ends if end["verdict"] == Verdict.ERROR]


def publish(outcome: Json) -> None:
    """How far every model came, as a Prefect artifact of the run."""
    columns = ("verdict", "model", "result", "serving", "why")
    rows = [{name: model[name] for name in columns} for model in outcome["models"]]
    if (retired := outcome["retirement"]) is not None:
        end = {"model": f"({retired['engine']})", "result": retired["result"], "serving": "-"}
        rows.append({**end, "verdict": retired["verdict"], "why": retired["why"]})
    put_table("switchyard-migration", worst_first(rows), outcome)
