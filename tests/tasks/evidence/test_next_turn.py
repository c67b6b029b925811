"""What a move costs the next turn of a conversation: a finding for whoever approves it, never a closed gate."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.evidence.next_turn import judge_next_turn
from tasks.verdicts.verdict import Verdict


def turn(ttft_ms: float, cached: int | None, by: str) -> dict[str, Any]:
    return {"ttft_ms": ttft_ms, "prompt_tokens": 3012, "cached_tokens": cached, "by": by}


COLD = {"before": turn(90, 2990, "old"), "moved": turn(12_400, 0, "new")}


def test_saved_prompts_keep_the_next_turn_as_fast() -> None:
    """Each time is named with its engine, and the worse of the two decides."""
    check = judge_next_turn({**COLD, "back": turn(99, 2990, "old"), "again": turn(108, 2990, "new")})
    assert (check.verdict, check.required, check.value) == (Verdict.PASS, False, pytest.approx(1.2))
    assert check.why.startswith(
        "a conversation of 3,012 tokens, time to the first token of its next turn: 90 ms before the move (old), "
        "12.4 s after it (new), 99 ms after the way back (old), 108 ms there once more (new)"
    )


def test_an_engine_that_saves_none_is_left_out() -> None:
    """Its time once more is that of a cold cache: no fault of the one that saves."""
    check = judge_next_turn({**COLD, "back": turn(99, 2990, "old"), "again": turn(12_000, None, "new")})
    assert (check.verdict, check.value) == (Verdict.PASS, pytest.approx(1.1))


@pytest.mark.parametrize(
    ("seen", "verdict", "why"),
    [
        (COLD, Verdict.INCONCLUSIVE, "12.4 s after it (new); no engine here keeps it over a stop"),
        ({**COLD, "back": turn(11_000, 0, "old"), "again": turn(12_000, 0, "new")}, Verdict.INCONCLUSIVE, "no engine"),
        ({**COLD, "back": turn(200, 2990, "old")}, Verdict.FAIL, "limit 1.3"),
        ({"failed": "a turn was not answered"}, Verdict.INCONCLUSIVE, "a turn was not answered"),
    ],
)
def test_what_is_not_kept_is_said(seen: dict[str, Any], verdict: Verdict, why: str) -> None:
    check = judge_next_turn(seen)
    assert (check.verdict, check.required) == (verdict, False)
    assert why in check.why
