"""Preflight: one report per model, and its checks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf_files import LLAMA, nemotron_keys, write_gguf

from engines.errors import BadInput
from engines.model.free_memory import FreeMemory
from engines.model.memory import GIB
from engines.registry import DRIVERS
from engines.settings import Settings
from tasks.evidence.preflight import judge_memory_estimate, judge_preflight, measured_over_estimated, preflight
from tasks.verdicts.verdict import Verdict, gate

PLENTY = FreeMemory(ram_bytes=512 * GIB)


def report(path: Path, memory: FreeMemory = PLENTY, **options: Any) -> dict[str, Any]:
    """The report of the one model at `path`."""
    models = preflight([("m", path)], memory=memory, **options)["models"]
    assert len(models) == 1
    return dict(models[0])


def verdicts(path: Path, memory: FreeMemory = PLENTY) -> dict[str, Verdict]:
    results = judge_preflight(report(path, memory, context=4096), "llama.cpp", "mistral.rs")
    return {result.check: result.verdict for result in results}


def test_a_report_is_plain_and_complete(tmp_path: Path) -> None:
    """It survives JSON unchanged."""
    entry = report(write_gguf(tmp_path / "m.gguf"), versions={"mistral.rs": "0.9.2"})
    assert json.loads(json.dumps(entry)) == entry
    assert (entry["model"], entry["architecture"], entry["alternatives"]) == ("m", "llama", [])
    assert [engine["engine"] for engine in entry["engines"]] == list(DRIVERS)
    assert {engine["loads"] for engine in entry["engines"]} == {"yes"}
    assert entry["memory"]["kv_bytes"] == 4096 * 256
    assert entry["elapsed_ms"] >= 0


def test_several_models_keep_their_order_and_settings(tmp_path: Path) -> None:
    """Each is read with its own settings."""
    paths = [(name, write_gguf(tmp_path / f"{name}.gguf")) for name in ("b", "a")]
    steps: list[str] = []
    settings = {"a": Settings(context_tokens=1024, kv_type="q8_0")}
    found = preflight(paths, settings_by_model=settings, memory=PLENTY, progress=steps.append)["models"]
    assert [entry["model"] for entry in found] == ["b", "a"]
    assert [entry["memory"]["context_tokens"] for entry in found] == [4096, 1024]
    assert found[1]["memory"]["kv_bytes_per_token"] == 136
    assert len(steps) == 2


def test_a_bad_file_among_good_ones_is_named(tmp_path: Path) -> None:
    """Model and path are in the one line."""
    good, bad = write_gguf(tmp_path / "good.gguf"), tmp_path / "bad.gguf"
    bad.write_bytes(good.read_bytes()[:100])
    with pytest.raises(BadInput, match=r"model 'second': .*bad\.gguf"):
        preflight([("first", good), ("second", bad)], memory=PLENTY)


def test_a_loadable_model_that_fits_passes(tmp_path: Path) -> None:
    """All checks pass."""
    assert set(verdicts(write_gguf(tmp_path / "m.gguf")).values()) == {Verdict.PASS}


def test_memory_that_cannot_be_within_the_limit_fails_at_once(tmp_path: Path) -> None:
    """vLLM with torch in three processes beside a small model; a limit that allows it, or one open, says nothing."""
    engines = {"llama.cpp": "llama.cpp", "vllm": "vllm"}
    settings = {"m": Settings(context_tokens=2048, host_cache_mib=0)}
    found = report(write_gguf(tmp_path / "m.gguf"), engines=engines, settings_by_model=settings)
    (result,) = judge_memory_estimate(found, "llama.cpp", "vllm", 1.1)
    assert (result.check, result.verdict, result.limit) == ("memory.estimate", Verdict.FAIL, 1.1)
    assert "limits.memory_peak_ratio is 1.1: set what you accept" in result.why
    assert result.value is not None
    assert judge_memory_estimate(found, "llama.cpp", "vllm", result.value + 0.1) == []
    assert judge_memory_estimate(found, "vllm", "llama.cpp", 1.1) == []


def test_nemotron_fails_to_load_and_gets_alternatives(tmp_path: Path) -> None:
    """It fits, but the candidate does not know it; the incumbent does, and would miss this file's tensors."""
    path = write_gguf(tmp_path / "m.gguf", "nemotron_h_moe", keys=nemotron_keys())
    found = verdicts(path)
    assert (found["preflight.loads"], found["preflight.fit"]) == (Verdict.FAIL, Verdict.PASS)
    assert found["preflight.incumbent.loads"] is Verdict.INCONCLUSIVE
    entry = report(path, context=512 << 10)
    assert any("Qwen3-30B-A3B" in choice for choice in entry["alternatives"])
    assert entry["memory"]["kv_bytes"] == 3 * GIB


