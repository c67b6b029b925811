"""A first look fails what is hopeless, and nothing else."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest

from tasks.evidence.first_look import CHECK, MORE_PAIRS, PAIRS, judge_pairs, measure_pairs
from tasks.verdicts.limits import Limits
from tasks.verdicts.verdict import Verdict


def clock(spread: float, seed: int) -> Callable[[float], dict[str, float]]:
    """The times of an engine so many times as slow; `spread` is the standard deviation of a time's logarithm."""
    drawn = random.Random(seed)

    def times(factor: float) -> dict[str, float]:
        noise = drawn.lognormvariate(0, spread)
        return {"ttft_ms": 100 * factor * noise, "tpot_ms": 10 * factor * noise, "e2e_ms": 170 * factor * noise}

    return times


def pairs(ratio: float, spread: float = 0.0, seed: int = 0) -> list[dict[str, Any]]:
    """The first pairs of an engine `ratio` times as slow."""
    times = clock(spread, seed)
    return [{"incumbent": times(1), "candidate": times(ratio)} for _ in range(PAIRS)]


def in_turns(ratio: float, spread: float = 0.0, seed: int = 0) -> list[dict[str, Any]]:
    """All the pairs that are asked of it in turns."""
    times = clock(spread, seed)
    return measure_pairs(lambda _: times(1), lambda _: times(ratio), Limits(), in_turns=True)


def test_eleven_times_as_slow_is_a_fail_with_its_figures() -> None:
    found = judge_pairs(pairs(11, 0.1), Limits())
    assert (found.check, found.verdict, found.required) == (CHECK, Verdict.FAIL, True)
    assert "TTFT 9.91x (at least 6.66x; limit 1.1x)" in found.why
    assert "limit 1.1x" in found.why


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.1, 1.5])
def test_what_a_restart_could_change_is_left_to_the_blocks(ratio: float) -> None:
    found = judge_pairs(pairs(ratio, 0.02), Limits())
    assert (found.verdict, found.required) == (Verdict.INCONCLUSIVE, False)


@pytest.mark.parametrize("asked", [pairs, in_turns])
def test_noise_fails_nobody(asked: Callable[[float, float, int], list[dict[str, Any]]]) -> None:
    """Equal engines on a machine where a request takes twice or half its time."""
    failed = [seed for seed in range(2000) if judge_pairs(asked(1.0, 0.7, seed), Limits()).verdict is Verdict.FAIL]
    assert len(failed) <= 2000 * 0.003, failed


def test_more_pairs_are_asked_where_noise_leaves_a_slow_candidate_open() -> None:
    """Not where the first ones settle it, nor for one that is as fast."""
    noisy = [in_turns(11, 0.5, seed) for seed in range(200)]
    verdicts = [judge_pairs(found, Limits()).verdict for found in noisy]
    more = [verdict for found, verdict in zip(noisy, verdicts, strict=True) if len(found) == MORE_PAIRS]
    assert len(more) > 20, "it is noise that leaves this open"
    assert more.count(Verdict.FAIL) > 0.8 * len(more)
    assert all(v is Verdict.FAIL for found, v in zip(noisy, verdicts, strict=True) if len(found) == PAIRS)
    assert {len(in_turns(ratio, 0.02)) for ratio in (0.5, 1.0, 1.5, 11)} == {PAIRS}


def test_too_few_answers_say_nothing() -> None:
    cut = pairs(11)
    for pair in cut[: PAIRS - 2]:
        pair["candidate"] = dict.fromkeys(pair["candidate"])
    assert (judge_pairs(cut, Limits()).verdict, judge_pairs(cut, Limits()).required) == (Verdict.INCONCLUSIVE, False)


@pytest.mark.parametrize("in_turns", [True, False])
def test_each_engine_is_asked_the_same_after_a_warm_up(in_turns: bool) -> None:
    """In turns where both are up; else one after the other, so that none is started twice."""
    asked: list[tuple[str, int]] = []

    def ask(arm: str) -> Any:
        return lambda number: asked.append((arm, number)) or {"number": number}

    found = measure_pairs(ask("incumbent"), ask("candidate"), Limits(), in_turns=in_turns)
    assert [(pair["incumbent"], pair["candidate"]) for pair in found] == [
        ({"number": n}, {"number": n}) for n in range(1, PAIRS + 1)
    ]
    changes = sum(before[0] != after[0] for before, after in itertools.pairwise(asked))
    assert changes > PAIRS if in_turns else changes == 1
    assert sorted(number for arm, number in asked if arm == "candidate") == list(range(PAIRS + 1))
