"""Steps and ramps over the nights: found where they are, not where they are not, and said with their size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats

from tasks.verdicts.drift import (
    ALARMS,
    BEFORE,
    FIRST,
    RAMP,
    SINCE,
    Night,
    alarm_limit,
    changes,
    failing,
    inflated,
    strongest,
)

DAY_S = 86_400.0
LIMIT = alarm_limit(36)


def nights(logs: Sequence[float], builds: Sequence[str] = (), level: float = 100.0) -> list[Night]:
    return [
        Night(at * DAY_S, level * math.exp(log), build=builds[at] if builds else "1") for at, log in enumerate(logs)
    ]


def noise(n: int, seed: int = 0, sd: float = 0.035) -> np.ndarray:
    return sd * np.random.default_rng(seed).standard_normal(n)


def test_a_ramp_is_found_with_its_slope():
    """2% a week from night 60 on: said as a ramp of about that, before six weeks are over."""
    logs = noise(102)
    logs[60:] += 0.02 / 7 * np.arange(1, 43)
    ((change, *_),) = changes([nights(logs)], LIMIT)
    assert change.shape == "ramp"
    assert 60 < change.found / DAY_S < 102
    assert change.per_week == pytest.approx(0.02, rel=0.5)
    assert abs(change.since / DAY_S - 60) <= 15
    assert change.now > change.before


def test_a_step_is_found_within_a_week_with_both_levels():
    logs = noise(80)
    logs[60:] += math.log(1.15)
    ((change,),) = changes([nights(logs)], LIMIT)
    assert change.shape == "step"
    assert 60 < change.found / DAY_S < 67
    assert abs(change.since / DAY_S - 60) <= 1
    assert change.before == pytest.approx(100, rel=0.02)
    assert change.now == pytest.approx(115, rel=0.04)
    assert change.z >= change.limit == LIMIT


def test_what_falls_is_a_change_below_zero():
    logs = noise(80)
    logs[60:] -= math.log(1.15)
    ((change,),) = changes([nights(logs)], LIMIT)
    assert change.z <= -LIMIT
    assert change.now < change.before


def test_a_later_night_takes_nothing_back():
    """What a night said stands: said once, it need not be said again."""
    logs = noise(160, 4)
    logs[50:] += 0.2
    logs[100:] += 0.01 * np.arange(60)
    series = nights(logs)
    known = [changes([series[:n]], LIMIT)[0] for n in range(FIRST, 160, 3)]
    assert all(later[: len(earlier)] == earlier for earlier, later in pairwise(known))
    assert len(known[-1]) >= 2


def test_another_build_begins_anew():
    """A jump with the build is none of the engine's over the nights; one within a build is."""
    logs = noise(120)
    logs[60:] += 0.3
    assert changes([nights(logs, ["1"] * 60 + ["2"] * 60)], LIMIT) == [[]]
    assert changes([nights(logs)], LIMIT) != [[]]


def test_too_few_nights_show_nothing():
    logs = [0.0] * (FIRST - 3) + [1.0, 1.0]
    assert changes([nights(logs)], LIMIT) == [[]]


def test_an_outlier_is_no_change():
    logs = noise(80)
    logs[70] += 2.0
    logs[75] -= 2.0
    assert changes([nights(logs)], LIMIT) == [[]]


def test_what_never_moves_shows_a_step_and_no_crumb():
    """Memory: the same figure every night. One per cent is nothing, fifteen are a step."""
    assert changes([nights([0.0] * 60 + [0.01] * 20)], LIMIT) == [[]]
    ((change,),) = changes([nights([0.0] * 60 + [math.log(1.15)] * 6)], LIMIT)
    assert change.now == pytest.approx(115)


