"""Judge a soak: failures, empty answers, throughput and memory growth, and what they do not prove."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from engines.errors import BadInput
from engines.units import duration, figure, number_of, quantity
from tasks.verdicts.counts import BY_CHANCE, chance_of, no_more_than_incumbent
from tasks.verdicts.statistics import Slope, bucket_medians, poisson_lower_rate, poisson_upper_rate, theil_sen
from tasks.verdicts.verdict import CheckResult, Verdict, decided, not_measured

DAY_S = 86_400
WARM_SHARE = 0.1  # of the soak, and 6 h at most, before memory is judged: caches fill first
BUCKETS = 12
LONGEST, LAST_TURN_S = 2.0, 600.0  # times as long as was planned, and a turn on a starved machine: more is another unit
FEWEST = 3  # failures; two can fall together by chance on any engine
FIRST_CHARS = 120  # of the first error, as a reason quotes it
LEAK = "memory.leak_bytes_per_day"
LEAK_UNIT = "bytes/day"


def judge_stability(
    incumbent: Sequence[Mapping[str, Any]],
    candidate: Sequence[Mapping[str, Any]],
    *,
    soak_s: float,
    failures_per_day: float,
    throughput_retention: float,
    confidence: float = 1 - BY_CHANCE,
) -> list[CheckResult]:
    """Failures against the incumbent's and the limit, silent-empty answers, throughput at the end.

    More failures than the incumbent's are a FAIL with this `confidence`: looks again and again need more of it.
    """
    if not candidate:
        return [not_measured("stability.failures", "the candidate was not soaked")]
    ours, theirs = _totals(candidate), _totals(incumbent)
    if ours["exposure_s"] > LONGEST * soak_s + LAST_TURN_S:
        raise BadInput(f"{duration(ours['exposure_s'])} under load in a soak of {duration(soak_s)}: another unit?")
    return [
        _judge_failures(ours, theirs, failures_per_day, confidence),
        _judge_rate(ours, theirs, soak_s, failures_per_day),
        _judge_silent_empty(ours, theirs),
        _judge_retention(candidate, throughput_retention),
    ]


def judge_leak(
    times_s: Sequence[float], memory_bytes: Sequence[float | None], *, soak_s: float, limit_bytes_per_day: float
) -> CheckResult:
    """The slope of memory (Theil-Sen on bucket medians, after a warm-up) with its 95% bounds, in bytes a day.

    FAIL iff the lower bound is over the limit; PASS iff the upper bound is under it. Slopes of a soak shorter than a
    day are reported and not required: a cache that fills looks like a leak for hours.
    """
    points = [(t - times_s[0], v) for t, v in zip(times_s, memory_bytes, strict=True) if v is not None]
    kept = [(t, value) for t, value in points if t >= warm_up_s(soak_s)]
    width_s = max(soak_s / BUCKETS / 2, 1.0)
    # a candidate that died early has samples in its warm-up alone
    times, medians = bucket_medians([t for t, _ in kept], [v for _, v in kept], width_s) if kept else ([], [])
    if len(medians) < 4:
        why = f"a slope of memory needs 4 medians after the warm-up, not {len(medians)}"
        why = why if points else "no memory was sampled during the soak"
        return not_measured(LEAK, why, limit=limit_bytes_per_day, unit=LEAK_UNIT, required=soak_s >= DAY_S)
    return judge_slope(theil_sen(times, medians), soak_s=soak_s, limit_bytes_per_day=limit_bytes_per_day)


def warm_up_s(soak_s: float) -> float:
    """How long memory is not judged at first."""
    return min(WARM_SHARE * soak_s, 6 * 3600)


def judge_slope(slope: Slope, *, soak_s: float, limit_bytes_per_day: float) -> CheckResult:
    """The verdict on a slope of memory in bytes per second, as `judge_leak` says."""
    required = soak_s >= DAY_S
    per_day, low, high = slope.estimate * DAY_S, slope.low * DAY_S, slope.high * DAY_S
    fails, passes = low > limit_bytes_per_day, high < limit_bytes_per_day
    verdict = decided(fails=required and fails, passes=required and passes)
    why = (
        f"memory moved by {quantity(per_day, LEAK_UNIT, limit_bytes_per_day)} (95% between {figure(low / 1e6)} and "
        f"{figure(high / 1e6)}), limit {quantity(limit_bytes_per_day, LEAK_UNIT)}"
    )
    if not required:
        why += f"; {duration(soak_s)} cannot distinguish a filling cache from a leak; soak for two days"
    value, limit = per_day, limit_bytes_per_day
    return CheckResult(
        check=LEAK, verdict=verdict, value=value, limit=limit, unit=LEAK_UNIT, why=why, required=required
    )


def _totals(segments: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = ("exposure_s", "requests", "silent_empty")
    sums = {name: sum(segment[name] for segment in segments) for name in names}
    return {**sums, "failures": [failure for segment in segments for failure in segment["failures"]]}


def _judge_failures(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], failures_per_day: float, confidence: float
) -> CheckResult:
    """The exact conditional test against the incumbent; where that never failed, the rate against the limit as well."""
    k, k_theirs = len(ours["failures"]), len(theirs["failures"])
    exposure = (
        f"{duration(ours['exposure_s'])} and {number_of(ours['requests'], 'request')} (incumbent: {k_theirs} in "
        f"{duration(theirs['exposure_s'])} and {theirs['requests']:,})"
    )
    if not ours["requests"] and not k:
        return not_measured("stability.failures", "the candidate was sent no request", limit=0, unit="failures")
    if k == 0:
        verdict, why = Verdict.PASS, f"no failure in {exposure}"
    elif not ours["requests"]:
        verdict, why = Verdict.FAIL, f"the candidate served no request; {_kinds(ours['failures'])}"
    else:
        chance = chance_of(k, ours["exposure_s"], k_theirs, theirs["exposure_s"])
        least = poisson_lower_rate(k, ours["exposure_s"] / DAY_S)
        too_many = k_theirs == 0 and k >= FEWEST and least > failures_per_day
        verdict = Verdict.FAIL if chance < 1 - confidence or too_many else Verdict.INCONCLUSIVE
        why = f"{number_of(k, 'failure')} ({_kinds(ours['failures'])}) in {exposure}; by chance alone {chance:.0%}"
        why += f"; surely over {figure(least)} a day, limit {failures_per_day:g} a day" if too_many else ""
    return CheckResult(check="stability.failures", verdict=verdict, value=k, limit=0, unit="failures", why=why)


def _judge_rate(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], soak_s: float, failures_per_day: float
) -> CheckResult:
    """The 95% upper bound of the failure rate. Required where the planned soak is long enough to prove the limit."""
    check, unit = "stability.failure_rate_upper95", "failures/day"
    can_prove = poisson_upper_rate(0, soak_s / DAY_S) <= failures_per_day * 1.001
    if not ours["exposure_s"]:
        return not_measured(check, "no exposure", limit=failures_per_day, unit=unit, required=can_prove)
    upper = poisson_upper_rate(len(ours["failures"]), ours["exposure_s"] / DAY_S)
    per_request = poisson_upper_rate(len(ours["failures"]), ours["requests"]) if ours["requests"] else None
    why = f"with 95% confidence under {figure(upper)} failures a day"
    why += f" and under {per_request:.2%} of requests" if per_request is not None else ""
    if theirs["exposure_s"]:
        upper_theirs = poisson_upper_rate(len(theirs["failures"]), theirs["exposure_s"] / DAY_S)
        why += f" (incumbent: under {figure(upper_theirs)} a day)"
    verdict = Verdict.PASS if upper <= failures_per_day else Verdict.INCONCLUSIVE
    if verdict is Verdict.INCONCLUSIVE:
        needed_s = poisson_upper_rate(len(ours["failures"]), 1.0) / failures_per_day * DAY_S
        why += f"; to prove under {failures_per_day:g} a day it needs {duration(needed_s)} without another failure"
    limit = failures_per_day
    return CheckResult(check=check, verdict=verdict, value=upper, limit=limit, unit=unit, why=why, required=can_prove)


def _judge_silent_empty(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> CheckResult:
    if not ours["requests"]:
        return not_measured("stability.silent_empty", "the candidate served no request", unit="answers")
    (k, n), (k_theirs, n_theirs) = ((one["silent_empty"], one["requests"]) for one in (ours, theirs))
    why = f"{k:,} of {number_of(n, 'answer')} were a 200 without a token (incumbent: {k_theirs:,} of {n_theirs:,})"
    return no_more_than_incumbent("stability.silent_empty", (k, n), (k_theirs, n_theirs), "answers", why)


def _judge_retention(segments: Sequence[Mapping[str, Any]], limit: float) -> CheckResult:
    """Decode speed of the last third over the first; reported only, as other processes on the machine move it too."""
    check = "stability.throughput_retention"
    rates = [rate for segment in segments for rate in segment["decode_tok_s"] if rate is not None]
    if len(rates) < 9:
        why = f"{number_of(len(rates), 'measured answer')}; 9 are needed"
        return not_measured(check, why, limit=limit, unit="ratio", required=False)
    third = len(rates) // 3
    ratio = statistics.median(rates[-third:]) / statistics.median(rates[:third])
    verdict = Verdict.PASS if ratio >= limit else Verdict.INCONCLUSIVE
    why = f"decode at the end ran at {ratio:.0%} of its speed at the start"
    return CheckResult(check=check, verdict=verdict, value=ratio, limit=limit, unit="ratio", why=why, required=False)


def _kinds(failures: Sequence[Mapping[str, Any]]) -> str:
    """How many of each type, and the start of the first error."""
    counted = Counter(str(failure["type"]) for failure in failures)
    kinds = ", ".join(f"{number} {kind}" for kind, number in counted.items()) or "none"
    first = next((" ".join(str(failure["error"]).split()) for failure in failures if failure.get("error")), "")
    return f"{kinds}; first: {first[:FIRST_CHARS]}" if first else kinds
