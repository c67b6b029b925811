"""Figures as a reader wants them."""

from __future__ import annotations

import math

import pytest

from engines.units import ago, duration, figure, quantity, size


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (None, "ms", "not measured"),
        (0.0, "failures", "0 failures"),
        (1, "failures", "1 failure"),
        (12345.678, "ms", "12,346 ms"),
        (0.97654, "share", "97.65 %"),
        (1.0512345, "ratio", "1.051×"),
        (1.5 * 2**30, "bytes", "1.50 GiB"),
        (5e7, "bytes/day", "50 MB/day"),
        (0.0000123, "nats", "1.23e-05 nats"),
        (0.00281, "nats", "0.00281 nats"),
    ],
)
def test_quantities_read_alike_everywhere(value: float | None, unit: str, shown: str) -> None:
    """Four significant digits, the unit behind; what is missing is said."""
    assert quantity(value, unit) == shown


def test_figures_keep_their_size() -> None:
    """Rounding does not lose a digit before the point."""
    assert [figure(n) for n in (100, 1000, 99999, 0.1, 123456789)] == ["100", "1,000", "99,999", "0.1", "123,456,789"]


def test_sizes_and_durations_choose_their_unit() -> None:
    """What is missing is said, and what has no end."""
    sizes = [size(n) for n in (None, 310, 2048, 47.6 * 2**20, 3 * 2**30, 5 * 2**40, 5 * 2**50)]
    assert sizes == ["not measured", "310 B", "2.0 KiB", "47.6 MiB", "3.00 GiB", "5.00 TiB", "5,120.00 TiB"]
    assert [duration(s) for s in (12, 150, 10_800, 259_200)] == ["12 s", "2.5 min", "3 h", "3 days"]
    assert figure(math.inf) == "infinite"


def test_ago_speaks_in_one_unit() -> None:
    """A clock that was set back is no negative time."""
    spoken = [ago(1000.0 - seconds, now=1000.0) for seconds in (-5, 0, 59, 60, 3600, 200_000)]
    assert spoken == ["0 s", "0 s", "59 s", "1 min", "1 h", "2 d"]
