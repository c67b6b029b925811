"""Result of a run as plain JSON: stored verdicts, and the path of the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.evaluation.judge import judged
from flows.evaluation.trial import BOTH, Bench, Trial
from migrations import demo, upgrade
from migrations.pairs import pair_of
from tasks.evidence.first_look import CANNOT_PROVE
from tasks.evidence.quants import another_quant
from tasks.evidence.unmeasured import PASS_WITHOUT_SOAK, SOAK_LEFT_OUT, judge_unmeasured
from tasks.records.store import Records
from tasks.report.report import write_report
from tasks.verdicts.risks import Risk, judge_risks
from tasks.verdicts.verdict import CheckResult, Verdict, gate, reasons, worst


def judge(bench: Bench, trials: Sequence[Trial]) -> dict[str, Any]:
    """Every verdict from the raw evidence, stored in place of earlier ones."""
    models = []
    for trial in trials:
        results = judged(trial)
        bench.records.drop_checks(bench.run_id, trial.model.id)
        bench.records.put_checks(bench.run_id, trial.model.id, results)
        models.append(model_outcome(trial.model.id, results, pair_of(bench.plan).risks))
        limits, headers = bench.plan.limits.model_dump(), trial.payload(BOTH, "preflight")
        if headers and (found := another_quant(results, headers, limits, str(trial.model.gguf))):
            models[-1]["another_quant"] = found
    unproven = demo.cannot_prove(bench.plan) or upgrade.cannot_prove(bench.plan)
    unproven = CANNOT_PROVE if bench.quick else unproven
    outcome = run_outcome(bench.run_id, bench.plan.name, models, unproven, quick=bench.quick)
    if outcome["verdict"] == Verdict.INCONCLUSIVE and all(map(only_lacks_its_soak, trials, models)):
        how = f"the gate stays shut until `switchyard evaluate --resume {bench.run_id}` adds the soak"
        outcome |= {"result": PASS_WITHOUT_SOAK, "why": f"all that was measured is PASS; {how}"}
    return outcome


def only_lacks_its_soak(trial: Trial, model: Mapping[str, Any]) -> bool:
    """Whether nothing keeps the model's gate shut but a soak that was left out on purpose."""
    missing = [judge_unmeasured(*found).check for found in trial.unmeasured() if found[1] == SOAK_LEFT_OUT]
    return set(model["closed_by"]) <= set(missing)


def model_outcome(model_id: str, results: Sequence[CheckResult], known_risks: Iterable[Risk] = ()) -> dict[str, Any]:
    """The verdict on one model, with its checks and the risks that they decide."""
    return {
        "model": model_id,
        "verdict": gate(results).value,
        "checks": [result.model_dump(mode="json") for result in results],
        "closed_by": [result.check for result in reasons(results)],
        "risks": [
            {
                **{name: getattr(one.risk, name) for name in ("risk", "likelihood", "impact", "mitigation")},
                "verdict": one.verdict.value,
                "decided_by": [result.check for result in one.decided_by],
                "not_measured": list(one.unmeasured),
            }
            for one in judge_risks(known_risks, results)
        ],
    }


def run_outcome(
    run_id: str, plan: str, models: Sequence[dict[str, Any]], cannot_prove: Sequence[str] = (), *, quick: bool = False
) -> dict[str, Any]:
    """The verdict on a run, with its models."""
    verdict = worst(Verdict(model["verdict"]) for model in models)
    return {
        "run_id": run_id,
        "plan": plan,
        "verdict": verdict.value,
        "models": list(models),
        "cannot_prove": cannot_prove,
        "quick": quick,
    }


def report(records: Records, home: Path, outcome: dict[str, Any], path: Path | None = None) -> dict[str, Any]:
    """`outcome` with the path of its HTML report, which is written."""
    run_id = outcome["run_id"]
    written = write_report(records, run_id, outcome, path or home / "reports" / f"{run_id}.html")
    records.note_run(run_id, report_path=written)
    return {**outcome, "report": str(written)}
