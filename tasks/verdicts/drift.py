"""Has an engine changed over the nights? Steps and ramps in nightly figures, at a known rate of false alarms.

After each night the logarithms of a series since its last change of build or plan are fitted by least squares, for
every night k with which a change may have begun, by

    step   y = a + b [night >= k]          ramp   y = a + b max(0, night - k + 1)

and the evidence is the largest b over its standard error, as a normal quantile z. A ramp is no step: each shape finds
the other late. Outliers are cut at 2.5 robust standard deviations. Nights that follow each other are alike, so z is
divided by the inflation sqrt((1 + r) / (1 - r)) of the error of a mean at the autocorrelation r of the residuals. One
series knows its own r to +-0.13 only after 56 nights: r is the mean over all series, or a series' own where that is
larger by more than its error.

A change is found where |z| reaches the alarm limit, which depends on the number of series alone and holds the false
alarms of all of them together to one a year of nights (`benchmarks/nights.py` shows it). The series then begins anew.
Each night adds to what earlier ones said and takes nothing back.

Pure. The ideas: Siegmund and Venkatraman 1995 (scanning for a change), Andrews 1993 (unknown break), Sullivan and
Woodall 1996 (re-estimating the baseline).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tasks.verdicts.statistics import normal_quantile

FIRST = 14  # nights of one build and plan before anything is judged
BEFORE = 7  # nights at least before a change
RAMP = 5  # nights at least of a ramp
LEAST = math.log(1.02)  # a smaller change is none that anybody would notice
# nights since a change that are tried; between two of them the nearer one loses little
SINCE = (2, 3, 4, 5, 6, 8, 10, 12, 14, 17, 21, 26, 32, 38, 45, 55, 70, 90)
CUT = 2.5
LEAST_SD = 0.005  # of a series that hardly moves (memory), or not at all
MOST_ALIKE = 0.6  # autocorrelation
# at z every series gives about ALARMS * exp(-z * z / 2) false alarms a year
ALARMS = 180.0

Floats = NDArray[np.float64]
Shape = Literal["step", "ramp", "failures"]


@dataclass(frozen=True)
class Night:
    """One figure of a series: when (s since the epoch), how much, and the build and plan that it is of."""

    at: float
    value: float
    build: str = ""
    plan: str = ""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What was found after the night `found` (s since the epoch): since which night, and the level before and now.

    `before` and `now` are in the unit of the series; of failures, the shares of nights. `nights` and `nights_before`
    count what it rests on.
    """

    shape: Shape
    since: float
    found: float
    before: float
    now: float
    nights: int
    nights_before: int
    z: float
    limit: float

    @property
    def per_week(self) -> float:
        """The change of a ramp in seven nights, as a share: 0.01 is 1% up."""
        return math.expm1(math.log(self.now / self.before) * 7 / self.nights)


def alarm_limit(n_series: int) -> float:
    """The |z| from which a change is found, where `n_series` are looked at every night."""
    return math.sqrt(2 * math.log(ALARMS * max(n_series, 1)))


def changes(series: Sequence[Sequence[Night]], limit: float) -> list[list[Change]]:
    """Series by series the changes found, in order of time. Values are positive; nights are in order."""
    found: list[list[Change]] = [[] for _ in series]
    where = [{night.at: index for index, night in enumerate(nights)} for nights in series]
    logs = [np.log([night.value for night in nights]) for nights in series]
    began = [0] * len(series)
    for at in sorted(set().union(*where)):
        due = defaultdict(list)
        for number, nights in enumerate(series):
            if (last := where[number].get(at)) is not None:
                if last and _of(nights[last]) != _of(nights[last - 1]):
                    began[number] = last
                due[last + 1 - began[number]].append(number)
        judged: dict[int, tuple[int, Strongest, int]] = {}
        for n, numbers in due.items():
            if n >= FIRST:
                fits = strongest(np.array([logs[one][began[one] : began[one] + n] for one in numbers]))
                judged |= {one: (n, fits, row) for row, one in enumerate(numbers)}
        alike = float(np.mean([fits.alike[row] for _, fits, row in judged.values()])) if judged else 0.0
        for number, (n, fits, row) in judged.items():
            z = float(inflated(fits.z[row], fits.alike[row], alike, n))
            if abs(z) >= limit:
                part = series[number][began[number] : began[number] + n]
                change = _change(part, fits, row, z, limit)
                if abs(math.log(change.now / change.before)) >= LEAST:
                    found[number].append(change)
                    began[number] += n
    return found


def _of(night: Night) -> tuple[str, str]:
    return night.build, night.plan


def _change(nights: Sequence[Night], fits: Strongest, row: int, z: float, limit: float) -> Change:
    since, values = int(fits.since[row]), [night.value for night in nights]
    if fits.is_ramp[row]:
        before = math.exp(float(fits.level[row]))
        now = before * math.exp(float(fits.slope[row]) * since)
    else:  # the levels as they are, without the cut
        before, now = float(np.median(values[:-since])), float(np.median(values[-since:]))
    return Change(
        shape="ramp" if fits.is_ramp[row] else "step",
        since=nights[-since].at,
        found=nights[-1].at,
        before=before,
        now=now,
        nights=since,
        nights_before=len(nights) - since,
        z=z,
        limit=limit,
    )


