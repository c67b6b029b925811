"""The verdicts on one model, from its recorded evidence alone: the same records give the same verdicts at any time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from flows.evaluation.trial import ARMS, BOTH, Trial
from migrations.plan import Plan
from tasks.evidence import compatibility, faults, performance, preflight
from tasks.evidence.behaviours.battery import DEFAULT_REQUIRED
from tasks.evidence.parity.judge import judge_parity
from tasks.evidence.parity.parameters import with_behaviours
from tasks.evidence.parity.tokens import judge_prompt_tokens
from tasks.evidence.soak.judge import judge_leak, judge_stability
from tasks.evidence.unmeasured import LAUNCH, SOAK_LEFT_OUT, ends_the_run, judge_unmeasured, summary
from tasks.verdicts.verdict import CheckResult, Verdict, not_measured


def judged(trial: Trial) -> list[CheckResult]:
    """Every check for which there is evidence, and a line on what was not measured and why."""
    results = [*_launches(trial), *_preflight(trial)]
    apart = (LAUNCH, "preflight", SOAK_LEFT_OUT)  # these stand with their area
    results += [judge_unmeasured(arm, what, record) for arm, what, record in trial.unmeasured() if what not in apart]
    for area, judge in (
        ("compatibility", _compatibility),
        ("parity", _parity),
        ("performance", _performance),
        ("stability", _soak),
        ("faults", _faults),
    ):
        results += _readable(area, partial(judge, trial))
    return results


def does_not_start(trial: Trial) -> list[CheckResult]:
    """The engines that do not start with this model: nothing can be compared without them."""
    return [result for result in _launches(trial) if result.verdict is not Verdict.PASS]


def turned_down(trial: Trial) -> list[CheckResult]:
    """Cheap checks that have failed already: the costly ones could not open the gate any more."""
    tokens = _readable("parity", partial(_prompt_tokens, trial))
    cheap = [*_launches(trial), *_preflight(trial), *tokens]
    return [result for result in cheap if result.required and result.verdict is Verdict.FAIL]


def required_behaviours(plan: Plan) -> Collection[str]:
    """The API behaviours that hold the gate: the plan's own list, else what a tool-calling agent uses."""
    return plan.client.requires or DEFAULT_REQUIRED


def _launches(trial: Trial) -> list[CheckResult]:
    return [judge_unmeasured(arm, what, record) for arm, what, record in trial.unmeasured() if what == LAUNCH]


def _preflight(trial: Trial) -> list[CheckResult]:
    for arm, what, record in trial.unmeasured():
        if what == "preflight":
            return [judge_unmeasured(arm, what, record)]
    report = trial.payload(BOTH, "preflight")
    if report is None:
        return [not_measured("preflight.loads", "not measured")]
    incumbent, candidate = (trial.engines[arm].driver.name for arm in ARMS)
    return _readable("preflight", lambda: preflight.judge_preflight(report, incumbent, candidate))


def _prompt_tokens(trial: Trial) -> list[CheckResult]:
    ours, theirs = (trial.payload(arm, "parity.tokens") for arm in ARMS)
    if ours is None or theirs is None:
        return []
    return judge_prompt_tokens(ours, theirs, trial.plan.limits)


def _compatibility(trial: Trial) -> list[CheckResult]:
    ours, theirs = (trial.payload(arm, "compatibility") for arm in ARMS)
    if ours is None or theirs is None:
        return [_missing(trial, "compatibility.required_passed", limit=1.0, unit="share")]
    return compatibility.judge_compatibility(ours, theirs, required_behaviours(trial.plan))


