"""Verdicts of a recorded evaluation made again from its evidence, and its plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from engines.deadline import Background
from engines.driver import Installation
from engines.errors import BadInput, EngineNotFound
from flows.evaluation.outcome import judge, report
from flows.evaluation.trial import ARMS, QUICK, Bench, Trial
from migrations.plan import EngineChoice, Plan
from migrations.plan_file import build_plan, recorded_plan
from tasks.evidence.unmeasured import models_to_retry
from tasks.records.store import DATABASE, LOCKED_S, READ_S, Records, open_records
from tasks.records.tables import Evidence, Run

ANY_BUILD = {"form": "auto", "binary": None, "version": None}  # nothing is started


def plan_of(reference: str) -> tuple[str, Plan]:
    """The id and the plan of a recorded run that did not get done, or of which a check could not be carried out."""
    with open_records() as records:
        run = _evaluation(records, reference)
        if run.kind == QUICK:
            raise BadInput(f"run {run.id} was a first look; `switchyard evaluate` without --quick measures the whole")
        complete = run.shown_status == "done" and not models_to_retry(records, run.id)
    if complete:
        raise BadInput(f"run {run.id} is done; read it with `switchyard report {run.id}`, or start a new one")
    return run.id, build_plan(run.plan, where=f"the plan of run {run.id}")


def rejudge(home: Path, reference: str, output: Path | None) -> dict[str, Any]:
    """Every verdict of a run made again from its raw evidence, and its report written; a broken-off run stays so."""
    with Background(DATABASE, lambda: open_records(wait_s=LOCKED_S)).result(READ_S) as records:
        run = _evaluation(records, reference)
        plan, budget = recorded_plan(run.plan), records.get_evidence(run.id, "-", "-", "self_test")
        if budget is None:
            raise BadInput(f"run {run.id} ended before anything was measured; there is nothing to report")
        bench = Bench(
            plan=plan,
            records=records,
            run_id=run.id,
            home=home,
            installations={
                arm: _described(getattr(plan, arm), partial(records.list_evidence, run.id), arm) for arm in ARMS
            },
            error_budget=budget.payload,
            quick=run.kind == QUICK,
        )
        trials = [Trial(bench, model) for model in plan.models]
        return report(records, home, judge(bench, trials), output)


def _described(choice: EngineChoice, recorded: Callable[[], Sequence[Evidence]], arm: str) -> Installation:
    """The engine as it is here, else as the run recorded it: it may be retired by now. Raises EngineNotFound."""
    try:
        return choice.model_copy(update=ANY_BUILD).find(ask=False)
    except EngineNotFound:
        for seen in (engine for one in recorded() for engine in (one.environment or {}).get("engines", ())):
            if seen["arm"] == arm:
                return Installation(
                    engine=choice.name,
                    kind=choice.engine,
                    form=seen["form"],
                    program=(seen["where"],),
                    version=seen["version"],
                    where=seen["where"],
                    build=seen.get("build") or "",
                )
        raise


def _evaluation(records: Records, reference: str) -> Run:
    run = records.find_run(reference, kind="evaluate")
    if run.kind not in ("evaluate", QUICK):
        raise BadInput(f"run {run.id} is a migration, not an evaluation; `switchyard migrate` resumes it")
    return run
