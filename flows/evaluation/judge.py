"""The verdicts on one model, from its recorded evidence alone: the same records give the same verdicts at any time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from engines.settings import NO_FILE
from engines.units import quantity
from flows.evaluation.trial import ARMS, BOTH, Trial
from migrations.plan import Plan
from tasks.evidence import compatibility, faults, performance, preflight, quants
from tasks.evidence.behaviours.battery import DEFAULT_REQUIRED
from tasks.evidence.device import judge_device
from tasks.evidence.engine_under_test import Arm
from tasks.evidence.first_look import judge_pairs
from tasks.evidence.parity.asking import Evidence
from tasks.evidence.parity.judge import judge_parity
from tasks.evidence.parity.parameters import judge_fields, with_behaviours
from tasks.evidence.soak.judge import LEAK, judge_leak, judge_stability
from tasks.evidence.tool_calls.judge import KIND as TOOL_CALLS
from tasks.evidence.tool_calls.judge import batches_of, judge_tool_calls
from tasks.evidence.unmeasured import LAUNCH, SOAK_LEFT_OUT, ends_the_run, judge_unmeasured, summary
from tasks.verdicts.verdict import LEFT_TO_WHOLE, CheckResult, Verdict, not_measured

NOT_MEASURED = "not measured"


def judged(trial: Trial) -> list[CheckResult]:
    """Every check for which there is evidence, and a line on what was not measured and why."""
    results = [*_launches(trial), *_devices(trial), *_preflight(trial)]
    apart = (LAUNCH, "preflight", SOAK_LEFT_OUT)  # these stand with their area
    results += [judge_unmeasured(arm, what, record) for arm, what, record in trial.unmeasured() if what not in apart]
    for area, judge in (
        ("compatibility", _compatibility),
        ("compatibility", _fields),
        ("parity", _parity),
        ("parity", tool_call_results),
        ("performance", _performance),
        ("stability", _soak),
        ("faults", _faults),
    ):
        results += _readable(area, partial(judge, trial))
    return _with_cause(trial, results)


def does_not_start(trial: Trial) -> list[CheckResult]:
    """The engines that do not start with this model: nothing can be compared without them."""
    return [result for result in _launches(trial) if result.verdict is not Verdict.PASS]


def settled(trial: Trial) -> bool:
    """Whether a required check has failed, or an engine does not start: more evidence could not open the gate."""
    return bool(does_not_start(trial)) or any(map(_fails, judged(trial)))


def _fails(result: CheckResult) -> bool:
    return result.required and result.verdict is Verdict.FAIL


def _with_cause(trial: Trial, results: list[CheckResult]) -> list[CheckResult]:
    """`results` in which what was not measured names the check that ended the evaluation of this model."""
    cause = ""
    if stopped := does_not_start(trial):
        cause = f": {stopped[0].check}: an engine that does not start cannot be compared"
    elif failed := next(filter(_fails, results), None):
        cause = f": {failed.check} failed first, and the gate cannot open any more"
    elif trial.bench.quick:
        cause = f": {LEFT_TO_WHOLE}"
    return [
        one.model_copy(update={"why": one.why + cause}) if cause and one.why == NOT_MEASURED else one for one in results
    ]


def required_behaviours(plan: Plan) -> Collection[str]:
    """The API behaviours that hold the gate: the plan's own list, else what a tool-calling agent uses."""
    return plan.client.requires or DEFAULT_REQUIRED


def _launches(trial: Trial) -> list[CheckResult]:
    return [judge_unmeasured(arm, what, record) for arm, what, record in trial.unmeasured() if what == LAUNCH]


def _devices(trial: Trial) -> list[CheckResult]:
    checks: dict[Arm, str] = {"candidate": "launch.device", "incumbent": "launch.device.incumbent"}
    seen = [(arm, trial.engines[arm], trial.payload(arm, "device")) for arm in checks]
    return [
        judge_device(checks[arm], engine.name, engine.settings.gpu_layers or 0, device)
        for arm, engine, device in seen
        if device is not None
    ]


