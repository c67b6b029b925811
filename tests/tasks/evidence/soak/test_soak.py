"""Stability: soaks of a few seconds against the fake engine, and verdicts on days of made-up evidence."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_driver import FakeDriver
from taken_ports import first_ports_taken

from engines.errors import BadInput
from engines.process.process import registered
from engines.settings import Settings
from tasks.evidence.engine_under_test import EngineUnderTest
from tasks.evidence.soak.judge import DAY_S, judge_leak, judge_stability
from tasks.evidence.soak.prompts import Agent
from tasks.evidence.soak.soak import RESTARTS_ALLOWED, soak
from tasks.verdicts.verdict import CheckResult, Verdict

DAYS_3 = 3 * DAY_S
MB = 1e6


class Soaked:
    """A soak of the fake engine with what it handed out."""

    def __init__(self, home: Path, *habits: str, done: Sequence[dict[str, Any]] = (), **options: Any) -> None:
        driver, gguf = FakeDriver(*habits), home / "m.gguf"
        gguf.write_bytes(b"GGUF")
        candidate = EngineUnderTest(
            arm="candidate",
            driver=driver,
            installation=driver.find(),
            model_id="m",
            gguf=gguf,
            settings=Settings(),
            home=home,
        )
        self.saved: dict[int, dict[str, Any]] = {}
        self.memory: list[tuple[float, int | None]] = []
        self.lines: list[str] = []
        soak(
            candidate,
            done=done,
            save=self.saved.__setitem__,
            on_memory=lambda at_s, n_bytes: self.memory.append((at_s, n_bytes)),
            progress=self.lines.append,
            **options,
        )
        self.segments = list(self.saved.values())

    def total(self, name: str) -> float:
        """The sum over the segments."""
        return sum(segment[name] for segment in self.segments)

    def failures(self) -> list[dict[str, Any]]:
        """Of all segments, in order."""
        return [failure for segment in self.segments for failure in segment["failures"]]


# --- measuring ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Soaked:
    """Two and a half seconds of an engine that behaves well, in segments of one second."""
    home = tmp_path_factory.mktemp("home")
    soaked = Soaked(home, soak_s=2.5, segment_s=1.0)
    assert registered(home) == []
    return soaked


def test_a_port_that_another_process_took_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is started on another one."""
    with first_ports_taken(monkeypatch, 2):
        soaked = Soaked(tmp_path, soak_s=0.5, segment_s=0.5)
    assert soaked.failures() == []
    assert soaked.total("requests") > 0


def test_a_soak_can_be_repeated() -> None:
    """Turns have seeds: without one, an answer that an engine cannot parse came to one side of a comparison alone."""
    first, second, other = ([agent.next() for _ in range(20)] for agent in (Agent(1), Agent(1), Agent(2)))
    assert first == second != other
    assert len({body["seed"] for _, body, _, _ in first}) == 20


def test_segments_are_saved_in_turn_and_add_up(clean: Soaked) -> None:
    """Exposure is what was really spent, so the last request may lengthen it."""
    assert list(clean.saved) == list(range(len(clean.saved)))
    assert len(clean.saved) >= 2
    assert clean.total("exposure_s") >= 2.5
    assert len(clean.lines) == len(clean.saved)
    assert json.loads(json.dumps(clean.segments, allow_nan=False)) == clean.segments


def test_a_clean_soak_has_an_agents_kinds_of_turns_and_no_failure(clean: Soaked) -> None:
    """A cancelled stream is no failure and no measurement."""
    kinds = {kind for segment in clean.segments for kind in segment["kinds"]}
    assert {"turn", "tools", "cancelled", "after a pause"} <= kinds
    assert clean.failures() == []
    assert clean.total("silent_empty") == clean.total("restarts") == 0
    cancelled = sum(segment["kinds"].get("cancelled", 0) for segment in clean.segments)
    measured = [value for segment in clean.segments for value in segment["ttft_ms"]]
    assert len(measured) == clean.total("requests") - cancelled
    assert clean.memory


def test_a_killed_soak_goes_on_where_it_stopped(clean: Soaked, tmp_path: Path) -> None:
    """Only the seconds that are missing are soaked; the segments are numbered on."""
    done = [segment | {"exposure_s": 99.5} for segment in clean.segments[:1]]
    resumed = Soaked(tmp_path, soak_s=100.0, done=done)
    assert list(resumed.saved) == [1]
    assert resumed.total("exposure_s") >= 0.5


