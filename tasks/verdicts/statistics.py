"""The statistics that verdicts rest on: percentiles, quantiles of t and chi2, bounds of rates, robust slopes.

No SciPy: these few functions are all that is needed, and each is tested against published values.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist, median

from engines.errors import BadInput, NoMeasurement
from engines.units import number_of

_NORMAL = NormalDist()


def percentile(samples: Sequence[float], q: float) -> float:
    """The `q` quantile (0 to 1; 0.95 for p95) of `samples`, in their unit, with linear interpolation.

    Hyndman and Fan's type 7, the default of NumPy and R. Raises NoMeasurement on no samples, BadInput on a NaN among
    them or on a `q` outside 0 to 1 (95 for p95 would otherwise pass for a number).
    """
    if not 0.0 <= q <= 1.0:
        raise BadInput(f"quantile {q} is outside 0 to 1: write p95 as 0.95")
    if not len(samples):
        raise NoMeasurement(f"no samples to take the p{100 * q:g} of")
    ordered = sorted(samples)
    if any(math.isnan(sample) for sample in ordered):
        raise BadInput("a sample is NaN: it has no place in an order")
    position = q * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    if ordered[below] == ordered[above]:
        return float(ordered[below])
    return float(ordered[below] + (position - below) * (ordered[above] - ordered[below]))


def normal_cdf(z: float) -> float:
    """Probability that a standard normal is at most `z`."""
    return _NORMAL.cdf(z)


def normal_quantile(p: float) -> float:
    """The z with `normal_cdf(z) == p`, for 0 < p < 1."""
    _inside(p, "probability")
    return _NORMAL.inv_cdf(p)


def t_cdf(t: float, df: float) -> float:
    """Probability that Student's t with `df` degrees of freedom is at most `t`."""
    tail = _t_tail(abs(t), df)
    return 1.0 - tail if t >= 0 else tail


@lru_cache(maxsize=4096)
def t_quantile(p: float, df: float) -> float:
    """The t with `t_cdf(t, df) == p`, for 0 < p < 1 and df >= 1 (whole or not)."""
    _inside(p, "probability")
    if df < 1:
        raise BadInput(f"Student's t needs at least 1 degree of freedom, not {df}: measure more")
    if p == 0.5:
        return 0.0
    tail = min(p, 1.0 - p)
    size = _invert(lambda t: -_t_tail(t, df), -tail)
    return size if p > 0.5 else -size


def chi2_cdf(x: float, df: float) -> float:
    """Probability that chi-squared with `df` degrees of freedom is at most `x`."""
    return _gamma_lower(df / 2.0, x / 2.0) if x > 0 else 0.0


@lru_cache(maxsize=1024)
def chi2_quantile(p: float, df: float) -> float:
    """The x with `chi2_cdf(x, df) == p`, for 0 < p < 1 and df > 0."""
    _inside(p, "probability")
    if df <= 0:
        raise BadInput(f"chi-squared needs a positive number of degrees of freedom, not {df}")
    return _invert(lambda x: chi2_cdf(x, df), p)


def binomial_tail(hits: int, trials: int, share: float) -> float:
    """P(X >= hits) of a binomial, for hits <= trials: I_share(hits, trials - hits + 1), DLMF 8.17.5."""
    return 1.0 if hits <= 0 else _beta_lower(share, float(hits), trials - hits + 1.0)


def poisson_upper_rate(failures: int, exposure: float, confidence: float = 0.95) -> float:
    """Upper bound of the rate, in failures per unit of `exposure`, after `failures` in it.

    chi2(confidence, 2k+2) / 2 / T (Garwood 1936): 3.00/T for none, 4.74/T for one. Raises NoMeasurement without
    exposure.
    """
    _counted(failures, "failures")
    if not exposure > 0:
        raise NoMeasurement(f"no rate without exposure (it is {exposure})")
    return chi2_quantile(confidence, 2 * failures + 2) / 2.0 / exposure


def poisson_lower_rate(failures: int, exposure: float, confidence: float = 0.95) -> float:
    """Lower bound of that rate; 0.0 for no failure, infinite where there were some without exposure."""
    _counted(failures, "failures")
    if not failures or not exposure > 0:
        return math.inf if failures else 0.0
    return chi2_quantile(1.0 - confidence, 2 * failures) / 2.0 / exposure


