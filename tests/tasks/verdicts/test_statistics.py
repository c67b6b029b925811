"""Every function against published values; the source stands beside the numbers."""

from __future__ import annotations

import math

import pytest

from engines.errors import BadInput, NoMeasurement
from tasks.verdicts.statistics import (
    binomial_tail,
    bucket_medians,
    chi2_cdf,
    chi2_quantile,
    clopper_pearson_lower,
    clopper_pearson_upper,
    newcombe_upper,
    normal_quantile,
    percentile,
    poisson_upper_rate,
    t_cdf,
    t_quantile,
    theil_sen,
    wilson,
)


@pytest.mark.parametrize(("q", "expected"), [(0.0, 1.0), (0.25, 1.75), (0.5, 2.5), (0.95, 3.85), (1.0, 4.0)])
def test_percentile_interpolates_between_the_two_nearest_samples(q: float, expected: float) -> None:
    """Hyndman and Fan's type 7, as numpy.percentile([4, 1, 3, 2], ...) gives it."""
    assert percentile([4.0, 1.0, 3.0, 2.0], q) == pytest.approx(expected)


def test_percentile_of_nothing_is_no_measurement() -> None:
    """Absent samples raise; they are not zero."""
    with pytest.raises(NoMeasurement):
        percentile([], 0.5)


@pytest.mark.parametrize(("samples", "q"), [([1.0, 2.0], 95), ([1.0, math.nan], 0.5)])
def test_percentile_refuses_what_has_no_meaning(samples: list[float], q: float) -> None:
    """95 in place of 0.95, and a NaN, which sorts anywhere."""
    with pytest.raises(BadInput):
        percentile(samples, q)


@pytest.mark.parametrize(
    ("p", "df", "expected"),
    [
        (0.975, 1, 12.7062047362),
        (0.95, 2, 2.9199855804),
        (0.975, 5, 2.5705818356),
        (0.99, 10, 2.7637694581),
        (0.95, 23, 1.7138715277),
        (0.9995, 30, 3.6459586350),
        (0.975, 120, 1.9799304051),
        (0.05, 11, -1.7958848187),
    ],
)
def test_t_quantile_agrees_with_the_table(p: float, df: int, expected: float) -> None:
    """Student's t table, NIST e-Handbook 1.3.6.7.2 with further digits."""
    assert t_quantile(p, df) == pytest.approx(expected, abs=1e-6)
    assert t_cdf(expected, df) == pytest.approx(p, abs=1e-9)


def test_t_quantile_with_many_degrees_of_freedom_is_the_normal_one() -> None:
    """t tends to the normal distribution."""
    assert t_quantile(0.975, 10_000_000) == pytest.approx(normal_quantile(0.975), abs=1e-6)


@pytest.mark.parametrize(
    ("p", "df", "expected"), [(0.95, 1, 3.841459), (0.95, 10, 18.307038), (0.05, 10, 3.940299), (0.99, 100, 135.806723)]
)
def test_chi2_quantile_agrees_with_the_table(p: float, df: int, expected: float) -> None:
    """Chi-squared table, NIST e-Handbook 1.3.6.7.4 with further digits."""
    assert chi2_quantile(p, df) == pytest.approx(expected, abs=1e-5)
    assert chi2_cdf(expected, df) == pytest.approx(p, abs=1e-6)


@pytest.mark.parametrize(("failures", "expected"), [(0, 3.00), (1, 4.74), (2, 6.30), (3, 7.75)])
def test_poisson_upper_rate_is_the_rule_of_three_and_its_sequel(failures: int, expected: float) -> None:
    """Garwood 1936; a rate over 4 hours is a quarter of the count's bound."""
    assert poisson_upper_rate(failures, 1.0) == pytest.approx(expected, abs=0.005)
    assert poisson_upper_rate(failures, 4.0) == pytest.approx(expected / 4, abs=0.002)


def test_a_rate_without_exposure_is_no_measurement() -> None:
    """No time watched, nothing known."""
    with pytest.raises(NoMeasurement):
        poisson_upper_rate(0, 0.0)


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    [(81, 263, 0.2527, 0.3676), (15, 148, 0.0578, 0.1617), (0, 20, 0.0, 0.1684), (1, 29, 0.0009, 0.1776)],
)
def test_clopper_pearson_agrees_with_newcombe(hits: int, trials: int, low: float, high: float) -> None:
    """Newcombe 1998, Statistics in Medicine 17:857, table I, method 5."""
    assert clopper_pearson_lower(hits, trials, 0.975) == pytest.approx(low, abs=6e-5)
    assert clopper_pearson_upper(hits, trials, 0.975) == pytest.approx(high, abs=6e-5)


