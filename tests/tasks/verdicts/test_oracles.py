"""Our statistics against SciPy's, statsmodels' and gsDesign's, over grids that hypothesis draws."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tasks.evidence.canary import _Share
from tasks.evidence.soak.judge import DAY_S, judge_stability
from tasks.evidence.soak.judge_windows import LOOK_CONFIDENCE
from tasks.verdicts.limits import CanaryLimits
from tasks.verdicts.noninferiority import look_bounds, pass_chance, spent_alpha
from tasks.verdicts.statistics import (
    binomial_tail,
    chi2_cdf,
    chi2_quantile,
    clopper_pearson_lower,
    clopper_pearson_upper,
    newcombe_upper,
    normal_quantile,
    percentile,
    poisson_lower_rate,
    poisson_upper_rate,
    t_cdf,
    t_quantile,
    theil_sen,
    wilson,
)
from tasks.verdicts.verdict import Verdict

stats = pytest.importorskip("scipy.stats", reason="pip install -e '.[test]'")
proportion = pytest.importorskip("statsmodels.stats.proportion", reason="pip install -e '.[test]'")
gsdesign = pytest.importorskip("gsdesign", reason="pip install -e '.[test]'")
grid = settings(max_examples=30, deadline=None, derandomize=True)
probabilities = st.floats(1e-4, 1 - 1e-4)
freedoms = st.integers(1, 400) | st.floats(1, 400)
counts = st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
numbers = st.floats(-1e6, 1e6, allow_subnormal=False)


@grid
@given(st.lists(numbers, min_size=1, max_size=40), st.floats(0, 1))
def test_percentiles_are_numpys(samples: list[float], q: float) -> None:
    assert percentile(samples, q) == pytest.approx(np.quantile(samples, q), rel=1e-9, abs=1e-6)


@grid
@given(probabilities, freedoms, st.floats(-50, 50))
@example(0.5, 92, 1e-05)
def test_students_t_is_scipys(p: float, df: float, t: float) -> None:
    assert t_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-8, abs=1e-9)
    assert t_cdf(t, df) == pytest.approx(stats.t.cdf(t, df), abs=1e-10)


@grid
@given(probabilities, st.integers(1, 400))
def test_normal_and_chi_squared_quantiles_are_scipys(p: float, df: int) -> None:
    assert normal_quantile(p) == pytest.approx(stats.norm.ppf(p), abs=1e-9)
    assert chi2_quantile(p, df) == pytest.approx(stats.chi2.ppf(p, df), rel=1e-9)
    assert chi2_cdf(float(df), df) == pytest.approx(stats.chi2.cdf(df, df), abs=1e-12)


@grid
@given(counts, st.floats(0.001, 0.999))
def test_the_binomial_tail_is_scipys(count: tuple[int, int], share: float) -> None:
    """By way of the incomplete beta function."""
    assert binomial_tail(*count, share) == pytest.approx(stats.binom.sf(count[0] - 1, count[1], share), abs=1e-11)


@grid
@given(counts, st.sampled_from((0.8, 0.9, 0.95, 0.99, 0.9998)))
def test_bounds_of_a_proportion_are_statsmodels(count: tuple[int, int], confidence: float) -> None:
    """Wilson's and Clopper and Pearson's, two-sided."""
    low, high = proportion.proportion_confint(*count, alpha=1 - confidence, method="wilson")
    assert wilson(*count, confidence) == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))
    low, high = proportion.proportion_confint(*count, alpha=1 - confidence, method="beta")
    one_sided = (1 + confidence) / 2
    assert clopper_pearson_lower(*count, one_sided) == pytest.approx(low, abs=1e-9)
    assert clopper_pearson_upper(*count, one_sided) == pytest.approx(high, abs=1e-9)


@grid
@given(counts, counts)
def test_the_bound_of_a_difference_is_newcombes(ours: tuple[int, int], theirs: tuple[int, int]) -> None:
    _, high = proportion.confint_proportions_2indep(*ours, *theirs, compare="diff", method="newcomb", alpha=0.1)
    assert newcombe_upper(*ours, *theirs) == pytest.approx(high, abs=1e-9)


@grid
@given(st.integers(0, 400), st.floats(0.01, 1e4))
def test_bounds_of_a_rate_leave_five_percent_on_each_side(failures: int, exposure: float) -> None:
    upper = poisson_upper_rate(failures, exposure) * exposure
    assert stats.poisson.cdf(failures, upper) == pytest.approx(0.05, abs=1e-9)
    lower = poisson_lower_rate(failures, exposure) * exposure
    assert not failures or stats.poisson.sf(failures - 1, lower) == pytest.approx(0.05, abs=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_theil_and_sens_slope_is_scipys_and_its_interval_no_narrower(seed: int) -> None:
    """SciPy rounds the ranks to the nearest, ours round outwards, and ties of y narrow SciPy's variance."""
    drawn = random.Random(seed)
    x = [float(drawn.randrange(30)) for _ in range(drawn.randrange(10, 40))]
    y = [at * seed / 10 + drawn.randrange(-9, 9) for at in x]
    theirs, ours = stats.theilslopes(y, x, 0.95), theil_sen(x, y)
    assert ours.estimate == pytest.approx(theirs.slope, abs=1e-12)
    assert ours.low <= theirs.low_slope + 1e-12
    assert ours.high >= theirs.high_slope - 1e-12


