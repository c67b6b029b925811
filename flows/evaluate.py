"""Phase 1 as a table of contents: is the candidate at least as good, for every model?"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_image_artifact

from flows.evaluation import measure
from flows.evaluation.estimate import estimate, still_takes
from flows.evaluation.judge import settled
from flows.evaluation.nights import look_at_nights
from flows.evaluation.outcome import judge, report
from flows.evaluation.run import opened
from flows.evaluation.soak import leave_soak_out, soak
from flows.evaluation.trial import ARMS, BOTH, Side, Trial, Unmeasured
from flows.orchestrator.artifacts import check_rows, put_report_link, put_table
from flows.orchestrator.ending import VERSION
from flows.orchestrator.step import take
from flows.progress import progress
from migrations.plan import Plan
from tasks.evidence.unmeasured import summary
from tasks.records.store import Records
from tasks.report.report import latency_images
from tasks.verdicts.verdict import Verdict

KINDS = {  # of evidence, where the step has another name
    "prompt tokens": "parity.tokens",
    "first answers": "parity.first_answers",
    "first look at speed": "performance.first_look",
    "smoke of the API": "compatibility.smoke",
    "answers": "parity.answers",
    "tool calls": "parity.tool_calls",
}


@flow(name="evaluate-plan", flow_run_name="evaluate {plan.name}", version=VERSION, persist_result=False)
def evaluate(
    plan: Plan,
    resume: str | None = None,
    allow_retired: bool = False,
    with_soak: bool = True,
    quick: bool = False,
    command: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Measure and judge every model of the plan; `resume` is a run that was killed or interrupted.

    `command` is what a person types to repeat it, for the report. Without a soak, stability is judged by that of an
    earlier evaluation of just this, and is INCONCLUSIVE without one. A `quick` one takes the first look only, and
    passes nothing.
    """
    with opened(plan, resume, allow_retired=allow_retired, quick=quick, command=command) as (bench, run):
        began = time.monotonic()
        trials = [Trial(bench, model, progress.get().say) for model in plan.models]
        less = "" if quick else "; less where a model fails early"
        progress.get().note(f"{plan.name}: {estimate(plan, with_soak=with_soak, quick=quick)}{less}")
        for trial in trials:
            trial.forget_unmeasured()
        for trial in trials:
            try_model(trial, with_soak=with_soak)
        progress.get().note(engine_share(bench.clock.seconds, time.monotonic() - began))
        outcome = judge(bench, trials)
        if not quick:
            outcome["drift"] = look_at_nights(bench, trials)
        run.finish("done", verdict=Verdict(outcome["verdict"]))
        outcome = report(bench.records, bench.home, outcome)
        publish(bench.records, bench.home, outcome)
    return outcome


def try_model(trial: Trial, *, with_soak: bool = True) -> None:
    """Cheap evidence first; a model whose gate cannot open any more is not measured at length."""
    resumed = trial.has(BOTH, "first_look")
    with trial.running:
        first_look(trial)
        if trial.bench.quick or settled(trial):
            return
        pairs = trial.payload(BOTH, "first_look") or ()
        starts_s = trial.running.starts_s
        left = still_takes(trial.plan, trial.model, pairs, starts_s=starts_s, with_soak=with_soak)
        if left and not resumed:
            progress.get().note(f"{trial.model.id}: {left}")
        for arm in ARMS:
            attempt(trial, arm, "prompt tokens", partial(measure.prompt_tokens, trial, arm))
        for arm in ARMS if not settled(trial) else ():
            attempt(trial, arm, "answers", partial(measure.answers, trial, arm))
        for arm in ARMS if not settled(trial) else ():
            attempt(trial, arm, "compatibility", partial(measure.compatibility, trial, arm))
        if trial.plan.measure.tool_prompts and not settled(trial):
            attempt(trial, "both", "tool calls", partial(measure.tool_calls, trial))
    if settled(trial):
        return
    if trial.plan.measure.calibration_blocks:
        attempt(trial, "incumbent", "calibration", partial(measure.calibration, trial))
    attempt(trial, "both", "performance", partial(measure.performance, trial))
    if settled(trial):
        return
    attempt(trial, "both", "soak", partial(soak if with_soak else leave_soak_out, trial))
    attempt(trial, "candidate", "faults", partial(measure.faults, trial))


def engine_share(engines_s: float, whole_s: float) -> str:
    """`engines were up for 412 s of 440 s (94%)`: the rest is what Switchyard itself took."""
    return f"engines were up for {engines_s:.0f} s of {whole_s:.0f} s ({engines_s / whole_s:.0%})"


def first_look(trial: Trial) -> None:
    """What takes seconds, and turns most hopeless candidates down."""
    attempt(trial, "both", "preflight", partial(measure.preflight, trial))
    for arm in ARMS if not settled(trial) else ():
        attempt(trial, arm, "first answers", partial(measure.first_answers, trial, arm))
    if not settled(trial):
        attempt(trial, "both", "first look at speed", partial(measure.pairs, trial))
    for arm in ARMS if not settled(trial) else ():
        attempt(trial, arm, "smoke of the API", partial(measure.smoke, trial, arm))


def attempt(trial: Trial, arm: Side, evidence: str, work: Callable[[], None]) -> None:
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
        take(f"{trial.model.id} · {arm}", evidence, noted)
    except Exception:
        if not broken:
            raise
        if not isinstance(broken[0], Unmeasured):
            trial.broke(arm, KINDS.get(evidence, evidence), broken[0])
        progress.get().note(f"{trial.model.id}: {evidence} could not be measured: {summary(broken[0])}")


def publish(records: Records, home: Path, outcome: dict[str, Any]) -> None:
    """The verdict table, the report and a latency plot per model, as Prefect artifacts of the run."""
    put_table("switchyard-verdict", check_rows(outcome["models"], required=True), outcome)
    put_report_link(home, Path(outcome["report"]))
    for number, (model, image) in enumerate(latency_images(records, outcome["run_id"], outcome).items(), 1):
        create_image_artifact(
            key=f"switchyard-latency-{number}", image_url=image, description=f"{model}: time to first token"
        )
