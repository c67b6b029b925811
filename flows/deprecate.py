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

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from prefect import task
from prefect.cache_policies import NO_CACHE

from engines import install
from engines.errors import BadInput
from engines.home import home
from engines.registry import driver
from engines.yard.client import YardClient
from engines.yard.state import StateFile, YardState
from flows.orchestrator.run import flow_run_id
from flows.progress import progress
from flows.rollout.guide import write_guide
from migrations.plan import Plan
from migrations.plan_file import plan_to_toml
from tasks.evidence.environment import machine_environment
from tasks.records.store import Records, open_records
from tasks.records.tables import Run
from tasks.verdicts.retirement import DAY_S, Standing, judge_retirement, write_archive
from tasks.verdicts.verdict import CheckResult, Verdict, gate, not_measured, reasons

NOBODY = "-"  # of steps that concern no single model
Say = Callable[[str], None]
Do = Callable[[str, Callable[[], None]], None]


class Deprecation:
    """Phase 4 of one plan. `who` and `reason` approve it; `at_once` waives the rollback window."""

    kind: ClassVar[str] = "deprecate"

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        records: Records,
        *,
        who: str = "",
        reason: str = "",
        at_once: bool = False,
        uninstall: bool = False,
        say: Say = lambda _: None,
        do: Do = lambda _, work: work(),
    ) -> None:
        if at_once and not (who.strip() and reason.strip()):
            raise BadInput("not to wait is a decision: add --who and --reason")
        self.plan, self.home, self.records = plan, folder, records
        self.engine = plan.incumbent.engine
        self.who, self.reason, self.at_once, self.uninstall = who.strip(), reason.strip(), at_once, uninstall
        self.say, self.do = say, do
        self.client = YardClient(folder)
        self._file = StateFile(folder / "yard")
        self._results: list[CheckResult] = []
        self._run_id: str | None = None

    def run(self) -> dict[str, Any]:
        """What it came to, as plain JSON. Raises SwitchyardError; the engine is retired whole or not at all."""
        state = self._file.read()
        plan = self.plan.model_dump(mode="json")
        unfinished = self.records.unfinished(plan, kind=self.kind)
        gone = state.retired.get(self.engine)
        if gone is not None and not (unfinished and self._has_retired(unfinished)):
            return self._outcome("already retired", Verdict.PASS, gone.line(self.engine), gone.archive)
        found = (
            self.records.resume_run(unfinished.id, flow_run_id=flow_run_id())
            if unfinished
            else self.records.start_run(
                self.kind, self.plan.name, plan, environment=machine_environment(), flow_run_id=flow_run_id()
            )
        )
        self._run_id = found.id
        try:
            outcome = self._steps(state)
        except BaseException as error:
            self.records.finish_run(found.id, "interrupted", error=str(error) or type(error).__name__)
            raise
        self.records.finish_run(found.id, "done", verdict=Verdict(outcome["verdict"]))
        return outcome

    def _has_retired(self, run: Run) -> bool:
        """Whether this run, which did not get done, came as far as to retire the engine."""
        return any(step.step == "retire" for step in self.records.steps(run.id))

    def _steps(self, state: YardState) -> dict[str, Any]:
        if self.engine in state.retired:  # by an earlier start of this run
            self._results = self.records.checks(self.run_id).get(NOBODY, [])
            self._put("retire", "done")
        elif shut := self._shut(state):
            return shut
        else:
            archive = self.home / "archive" / f"{self.engine}-{self._run_id}"
            self.do("archive", lambda: self._archive(archive, state))
            self.do("retire", lambda: self._retire(archive))
        if self.uninstall:
            self.do("uninstall", self._uninstall)
        self.do("guide", self._guide)
        gone = self._file.read().retired[self.engine]
        return self._outcome("retired", Verdict.PASS, gone.line(self.engine), gone.archive)

    def _shut(self, state: YardState) -> dict[str, Any] | None:
        """Why it stays; None when nothing needs it and a person, or the plan, approves."""
        self._results = self._judged(state)
        self._put("precondition", "done" if gate(self._results) is Verdict.PASS else "failed")
        shut, outcome = reasons(self._results), None
        if shut:
            outcome = self._outcome("not retired", gate(self._results), "; ".join(result.why for result in shut))
        elif not self._approved():
            why = f"{self.engine} can go; say so with --who NAME --reason TEXT"
            self._results.append(not_measured("retire.approval", why))
            outcome = self._outcome("waits for approval", Verdict.INCONCLUSIVE, why)
        self.records.put_checks(self.run_id, NOBODY, self._results)
        return outcome

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

    def _approved(self) -> bool:
        """True when a person said so, now or to an earlier start of this run, or the plan does not ask."""
        if self.who and self.reason:
            self.records.put_decision(self.run_id, NOBODY, "retire", who=self.who, why=self.reason)
        decided = any(made.kind == "retire" for made in self.records.decisions(self.run_id))
        return decided or self.plan.retire.approve == "auto"

    def _archive(self, folder: Path, state: YardState) -> None:
        self._put("archive", "intent", folder=str(folder))
        write_archive(folder, self.engine, state, plan_to_toml(self.plan))
        self._put("archive", "done", folder=str(folder))

    def _retire(self, archive: Path) -> None:
        self._put("retire", "intent")
        made = [decision for decision in self.records.decisions(self.run_id) if decision.kind == "retire"]
        who, why = (made[-1].who, made[-1].why) if made else ("the plan", 'approve = "auto"')
        if self.client.runs():
            self.say(self.client.order("retire", self.say, engine=self.engine, who=who, why=why, archive=str(archive)))
        else:
            state = self._file.read().retire(self.engine, at=time.time(), who=who, why=why, archive=str(archive))
            self._file.save(state)
        self._put("retire", "done")

    def _guide(self) -> None:
        self._put("guide", "intent")
        written = write_guide(self.records, self.plan, self.home)
        self.say(f"migration guide: {written[0]}")
        self._put("guide", "done", files=[str(path) for path in written])

    def _uninstall(self) -> None:
        self._put("uninstall", "intent")
        removed = install.uninstall_ours(driver(self.engine), self.home)
        self.say(f"uninstalled: {', '.join(removed)}" if removed else f"nothing of {self.engine} was installed by us")
        self._put("uninstall", "done", removed=removed)

    @property
    def run_id(self) -> str:
        """The id of the run that records this."""
        assert self._run_id is not None
        return self._run_id

    def _put(self, step: str, state: Any, **detail: Any) -> None:
        self.records.put_step(self.run_id, NOBODY, step, state, detail)

    def _outcome(self, result: str, verdict: Verdict, why: str, archive: str = "") -> dict[str, Any]:
        return {
            "run_id": self._run_id,
            "plan": self.plan.name,
            "phase": "deprecate",
            "engine": self.engine,
            "result": result,
            "verdict": verdict.value,
            "why": why,
            "archive": archive or None,
            "checks": [check.model_dump(mode="json") for check in self._results],
        }


def restore(engine: str, folder: Path, say: Say) -> str:
    """A retired engine back, with what was uninstalled of it. Raises BadInput when it is not retired."""
    client, file = YardClient(folder), StateFile(folder / "yard")
    restored = file.read().restore(engine)  # refused before anything is installed
    for package in install.reinstall_ours(driver(engine), folder):
        say(f"installed again: {package}")
    if client.runs():
        return client.order("restore", say, engine=engine)
    file.save(restored)
    return f"{engine} is back; `switchyard serve`, then `switchyard promote MODEL --to {engine}` makes it serve"


@task(task_run_name="{step}", cache_policy=NO_CACHE, persist_result=False)
def take(step: str, work: Callable[[], None]) -> None:
    """One step; `work` records it."""
    with progress.get().step(step):
        work()


def deprecate(
    plan: Plan, who: str = "", reason: str = "", at_once: bool = False, uninstall: bool = False
) -> dict[str, Any]:
    """Retire the plan's incumbent, or say who still needs it."""
    with open_records() as records:
        return Deprecation(
            plan,
            home(),
            records,
            who=who,
            reason=reason,
            at_once=at_once,
            uninstall=uninstall,
            say=progress.get().say,
            do=take,
        ).run()
