"""Phase 1 as a table of contents: is the candidate at least as good, for every model?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.bench import opened
from flows.outcome import conclude, publish
from flows.progress import progress
from flows.trial import ARMS, Trial
from migrations.plan import Plan


@task(task_run_name="{model} · {arm} · {evidence}", cache_policy=NO_CACHE, persist_result=False)
def gather(model: str, arm: str, evidence: str, work: Callable[[], None]) -> None:
    """One kind of evidence for one model and engine; `work` stores it, or finds it stored."""
    with progress.get().step(f"{model} · {arm} · {evidence}"):
        work()


@flow(name="evaluate", flow_run_name="evaluate {plan.name}", persist_result=False)
def evaluate(plan: Plan, resume: str | None = None, allow_retired: bool = False) -> dict[str, Any]:
    """Measure and judge every model of the plan; `resume` goes on with a run that was killed or interrupted."""
    with opened(plan, resume, allow_retired=allow_retired) as (bench, run):
        trials = [Trial(bench, model, progress.get().say) for model in plan.models]
        for trial in trials:
            try_model(trial)
        outcome = conclude(bench, run, trials)
        publish(bench, outcome)
    return outcome


def try_model(trial: Trial) -> None:
    """Cheap evidence first; a model that it turns down is not measured at length."""
    name = trial.model.id
    gather(name, "both", "preflight", trial.preflight)
    if trial.turned_down():
        return
    for arm in ARMS:
        gather(name, arm, "prompt tokens", lambda arm=arm: trial.prompt_tokens(arm))
    for arm in ARMS:
        gather(name, arm, "answers", lambda arm=arm: trial.answers(arm))
    if trial.turned_down():
        return
    for arm in ARMS:
        gather(name, arm, "compatibility", lambda arm=arm: trial.compatibility(arm))
    if trial.bench.plan.sampling.calibration_blocks:
        gather(name, "incumbent", "calibration", trial.calibration)
    gather(name, "both", "performance", trial.performance)
    gather(name, "both", "soak", trial.soak)
    gather(name, "candidate", "faults", trial.faults)