def _preflight(trial: Trial) -> list[CheckResult]:
    for arm, what, record in trial.unmeasured():
        if what == "preflight":
            return [judge_unmeasured(arm, what, record)]
    report = trial.payload(BOTH, "preflight")
    if trial.model.gguf == NO_FILE:
        why = f"the plan names no file of {trial.model.id}: which weights the attached engines serve is unknown"
        return [CheckResult(check="preflight.identity", verdict=Verdict.INCONCLUSIVE, why=why, required=False)]
    if report is None:
        return [not_measured("preflight.loads", "not measured")]
    incumbent, candidate = (trial.engines[arm].name for arm in ARMS)
    results = _readable("preflight", lambda: preflight.judge_preflight(report, incumbent, candidate))
    if any(map(trial.is_attached, ARMS)) or trial.payloads(BOTH, "performance"):  # what is measured counts
        return results
    limit = trial.plan.limits.memory_peak_ratio
    found = preflight.judge_memory_estimate
    return results + _readable("memory", lambda: found(report, incumbent, candidate, limit))


def _compatibility(trial: Trial) -> list[CheckResult]:
    ours, theirs = (trial.payload(arm, "compatibility") for arm in ARMS)
    if ours is not None and theirs is not None:
        return compatibility.judge_compatibility(ours, theirs, required_behaviours(trial.plan))
    missing = _missing("compatibility.required_passed", limit=1.0, unit="share")
    ours, theirs = (trial.payload(arm, "smoke") for arm in ARMS)
    if ours is None or theirs is None:
        return [missing]
    tried = compatibility.judge_compatibility(ours, theirs, sorted(ours["behaviours"]))
    return [*(one for one in tried if one.check != missing.check), missing]


def _fields(trial: Trial) -> list[CheckResult]:
    used = trial.payload(BOTH, "fields")
    return [] if used is None else [judge_fields(used, *_parameters(trial))]


def _parameters(trial: Trial) -> list[Evidence | None]:
    """What each engine did with request parameters; None where not all of it was measured."""
    probed, seen = ([trial.payload(arm, kind) for arm in ARMS] for kind in ("parity.parameters", "compatibility"))
    return [
        None if parameters is None or behaviours is None else with_behaviours(parameters, behaviours)
        for parameters, behaviours in zip(probed, seen, strict=True)
    ]


def _parity(trial: Trial) -> list[CheckResult]:
    tokens = trial.parity("tokens")
    floors, ignored = [trial.payload(arm, "parity.floor") for arm in ARMS], _parameters(trial)
    if None in tokens:
        return [_missing("parity.prompt_tokens", limit=1.0, unit="share")]
    results = judge_parity(
        *tokens,
        *trial.parity("answers"),
        floors=[floor for floor in floors if floor is not None],
        ignored_incumbent=ignored[0],
        ignored_candidate=ignored[1],
        required_parameters=trial.plan.client.required_parameters,
        limits=trial.plan.limits,
    )
    if all(trial.has(arm, "parity.answers") for arm in ARMS):
        return results
    # the few answers of a first look fail a candidate; what they leave open was not measured yet
    return [*map(_reported_only, results), _missing("parity.answers")]


def tool_batches(trial: Trial) -> list[Evidence]:
    """The tool prompts' answers, batch by batch; none in a run of a Switchyard that did not ask them."""
    return batches_of(*(trial.payloads(arm, TOOL_CALLS) for arm in ARMS))


def tool_call_results(trial: Trial) -> list[CheckResult]:
    """The two numbers on tool calls."""
    return judge_tool_calls(tool_batches(trial), trial.plan.limits)


def _reported_only(result: CheckResult) -> CheckResult:
    left_open = result.verdict is Verdict.INCONCLUSIVE
    return result.model_copy(update={"required": False}) if left_open else result


def _performance(trial: Trial) -> list[CheckResult]:
    looks, workload, limits, errors = trial.plan.measure.looks, trial.workload, trial.plan.limits, trial.client_errors
    blocks = trial.payloads(BOTH, "performance")
    if not blocks:
        missing = _missing("performance.ttft_p50_ratio", limit=limits.ttft_p50_ratio, unit="ratio")
        pairs = trial.payload(BOTH, "first_look")
        return [missing] if pairs is None else [_named(trial, "first_look", judge_pairs(pairs, limits)), missing]
    budgets: dict[str, str] = {arm: e.driver.cache_budget(e.settings) for arm, e in trial.engines.items()}
    speed = {f"performance.{metric.name}_ratio" for metric in performance.metrics(limits, workload)}
    results = [
        *(
            _named(trial, "performance", one) if one.check in speed else one
            for one in performance.judge_performance(blocks, limits, workload, looks, client_error_ms=errors)
        ),
        performance.judge_client(trial.bench.error_budget, trial.plan.limits.client_cpu),
        *_fresh_starts(trial, blocks),
        *_of_ours(trial, "memory.peak_ratio", lambda: [performance.judge_memory(blocks, limits, looks)], *ARMS),
        performance.memory_figures(blocks, budgets),
    ]
    if calibration := trial.payloads(BOTH, "calibration"):
        results += performance.judge_noise(calibration, limits, workload, looks, client_error_ms=errors)
    return results


