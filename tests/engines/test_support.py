"""What each engine loads, with the reason that the user reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFEndian
from gguf_files import LLAMA, nemotron_keys, write_gguf

from engines.errors import BadInput
from engines.model.header import Header, read_header
from engines.model.loads import parse_version
from engines.support import alternatives, loads


def header(tmp_path: Path, architecture: str = "llama", **options: object) -> Header:
    return read_header(write_gguf(tmp_path / "m.gguf", architecture, **options))  # type: ignore[arg-type]


def test_a_listed_architecture_with_readable_tensors_loads(tmp_path: Path) -> None:
    """The reason names the list and its version."""
    answer = loads("mistral.rs", header(tmp_path), version="0.9.2")
    assert answer.answer == "yes"
    assert answer.why.endswith("(0.9.2 source list)")


def test_nemotron_is_refused_by_mistral_rs_alone(tmp_path: Path) -> None:
    """llama.cpp knows the architecture, and misses the tensors of this file; mistral.rs does not."""
    nemotron = header(tmp_path, "nemotron_h_moe", keys=nemotron_keys())
    assert loads("llama.cpp", nemotron).answer == "unknown"
    answer = loads("mistral.rs", nemotron, version="0.9.5")
    assert answer.answer == "no"
    assert "nemotron_h_moe" in answer.why
    assert "list read at 0.9.2; 0.9.5 is newer" in answer.why


@pytest.mark.parametrize(
    ("kind", "told"), [("IQ3_S", "no IQ* type"), ("TQ1_0", "no TQ* type"), ("NVFP4", "no NVFP4"), ("MXFP4", "gpt-oss")]
)
def test_one_unreadable_tensor_is_enough_and_is_named(tmp_path: Path, kind: str, told: str) -> None:
    """Files sold as Q3_K often hold some."""
    mixed = header(tmp_path, tensors={"token_embd.weight": "Q4_K", "blk.1.ffn_down.weight": kind})
    answer = loads("mistral.rs", mixed, version="0.9.2")
    assert answer.answer == "no"
    assert f"tensor blk.1.ffn_down.weight is {kind}" in answer.why
    assert told in answer.why
    assert kind not in loads("llama.cpp", mixed).why


def test_mxfp4_is_read_for_gpt_oss(tmp_path: Path) -> None:
    """The one exception among the types; what this file lacks is another matter."""
    assert "MXFP4" not in loads("mistral.rs", header(tmp_path, "gpt-oss", tensors={"a.weight": "MXFP4"})).why


@pytest.mark.parametrize(
    ("version", "answer", "told"),
    [
        ("0.9.2", "yes", "0.9.2 source list"),
        ("v0.9.5", "yes", "0.9.5 is newer"),
        ("0.7.0", "unknown", "older than 0.9.1"),
        ("0.8.1", "yes", "0.9.2 source list"),
        (None, "yes", "version is not known"),
        ("nightly", "yes", "'nightly' cannot be read"),
    ],
)
def test_the_answer_says_how_old_the_list_is(tmp_path: Path, version: str | None, answer: str, told: str) -> None:
    """A list read at one version is not silently taken for another."""
    found = loads("mistral.rs", header(tmp_path), version=version)
    assert found.answer == answer
    assert told in found.why


@pytest.mark.parametrize(("version", "answer"), [("0.8.1", "no"), ("0.8.4", "unknown")])
def test_the_last_version_on_crates_io_knows_few_architectures(tmp_path: Path, version: str, answer: str) -> None:
    """It ends at "Unknown GGUF architecture"; which version after it has which is not known."""
    assert loads("mistral.rs", header(tmp_path, "gemma2"), version=version).answer == answer


def test_an_old_version_still_refuses_what_no_version_loads(tmp_path: Path) -> None:
    """No stays no."""
    assert loads("mistral.rs", header(tmp_path, "mamba2"), version="0.7.0").answer == "no"


def test_a_tokenizer_that_is_rebuilt_is_a_warning(tmp_path: Path) -> None:
    """That of Gemma 3 is of this kind."""
    answer = loads("mistral.rs", header(tmp_path, "gemma3", tokenizer="llama"), version="0.9.5")
    assert any("Unigram" in warning for warning in answer.warnings)


def test_a_multimodal_only_architecture_is_unknown(tmp_path: Path) -> None:
    """The projector file was not looked at."""
    answer = loads("mistral.rs", header(tmp_path, "qwen3vl"))
    assert answer.answer == "unknown"
    assert "projector" in answer.why


def test_a_template_without_tools_is_a_warning(tmp_path: Path) -> None:
    """Both engines drop the tools of a request then."""
    answer = loads("mistral.rs", header(tmp_path, template="{{ messages }}"))
    assert any("never names tools" in warning for warning in answer.warnings)


def test_big_endian_is_refused(tmp_path: Path) -> None:
    """Whatever the architecture."""
    answer = loads("mistral.rs", header(tmp_path, endian=GGUFEndian.BIG))
    assert answer.answer == "no"
    assert "big-endian" in answer.why


def test_a_projector_file_is_no_model(tmp_path: Path) -> None:
    """mmproj files are GGUFs too."""
    projector = header(tmp_path, "clip", keys={}, general={"general.type": "mmproj"})
    assert loads("llama.cpp", projector).answer == loads("mistral.rs", projector).answer == "no"


def test_llama_cpp_does_not_refuse_what_its_list_lacks(tmp_path: Path) -> None:
    """A newer build may know it."""
    answer = loads("llama.cpp", header(tmp_path, "quetzal"))
    assert answer.answer == "unknown"
    assert "newer llama.cpp" in answer.why


def test_an_engine_without_a_list_is_bad_input(tmp_path: Path) -> None:
    """Silence would read as yes."""
    with pytest.raises(BadInput, match="exllama"):
        loads("exllama", header(tmp_path))


def test_a_blocked_nemotron_gets_models_of_its_class(tmp_path: Path) -> None:
    """And the ways out that keep the model."""
    nemotron = header(tmp_path, "nemotron_h_moe", keys=nemotron_keys())
    answers = {engine: loads(engine, nemotron) for engine in ("llama.cpp", "mistral.rs")}
    choices = alternatives(answers, incumbent="llama.cpp")
    assert any("Qwen3-30B-A3B" in choice for choice in choices)
    assert any("stay on llama.cpp" in choice for choice in choices)
    assert any("vLLM" in choice for choice in choices)


def test_nothing_blocked_needs_no_alternative(tmp_path: Path) -> None:
    """The list is empty, not noise."""
    answers = {"mistral.rs": loads("mistral.rs", header(tmp_path), version="0.9.2")}
    assert alternatives(answers, incumbent="llama.cpp") == []


@pytest.mark.parametrize(
    ("text", "version"), [("mistralrs 0.9.5", (0, 9, 5)), ("v0.10.0", (0, 10, 0)), ("b10434", None), (None, None)]
)
def test_versions_compare_as_numbers(text: str | None, version: tuple[int, ...] | None) -> None:
    """0.10 is newer than 0.9."""
    assert parse_version(text) == version


def test_weights_without_a_fast_kernel_are_counted_with_figures_and_a_way_out(tmp_path: Path) -> None:
    """A ratio holds for one quant, so another one is named beside it."""
    kinds = {"a.weight": "Q4_1", "b.weight": "Q4_1", "c.weight": "F32"}
    (slow,) = loads("mistral.rs", header(tmp_path, tensors=kinds), version="0.9.5").slow
    assert (slow.device, slow.quant, slow.tensors, slow.faster, slow.times) == ("CPU", "Q4_1", 2, "F16", (0.83, 2.0))
    assert "2 of 3 tensors are Q4_1" in str(slow)
    assert "11.7 times" in str(slow)
    assert "--to F16" in str(slow)
    assert loads("mistral.rs", header(tmp_path, tensors={"a.weight": "Q8_0"}), version="0.9.5").slow == ()


@pytest.mark.parametrize(
    ("without", "answer", "why"),
    [
        ("attention.layer_norm_epsilon", "no", "the key starcoder2.attention.layer_norm_epsilon is missing"),
        ("rope.freq_base", "unknown", "tensor output_norm.weight is missing"),
    ],
)
def test_what_an_architecture_needs_is_listed(tmp_path: Path, without: str, answer: str, why: str) -> None:
    """A key is certain; which tensors there are depends on more."""
    keys = {**LLAMA, "attention.layer_norm_epsilon": 1e-5, "rope.freq_base": 1e4}
    keys.pop(without)
    found = header(tmp_path, "starcoder2", keys=keys, tensors={"token_embd.weight": "F32"})
    said = loads("llama.cpp", found)
    assert said.answer == answer
    assert why in said.why