def test_series_of_different_lengths_share_their_autocorrelation():
    """One that begins late, and one that was not measured some nights, are judged beside the others."""
    whole, late = nights(noise(100, 1)), nights(noise(100, 2))[40:]
    drifting = noise(100, 3)
    drifting[60:] += 0.15
    gaps = [night for number, night in enumerate(nights(drifting)) if number % 5]
    found = changes([whole, late, gaps], LIMIT)
    assert found[:2] == [[], []]
    assert [change.shape for change in found[2]] == ["step"]


@pytest.mark.parametrize("seed", range(3))
def test_z_is_that_of_least_squares(seed):
    """The largest t of every step and ramp, by statsmodels, as a normal quantile, by scipy."""
    rng = np.random.default_rng(seed)
    y = 0.03 * rng.uniform(-1, 1, 50)  # nothing to cut off
    y[35:] += 0.02 * seed
    best = 0.0
    for m in SINCE:
        for x in ((np.arange(50) >= 50 - m) * 1.0, np.maximum(np.arange(1, 51) - (50 - m), 0)):
            if m <= 50 - BEFORE and (x.max() == 1 or m >= RAMP):
                t = sm.OLS(y, sm.add_constant(x)).fit().tvalues[1]
                best = t if abs(t) > abs(best) else best
    t = sm.OLS(y, sm.add_constant(np.arange(1, 51))).fit().tvalues[1]
    best = t if abs(t) > abs(best) else best
    fits = strongest(y[None])
    assert fits.z[0] == pytest.approx(stats.norm.isf(stats.t.sf(best, 48)), abs=0.02)


def test_alike_nights_count_for_less():
    """At an autocorrelation of 0.6 the error of a mean is twice as large; below 0 it is not taken to be smaller."""
    assert inflated(4.0, 0.6, 0.6, 100) == pytest.approx(2.0)
    assert inflated(4.0, 0.7, 0.0, 100) == pytest.approx(2.0)
    assert inflated(4.0, -0.5, -0.5, 100) == 4.0
    rng = np.random.default_rng(5)
    logs = rng.standard_normal((200, 80))
    for night in range(1, 80):
        logs[:, night] = 0.3 * logs[:, night - 1] + math.sqrt(1 - 0.09) * logs[:, night]
    assert strongest(0.03 * logs).alike.mean() == pytest.approx(0.3, abs=0.1)


def test_more_series_have_a_higher_limit():
    """So that all of them together have one false alarm a year."""
    for n_series in (1, 2, 36):
        assert n_series * ALARMS * math.exp(-(alarm_limit(n_series) ** 2) / 2) == pytest.approx(1.0)


def test_quiet_plans_have_few_false_alarms():
    """Three plan-years of 12 series: `benchmarks/nights.py` shows the rate, this that it is not lost."""
    limit, alarms = alarm_limit(12), 0
    for seed in range(3):
        logs = 0.035 * np.random.default_rng(seed).standard_normal((12, 365))
        alarms += sum(one.now > one.before for found in changes([nights(one) for one in logs], limit) for one in found)
    assert alarms <= 8  # of 3 expected at most; more come once in two hundred times


def counted(failed: Sequence[int], builds: Sequence[str] = ()) -> list[Night]:
    return [Night(at * DAY_S, float(number), build=builds[at] if builds else "1") for at, number in enumerate(failed)]


def test_nights_that_fail_one_after_the_other_are_a_change():
    (change,) = failing(counted([0] * 60 + [3, 1, 1, 2]), LIMIT)
    assert change.shape == "failures"
    assert (change.before, change.now, change.nights, change.nights_before) == (0.0, 1.0, 4, 60)
    assert change.since == 60 * DAY_S


def test_one_bad_night_is_none_however_much_fails():
    assert failing(counted([0] * 60 + [500]), LIMIT) == []
    assert failing(counted([0] * 60 + [500] * 6, ["1"] * 60 + ["2"] * 6), LIMIT) == []


def test_failures_as_ever_are_no_change():
    rng = np.random.default_rng(2)
    assert failing(counted([int(one) for one in rng.random(365) < 0.1]), LIMIT) == []
