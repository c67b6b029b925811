"""A first look fails what is hopeless, and nothing else."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from tasks.evidence.first_look import CHECK, PAIRS, judge_pairs, measure_pairs
from tasks.verdicts.limits import Limits
from tasks.verdicts.verdict import Verdict


def pairs(ratio: float, spread: float = 0.0, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs of an engine `ratio` times as slow; `spread` is the standard deviation of a time's logarithm."""
    drawn = random.Random(seed)

    def times(factor: float) -> dict[str, float]:
        noise = drawn.lognormvariate(0, spread)
        return {"ttft_ms": 100 * factor * noise, "tpot_ms": 10 * factor * noise, "e2e_ms": 170 * factor * noise}

    return [{"incumbent": times(1), "candidate": times(ratio)} for _ in range(PAIRS)]


def test_eleven_times_as_slow_is_a_fail_with_its_figures() -> None:
    found = judge_pairs(pairs(11, 0.1), Limits())
    assert (found.check, found.verdict, found.required) == (CHECK, Verdict.FAIL, True)
    assert "TTFT 9.91x (at least 6.66x; limit 1.1x)" in found.why
    assert "limit 1.1x" in found.why


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.1, 1.5])
def test_what_a_restart_could_change_is_left_to_the_blocks(ratio: float) -> None:
    found = judge_pairs(pairs(ratio, 0.02), Limits())
    assert (found.verdict, found.required) == (Verdict.INCONCLUSIVE, False)


def test_noise_fails_nobody() -> None:
    """Equal engines on a machine where a request takes twice or half its time."""
    failed = [seed for seed in range(2000) if judge_pairs(pairs(1.0, 0.7, seed), Limits()).verdict is Verdict.FAIL]
    assert len(failed) <= 2000 * 0.003, failed


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

    found = measure_pairs(ask("incumbent"), ask("candidate"), in_turns=in_turns)
    assert [(pair["incumbent"], pair["candidate"]) for pair in found] == [
        ({"number": n}, {"number": n}) for n in range(1, PAIRS + 1)
    ]
    changes = sum(before[0] != after[0] for before, after in itertools.pairwise(asked))
    assert changes > PAIRS if in_turns else changes == 1
    assert sorted(number for arm, number in asked if arm == "candidate") == list(range(PAIRS + 1))
