"""The benchmark of the overflow keeps what it measured."""

from __future__ import annotations

from collections import Counter

from benchmarks.hybrid import Seen, cells


def test_a_way_without_answers_does_not_take_the_others_along() -> None:
    """An engine that answers nothing in the window has a dash, and the other rows are printed."""
    assert cells("vllm", Seen(load=35.2), Counter(), 100) == ["vllm", "0.0", "-", "-", "0", "35", ""]
    seen = Seen(conversations=5, ttft_ms=[100.0] * 19 + [5000.0], failed=["refused"], load=2.0)
    row = cells("llama.cpp", seen, Counter({"llama.cpp": 20}), 60)
    assert row == ["llama.cpp", "5.0", "100", "345", "1", "2", "llama.cpp 20"]
