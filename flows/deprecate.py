"""Phase 4 as a table of contents: the incumbent retired, or the list of who still needs it.

    precondition    no route, no fallback in force uses it; each model's rollback window is over
    approval        a person, by name and with a reason, where the plan says `approve = "ask"`
    archive         all it takes to have it back
    retire          from here on nothing starts it; `switchyard restore` undoes that
    guide           what changed, for those who use the port
    uninstall       only what Switchyard installed, and only when asked to

The yard's own state decides, and works without the database; every step is a row, and done once.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines import install
from engines.errors import BadInput
from engines.home import home
from engines.registry import driver
from engines.yard.client import YardClient
from engines.yard.engine.slot_store import SlotStore
from engines.yard.state import StateFile, YardState
from flows.orchestrator.run import run_journal
from flows.orchestrator.step import take
from flows.progress import progress
from flows.rollout.guide import write_guide
from migrations.plan import Plan
from migrations.plan_file import plan_to_toml
from tasks.records.journal import RunJournal
from tasks.records.store import Records, open_records
from tasks.records.tables import Decision
from tasks.verdicts.retirement import DAY_S, Standing, judge_retirement, write_archive
from tasks.verdicts.verdict import CheckResult, Verdict, gate, not_measured, reasons

KIND = "deprecate"
NOBODY = "-"  # of steps that concern no single model
Say = Callable[[str], None]
Do = Callable[[str, Callable[[], None]], None]


@dataclass
class Deprecation:
    """Phase 4 of one plan. `who` and `reason` approve it; `at_once` waives the rollback window."""

    plan: Plan
    home: Path
    records: Records
    who: str = ""
    reason: str = ""
    at_once: bool = False
    uninstall: bool = False
    say: Say = lambda _: None
    do: Do = lambda _, work: work()

    def __post_init__(self) -> None:
        self.who, self.reason = self.who.strip(), self.reason.strip()
        if self.at_once and not (self.who and self.reason):
            raise BadInput("not to wait is a decision: add --who and --reason")
        self.engine = self.plan.incumbent.name
        self.client, self._file = YardClient(self.home), StateFile(self.home / "yard")
        self._results: list[CheckResult] = []

    def run(self) -> dict[str, Any]:
        """The result as plain JSON. Raises SwitchyardError; the engine is retired whole or not at all."""
        state, asked = self._file.read(), self.plan.model_dump(mode="json")
        unfinished = self.records.unfinished(asked, kind=KIND)
        gone = state.retired.get(self.engine)
        has_retired = unfinished and any(step.step == "retire" for step in self.records.steps(unfinished.id))
        if gone is not None and not has_retired:
            return self._outcome(None, "already retired", Verdict.PASS, gone.line(self.engine), gone.archive)
        closing: dict[str, Any] = {
            "on_error": "interrupted",
            "interrupted_by": lambda error: str(error) or type(error).__name__,
        }
        with run_journal(self.records, KIND, asked, unfinished=unfinished, **closing) as run:
            outcome = self._steps(run, state)
            if run.has_begun:  # a refusal, or the question who approves it, is no run
                run.finish("done", verdict=Verdict(outcome["verdict"]))
        return outcome

    def _steps(self, run: RunJournal, state: YardState) -> dict[str, Any]:
        if self.engine in state.retired:  # by an earlier start of this run
            self._results = run.checks(NOBODY)
            run.put_step(NOBODY, "retire", "done")
        elif shut := self._shut(run, state):
            return shut
        else:
            archive = self.home / "archive" / f"{self.engine}-{run.id}"
            toml = plan_to_toml(self.plan)
            self._step(run, "archive", lambda: write_archive(archive, self.engine, state, toml), folder=str(archive))
            self._step(run, "retire", lambda: self._retire(run, str(archive)))
        if self.uninstall:
            self._step(run, "uninstall", self._uninstall)
        self._step(run, "guide", self._guide)
        gone = self._file.read().retired[self.engine]
        return self._outcome(run.id, "retired", Verdict.PASS, gone.line(self.engine), gone.archive)

    def _step(self, run: RunJournal, name: str, work: Callable[[], Any], **detail: Any) -> None:
        """A step, recorded before and after; what `work` returns as a dict is recorded with it."""

        def recorded() -> None:
            run.put_step(NOBODY, name, "intent", **detail)
            found = work()
            run.put_step(NOBODY, name, "done", **detail, **(found if isinstance(found, dict) else {}))

        self.do(name, recorded)

    def _shut(self, run: RunJournal, state: YardState) -> dict[str, Any] | None:
        """Why it stays; None when nothing needs it and a person, or the plan, approves."""
        self._results = self._judged(state)
        if shut := reasons(self._results):
            why = "; ".join(result.why for result in shut)
            return self._outcome(run.known_id, "not retired", gate(self._results), why)
        decides = bool(self.who and self.reason)
        if not (decides or _approvals(run) or self.plan.retire.approve == "auto"):
            why = f"{self.engine} can go; approve it with --who NAME --reason TEXT"
            self._results.append(not_measured("retire.approval", why))
            return self._outcome(run.known_id, "waits for approval", Verdict.INCONCLUSIVE, why)
        run.put_step(NOBODY, "precondition", "done")
        if decides:
            run.put_decision(NOBODY, "retire", who=self.who, why=self.reason)
        run.put_checks(NOBODY, self._results)
        return None

    def _judged(self, state: YardState) -> list[CheckResult]:
        routes: dict[str, Any] = {}
        if self.client.runs():
            routes = {route["id"]: route for route in self.client.status()["models"]}
        models = [
            Standing(model.id, state.models.get(model.id), routes.get(model.id, {}).get("fallback"))
            for model in self.plan.models
        ]
        waived = f"{self.who}: {self.reason}" if self.at_once else None
        window_s = self.plan.retire.rollback_window_days * DAY_S
        return judge_retirement(self.engine, models, window_s=window_s, now=time.time(), waived=waived)

    def _retire(self, run: RunJournal, archive: str) -> None:
        made = _approvals(run)
        who, why = (made[-1].who, made[-1].why) if made else ("the plan", 'approve = "auto"')
        if self.client.runs():
            self.say(self.client.order("retire", self.say, engine=self.engine, who=who, why=why, archive=archive))
        else:
            self._file.save(self._file.read().retire(self.engine, at=time.time(), who=who, why=why, archive=archive))
            SlotStore(self.home / "yard" / "slots", lambda: self.plan.yard.prompt_cache_mib).drop(engines={self.engine})

    def _guide(self) -> dict[str, Any]:
        written = write_guide(self.records, self.plan, self.home)
        self.say(f"migration guide: {written[0]}")
        return {"files": [str(path) for path in written]}

    def _uninstall(self) -> dict[str, Any]:
        kind = self.plan.incumbent.engine
        shared = kind == self.plan.candidate.engine  # what serves now may be of the same package
        removed = [] if shared else install.uninstall_ours(driver(kind), self.home)
        self.say(f"uninstalled: {', '.join(removed)}" if removed else f"nothing of {self.engine} was installed by us")
        return {"removed": removed}

    def _outcome(
        self, run_id: str | None, result: str, verdict: Verdict, why: str, archive: str = ""
    ) -> dict[str, Any]:
        return {
            "run_id": run_id,
            "plan": self.plan.name,
            "phase": "deprecate",
            "engine": self.engine,
            "result": result,
            "verdict": verdict.value,
            "why": why,
            "archive": archive or None,
            "checks": [check.model_dump(mode="json") for check in self._results],
        }


def _approvals(run: RunJournal) -> list[Decision]:
    return [decision for decision in run.decisions() if decision.kind == "retire"]


def restore(engine: str, folder: Path, say: Say) -> str:
    """A retired engine back, with what was uninstalled of it. Raises BadInput when it is not retired."""
    client, file = YardClient(folder), StateFile(folder / "yard")
    restored = file.read().restore(engine)  # refused before anything is installed
    kinds = {spec.kind for spec in file.read().retired[engine].specs.values()}
    for package in (package for kind in kinds for package in install.reinstall_ours(driver(kind), folder)):
        say(f"installed again: {package}")
    if client.runs():
        return client.order("restore", say, engine=engine)
    file.save(restored)
    return f"{engine} is back; `switchyard serve`, then `switchyard promote MODEL --to {engine}` makes it serve"


def deprecate(
    plan: Plan, who: str = "", reason: str = "", at_once: bool = False, uninstall: bool = False
) -> dict[str, Any]:
    """Retire the plan's incumbent, or report who still needs it."""
    how: dict[str, Any] = {"who": who, "reason": reason, "at_once": at_once, "uninstall": uninstall}
    do = functools.partial(take, plan.incumbent.name)
    with open_records() as records:
        return Deprecation(plan, home(), records, **how, say=progress.get().say, do=do).run()