def clopper_pearson_upper(hits: int, trials: int, confidence: float = 0.95) -> float:
    """One-sided upper bound of a proportion, exact binomial (Clopper and Pearson 1934); 1.0 when every trial hit.

    The upper end of a two-sided 95% interval is `confidence=0.975`. Raises NoMeasurement on no trials.
    """
    _proportion(hits, trials)
    _inside(confidence, "confidence")
    if hits == trials:
        return 1.0
    return _bisect(lambda p: _beta_lower(p, hits + 1.0, float(trials - hits)), confidence, 0.0, 1.0)


def clopper_pearson_lower(hits: int, trials: int, confidence: float = 0.95) -> float:
    """One-sided lower bound of a proportion, exact binomial; 0.0 when no trial hit."""
    return 1.0 - clopper_pearson_upper(trials - hits, trials, confidence)


def wilson(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided score interval (low, high) of a proportion (Wilson 1927). Raises NoMeasurement on no trials."""
    _inside(confidence, "confidence")
    return _wilson(hits, trials, normal_quantile((1.0 + confidence) / 2.0))


def newcombe_upper(
    candidate_hits: int, candidate_trials: int, incumbent_hits: int, incumbent_trials: int, confidence: float = 0.95
) -> float:
    """One-sided upper bound of (candidate's proportion - incumbent's), -1 to 1.

    Newcombe 1998, method 10: each proportion's Wilson bound on the side that hurts, combined in squares. The upper end
    of a two-sided 95% interval is `confidence=0.975`. Raises NoMeasurement when either has no trials.
    """
    z = normal_quantile(confidence)
    candidate_high = _wilson(candidate_hits, candidate_trials, z)[1]
    incumbent_low = _wilson(incumbent_hits, incumbent_trials, z)[0]
    candidate, incumbent = candidate_hits / candidate_trials, incumbent_hits / incumbent_trials
    return candidate - incumbent + math.hypot(candidate_high - candidate, incumbent - incumbent_low)


@dataclass(frozen=True)
class Slope:
    """Change of y per unit of x, with both ends of its confidence interval."""

    estimate: float
    low: float
    high: float
    n_points: int


def theil_sen(x: Sequence[float], y: Sequence[float], confidence: float = 0.95) -> Slope:
    """The median of all pairwise slopes, and Sen's two-sided interval from Kendall's variance (Sen 1968).

    The interval's ranks are rounded outwards, and it is infinite on both sides where the points are too few to bound
    the slope (under 5 at 95%). The points must be near independent: give it `bucket_medians`, not raw samples, whose
    autocorrelation makes it sure of slopes that are not there. Raises NoMeasurement on fewer than two distinct x.
    """
    return slope_within([(x, y)], confidence)


def slope_within(parts: Sequence[tuple[Sequence[float], Sequence[float]]], confidence: float = 0.95) -> Slope:
    """As `theil_sen`, over the pairs of points within each part (x, y); the variances of the parts are added.

    The slope of Hirsch, Slack and Smith (1982), whose parts are seasons.
    """
    _inside(confidence, "confidence")
    slopes: list[float] = []
    for x, y in parts:
        if len(x) != len(y):
            raise BadInput(f"a slope needs as many x as y, not {len(x)} and {len(y)}")
        if not all(math.isfinite(number) for number in (*x, *y)):
            raise BadInput("a slope needs finite points: leave out what was not measured")
        points = list(zip(x, y, strict=True))
        slopes += [(y2 - y1) / (x2 - x1) for i, (x1, y1) in enumerate(points) for x2, y2 in points[:i] if x2 != x1]
    n_points = sum(len(x) for x, _ in parts)
    if not slopes:
        raise NoMeasurement(f"no slope from {number_of(n_points, 'point')} without two different x")
    slopes.sort()
    variance = sum(_kendall_variance(x) for x, _ in parts)
    spread = normal_quantile((1.0 + confidence) / 2.0) * math.sqrt(variance)
    low_rank = math.floor((len(slopes) - spread) / 2.0) - 1
    high_rank = len(slopes) - 1 - low_rank
    bounded = low_rank >= 0
    return Slope(
        estimate=median(slopes),
        low=slopes[low_rank] if bounded else -math.inf,
        high=slopes[high_rank] if bounded else math.inf,
        n_points=n_points,
    )


def bucket_medians(times: Sequence[float], values: Sequence[float], width: float) -> tuple[list[float], list[float]]:
    """Middle of each bucket of `width` (unit of `times`) that holds samples, and the median of its values, in order.

    Buckets start at the earliest time; an empty bucket is left out, not filled.
    """
    if len(times) != len(values):
        raise BadInput(f"buckets need as many times as values, not {len(times)} and {len(values)}")
    if not width > 0:
        raise BadInput(f"the width of a bucket must be positive, not {width}")
    if not len(times):
        raise NoMeasurement("no samples to put into buckets")
    if any(math.isnan(number) for number in (*times, *values)):
        raise BadInput("a sample is NaN: leave out what was not measured")
    start = min(times)
    buckets: defaultdict[int, list[float]] = defaultdict(list)
    for time, value in zip(times, values, strict=True):
        buckets[int((time - start) // width)].append(value)
    middles = [start + (number + 0.5) * width for number in sorted(buckets)]
    return middles, [float(median(buckets[number])) for number in sorted(buckets)]


def _kendall_variance(x: Sequence[float]) -> float:
    """Variance of Kendall's S without a trend; equal x carry no order, so they are taken out (Sen 1968)."""
    ties = [sum(1 for other in x if other == value) for value in set(x)]
    n = len(x)
    return (n * (n - 1) * (2 * n + 5) - sum(u * (u - 1) * (2 * u + 5) for u in ties)) / 18.0


def _wilson(hits: int, trials: int, z: float) -> tuple[float, float]:
    _proportion(hits, trials)
    share = hits / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # at 0 and at all hits the bound is exact; the subtraction would leave a rounding error
    return (0.0 if hits == 0 else centre - half), (1.0 if hits == trials else centre + half)


def _inside(p: float, name: str) -> None:
    if not 0.0 < p < 1.0:
        raise BadInput(f"a {name} must lie between 0 and 1, not {p}")


def _counted(number: int, name: str) -> None:
    if number < 0 or number != int(number):
        raise BadInput(f"{name} are counted: 0, 1, 2, ..., not {number}")


def _proportion(hits: int, trials: int) -> None:
    _counted(hits, "hits")
    _counted(trials, "trials")
    if trials == 0:
        raise NoMeasurement("no proportion without trials")
    if hits > trials:
        raise BadInput(f"{hits} hits of {trials} trials: there cannot be more hits than trials")


def _invert(rising: Callable[[float], float], target: float) -> float:
    """The x > 0 where the rising function reaches `target`."""
    high = 1.0
    while rising(high) < target:
        high *= 2.0
    return _bisect(rising, target, 0.0, high)


def _bisect(rising: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Where the rising function reaches `target` between `low` and `high`, to the last bits of a float."""
    while True:
        middle = (low + high) / 2.0
        if not low < middle < high or high - low <= 1e-14 * high:
            return middle
        if rising(middle) < target:
            low = middle
        else:
            high = middle


def _t_tail(t: float, df: float) -> float:
    """P(T > t) for t >= 0."""
    square = t * t
    if square * (df + 2.0) < 3.0 * df:  # 1 - df / (df + t*t) would have lost the digits of a small t
        return 0.5 - 0.5 * _beta_lower(square / (df + square), 0.5, df / 2.0)
    return 0.5 * _beta_lower(df / (df + square), df / 2.0, 0.5)


def _beta_lower(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta I_x(a, b), by the continued fraction DLMF 8.17.22."""
    if x <= 0.0 or x >= 1.0:
        return 0.0 if x <= 0.0 else 1.0
    if x > (a + 1.0) / (a + b + 2.0):  # the fraction converges fast on this side only
        return 1.0 - _beta_lower(1.0 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))

    def coefficient(n: int) -> float:
        m = n // 2
        if n % 2 == 0:
            return m * (b - m) * x / ((a + n - 1) * (a + n))
        return -(a + m) * (a + b + m) * x / ((a + n - 1) * (a + n))

    return front / a / _continued_fraction(coefficient)


def _continued_fraction(coefficient: Callable[[int], float]) -> float:
    """1 + c1/(1 + c2/(1 + ...)) by the modified Lentz method."""
    tiny = 1e-300
    value, c, d = 1.0, 1.0, 0.0
    for n in range(1, 10_000):
        term = coefficient(n)
        d = 1.0 / (1.0 + term * d or tiny)
        c = 1.0 + term / c or tiny
        value *= c * d
        if abs(c * d - 1.0) < 1e-16:
            break
    return value


def _gamma_lower(a: float, x: float) -> float:
    """Regularised lower incomplete gamma P(a, x), by its series (DLMF 8.11.4); terms fall once n > x - a."""
    term = total = 1.0 / a
    n = 0
    while term > total * 1e-17:
        n += 1
        term *= x / (a + n)
        total += term
    return min(1.0, total * math.exp(a * math.log(x) - x - math.lgamma(a)))
