"""Judge the windows of a soak of a serving engine, during it and at its end."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from engines.errors import BadInput
from engines.units import duration, number_of
from tasks.evidence.soak.judge import BUCKETS, DAY_S, LEAK, LEAK_UNIT, judge_slope, judge_stability, warm_up_s
from tasks.verdicts.limits import Limits
from tasks.verdicts.statistics import (
    bucket_medians,
    clopper_pearson_lower,
    clopper_pearson_upper,
    newcombe_upper,
    slope_within,
    theil_sen,
)
from tasks.verdicts.verdict import CheckResult, Verdict, decided, not_measured

MEDIANS_FOR_SLOPE = 4
# looked at after every window: at 95% one look in forty would be a false alarm, and an alarm moves traffic
LOOK_CONFIDENCE = 0.999
END_CONFIDENCE = 0.95
SERVED = "stability.served"
TTFT_DRIFT = "stability.ttft_drift"
DECODE_DRIFT = "stability.decode_drift"
FAILURES = "stability.failures"
SILENT_EMPTY = "stability.silent_empty"
# judged here by share, as the incumbent was asked for minutes only, and over days, as the drift has bounds
JUDGED_OTHERWISE = (SILENT_EMPTY, "stability.throughput_retention")
YARD_LEAK = "memory.yard_leak_bytes_per_day"
ENDS_IT = (SERVED, FAILURES, TTFT_DRIFT, DECODE_DRIFT)  # failed, these end a soak at once


def window_summary(window: Mapping[str, Any]) -> dict[str, Any]:
    """The window with the median in place of each list of times, so that thousands can be judged together."""
    known = {name: [one for one in window[name] if one is not None] for name in ("ttft_ms", "decode_tok_s")}
    medians = {name: [statistics.median(values)] if values else [] for name, values in known.items()}
    return {**window, **medians, "prompt_tokens": []}


def judge_windows(
    incumbent: Sequence[Mapping[str, Any]],
    windows: Sequence[Mapping[str, Any]],
    *,
    soak_s: float,
    limits: Limits,
    is_over: bool,
) -> list[CheckResult]:
    """Every check on the windows of one model, in order of time; `incumbent` are segments of an evaluation's soak.

    Before the soak `is_over` they are preliminary, and a drift and failures above the incumbent's are held to 99.9%,
    as they are looked at again and again.
    """
    if len({window["started_at"] for window in windows}) < len(windows):
        raise BadInput("a window of the soak occurs twice: each is counted once")
    confidence = END_CONFIDENCE if is_over else LOOK_CONFIDENCE
    stability = judge_stability(
        incumbent,
        windows,
        soak_s=soak_s,
        failures_per_day=limits.failures_per_day,
        throughput_retention=limits.throughput_retention,
        confidence=confidence,
    )
    return [
        judge_served(windows),
        *(result for result in stability if result.check not in JUDGED_OTHERWISE),
        judge_silent_empty(incumbent, windows, margin=limits.failure_rate_margin),
        *judge_drift(windows, soak_s=soak_s, limits=limits, confidence=confidence),
        judge_process_leak(windows, soak_s=soak_s, limit_bytes_per_day=limits.leak_bytes_per_day),
        judge_yard_leak(windows, limit_bytes_per_day=limits.leak_bytes_per_day),
    ]


def ending(results: Sequence[CheckResult]) -> list[CheckResult]:
    """The failed checks that end a soak before its time."""
    return [r for r in results if r.check in ENDS_IT and r.required and r.verdict is Verdict.FAIL]


def judge_served(windows: Sequence[Mapping[str, Any]]) -> CheckResult:
    """FAIL when the yard had to put another engine, or none, in the place of the one that is soaked."""
    if not windows:
        return not_measured(SERVED, "no window yet")
    out = [window["outage"] for window in windows if window["outage"]]
    why = f"it could not be kept up: {out[-1]}" if out else f"it served in all {number_of(len(windows), 'window')}"
    return CheckResult(check=SERVED, verdict=Verdict.FAIL if out else Verdict.PASS, why=why)


def judge_silent_empty(
    incumbent: Sequence[Mapping[str, Any]], windows: Sequence[Mapping[str, Any]], *, margin: float
) -> CheckResult:
    """The share of answers without a token, over the incumbent's: the two were not asked equally long.

    PASS without any, or when the 95% upper bound of the difference is within `margin`; FAIL when the lower bound is
    beyond it.
    """
    (k, n), (k_theirs, n_theirs) = _empties(windows), _empties(incumbent)
    if not n:
        return not_measured(SILENT_EMPTY, "no request was answered", limit=margin, unit="share")
    upper = newcombe_upper(k, n, k_theirs, n_theirs) if n_theirs else clopper_pearson_upper(k, n)
    lower = clopper_pearson_lower(k, n) - (k_theirs / n_theirs if n_theirs else 0.0)
    passes = k == 0 or upper <= margin
    verdict = decided(fails=not passes and lower > margin, passes=passes)
    theirs = f"incumbent: {k_theirs:,} of {n_theirs:,}"
    why = f"{k:,} of {number_of(n, 'answer')} were a 200 without a token ({theirs}); under {upper:.2%} more"
    return CheckResult(check=SILENT_EMPTY, verdict=verdict, value=upper, limit=margin, unit="share", why=why)


def _empties(segments: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    return sum(one["silent_empty"] for one in segments), sum(one["requests"] for one in segments)


def judge_drift(
    windows: Sequence[Mapping[str, Any]], *, soak_s: float, limits: Limits, confidence: float
) -> list[CheckResult]:
    """TTFT and decode speed at the end of the soak over its beginning: Theil-Sen on the logarithms of the medians.

    FAIL when the whole interval lies beyond the limit, PASS when it lies within. Not before a day is over: other
    traffic changes by the hour, and a morning looks like a drift. Required of soaks of a day and longer.
    """
    required = soak_s >= DAY_S
    return [
        _judge_drift(TTFT_DRIFT, "ttft_ms", windows, required, confidence, most=limits.ttft_p50_ratio),
        _judge_drift(DECODE_DRIFT, "decode_tok_s", windows, required, confidence, least=limits.throughput_retention),
    ]


def _judge_drift(
    check: str,
    name: str,
    windows: Sequence[Mapping[str, Any]],
    required: bool,
    confidence: float,
    *,
    most: float = math.inf,
    least: float = 0.0,
) -> CheckResult:
    limit = most if least == 0.0 else least
    known = [(_middle(one), math.log(one[name][0])) for one in windows if one[name] and one[name][0] != 0]
    span_s = known[-1][0] - known[0][0] if known else 0.0
    if span_s < DAY_S:
        why = f"{duration(span_s)} of windows so far; a day is needed to separate drift from daily traffic"
        return not_measured(check, why, limit=limit, unit="ratio", required=required)
    times, medians = bucket_medians([t for t, _ in known], [value for _, value in known], span_s / BUCKETS / 2)
    slope = theil_sen(times, medians, confidence)
    ratio, *bounds = (_ratio(rate, span_s) for rate in (slope.estimate, slope.low, slope.high))
    low, high = bounds
    verdict = decided(fails=high < least or low > most, passes=least <= low and high <= most)
    why = (
        f"{ratio:.1%} of its beginning after {duration(span_s)} ({confidence:.1%} between {low:.1%} and {high:.1%}), "
        f"by the medians of {number_of(len(known), 'window')}"
    )
    return CheckResult(check=check, verdict=verdict, value=ratio, limit=limit, unit="ratio", why=why, required=required)


def _ratio(rate: float, span_s: float) -> float:
    """exp(rate x span); an unbounded slope, or an absurd one, has no bound."""
    return math.exp(rate * span_s) if rate * span_s < 700 else math.inf


def judge_process_leak(
    windows: Sequence[Mapping[str, Any]], *, soak_s: float, limit_bytes_per_day: float
) -> CheckResult:
    """The slope of the engine's memory by `judge_leak`'s rule, over slopes within one process.

    By wall time, not by exposure: the limit is in bytes a day of uptime, and the process serves between the windows
    too. A restart sets memory back: a line across it would be neither the leak nor its cure, so no pair of points from
    two processes counts.
    """
    processes: dict[str, list[tuple[float, float]]] = {}
    for one in (one for window in windows for one in window["lives"] if one["memory_bytes"] is not None):
        processes.setdefault(one["life"], []).append(((one["from"] + one["until"]) / 2, one["memory_bytes"]))
    if not processes:
        why, required = "no memory was sampled during the soak", soak_s >= DAY_S
        return not_measured(LEAK, why, limit=limit_bytes_per_day, unit=LEAK_UNIT, required=required)
    return _judge_processes(list(processes.values()), soak_s=soak_s, limit_bytes_per_day=limit_bytes_per_day)


def _judge_processes(
    processes: Sequence[Sequence[tuple[float, float]]],
    *,
    soak_s: float,
    limit_bytes_per_day: float,
    whose: str = "the engine",
) -> CheckResult:
    required = soak_s >= DAY_S
    span_s = max(points[-1][0] for points in processes) - min(points[0][0] for points in processes)
    warm_s, width_s = warm_up_s(min(soak_s, span_s)), max(span_s / BUCKETS / 2, 1.0)
    warm = [[point for point in points if point[0] - points[0][0] >= warm_s] for points in processes]
    parts = [bucket_medians([t for t, _ in points], [v for _, v in points], width_s) for points in warm if points]
    usable = [part for part in parts if len(part[0]) > 1]
    n_points = sum(len(times) for times, _ in usable)
    if n_points < MEDIANS_FOR_SLOPE:
        why = (
            f"a slope of memory needs {MEDIANS_FOR_SLOPE} medians after the warm-up of each process; {n_points} "
            f"in {number_of(len(processes), 'process')} of {whose}"
        )
        return not_measured(LEAK, why, limit=limit_bytes_per_day, unit=LEAK_UNIT, required=required)
    # the first hours of a long soak prove no more than a short soak
    slope = slope_within(usable)
    result = judge_slope(slope, soak_s=min(soak_s, span_s), limit_bytes_per_day=limit_bytes_per_day)
    why = f"{result.why}; within {len(usable)} of {number_of(len(processes), 'process')} of {whose}"
    return result.model_copy(update={"why": why, "required": required})


def judge_yard_leak(windows: Sequence[Mapping[str, Any]], *, limit_bytes_per_day: float) -> CheckResult:
    """The same of the yard's own memory; reported only, as the candidate is not to blame."""
    processes: dict[str, list[tuple[float, float]]] = {}
    for window in windows:
        if window["yard_memory_bytes"] is not None:
            processes.setdefault(window["yard_life"], []).append((_middle(window), window["yard_memory_bytes"]))
    if not processes:
        why = "the yard's memory was not sampled"
        return not_measured(YARD_LEAK, why, limit=limit_bytes_per_day, unit=LEAK_UNIT, required=False)
    points = list(processes.values())
    judged = _judge_processes(points, soak_s=DAY_S, limit_bytes_per_day=limit_bytes_per_day, whose="the yard")
    return judged.model_copy(update={"check": YARD_LEAK, "required": False})


def _middle(window: Mapping[str, Any]) -> float:
    return float((window["started_at"] + window["ended_at"]) / 2)
