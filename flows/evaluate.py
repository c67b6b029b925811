"""Phase 1 as a table of contents: is the candidate at least as good, for every model?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.evaluation.outcome import conclude, publish
from flows.evaluation.run import opened
from flows.evaluation.trial import ARMS, Trial, Unmeasured
from flows.progress import progress
from migrations.plan import Plan
from tasks.evidence.engine_under_test import Arm
from tasks.evidence.unmeasured import summary

KINDS = {
    "prompt tokens": "parity.tokens",
    "answers": "parity.answers",
}  # of evidence, where the step is named otherwise


@task(task_run_name="{model} · {arm} · {evidence}", cache_policy=NO_CACHE, persist_result=False)
def gather(model: str, arm: str, evidence: str, work: Callable[[], None]) -> None:
    """One kind of evidence for one model and engine; `work` stores it, or finds it stored."""
    with progress.get().step(f"{model} · {arm} · {evidence}"):
        work()


@flow(name="evaluate-plan", flow_run_name="evaluate {plan.name}", persist_result=False)
def evaluate(
    plan: Plan, resume: str | None = None, allow_retired: bool = False, with_soak: bool = True
) -> dict[str, Any]:
    """Measure and judge every model of the plan; `resume` goes on with a run that was killed or interrupted.

    Without a soak, stability is judged by that of an earlier evaluation of just this, and is INCONCLUSIVE without one.
    """
    with opened(plan, resume, allow_retired=allow_retired) as (bench, run):
        trials = [Trial(bench, model, progress.get().say) for model in plan.models]
        for trial in trials:
            trial.forget_unmeasured()
        for trial in trials:
            try_model(trial, with_soak=with_soak)
        outcome = conclude(bench, run, trials)
        publish(bench, outcome)
    return outcome


def try_model(trial: Trial, *, with_soak: bool = True) -> None:
    """Cheap evidence first; a model that it turns down, or that an engine does not load, is not measured at length."""
    attempt(trial, "both", "preflight", trial.preflight)
    if trial.turned_down():
        return
    for arm in ARMS:
        attempt(trial, arm, "prompt tokens", partial(trial.prompt_tokens, arm))
    if trial.does_not_start():
        return
    for arm in ARMS:
        attempt(trial, arm, "answers", partial(trial.answers, arm))
    if trial.turned_down() or trial.does_not_start():
        return
    for arm in ARMS:
        attempt(trial, arm, "compatibility", partial(trial.compatibility, arm))
    if trial.does_not_start():
        return
    if trial.bench.plan.measure.calibration_blocks:
        attempt(trial, "incumbent", "calibration", trial.calibration)
    attempt(trial, "both", "performance", trial.performance)
    attempt(trial, "both", "soak", trial.soak if with_soak else trial.leave_soak_out)
    attempt(trial, "candidate", "faults", trial.faults)


def attempt(trial: Trial, arm: Arm | Literal["both"], evidence: str, work: Callable[[], None]) -> None:
    """One kind of evidence; where it cannot be gathered that is recorded, and the run continues.

    Raises what ends the whole run: an interrupt, a bad plan, records that cannot be written, an error of Prefect's.
    """
    broken: list[Exception] = []

    def noted() -> None:
        try:
            work()
        except Exception as error:
            broken.append(error)
            raise

    try:
        gather(trial.model.id, arm, evidence, noted)
    except Exception:
        if not broken:
            raise
        if not isinstance(broken[0], Unmeasured):
            trial.broke(arm, KINDS.get(evidence, evidence), broken[0])
        progress.get().note(f"{trial.model.id}: {evidence} could not be measured: {summary(broken[0])}")
