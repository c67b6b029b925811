"""A figure of speed names its quant, and a slow candidate gets another one to try."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf_files import LLAMA, write_gguf

from engines.model.free_memory import FreeMemory
from engines.model.memory import GIB
from tasks.evidence.preflight import preflight
from tasks.evidence.quants import another_quant, measured_on
from tasks.verdicts.verdict import CheckResult, Verdict, at_most, not_measured

SLOW = at_most("performance.first_look", 11.0, limit=1.1, unit="ratio")
LIMITS = {"ttft_p50_ratio": 1.1, "tpot_p50_ratio": 1.1}
TYPES = {"a.weight": "Q4_1", "b.weight": "Q4_1", "c.weight": "F32"}


def report(folder: Path, types: dict[str, str] = TYPES, **options: Any) -> dict[str, Any]:
    path = write_gguf(folder / "m.gguf", keys=LLAMA, tensors=types)
    asked = {"engines": {name: name for name in ("llama.cpp", "mistral.rs")}, **options}
    found = preflight([("m", path)], memory=FreeMemory(ram_bytes=512 * GIB), **asked)["models"][0]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("types", "threads", "words"),
    [
        (TYPES, 1, "Q4_1 weights, 1 thread, CPU"),
        ({"a": "Q5_0", "b": "Q4_K", "c": "Q5_0", "d": "F32"}, 4, "Q5_0/Q4_K weights, 4 threads, CPU"),
        ({"a": "F32"}, None, "F32 weights, CPU"),
        ({"a": "Q6_K", **{f"b{n}": "Q4_0" for n in range(12)}}, None, "Q4_0 weights, CPU"),
    ],
)
def test_speed_is_measured_on_a_quant_with_threads_on_a_device(
    tmp_path: Path, types: dict[str, str], threads: int | None, words: str
) -> None:
    assert measured_on(report(tmp_path, types), threads) == words
    assert measured_on(report(tmp_path, types), threads, ours=False) == words.split(",")[0]


def test_a_candidate_that_lacks_the_kernel_gets_a_quant_to_evaluate(tmp_path: Path) -> None:
    """With its figures, whether they lie within the limits, the command, and no promise."""
    said = another_quant([SLOW], report(tmp_path), LIMITS, "/my models/m.gguf")
    assert said is not None
    assert "2 of 3 tensors are Q4_1" in said
    assert "As F16 0.83 and 2 (" in said
    assert "still beyond the limits (a token, limit 1.1)" in said
    assert "`switchyard requantize '/my models/m.gguf' --to F16`" in said
    assert "Nothing is promised" in said
    wide = another_quant([SLOW], report(tmp_path), {**LIMITS, "tpot_p50_ratio": 3.0}, "m.gguf")
    assert (wide or "").startswith("Another quant may turn it")
    assert "within the limits" in (wide or "")


def test_no_other_quant_is_named_where_it_would_turn_nothing(tmp_path: Path) -> None:
    """Another failure, one engine's own errors, a quant that both compute alike, or one that is fast."""
    slow, tokens = report(tmp_path), CheckResult(check="parity.prompt_tokens", verdict=Verdict.FAIL, why="other")
    assert another_quant([SLOW, tokens], slow, LIMITS, "m") is None
    assert another_quant([at_most("performance.errors", 3.0, limit=1.0, unit="")], slow, LIMITS, "m") is None
    assert another_quant([not_measured("performance.ttft_p50_ratio", "not measured")], slow, LIMITS, "m") is None
    alike = report(tmp_path, engines={"old": "mistral.rs", "new": "mistral.rs"})
    assert another_quant([SLOW], alike, LIMITS, "m") is None
    assert another_quant([SLOW], report(tmp_path, {"a.weight": "Q8_0"}), LIMITS, "m") is None