# --- looks


@pytest.mark.parametrize("looks", [(24,), (12, 24), (6, 12, 24), (6, 12, 18, 24), (3, 30)])
def test_the_alpha_that_looks_spend_is_a_multivariate_normals(looks: tuple[int, ...]) -> None:
    bounds = look_bounds(looks)
    shares = [look / looks[-1] for look in looks]
    cov = [[math.sqrt(min(a, b) / max(a, b)) for b in shares] for a in shares]
    drawn = stats.multivariate_normal(cov=cov, allow_singular=True, seed=1)
    assert spent_alpha(looks, bounds) == pytest.approx(1 - drawn.cdf(list(bounds)), abs=2e-4)
    assert spent_alpha(looks, bounds) == pytest.approx(0.05, abs=1e-4)


@pytest.mark.parametrize("looks", [(8, 16, 24), (6, 12, 24), (5, 10, 15, 20, 25)])
def test_the_alpha_that_looks_spend_is_gs_designs(looks: tuple[int, ...]) -> None:
    """By the integration of the R package of that name (Jennison and Turnbull 2000, chapter 19)."""
    bounds, shares = look_bounds(looks), [look / looks[-1] for look in looks]
    spent = gsdesign.h1(18, 0.0, shares[0], bounds[0], math.inf)[2].sum()
    going = gsdesign.h1(18, 0.0, shares[0], -math.inf, bounds[0])
    for before, share, bound in zip(shares, shares[1:], bounds[1:], strict=False):
        spent += gsdesign.hupdate(18, 0.0, share, bound, math.inf, 0.0, before, going)[2].sum()
        going = gsdesign.hupdate(18, 0.0, share, -math.inf, bound, 0.0, before, going)
    assert spent_alpha(looks, bounds) == pytest.approx(spent, abs=2e-5)


@pytest.mark.parametrize(("sd", "n"), [(0.05, 6), (0.1, 12), (0.2, 24)])
def test_the_chance_to_pass_is_a_noncentral_ts(sd: float, n: int) -> None:
    shift, df = math.log1p(0.1) * math.sqrt(n) / sd, n - 1
    assert pass_chance(sd, 0.1, n) == pytest.approx(stats.nct.sf(stats.t.ppf(0.95, df), df, shift), abs=1e-4)


# --- looked at again and again, by simulation: the 99% upper bound of the share of wrong alarms


def wrong_share(alarms: Sequence[bool]) -> float:
    return clopper_pearson_upper(sum(alarms), len(alarms), 0.99)


def canary_alarm(seed: int, *, share: float, weight: float, requests: int = 1000) -> bool:
    """Whether equal engines that both lose a share of requests ever fail a canary that is asked all the time."""
    drawn = np.random.default_rng(seed)
    on_new, lost = drawn.random(requests) < weight, drawn.random(requests) < share
    asked, hits = np.cumsum(on_new), np.cumsum(on_new & lost)
    theirs, their_hits = np.cumsum(~on_new), np.cumsum(~on_new & lost)
    # a verdict can turn to FAIL only where the candidate failed just now
    seen = zip(*(one[on_new & lost].tolist() for one in (hits, asked, their_hits, theirs)), strict=True)
    return any(_Share(*one).is_clear(CanaryLimits().failure_rate_margin) for one in seen)


@pytest.mark.parametrize(("share", "weight"), [(0.02, 0.05), (0.02, 0.5), (0.2, 0.2)])
def test_a_canary_of_equal_engines_fails_in_under_two_percent(share: float, weight: float) -> None:
    assert wrong_share([canary_alarm(seed, share=share, weight=weight) for seed in range(300)]) < 0.02


def soak_alarm(seed: int, *, per_day: float, incumbent_s: float) -> bool:
    """Whether failures that come as often on either engine, half as often as they may, ever end a soak of 30 hours."""
    drawn = np.random.default_rng(seed)
    soaked = {"requests": 1000, "silent_empty": 0, "decode_tok_s": []}
    failure = {"type": "http", "error": "HTTP 500"}
    theirs = {**soaked, "exposure_s": incumbent_s, "failures": [failure] * drawn.poisson(per_day * incumbent_s / DAY_S)}
    at = np.sort(drawn.random(drawn.poisson(per_day * 1.25))) * 1.25 * DAY_S
    looks = ({**soaked, "exposure_s": s, "failures": [failure] * k} for k, s in enumerate(at.tolist(), 1))
    return any(
        judge_stability(
            [theirs],
            [ours],
            soak_s=3 * DAY_S,
            failures_per_day=2 * per_day,
            throughput_retention=0.9,
            confidence=LOOK_CONFIDENCE,
        )[0].verdict
        is Verdict.FAIL
        for ours in looks
    )


@pytest.mark.parametrize(("per_day", "hours"), [(1, 3), (10, 72), (40, 3), (40, 72)])
def test_a_soak_of_equal_engines_is_ended_by_its_failures_in_under_five_percent(per_day: float, hours: float) -> None:
    """Looked at after each failure; with 95% at each look it was up to 32%."""
    alarms = [soak_alarm(seed, per_day=per_day, incumbent_s=hours * 3600) for seed in range(300)]
    assert wrong_share(alarms) < 0.05
