"""The journal of one run: opened with the first thing that is recorded, and closed however the run ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from engines.errors import SwitchyardError
from tasks.records.store import Records
from tasks.records.tables import Decision, Run, Status, Step, StepState
from tasks.verdicts.verdict import CheckResult, Verdict

Say = Callable[[str], None]


@contextlib.contextmanager
def journal(
    records: Records,
    kind: str,
    plan: Mapping[str, Any],
    *,
    name: str | None = None,
    unfinished: Run | None = None,
    environment: Callable[[], Any] = dict,
    flow_run_id: str | None = None,
    say: Say = lambda _: None,
    on_error: Status = "failed",
    interrupted_by: Callable[[BaseException], str] = lambda error: type(error).__name__,
) -> Iterator[RunJournal]:
    """The journal of a run of `plan` (its JSON form), which an exception closes and then leaves as it is.

    A run that ends in a SwitchyardError is stored as `on_error` with its text; Ctrl-C, a cancellation and any other
    exception as "interrupted", in the words of `interrupted_by`. A run that ends otherwise calls `finish`: where it
    did not, it is stored as "done". Nothing is stored of a run that recorded nothing.

        with journal(records, "migrate", plan.model_dump(mode="json"), unfinished=..., environment=...) as run:
            run.put_step("tiny", "promote", "intent")
            run.finish("done", verdict=Verdict.PASS)

    `unfinished` is the earlier run to resume (`records.unfinished(plan, kind=kind)`, say), `name` defaults to the
    plan's, and `environment` is called where a new run starts.
    """
    run = RunJournal(
        records,
        unfinished,
        lambda: records.start_run(kind, name or plan["name"], plan, environment=environment(), flow_run_id=flow_run_id),
        flow_run_id,
        say,
    )
    try:
        yield run
    except SwitchyardError as error:
        run.close(on_error, error=str(error))
        raise
    except BaseException as error:  # Ctrl-C and Prefect's cancellation are no Exceptions
        run.close("interrupted", error=interrupted_by(error))
        raise
    if not run.is_finished:
        run.close("done")


class RunJournal:
    """What one run records. Its first write resumes the unfinished run, or starts a new one; reading writes nothing."""

    def __init__(
        self, records: Records, unfinished: Run | None, start: Callable[[], Run], flow_run_id: str | None, say: Say
    ) -> None:
        self.records = records
        self.is_finished = False
        self._unfinished, self._start, self._flow_run_id, self._say = unfinished, start, flow_run_id, say
        self._run: Run | None = None

    @property
    def run(self) -> Run:
        """The run's row, which is written on first use."""
        if self._run is None and self._unfinished is not None:
            self._say(f"resuming run {self._unfinished.id}")
            self._run = self.records.resume_run(self._unfinished.id, flow_run_id=self._flow_run_id)
        elif self._run is None:
            self._run = self._start()
        return self._run

    @property
    def id(self) -> str:
        """The run's id; its row is written on first use."""
        return self.run.id

    def begin(self) -> None:
        """Put the run on record now, whether anything is recorded of it or not."""
        _ = self.run

    @property
    def has_begun(self) -> bool:
        """Whether this start of it has recorded anything."""
        return self._run is not None

    @property
    def known_id(self) -> str | None:
        """The id of the run that is open or would be resumed; None where nothing is recorded yet."""
        known = self._run or self._unfinished
        return known.id if known else None

    def steps(self, model_id: str | None = None) -> list[Step]:
        """The steps so far, those of an unfinished run included, in the order in which they began."""
        return self.records.steps(self.known_id, model_id) if self.known_id else []

    def step(self, model_id: str, name: str) -> Step | None:
        """Where one step of a model (or host) stands; None before it began."""
        return next((step for step in self.steps(model_id) if step.step == name), None)

    def put_step(self, model_id: str, name: str, state: StepState, **detail: Any) -> None:
        """Store where a step stands; it is on the disk when this returns."""
        self.records.put_step(self.id, model_id, name, state, detail)

    def checks(self, model_id: str) -> list[CheckResult]:
        """The results of a model so far."""
        return self.records.checks(self.known_id).get(model_id, []) if self.known_id else []

    def put_checks(self, model_id: str, results: Iterable[CheckResult]) -> None:
        """Store each result, in place of one of the same name."""
        self.records.put_checks(self.id, model_id, results)

    def decisions(self, model_id: str | None = None) -> list[Decision]:
        """What was decided so far, oldest first."""
        return self.records.decisions(self.known_id, model_id) if self.known_id else []

    def put_decision(self, model_id: str, kind: str, *, who: str, why: str) -> Decision:
        """Record who decided what, and why."""
        return self.records.put_decision(self.id, model_id, kind, who=who, why=why)

    def finish(self, status: Status = "done", *, verdict: Verdict | None = None, error: str | None = None) -> None:
        """Store how the run ended; a run that is not "done" is resumed by the next one of the same plan."""
        self.records.finish_run(self.id, status, verdict=verdict, error=error)
        self.is_finished = True

    def refused(self) -> None:
        """Forget a run that was refused before it did anything; an older one, and what was done, stay."""
        if self._run is not None and self._unfinished is None and self.records.drop_empty_run(self._run.id):
            self._run = None

    def close(self, status: Status, *, error: str | None = None) -> None:
        """Store how the run ended where it recorded anything."""
        if self._run is not None:
            self.finish(status, error=error)