def test_a_finished_soak_starts_nothing(clean: Soaked, tmp_path: Path) -> None:
    """Run again, it has nothing to do."""
    again = Soaked(tmp_path, soak_s=2.5, done=clean.segments)
    assert again.saved == {}
    assert not (tmp_path / "logs").exists()


def test_a_crash_is_counted_once_and_the_soak_goes_on(tmp_path: Path) -> None:
    """The request that broke is part of the crash, not a failure of its own."""
    soaked = Soaked(tmp_path, "--die-after-s", "1.2", "--itl-ms", "2", soak_s=2.5, segment_s=10.0)
    kinds = [failure["type"] for failure in soaked.failures()]
    assert set(kinds) <= {"crash", "start"}
    assert kinds.count("crash") == soaked.total("restarts") >= 1
    assert all("signal SIGKILL" in failure["error"] for failure in soaked.failures() if failure["type"] == "crash")
    assert soaked.total("exposure_s") >= 2.5
    assert registered(tmp_path) == []


def test_an_engine_that_never_comes_up_is_given_up_with_its_reasons(tmp_path: Path) -> None:
    """No exposure at all, and every failed start on record; resumed, it is not tried twenty times more."""
    soaked = Soaked(tmp_path, "--exit-code", "3", soak_s=60.0)
    (segment,) = soaked.segments
    assert (segment["exposure_s"], segment["requests"]) == (0.0, 0)
    assert len(segment["failures"]) == RESTARTS_ALLOWED + 1
    assert "exit status 3" in segment["failures"][0]["error"]
    assert Soaked(tmp_path, "--exit-code", "3", soak_s=60.0, done=soaked.segments).saved == {}


def test_an_answer_without_a_token_is_counted_though_it_was_a_200(tmp_path: Path) -> None:
    """Nothing failed, and yet nothing was said."""
    soaked = Soaked(tmp_path, "--silent-empty", soak_s=0.5)
    assert soaked.total("silent_empty") > 0
    assert soaked.failures() == []
    assert named(judge([segment() for _ in range(1)], soaked.segments))["silent_empty"].verdict is Verdict.FAIL


# --- judging stability --------------------------------------------------------------------------------------------


def segment(n_failures: int = 0, *, days: float = 3.0, **changes: Any) -> dict[str, Any]:
    """A segment of so many days with so many crashes."""
    failures = [{"at_s": 1.0, "type": "crash", "error": "ended with signal SIGKILL"} for _ in range(n_failures)]
    return {
        "exposure_s": days * DAY_S,
        "requests": 1000,
        "kinds": {"turn": 1000},
        "failures": failures,
        "restarts": n_failures,
        "silent_empty": 0,
        "ttft_ms": [20.0] * 12,
        "decode_tok_s": [100.0] * 12,
        "prompt_tokens": [50] * 12,
    } | changes


def judge(
    incumbent: Sequence[dict[str, Any]], candidate: Sequence[dict[str, Any]], soak_s: float = DAYS_3
) -> list[CheckResult]:
    """Against one failure a day and nine tenths of the speed."""
    return judge_stability(incumbent, candidate, soak_s=soak_s, failures_per_day=1.0, throughput_retention=0.9)


def named(results: Sequence[CheckResult]) -> dict[str, CheckResult]:
    return {result.check.removeprefix("stability."): result for result in results}


@pytest.mark.parametrize(("days", "upper"), [(1.0, 2.996), (3.0, 0.9986), (30.0, 0.09986)])
def test_no_failure_bounds_the_rate_at_three_over_the_time(days: float, upper: float) -> None:
    """-ln(0.05) / T, 95% confidence."""
    rate = named(judge([segment()], [segment(days=days)], days * DAY_S))["failure_rate_upper95"]
    assert rate.value == pytest.approx(upper, rel=1e-3)


def test_a_last_turn_that_overruns_a_short_soak_is_no_other_unit() -> None:
    """On a starved machine a turn may take twenty times the two seconds of a soak; a thousand times is an error."""
    assert named(judge([segment()], [segment(exposure_s=40.0)], soak_s=2.0))["failures"].verdict is Verdict.PASS
    with pytest.raises(BadInput, match="another unit"):
        judge([segment()], [segment(exposure_s=2000.0)], soak_s=2.0)


