"""The soak of what serves: verdicts on days of made-up windows, and how little they take on the disk."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak_records import Replay, recorded_like
from tasks.evidence.soak.judge import DAY_S, LEAK
from tasks.evidence.soak.judge_windows import (
    DECODE_DRIFT,
    FAILURES,
    SERVED,
    SILENT_EMPTY,
    TTFT_DRIFT,
    YARD_LEAK,
    ending,
    judge_windows,
    window_summary,
)
from tasks.evidence.soak.segment import empty_segment
from tasks.evidence.soak.window import KEPT
from tasks.records.store import open_records
from tasks.verdicts.limits import Limits
from tasks.verdicts.statistics import slope_within, theil_sen
from tasks.verdicts.verdict import CheckResult, Verdict

DAYS_3 = 3 * DAY_S
STEP_S = 3600.0  # from window to window: as many as it takes, and few enough to judge in milliseconds
MB = 1e6
LIMITS = Limits(
    failures_per_day=1.0,
    throughput_retention=0.9,
    ttft_p50_ratio=1.1,
    leak_bytes_per_day=50 * MB,
    failure_rate_margin=0.01,
)


def window(at_s: float, **changes: Any) -> dict[str, Any]:
    """One hour of clean service, `at_s` seconds after the beginning."""
    times = {"from": at_s, "until": at_s + STEP_S}
    return {
        **empty_segment(),
        **{"exposure_s": STEP_S, "requests": 1000, "kinds": {"turn": 1000}, "ttft_ms": [20.0], "decode_tok_s": [50.0]},
        **{"started_at": at_s, "ended_at": at_s + STEP_S, "outage": None, "ended": "", "yard_life": "1@1"},
        "lives": [{"life": "7@7", **times, "samples": 3600, "memory_bytes": 500 * MB}],
        "yard_memory_bytes": 90 * MB,
        **changes,
    }


def windows(n: int = 72, **series: Any) -> list[dict[str, Any]]:
    """`n` hours of them; `memory`, `ttft`, `decode`, `life`, `yard` are functions of the hour."""
    found = []
    for hour in range(n):
        one = window(hour * STEP_S)
        if "memory" in series:
            one["lives"][0]["memory_bytes"] = series["memory"](hour)
        if "life" in series:
            one["lives"][0]["life"] = series["life"](hour)
        if "ttft" in series:
            one["ttft_ms"] = [series["ttft"](hour)]
        if "decode" in series:
            one["decode_tok_s"] = [series["decode"](hour)]
        if "yard" in series:
            one["yard_memory_bytes"] = series["yard"](hour)
        found.append(one)
    return found


def failed(number: int = 1) -> dict[str, Any]:
    """What a window with so many crashes has."""
    return {"failures": [{"at_s": 1.0, "type": "crash", "error": "SIGKILL"}] * number, "restarts": number}


def judged(found: Sequence[dict[str, Any]], *, over: bool = True, **how: Any) -> dict[str, CheckResult]:
    results = judge_windows(
        how.pop("incumbent", []), found, soak_s=how.pop("soak_s", DAYS_3), limits=LIMITS, is_over=over
    )
    return {result.check: result for result in results}


# the whole


def test_three_clean_days_pass_every_check() -> None:
    results = judged(windows())
    assert {name: r.verdict for name, r in results.items() if r.required} == {
        name: Verdict.PASS for name, r in results.items() if r.required
    }
    assert {SERVED, FAILURES, SILENT_EMPTY, TTFT_DRIFT, DECODE_DRIFT, LEAK} <= {
        name for name, result in results.items() if result.required
    }
    assert not results[YARD_LEAK].required
    assert ending(list(results.values())) == []


def test_the_first_window_of_a_long_soak_ends_nothing() -> None:
    """What only days can tell is said to be open."""
    results = judged(windows(1), over=False)
    assert ending(list(results.values())) == []
    assert {results[name].verdict for name in (TTFT_DRIFT, DECODE_DRIFT, LEAK)} == {Verdict.INCONCLUSIVE}


def test_without_windows_nothing_is_judged() -> None:
    assert set(r.verdict for r in judged([]).values()) == {Verdict.INCONCLUSIVE}


# failures


def test_a_third_failure_ends_the_soak_of_an_engine_whose_incumbent_had_none() -> None:
    """The rule of tasks.evidence.soak.soak: three where the incumbent had none are no chance."""
    found = windows(10)
    for one in found[:2]:
        one.update(failed())
    assert ending(list(judged(found, over=False).values())) == []
    found[2].update(failed())
    assert [r.check for r in ending(list(judged(found, over=False).values()))] == [FAILURES]


def test_an_engine_that_had_to_be_replaced_ends_the_soak() -> None:
    found = [*windows(3), window(3 * STEP_S, outage="fallback to llama.cpp")]
    (result,) = ending(list(judged(found, over=False).values()))
    assert result.check == SERVED
    assert "fallback to llama.cpp" in result.why


@pytest.mark.parametrize(
    ("empties", "expected"), [(0, Verdict.PASS), (20, Verdict.PASS), (720, Verdict.INCONCLUSIVE), (2000, Verdict.FAIL)]
)
def test_silent_empty_answers_are_judged_by_their_share(empties: int, expected: Verdict) -> None:
    """Of 72,000; the incumbent's evaluation had none in its few hundred, which proves little."""
    found = windows()
    found[0]["silent_empty"] = empties
    incumbent = [{**empty_segment(), "exposure_s": 120.0, "requests": 400}]
    assert judged(found, incumbent=incumbent)[SILENT_EMPTY].verdict is expected


# memory