@dataclass(frozen=True)
class Strongest:
    """Row by row the fit with the largest |z|: z without regard to autocorrelation, which is `alike`.

    `level` and `slope` are a and b; `since` counts the nights since the change began.
    """

    z: Floats
    alike: Floats
    is_ramp: NDArray[np.bool_]
    since: NDArray[np.int64]
    level: Floats
    slope: Floats


def strongest(logs: Floats) -> Strongest:
    """The strongest change in each row of logarithms (series x nights)."""
    n = logs.shape[1]
    middle = np.median(logs, axis=1, keepdims=True)
    spread = 1.4826 * np.median(np.abs(logs - middle), axis=1, keepdims=True)
    cut = np.maximum(CUT * spread, LEAST)
    y = np.clip(logs - middle, -cut, cut)
    steps = np.array([m for m in SINCE if m <= n - BEFORE])
    ramps = np.array([*(m for m in SINCE if RAMP <= m <= n - BEFORE), n])
    since = np.concatenate([steps, ramps])
    is_ramp = np.arange(len(since)) >= len(steps)
    # sums over the latest m nights, of y and of y times a ramp's height
    tail = np.cumsum(y[:, ::-1], axis=1)
    sum_x = np.where(is_ramp, since * (since + 1) / 2, since)
    sum_xx = np.where(is_ramp, since * (since + 1) * (2 * since + 1) / 6, since) - sum_x**2 / n
    sum_xy = np.concatenate([tail[:, steps - 1], np.cumsum(tail, axis=1)[:, ramps - 1]], axis=1)
    total = y.sum(axis=1, keepdims=True)
    sum_xy -= sum_x * total / n
    slope = sum_xy / sum_xx
    rest = (y * y).sum(axis=1, keepdims=True) - total**2 / n - slope * sum_xy
    t = slope * np.sqrt(sum_xx / np.maximum(rest / (n - 2), LEAST_SD**2))
    best = np.abs(t).argmax(axis=1)
    rows = np.arange(len(y))
    b, m = slope[rows, best], since[best]
    height = np.arange(1, n + 1) - n + m[:, None]
    x = np.where(is_ramp[best][:, None], np.maximum(height, 0), height > 0)
    left = y - b[:, None] * x
    mean = left.mean(axis=1, keepdims=True)
    left -= mean
    alike = (left[:, 1:] * left[:, :-1]).sum(axis=1) / np.maximum((left * left).sum(axis=1), 1e-30)
    return Strongest(
        z=_as_normal(t[rows, best], n - 2),
        alike=alike + (1 + 3 * alike) / n,  # without the bias of few nights
        is_ramp=is_ramp[best],
        since=m,
        level=(middle + mean)[:, 0],
        slope=b,
    )


def inflated(z: Floats | float, own: Floats | float, mean: Floats | float, n: int) -> Floats:
    """z with regard to autocorrelation: the mean over all series, or a series' `own` where that is surely larger."""
    alike = np.clip(np.maximum(mean, own - 1 / math.sqrt(n)), 0.0, MOST_ALIKE)
    result: Floats = z * np.sqrt((1 - alike) / (1 + alike))
    return result


def _as_normal(t: Floats, df: int) -> Floats:
    """The normal quantile with the tail of Student's t (Wallace 1959); exact to 0.02 from 12 degrees of freedom."""
    z: Floats = np.sign(t) * (8 * df + 1) / (8 * df + 3) * np.sqrt(df * np.log1p(t**2 / df))
    return z


def failing(nights: Sequence[Night], limit: float) -> list[Change]:
    """Changes to more failures; the value of a night is the number of its failed requests.

    Nights with failures are counted, not requests: one crash fails many. Given how many there are in all, their number
    among the latest m nights is hypergeometric where nothing has changed.
    """
    found: list[Change] = []
    began = 0
    for last, night in enumerate(nights):
        if last and _of(night) != _of(nights[last - 1]):
            began = last
        part = nights[began : last + 1]
        if len(part) < FIRST or not night.value:
            continue
        bad = [one.value > 0 for one in part]
        tries = [m for m in SINCE if m <= len(part) - BEFORE]
        m = min(tries, key=lambda m: _tail(sum(bad[-m:]), sum(bad), m, len(part)))
        z = -normal_quantile(max(_tail(sum(bad[-m:]), sum(bad), m, len(part)), 1e-300))
        if z >= limit:
            found.append(
                Change(
                    shape="failures",
                    since=part[-m].at,
                    found=night.at,
                    before=sum(bad[:-m]) / (len(part) - m),
                    now=sum(bad[-m:]) / m,
                    nights=m,
                    nights_before=len(part) - m,
                    z=z,
                    limit=limit,
                )
            )
            began = last + 1
    return found


def _tail(hits: int, marked: int, drawn: int, of: int) -> float:
    """P(at least `hits` marked ones) in `drawn` of `of`, `marked` of which are."""
    ways = sum(math.comb(marked, k) * math.comb(of - marked, drawn - k) for k in range(hits, min(marked, drawn) + 1))
    return min(ways / math.comb(of, drawn), 1.0 - 1e-16)