def test_three_clean_days_prove_less_than_one_failure_a_day() -> None:
    """Exactly the soak that the plan asks for."""
    rate = named(judge([segment()], [segment(days=1.0)] * 3))["failure_rate_upper95"]
    assert (rate.verdict, rate.required) == (Verdict.PASS, True)


def test_a_soak_too_short_to_prove_it_is_not_held_to_it() -> None:
    """INCONCLUSIVE beside the gate, with the days that it would take."""
    rate = named(judge([segment()], [segment(days=0.01)], 0.01 * DAY_S))["failure_rate_upper95"]
    assert (rate.verdict, rate.required) == (Verdict.INCONCLUSIVE, False)
    assert "needs 3 days" in rate.why


def test_a_failure_in_three_days_is_too_many_to_prove_the_limit() -> None:
    """4.74 / 3 a day at most; 4.7 days without another one would do."""
    rate = named(judge([segment(1)], [segment(1)]))["failure_rate_upper95"]
    assert (rate.verdict, rate.required) == (Verdict.INCONCLUSIVE, True)
    assert rate.value == pytest.approx(4.744 / 3, rel=1e-3)
    assert "4.7 days" in rate.why


@pytest.mark.parametrize(
    ("theirs", "ours", "expected"),
    [
        (0, 0, Verdict.PASS),
        (5, 0, Verdict.PASS),
        (3, 1, Verdict.INCONCLUSIVE),
        (0, 2, Verdict.INCONCLUSIVE),
        (0, 3, Verdict.INCONCLUSIVE),
        (0, 5, Verdict.FAIL),
        (1, 9, Verdict.FAIL),
        (5, 6, Verdict.INCONCLUSIVE),
    ],
)
def test_failures_are_compared_by_the_exact_conditional_test(theirs: int, ours: int, expected: Verdict) -> None:
    """Equal exposure: a fair coin decides on whose side each failure falls."""
    result = named(judge([segment(theirs)], [segment(ours)]))["failures"]
    assert (result.verdict, result.value) == (expected, ours)


def test_a_failure_is_quoted() -> None:
    """The first of them, in one line that is not long."""
    broke = {"at_s": 1.0, "type": "error_event", "error": "the output does not match\nthe format" + 200 * "."}
    ours = segment(failures=[broke, {**broke, "type": "crash", "error": None}])
    why = named(judge([segment()], [ours]))["failures"].why
    assert why.startswith("2 failures (1 error_event, 1 crash; first: the output does not match the format...")
    assert len(why) < 280


def test_a_shorter_exposure_makes_the_same_failures_weigh_more() -> None:
    """Five each, but the candidate's came in a tenth of the time."""
    assert named(judge([segment(5)], [segment(5)]))["failures"].verdict is Verdict.INCONCLUSIVE
    assert named(judge([segment(5)], [segment(5, days=0.3)]))["failures"].verdict is Verdict.FAIL


def test_a_candidate_that_served_no_request_fails() -> None:
    """And the rate and the empty answers are not measured, rather than nought."""
    results = named(judge([segment()], [segment(3, days=0.0, requests=0)]))
    assert results["failures"].verdict is Verdict.FAIL
    assert "3 crash" in results["failures"].why
    assert results["failure_rate_upper95"].value is None
    assert results["silent_empty"].verdict is Verdict.INCONCLUSIVE


def test_no_soak_is_inconclusive() -> None:
    """Of the candidate; an incumbent that was not soaked leaves the candidate's own limits."""
    (nothing,) = judge([segment()], [])
    assert nothing.verdict is Verdict.INCONCLUSIVE
    alone = named(judge([], [segment()]))
    assert (alone["failures"].verdict, alone["failure_rate_upper95"].verdict) == (Verdict.PASS, Verdict.PASS)