def noise(scale: float) -> Any:
    """Small differences that are the same in every run of the test."""
    drawn = random.Random(1)
    return lambda _hour: drawn.uniform(-scale, scale)


def test_a_leak_over_the_limit_fails_and_one_under_it_passes() -> None:
    shaken = noise(MB)
    steep = judged(windows(memory=lambda hour: 500 * MB + hour / 24 * 100 * MB + shaken(hour)))[LEAK]
    assert (steep.verdict, steep.value) == (Verdict.FAIL, pytest.approx(100 * MB, rel=0.1))
    gentle = judged(windows(memory=lambda hour: 500 * MB + hour / 24 * 10 * MB + shaken(hour)))[LEAK]
    assert gentle.verdict is Verdict.PASS


def test_a_restart_is_no_cure_of_a_leak() -> None:
    """Back to the start every 18 hours: over all it looks harmless, within each process it does not."""
    saw = windows(memory=lambda hour: 500 * MB + (hour % 18) / 24 * 100 * MB, life=lambda hour: f"{hour // 18}@1")
    flat = theil_sen([w["started_at"] for w in saw], [w["lives"][0]["memory_bytes"] for w in saw])
    assert flat.estimate * DAY_S < LIMITS.leak_bytes_per_day
    leak = judged(saw)[LEAK]
    assert (leak.verdict, leak.value) == (Verdict.FAIL, pytest.approx(100 * MB, rel=0.05))
    assert "within 4 of 4 processes" in leak.why


def test_a_restart_is_no_leak() -> None:
    """A process that holds more than the one before it, both flat."""
    steps = windows(memory=lambda hour: 500 * MB + hour // 18 * 200 * MB, life=lambda hour: f"{hour // 18}@1")
    assert judged(steps)[LEAK].verdict is Verdict.PASS


def test_lives_too_short_to_tell_are_said_to_be() -> None:
    """A model that is unloaded whenever it is idle has a process a window."""
    leak = judged(windows(life=lambda hour: f"{hour}@1"))[LEAK]
    assert (leak.verdict, leak.required) == (Verdict.INCONCLUSIVE, True)
    assert "in 72 processes" in leak.why


def test_the_yards_own_memory_is_reported_and_holds_nothing_up() -> None:
    results = judged(windows(yard=lambda hour: 90 * MB + hour / 24 * 100 * MB))
    assert (results[YARD_LEAK].verdict, results[YARD_LEAK].required) == (Verdict.FAIL, False)
    assert "of the yard" in results[YARD_LEAK].why


def test_the_pooled_slope_of_one_part_is_theil_sens() -> None:
    drawn = random.Random(2)
    xs, ys = [float(i) for i in range(20)], [drawn.gauss(i, 3) for i in range(20)]
    assert slope_within([(xs, ys)]) == theil_sen(xs, ys)
    assert slope_within([(xs, ys), (xs, ys)]).estimate == pytest.approx(theil_sen(xs, ys).estimate)


# drift


def test_a_slow_decay_over_the_days_fails_and_ends_the_soak() -> None:
    """A fifth slower in three days; 5% is within the limit."""
    shaken = noise(0.2)
    slower = windows(decode=lambda hour: 50 * (1 - 0.2 * hour / 72) + shaken(hour))
    assert [r.check for r in ending(list(judged(slower, over=False).values()))] == [DECODE_DRIFT]
    assert judged(windows(decode=lambda hour: 50 * (1 - 0.05 * hour / 72)))[DECODE_DRIFT].verdict is Verdict.PASS
    later = judged(windows(ttft=lambda hour: 20 * (1 + 0.3 * hour / 72) + shaken(hour)))[TTFT_DRIFT]
    assert (later.verdict, later.value) == (Verdict.FAIL, pytest.approx(1.3, rel=0.05))


def test_the_hours_of_a_day_are_no_drift() -> None:
    """Half as fast by day as by night: not judged before a day is over, and no failure on any day after it."""
    busy = lambda hour: 25.0 if 9 <= hour % 24 < 18 else 50.0  # noqa: E731
    for hours in (6, 12, 18, 24, 36, 48, 72):
        assert ending(list(judged(windows(hours, decode=busy), over=False).values())) == []


def test_a_soak_of_hours_is_not_held_to_a_drift() -> None:
    results = judged(windows(6, decode=lambda hour: 50.0 - 5 * hour), soak_s=6 * 3600.0)
    assert not results[DECODE_DRIFT].required
    assert not results[LEAK].required


def test_a_gist_is_small_and_judged_alike() -> None:
    """Medians in place of lists."""
    whole = window(0.0, ttft_ms=[1.0, 2.0, None, 9.0], decode_tok_s=[5.0], prompt_tokens=[1] * 4)
    short = window_summary(whole)
    assert (short["ttft_ms"], short["decode_tok_s"], short["prompt_tokens"]) == ([2.0], [5.0], [])
    assert window_summary(short)["ttft_ms"] == [2.0]


# on the disk


def test_three_days_fit_into_fifty_megabytes(tmp_path: Path) -> None:
    """By the bytes of a few windows of 600 s: series at 1 Hz, and the answers of a fast engine."""
    with open_records(tmp_path / "r.db") as records:
        replay = Replay(records, recorded_like(answers_per_s=20.0), window_s=600, seed=3)
        few = 4
        for index in range(few):
            replay.add(index)
        size = replay.sizes()
    assert size["samples"] == few * 600 * 2
    assert size["sample_bytes"] / size["samples"] < 6
    assert size["evidence_bytes"] / few < 30_000
    assert (size["sample_bytes"] + size["evidence_bytes"]) / few * 432 < 50e6
    assert all(kept <= KEPT for kept in size["kept"])