@pytest.mark.parametrize(("trials", "share"), [(59, 0.05), (299, 0.01), (2995, 0.001)])
def test_so_many_clean_trials_prove_so_small_a_share(trials: int, share: float) -> None:
    """n = ln 0.05 / ln(1 - share): one trial fewer does not prove it."""
    assert clopper_pearson_upper(0, trials) <= share < clopper_pearson_upper(0, trials - 1)


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_agrees_with_newcombe(hits: int, trials: int, low: float, high: float) -> None:
    """Newcombe 1998, table I, method 3."""
    assert wilson(hits, trials) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize(
    ("b", "n_b", "a", "n_a", "high"),
    [(56, 70, 48, 80, 0.3339), (9, 10, 3, 10, 0.8090), (5, 56, 0, 29, 0.1926), (10, 10, 0, 10, 1.0)],
)
def test_newcombe_upper_agrees_with_its_author(b: int, n_b: int, a: int, n_a: int, high: float) -> None:
    """Newcombe 1998, Statistics in Medicine 17:873, table II, method 10, upper ends of 95% intervals."""
    assert newcombe_upper(b, n_b, a, n_a, 0.975) == pytest.approx(high, abs=6e-5)


def test_a_proportion_without_trials_is_no_measurement() -> None:
    """0 of 0 is not 0%."""
    for bound in (lambda: wilson(0, 0), lambda: clopper_pearson_upper(0, 0), lambda: newcombe_upper(0, 0, 1, 2)):
        with pytest.raises(NoMeasurement):
            bound()


def test_more_hits_than_trials_are_refused() -> None:
    """A miscount is told, not turned into a share over 1."""
    with pytest.raises(BadInput, match="more hits"):
        wilson(3, 2)


def test_theil_sen_agrees_with_sen() -> None:
    """Sen 1968, JASA 63:1379, its worked example: slope 4, 93% interval 26/7 to 35/8."""
    slope = theil_sen([1, 2, 3, 4, 10, 12, 18], [9, 15, 19, 20, 45, 55, 78], confidence=0.93)
    assert (slope.estimate, slope.low, slope.high) == pytest.approx((4.0, 26 / 7, 35 / 8))


def test_theil_sen_ignores_a_wild_point() -> None:
    """A single spike does not move the median slope."""
    x = [float(i) for i in range(21)]
    y = [2.0 * value for value in x]
    y[10] = 1e9
    assert theil_sen(x, y).estimate == pytest.approx(2.0)


def test_three_points_do_not_bound_a_slope() -> None:
    """Too few points give an infinite interval, so that no verdict can rest on it."""
    slope = theil_sen([0.0, 1.0, 2.0], [5.0, 5.1, 5.2])
    assert (slope.low, slope.high) == (-math.inf, math.inf)


def test_a_slope_needs_two_different_times() -> None:
    """Points on top of each other have no slope."""
    with pytest.raises(NoMeasurement):
        theil_sen([1.0, 1.0], [1.0, 2.0])


def test_bucket_medians_leave_empty_buckets_out() -> None:
    """Hours 0 and 2 hold samples, hour 1 does not."""
    assert bucket_medians([0.0, 0.5, 0.9, 2.1], [1.0, 9.0, 2.0, 4.0], 1.0) == ([0.5, 2.5], [2.0, 4.0])


@pytest.mark.parametrize(
    ("hits", "trials", "share", "expected"),
    [
        (3, 5, 0.5, 0.5),
        (5, 5, 0.5, 1 / 32),
        (0, 5, 0.5, 1.0),
        (2, 3, 0.25, 10 / 64),
        (0, 0, 0.5, 1.0),
    ],
)
def test_binomial_tail_is_the_sum_of_its_terms(hits: int, trials: int, share: float, expected: float) -> None:
    assert binomial_tail(hits, trials, share) == pytest.approx(expected, abs=1e-12)


def test_binomial_tail_takes_thousands_of_trials() -> None:
    """Of 10 000 fair trials half or more: a little over one half (half of P(X = 5000), which is 0.79788% )."""
    assert binomial_tail(5000, 10_000, 0.5) == pytest.approx(0.5 + 0.0079788 / 2, abs=1e-6)
