"""What is recorded: runs in the past and at this moment, and verdicts made again from stored evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil

from engines.deadline import Background
from engines.errors import BadInput, SwitchyardError
from engines.process.process import end_orphans, registered
from engines.redaction import redacted
from engines.registry import driver
from flows.evaluation.outcome import judge, report
from flows.evaluation.trial import ARMS, Bench, Trial
from migrations.plan import Plan
from migrations.plan_file import build_plan, recorded_plan
from tasks.evidence.unmeasured import models_to_retry
from tasks.records.store import Records, open_records
from tasks.records.tables import Run

DATABASE = "the database of the records"
LOCKED_S = 3.0  # for each lock of another program; our own writers hold theirs for milliseconds
READ_S = 10.0  # for all of it, whatever hangs


def past(limit: int) -> list[dict[str, Any]]:
    """The latest runs, newest first."""

    def read() -> list[dict[str, Any]]:
        with open_records(wait_s=LOCKED_S) as records:
            return [_run(run) for run in records.history(limit)]

    return Background(DATABASE, read).result(READ_S)


def current(home: Path) -> dict[str, Any]:
    """Runs and processes that are alive, what was left behind and ended just now, and the last run.

    `records` is None, or one line that says why no run is shown: they are locked, unreadable or out of reach.
    """

    def read() -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        with open_records(wait_s=LOCKED_S) as records:
            runs = records.history(50)
            return [
                {**_run(run), "pid": run.owner_pid, "evidence": len(records.list_evidence(run.id))}
                for run in runs
                if run.shown_status == "running"
            ], _run(runs[0]) if runs else None

    reading = Background(DATABASE, read)
    ended = end_orphans(home)
    running: list[dict[str, Any]] = []
    last = problem = None
    try:
        running, last = reading.result(READ_S)
    except SwitchyardError as error:
        problem = str(error)
    return {
        "records": problem,
        "running": running,
        "processes": [
            {"name": name, "pid": process.pid, "memory_bytes": _memory(process)} for name, process in registered(home)
        ],
        "ended": ended,
        "last": last,
    }


def plan_of(reference: str) -> tuple[str, Plan]:
    """The id and the plan of a recorded run that did not get done, or of which a check could not be carried out."""
    with open_records() as records:
        run = _evaluation(records, reference)
        complete = run.shown_status == "done" and not models_to_retry(records, run.id)
    if complete:
        raise BadInput(f"run {run.id} is done; read it with `switchyard report {run.id}`, or start a new one")
    return run.id, build_plan(run.plan, where=f"the plan of run {run.id}")


def rejudge(home: Path, reference: str, output: Path | None) -> dict[str, Any]:
    """Every verdict of a run made again from its raw evidence, and its report written; a broken-off run stays so."""
    opened = Background(DATABASE, lambda: open_records(wait_s=LOCKED_S)).result(READ_S)
    with opened as records:
        run = _evaluation(records, reference)
        bench = _bench_of(records, run, home)
        trials = [Trial(bench, model) for model in bench.plan.models]
        return report(records, home, judge(bench, trials), output)


def _evaluation(records: Records, reference: str) -> Run:
    run = records.find_run(reference, kind="evaluate")
    if run.kind != "evaluate":
        raise BadInput(f"run {run.id} is a migration, not an evaluation; `switchyard migrate` resumes it")
    return run


def _bench_of(records: Records, run: Run, home: Path) -> Bench:
    plan = recorded_plan(run.plan)
    budget = records.get_evidence(run.id, "-", "-", "self_test")
    if budget is None:
        raise BadInput(f"run {run.id} ended before anything was measured; there is nothing to report")
    installations = {arm: driver(getattr(plan, arm).engine).find() for arm in ARMS}
    return Bench(
        plan=plan, records=records, run_id=run.id, home=home, installations=installations, error_budget=budget.payload
    )


def _run(run: Run) -> dict[str, Any]:
    took = (run.ended_at - run.started_at).total_seconds() if run.ended_at else None
    told = {
        "run_id": run.id,
        "kind": run.kind,
        "plan": run.name,
        "status": run.shown_status,
        "verdict": run.verdict,
        "started_at": run.started_at.isoformat(),
        "took_s": took,
        "error": run.error,
        "report": run.report_path,
    }
    return dict(redacted(told))  # what an older version stored may still hold a secret


def _memory(process: psutil.Process) -> int | None:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return None
