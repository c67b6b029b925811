"""Verdicts: the worst required one wins, and what was not measured is never a pass."""

from __future__ import annotations

import itertools
import math

import pytest
from pydantic import ValidationError

from tasks.verdicts.verdict import CheckResult, Verdict, at_least, at_most, gate, not_measured, worst

BEST_TO_WORST = (Verdict.PASS, Verdict.INCONCLUSIVE, Verdict.ERROR, Verdict.FAIL)


def result(verdict: Verdict, *, required: bool = True) -> CheckResult:
    """A check with nothing but a verdict."""
    return CheckResult(check="c", verdict=verdict, why="because", required=required)


def test_verdicts_are_ordered_best_to_worst() -> None:
    """PASS, INCONCLUSIVE, ERROR, FAIL."""
    assert tuple(sorted(Verdict, key=lambda verdict: verdict.badness)) == BEST_TO_WORST


@pytest.mark.parametrize("pair", list(itertools.combinations(BEST_TO_WORST, 2)))
def test_the_worst_wins_in_any_order(pair: tuple[Verdict, Verdict]) -> None:
    """The second of each pair is the worse one."""
    better, worse = pair
    assert worst([better, worse]) is worst([worse, better]) is worse
    assert gate([result(better), result(worse)]) is worse


def test_nothing_measured_is_inconclusive() -> None:
    """An empty gate does not open, and neither does one of optional checks alone."""
    assert worst([]) is Verdict.INCONCLUSIVE
    assert gate([]) is Verdict.INCONCLUSIVE
    assert gate([result(Verdict.PASS, required=False)]) is Verdict.INCONCLUSIVE


def test_what_is_not_required_does_not_hold_the_gate() -> None:
    """It is reported beside it."""
    assert gate([result(Verdict.PASS), result(Verdict.FAIL, required=False)]) is Verdict.PASS


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["value", "limit"])
def test_a_number_that_is_not_finite_is_refused(number: float, place: str) -> None:
    """NaN compares False with everything, so it would pass any `>`."""
    numbers = {"value": 1.0, "limit": 1.0, place: number}
    with pytest.raises(ValidationError, match="finite number"):
        CheckResult(check="c", verdict=Verdict.PASS, why="", **numbers)


def test_a_nan_cannot_come_out_of_a_comparison() -> None:
    """It would have been a FAIL for want of a true comparison, with a value nobody can read."""
    for compare in (at_most, at_least):
        with pytest.raises(ValidationError):
            compare("c", math.nan, limit=1.0, unit="ms")


@pytest.mark.parametrize(
    ("value", "most", "least"),
    [
        (0.9, Verdict.PASS, Verdict.FAIL),
        (1.0, Verdict.PASS, Verdict.PASS),
        (1.1, Verdict.FAIL, Verdict.PASS),
        (None, Verdict.INCONCLUSIVE, Verdict.INCONCLUSIVE),
        (0.0, Verdict.PASS, Verdict.FAIL),
    ],
)
def test_a_limit_itself_is_allowed(value: float | None, most: Verdict, least: Verdict) -> None:
    """Absent is not zero: None is INCONCLUSIVE where 0 has a verdict."""
    assert at_most("c", value, limit=1.0, unit="ms").verdict is most
    assert at_least("c", value, limit=1.0, unit="ms").verdict is least


def test_a_result_says_why_with_its_numbers() -> None:
    """And their unit, whatever words the judge had."""
    assert at_most("c", 2.0, limit=1.0, unit="ms").why == "2 ms, limit 1 ms"
    assert at_least("c", 2.0, limit=1.0, unit="ms").why == "2 ms, limit 1 ms"
    assert at_most("c", 2.0, limit=1.0, unit="ms", why="p95").why == "p95; 2 ms, limit 1 ms"
    assert at_least("c", 0.5, limit=0.97, unit="share", why="half, limit 97%").why == "half, limit 97%"
    assert CheckResult(check="c", verdict=Verdict.PASS, value=2.0, unit="ms", why="seen").why == "seen"
    again = at_most("c", 11400.0, limit=1.0, unit="ms", why="p95")
    assert CheckResult.model_validate(again.model_dump()).why == again.why == "p95; 11,400 ms, limit 1 ms"
    assert at_most("c", None, limit=1.0, unit="ms").why == "no samples"


def test_not_measured_keeps_its_limit_and_has_no_value() -> None:
    """So that a report can say what it would have been held against."""
    absent = not_measured("c", "no block", limit=1.1, unit="ratio")
    assert (absent.verdict, absent.value, absent.limit, absent.required) == (Verdict.INCONCLUSIVE, None, 1.1, True)


def test_a_result_survives_json() -> None:
    """Stored as returned."""
    for made in (result(Verdict.ERROR, required=False), at_most("c", 1.0, limit=2.0, unit="ms")):
        assert CheckResult.model_validate_json(made.model_dump_json()) == made


def test_a_result_is_frozen_and_knows_no_other_fields() -> None:
    """What was judged stays judged."""
    with pytest.raises(ValidationError):
        result(Verdict.PASS).verdict = Verdict.FAIL  # type: ignore[misc]
    with pytest.raises(ValidationError):
        CheckResult(check="c", verdict=Verdict.PASS, why="", wy="")  # type: ignore[call-arg]