def test_an_unknown_architecture_is_inconclusive_on_the_incumbent(tmp_path: Path) -> None:
    """And its memory is unknown, not zero."""
    path = write_gguf(tmp_path / "m.gguf", "quetzal")
    found = verdicts(path)
    assert found["preflight.fit"] is found["preflight.incumbent.loads"] is Verdict.INCONCLUSIVE
    memory = report(path)["memory"]
    assert memory["kv_bytes"] is None
    assert memory["state_bytes_per_sequence"] is None
    assert "quetzal" in memory["why_unknown"]


def test_too_little_memory_fails_with_both_numbers(tmp_path: Path) -> None:
    """Value and limit are the fullest device's."""
    entry = report(write_gguf(tmp_path / "m.gguf"), FreeMemory(ram_bytes=1 << 20))
    fit = next(
        result for result in judge_preflight(entry, "llama.cpp", "mistral.rs") if result.check == "preflight.fit"
    )
    assert fit.verdict is Verdict.FAIL
    assert fit.value is not None
    assert fit.limit == 1 << 20
    assert fit.value > fit.limit
    assert "smaller quantization" in entry["alternatives"][0]


def test_two_engines_that_fit_alone_may_not_fit_together(tmp_path: Path) -> None:
    """That is told, but does not hold the gate: the switch can stop one first."""
    path = write_gguf(tmp_path / "m.gguf", keys={**LLAMA, "context_length": 1 << 22})
    together = report(path)
    largest = max(engine["fit"]["needs"][0]["expected"] for engine in together["engines"])
    results = judge_preflight(report(path, FreeMemory(ram_bytes=largest)), "llama.cpp", "mistral.rs")
    pair = next(result for result in results if result.check == "preflight.side_by_side")
    assert (pair.verdict, pair.required) == (Verdict.FAIL, False)
    assert gate(results) is Verdict.PASS


def test_a_second_engine_is_sized_as_it_serves_the_overflow(tmp_path: Path) -> None:
    """Its sequences are its own; what both take together is in the report."""
    path = write_gguf(tmp_path / "m.gguf")
    engines = {name: name for name in ("llama.cpp", "mistral.rs")}
    plain = report(path, engines=engines, settings_by_model={"m": Settings(context_tokens=4096)})
    more = Settings(context_tokens=16 * 4096, parallel=16)
    entry = report(
        path,
        engines=engines,
        settings_by_model={"m": Settings(context_tokens=4096)},
        overflow={"m": ("mistral.rs", more)},
    )
    needs = [[one["fit"]["needs"][0]["expected"] for one in each["engines"]] for each in (plain, entry)]
    assert needs[0][0] == needs[1][0]
    assert needs[0][1] < needs[1][1]
    assert (entry["overflow"], "overflow" in plain) == ("mistral.rs", False)


def test_an_engine_that_was_not_looked_at_is_inconclusive(tmp_path: Path) -> None:
    """Absent is not a pass."""
    entry = report(write_gguf(tmp_path / "m.gguf"), engines={"llama.cpp": "llama.cpp"})
    results = judge_preflight(entry, "llama.cpp", "mistral.rs")
    assert gate(results) is Verdict.INCONCLUSIVE


@pytest.mark.parametrize(
    ("measured", "ratio"), [([1.4, 1.6, None], 1.5), ([0.3, 0.4], 1.0), ([None], None), ([], None)]
)
def test_short_prompts_do_not_teach_that_full_ones_fit(
    tmp_path: Path, measured: list[float | None], ratio: float | None
) -> None:
    """An engine that took less than expected may not have been asked for all of its context."""
    entry = report(write_gguf(tmp_path / "m.gguf"))
    expected = next(one for one in entry["engines"] if one["engine"] == "mistral.rs")["fit"]["needs"][0]["expected"]
    seen = [None if share is None else int(share * expected) for share in measured]
    found = measured_over_estimated(entry, "mistral.rs", seen)
    assert found == (ratio if ratio is None else pytest.approx(ratio, rel=1e-3))