def _parity(trial: Trial) -> list[CheckResult]:
    tokens, answers, floors, ignored = (
        [trial.payload(arm, f"parity.{kind}") for arm in ARMS] for kind in ("tokens", "answers", "floor", "parameters")
    )
    if None in tokens:
        return [_missing(trial, "parity.prompt_tokens", limit=1.0, unit="share")]
    seen = [trial.payload(arm, "compatibility") for arm in ARMS]
    ignored = [
        None if probed is None or behaviours is None else with_behaviours(probed, behaviours)
        for probed, behaviours in zip(ignored, seen, strict=True)
    ]
    return judge_parity(
        *tokens,
        *answers,
        floors=[floor for floor in floors if floor is not None],
        ignored_incumbent=ignored[0],
        ignored_candidate=ignored[1],
        required_parameters=trial.plan.client.required_parameters,
        limits=trial.plan.limits,
    )


def _performance(trial: Trial) -> list[CheckResult]:
    looks, workload, limits, errors = trial.plan.measure.looks, trial.workload, trial.plan.limits, trial.client_errors
    blocks = trial.payloads(BOTH, "performance")
    if not blocks:
        return [_missing(trial, "performance.ttft_p50_ratio", limit=limits.ttft_p50_ratio, unit="ratio")]
    budgets: dict[str, str] = {arm: e.driver.cache_budget(e.settings) for arm, e in trial.engines.items()}
    results = [
        *performance.judge_performance(blocks, limits, workload, looks, client_error_ms=errors),
        performance.judge_client(trial.bench.error_budget, trial.plan.limits.client_cpu),
        performance.judge_memory(blocks, limits, looks),
        performance.memory_figures(blocks, budgets),
    ]
    if calibration := trial.payloads(BOTH, "calibration"):
        results += performance.judge_noise(calibration, limits, workload, looks, client_error_ms=errors)
    return results


def _soak(trial: Trial) -> list[CheckResult]:
    limits, soak_s, run_id = trial.plan.limits, trial.plan.measure.soak_s, trial.soak_run
    incumbent, candidate = (trial.payloads(arm, "soak", run_id=run_id) for arm in ARMS)
    if not candidate:
        out = [judge_unmeasured(arm, what, why) for arm, what, why in trial.unmeasured() if what == SOAK_LEFT_OUT]
        return out or [_missing(trial, "stability.failures", unit="failures")]
    points = trial.records.read_samples(run_id, trial.model.id, "candidate", "memory_bytes").points()
    results = [
        *judge_stability(
            incumbent,
            candidate,
            soak_s=soak_s,
            failures_per_day=limits.failures_per_day,
            throughput_retention=limits.throughput_retention,
        ),
        judge_leak(
            [t for t, _ in points],
            [value for _, value in points],
            soak_s=soak_s,
            limit_bytes_per_day=limits.leak_bytes_per_day,
        ),
    ]
    if run_id == trial.run_id:
        return results
    return [one.model_copy(update={"why": f"{one.why} (the soak of run {run_id})"}) for one in results]


def _faults(trial: Trial) -> list[CheckResult]:
    if trial.behind_yards:
        return []
    evidence, limits = trial.payload("candidate", "faults"), trial.plan.limits
    if evidence is None:
        return [_missing(trial, "faults.sigkill")]
    return faults.judge_faults(
        evidence, kill_detect_s=limits.kill_detect_s, hang_detect_s=limits.hang_detect_s, recover_s=limits.recover_s
    )


def _missing(trial: Trial, check: str, *, limit: float | None = None, unit: str = "") -> CheckResult:
    """The check as not measured, with the reason where an earlier check is one."""
    why = "not measured"
    if stopped := does_not_start(trial):
        why += f": {stopped[0].check}: an engine that does not start cannot be compared"
    elif not check.startswith("parity.prompt_tokens") and (down := turned_down(trial)):
        why += f": {down[0].check} failed first, and the gate cannot open any more"
    return not_measured(check, why, limit=limit, unit=unit)


def _readable(area: str, judge: Callable[[], Any]) -> list[CheckResult]:
    """The results of `judge`; evidence that it cannot read is an ERROR of its area, and the other areas are judged."""
    try:
        return list(judge())
    except Exception as error:
        if ends_the_run(error):
            raise
        why = f"the evidence could not be judged: {summary(error)}"
        return [CheckResult(check=f"{area}.judged", verdict=Verdict.ERROR, why=why)]