def _named(trial: Trial, evidence: str, result: CheckResult) -> CheckResult:
    """A verdict on speed with what it holds for: an engine that is slow with one quant need not be with another."""
    report = trial.payload(BOTH, "preflight")
    ours = not any(map(trial.is_attached, ARMS))  # how others run an engine is not known
    on = quants.measured_on(report, trial.threads(evidence), ours=ours) if report else ""
    return result.model_copy(update={"why": f"{result.why} ({on})"}) if on else result


def _soak(trial: Trial) -> list[CheckResult]:
    limits, soak_s, run_id = trial.plan.limits, trial.plan.measure.soak_s, trial.soak_run
    incumbent, candidate = (trial.payloads(arm, "soak", run_id=run_id) for arm in ARMS)
    if not candidate:
        out = [judge_unmeasured(arm, what, why) for arm, what, why in trial.unmeasured() if what == SOAK_LEFT_OUT]
        return out or [_missing("stability.failures", unit="failures")]
    points = trial.records.read_samples(run_id, trial.model.id, "candidate", "memory_bytes").points()
    leak = partial(
        judge_leak,
        [t for t, _ in points],
        [value for _, value in points],
        soak_s=soak_s,
        limit_bytes_per_day=limits.leak_bytes_per_day,
    )
    results = [
        *judge_stability(
            incumbent,
            candidate,
            soak_s=soak_s,
            failures_per_day=limits.failures_per_day,
            throughput_retention=limits.throughput_retention,
        ),
        *_of_ours(trial, LEAK, lambda: [leak()], "candidate"),
    ]
    if run_id == trial.run_id:
        return results
    return [one.model_copy(update={"why": f"{one.why} (the soak of run {run_id})"}) for one in results]


def _faults(trial: Trial) -> list[CheckResult]:
    if trial.behind_yards:
        return []
    evidence, limits = trial.payload("candidate", "faults"), trial.plan.limits
    if trial.is_attached("candidate"):
        return [_not_possible(trial, f"faults.{kind}", "candidate") for kind in faults.KINDS]
    if evidence is None:
        return [_missing("faults.sigkill")]
    return faults.judge_faults(
        evidence, kill_detect_s=limits.kill_detect_s, hang_detect_s=limits.hang_detect_s, recover_s=limits.recover_s
    )


def _not_possible(trial: Trial, check: str, arm: Arm, more: str = "") -> CheckResult:
    """What needs a process of ours, and cannot be done to one of others: reported, and holds no gate."""
    why = f"not possible for an attached engine: others run {trial.engines[arm].name!r}{more}"
    return CheckResult(check=check, verdict=Verdict.INCONCLUSIVE, why=why, required=False)


def _of_ours(trial: Trial, check: str, judge: Callable[[], list[CheckResult]], *arms: Arm) -> list[CheckResult]:
    """The verdict where all of `arms` are processes of ours, whose memory can be read."""
    return next(([_not_possible(trial, check, arm)] for arm in arms if trial.is_attached(arm)), None) or judge()


def _fresh_starts(trial: Trial, blocks: Sequence[Mapping[str, Any]]) -> list[CheckResult]:
    """How far a server that was not started afresh, and that others may use, moved from block to block."""
    results = []
    for arm in filter(trial.is_attached, ARMS):
        medians = [statistics.median(block[arm]["ttft_ms"]) for block in blocks if block[arm].get("ttft_ms")]
        moved = f"between {quantity(min(medians), 'ms')} and {quantity(max(medians), 'ms')}" if medians else "unknown"
        more = f", its blocks share one process, and whoever else uses it is in its figures (median TTFT: {moved})"
        results.append(_not_possible(trial, f"performance.fresh_starts.{arm}", arm, more))
    return results


def _missing(check: str, *, limit: float | None = None, unit: str = "") -> CheckResult:
    return not_measured(check, NOT_MEASURED, limit=limit, unit=unit)


def _readable(area: str, judge: Callable[[], Any]) -> list[CheckResult]:
    """The results of `judge`; evidence that it cannot read is an ERROR of its area, and the other areas are judged."""
    try:
        return list(judge())
    except Exception as error:
        if ends_the_run(error):
            raise
        why = f"the evidence could not be judged: {summary(error)}"
        return [CheckResult(check=f"{area}.judged", verdict=Verdict.ERROR, why=why)]
