"""Load cycles and a hang, judged: what is enough to pass, what fails, and what says nothing."""

import pytest

from tasks.evidence.load_cycles import judge_hang, judge_load_cycles
from tasks.verdicts.verdict import Verdict

MIB = 2**20


def cycle(number, *, answered=True, grows=0, noise=(0, 30_000, -20_000, 10_000)):
    size = 100 * MIB + grows * number + noise[number % 4]
    error = None if answered else "HTTP 503: no"
    return {"answered": answered, "error": error, "load_s": 1.5, "yard_bytes": size, "engine_bytes": size}


def judged(cycles, asked=None):
    return {r.check: r for r in judge_load_cycles({"asked": asked or len(cycles), "cycles": cycles})}


def test_steady_memory_passes():
    results = judged([cycle(number) for number in range(50)])
    assert {result.verdict for result in results.values()} == {Verdict.PASS}
    assert "50 of 50" in results["native.load_cycles"].why


@pytest.mark.parametrize("part", ["yard", "engine"])
def test_growth_with_every_cycle_fails(part):
    results = judged([cycle(number, grows=3 * MIB) for number in range(20)])
    assert results[f"native.cycle_memory_{part}"].verdict is Verdict.FAIL
    assert results[f"native.cycle_memory_{part}"].value == pytest.approx(3 * MIB, rel=0.05)


def test_a_cycle_that_is_not_answered_fails_and_says_why():
    results = judged([cycle(0), cycle(1, answered=False)], asked=20)
    assert results["native.load_cycles"].verdict is Verdict.FAIL
    assert "1 of 20" in results["native.load_cycles"].why
    assert "HTTP 503" in results["native.load_cycles"].why


def test_few_cycles_and_unweighed_ones_say_nothing_of_a_slope():
    few = judged([cycle(number) for number in range(5)])
    unweighed = judged([{**cycle(number), "yard_bytes": None, "engine_bytes": None} for number in range(30)])
    for results in (few, unweighed):
        assert results["native.cycle_memory_yard"].verdict is Verdict.INCONCLUSIVE


def test_a_process_that_begins_in_two_sizes_takes_more_cycles_to_settle():
    """As seen of the real one, 253 or 264 MB from start to start: the reason says what would settle it."""
    seen = [253.39, 264.15, 264.56, 264.65, 253.33, 264.53, 253.37, 264.43, 264.60, 264.46]
    cycles = [{**cycle(number), "engine_bytes": seen[number % 10] * 1e6} for number in range(25)]
    few, enough = (judged(some)["native.cycle_memory_engine"] for some in (cycles[:10], cycles))
    assert (few.verdict, enough.verdict) == (Verdict.INCONCLUSIVE, Verdict.PASS), (few, enough)
    assert "measure more cycles (measure.load_cycles)" in few.why


def test_what_was_not_tried_is_not_passed():
    results = judge_load_cycles({"not_measured": "no room"})
    assert {result.verdict for result in results} == {Verdict.INCONCLUSIVE}
    assert judge_hang({"not_measured": "no room"}).verdict is Verdict.INCONCLUSIVE
    assert [result.verdict for result in judge_load_cycles({"failed": "no yard"})] == [Verdict.ERROR]
    assert judge_hang({"failed": "no yard"}).verdict is Verdict.ERROR


@pytest.mark.parametrize(
    ("seen", "verdict"),
    [
        ({"detect_s": 3.0, "recover_s": 2.0, "answered": True, "by": "mistral.rs", "error": None}, Verdict.PASS),
        ({"detect_s": None, "recover_s": 2.0, "answered": True, "by": "mistral.rs", "error": None}, Verdict.FAIL),
        ({"detect_s": 3.0, "recover_s": 2.0, "answered": False, "by": None, "error": "HTTP 503"}, Verdict.FAIL),
    ],
)
def test_a_hang_is_found_and_served_past(seen, verdict):
    assert judge_hang(seen).verdict is verdict