@pytest.mark.parametrize(
    ("theirs", "ours", "expected"),
    [(0, 0, Verdict.PASS), (2, 2, Verdict.PASS), (0, 1, Verdict.INCONCLUSIVE), (0, 6, Verdict.FAIL)],
)
def test_more_empty_answers_than_the_incumbent_fail(theirs: int, ours: int, expected: Verdict) -> None:
    """A 200 without a token is a failure that no status tells."""
    results = named(judge([segment(silent_empty=theirs)], [segment(silent_empty=ours)]))
    assert results["silent_empty"].verdict is expected


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([100.0] * 12, Verdict.PASS),
        ([100.0] * 6 + [50.0] * 6, Verdict.INCONCLUSIVE),
        ([100.0] * 8, Verdict.INCONCLUSIVE),
        ([100.0, None] * 9, Verdict.PASS),
    ],
)
def test_the_speed_at_the_end_is_reported(rates: list[float | None], expected: Verdict) -> None:
    """Its last third against its first; never required, for a neighbour moves it as well."""
    result = named(judge([segment()], [segment(decode_tok_s=rates)]))["throughput_retention"]
    assert (result.verdict, result.required) == (expected, False)


# --- judging a leak -----------------------------------------------------------------------------------------------


def memory(per_day: float, *, days: float = 3.0, noise: float = 0.5 * MB) -> tuple[list[float], list[float | None]]:
    """A sample every ten minutes: 500 MB, a cache that fills in four hours, noise, and growth in bytes a day."""
    dice = random.Random(1)
    times = [1.7e9 + 600.0 * i for i in range(int(days * 144))]
    start = times[0]
    values: list[float | None] = [
        500 * MB
        + 100 * MB * min((t - start) / (4 * 3600), 1.0)
        + per_day * (t - start) / DAY_S
        + dice.uniform(-noise, noise)
        for t in times
    ]
    return times, values


def leak(per_day: float, *, days: float = 3.0, limit: float = 20 * MB, noise: float = 0.5 * MB) -> CheckResult:
    return judge_leak(*memory(per_day, days=days, noise=noise), soak_s=days * DAY_S, limit_bytes_per_day=limit)


@pytest.mark.parametrize(
    ("per_day", "noise", "expected"),
    [
        (0.0, 0.5 * MB, Verdict.PASS),
        (-50 * MB, 0.5 * MB, Verdict.PASS),
        (100 * MB, 0.5 * MB, Verdict.FAIL),
        (10 * MB, 400 * MB, Verdict.INCONCLUSIVE),
    ],
)
def test_three_days_of_memory_tell_a_leak(per_day: float, noise: float, expected: Verdict) -> None:
    """Growth after the caches filled; noise that hides it leaves the question open."""
    result = leak(per_day, noise=noise)
    assert (result.verdict, result.required) == (expected, True)


def test_a_leak_is_given_in_bytes_a_day() -> None:
    """With its bounds in the reason."""
    result = leak(100 * MB)
    assert result.value == pytest.approx(100 * MB, rel=0.05)
    assert "95% between" in result.why


def test_a_filling_cache_is_no_leak() -> None:
    """100 MB in the first four hours lie in the warm-up."""
    assert abs(leak(0.0).value or 0.0) < 5 * MB


@pytest.mark.parametrize("per_day", [0.0, 100 * MB])
def test_a_short_soak_reports_its_slope_and_judges_nothing(per_day: float) -> None:
    """A filling cache looks like a leak for hours."""
    result = leak(per_day, days=0.9)
    assert (result.verdict, result.required) == (Verdict.INCONCLUSIVE, False)
    assert "soak for two days" in result.why


@pytest.mark.parametrize(("soak_s", "required"), [(DAYS_3, True), (60.0, False)])
@pytest.mark.parametrize("samples", [[], [(0.0, None), (1.0, None)], [(0.0, 1.0), (1.0, 1.0)]])
def test_memory_that_was_not_sampled_is_not_judged(
    soak_s: float, required: bool, samples: list[tuple[float, float | None]]
) -> None:
    """Missing is INCONCLUSIVE; it holds the gate where a soak of that length would have been held to it."""
    times, values = [t for t, _ in samples], [value for _, value in samples]
    result = judge_leak(times, values, soak_s=soak_s, limit_bytes_per_day=MB)
    assert (result.verdict, result.value, result.required) == (Verdict.INCONCLUSIVE, None, required)


def test_gaps_in_the_samples_are_left_out() -> None:
    """None is not zero: a gap read as nought would be a fall and a rise."""
    times, values = memory(0.0)
    values[100:120] = [None] * 20
    assert judge_leak(times, values, soak_s=DAYS_3, limit_bytes_per_day=20 * MB).verdict is Verdict.PASS
