"""What a run came to: stored verdicts, the report, Prefect's artifacts, and the next step for the user."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.errors import SwitchyardError
from engines.yard.client import YardClient, public_address
from flows.evaluation.run import Bench
from flows.evaluation.trial import Trial
from migrations.demo import DEMO_NAME
from migrations.llama_cpp_to_mistral_rs import DEMO_CANNOT_PROVE, RISKS
from tasks.records.tables import Run
from tasks.report.report import latency_images, write_report
from tasks.verdicts.risks import judge_risks
from tasks.verdicts.verdict import CheckResult, Verdict, gate, reasons, worst


def conclude(bench: Bench, run: Run, trials: Sequence[Trial]) -> dict[str, Any]:
    """The run's JSON form, judged, stored, reported, and the run recorded as done."""
    outcome = judge(bench, run, trials)
    bench.records.finish_run(run.id, "done", verdict=Verdict(outcome["verdict"]))
    return report(bench, run, outcome)


def judge(bench: Bench, run: Run, trials: Sequence[Trial]) -> dict[str, Any]:
    """Every verdict from the raw evidence, stored in place of earlier ones."""
    models = []
    for trial in trials:
        results = trial.judged()
        bench.records.drop_checks(run.id, trial.model.id)
        bench.records.put_checks(run.id, trial.model.id, results)
        models.append(_model_outcome(trial, results))
    verdict = worst(Verdict(model["verdict"]) for model in models)
    return {
        "run_id": run.id,
        "plan": bench.plan.name,
        "verdict": verdict.value,
        "models": models,
        "cannot_prove": DEMO_CANNOT_PROVE if bench.plan.name == DEMO_NAME else (),
    }


def report(bench: Bench, run: Run, outcome: dict[str, Any], path: Path | None = None) -> dict[str, Any]:
    """`outcome` with the path of its HTML report, which is written."""
    written = write_report(bench.records, run.id, outcome, path or bench.home / "reports" / f"{run.id}.html")
    bench.records.note_run(run.id, report_path=written)
    return {**outcome, "report": str(written)}


def publish(bench: Bench, outcome: dict[str, Any]) -> None:
    """The verdict table and a latency plot per model, as Prefect artifacts of the run."""
    from prefect.artifacts import create_image_artifact, create_link_artifact, create_table_artifact

    rows = [
        {"model": model["model"], **{key: check[key] for key in ("check", "verdict", "value", "limit", "unit", "why")}}
        for model in outcome["models"]
        for check in model["checks"]
        if check["required"]
    ]
    create_table_artifact(
        key="switchyard-verdict",
        table=rows,
        description=f"Run {outcome['run_id']}: {outcome['verdict']}. Report: {outcome['report']}",
    )
    if (link := _link(bench.home, outcome["report"])) is not None:
        create_link_artifact(link, link_text="the report", key="switchyard-report", description="served by the yard")
    for number, (model, image) in enumerate(latency_images(bench.records, outcome["run_id"], outcome).items(), 1):
        create_image_artifact(
            key=f"switchyard-latency-{number}", image_url=image, description=f"{model}: time to first token"
        )


def _link(home: Path, report: str) -> str | None:
    """Where a browser finds a report: the yard serves it, and where none runs nobody does."""
    try:
        address = public_address(YardClient(home).status()["address"])
    except SwitchyardError:
        return None
    return f"{address}/yard/reports/{Path(report).name}"


def _model_outcome(trial: Trial, results: Sequence[CheckResult]) -> dict[str, Any]:
    return {
        "model": trial.model.id,
        "verdict": gate(results).value,
        "checks": [result.model_dump(mode="json") for result in results],
        "closed_by": [result.check for result in reasons(results)],
        "risks": [
            {
                "risk": judged.risk.risk,
                "likelihood": judged.risk.likelihood,
                "impact": judged.risk.impact,
                "mitigation": judged.risk.mitigation,
                "verdict": judged.verdict.value,
                "decided_by": [result.check for result in judged.decided_by],
            }
            for judged in judge_risks(RISKS, results)
        ],
    }
