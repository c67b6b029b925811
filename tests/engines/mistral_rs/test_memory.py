"""Memory of mistral.rs on a CPU: what was seen of the wheel 0.9.5."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf_files import LLAMA, write_gguf

from engines.fit import estimate
from engines.mistral_rs import memory
from engines.model.free_memory import FreeMemory
from engines.model.gguf import Tensor
from engines.model.header import Header, read_header
from engines.model.memory import GIB, MIB, Part
from engines.settings import Settings

RAM = FreeMemory(ram_bytes=512 * GIB)
SMOLLM2 = {
    "block_count": 30,
    "context_length": 8192,
    "embedding_length": 576,
    "feed_forward_length": 1536,
    "attention.head_count": 9,
    "attention.head_count_kv": 3,
}


def parts(header: Header, free: FreeMemory = RAM, **settings: Any) -> dict[str, Part]:
    """By name; what takes nothing is empty."""
    found = estimate(header, Settings(**settings), "mistral.rs", memory=free).parts
    return defaultdict(lambda: Part("", "ram", 0, 0, 0, ""), {part.name: part for part in found})


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the measurements."""
    monkeypatch.setattr(memory, "cpu_flags", lambda: frozenset({"avx2", "fma", "avx512_vnni"}))


@pytest.fixture
def header(tmp_path: Path) -> Header:
    return read_header(write_gguf(tmp_path / "smollm2.gguf", keys=SMOLLM2))


def with_tensors(header: Header, kinds: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> Header:
    return replace(header, tensors=tuple(Tensor(name, kind, shapes[name], 0) for name, kind in kinds.items()))


def test_weights_that_are_not_quantised_are_kept_as_f32(tmp_path: Path) -> None:
    """SmolLM2 135M as F16 takes twice its file; what is quantised, and f32, stays as it is."""
    types = {"token_embd.weight": "F16", "blk.0.attn_q.weight": "Q8_0", "blk.0.attn_norm.weight": "F32"}
    header = read_header(write_gguf(tmp_path / "m.gguf", keys=LLAMA, tensors=types))
    embedding = next(tensor.n_bytes for tensor in header.tensors if tensor.type == "F16")
    assert parts(header)["weights"].expected == header.tensor_bytes + embedding
    on_gpu = parts(header, FreeMemory(512 * GIB, vram_bytes=80 * GIB, n_gpus=1))["weights"]
    assert (on_gpu.expected, on_gpu.high) == (header.tensor_bytes, header.tensor_bytes + embedding)


# of a wide model of four layers (1,024 wide, 4,096 within): MiB that it took more than as Q4_0, without the file's size
WIDE = {"attn_q": (1024, 1024), "attn_k": (1024, 256), "attn_v": (1024, 256), "attn_output": (1024, 1024)}
WIDE |= {"ffn_gate": (1024, 4096), "ffn_up": (1024, 4096), "ffn_down": (4096, 1024)}


@pytest.mark.parametrize(
    ("quant", "more_mib"),
    [("Q4_0", 0.0), ("Q2_K", 0.0), ("Q3_K", 0.0), ("Q5_K", 0.0), ("Q4_K", 42.7), ("Q6_K", 71.5), ("Q8_0", 60.9)],
)
def test_quants_with_kernels_of_the_cpu_are_held_twice(header: Header, quant: str, more_mib: float) -> None:
    tensors = {f"blk.{layer}.{name}.weight": shape for layer in range(4) for name, shape in WIDE.items()}
    found = parts(with_tensors(header, dict.fromkeys(tensors, quant), tensors))["repacked weights"]
    assert found.expected / MIB == pytest.approx(more_mib, abs=1.2)
    assert found.low == 0


def test_q8_0_is_held_once_where_the_cpu_has_no_vnni(header: Header, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "cpu_flags", lambda: frozenset({"avx2", "fma"}))
    kinds = {"blk.0.attn_q.weight": "Q8_0", "blk.0.attn_output.weight": "Q4_K"}
    found = parts(with_tensors(header, kinds, dict.fromkeys(kinds, (1024, 1024))))["repacked weights"]
    assert (found.expected, found.high) == (0.75 * MIB, (0.75 + 17 / 16) * MIB)


def test_other_shapes_are_held_once(header: Header) -> None:
    """Rows by 16 and columns by 256: of SmolLM2, 576 wide, ffn_down alone, which took 26 MiB of Q8_0."""
    shapes = {"blk.0.attn_q.weight": (576, 576), "blk.0.ffn_up.weight": (576, 1536), "blk.0.ffn_gate.weight": (256, 8)}
    assert parts(with_tensors(header, dict.fromkeys(shapes, "Q8_0"), shapes))["repacked weights"].expected == 0
    shapes = {f"blk.{layer}.ffn_down.weight": (1536, 576) for layer in range(30)}
    found = parts(with_tensors(header, dict.fromkeys(shapes, "Q8_0"), shapes))["repacked weights"]
    assert found.expected / MIB == pytest.approx(26, abs=1)


@pytest.mark.parametrize(("quant", "more_mib"), [("Q4_K", 24.0), ("Q8_0", 34.5), ("Q6_K", 0.0), ("Q5_K", 0.0)])
@pytest.mark.parametrize("is_tied", [True, False])
def test_an_output_is_held_twice_but_as_q6_k(header: Header, quant: str, more_mib: float, is_tied: bool) -> None:
    """16,384 tokens, 2,048 wide; what only looks up tokens is not multiplied, and held once."""
    kinds = {"token_embd.weight": quant} if is_tied else {"token_embd.weight": "Q8_0", "output.weight": quant}
    found = parts(with_tensors(header, kinds, dict.fromkeys(kinds, (2048, 16384))))["repacked weights"]
    assert found.expected / MIB == pytest.approx(more_mib, abs=1)


@pytest.mark.parametrize(
    ("experts", "used", "hidden", "n_tokens", "grown_mib"),
    [(8, 2, 512, 441, 896), (8, 2, 512, 897, 1825), (32, 2, 512, 441, 924), (8, 4, 512, 441, 1777)],
)
def test_each_token_of_a_prompt_takes_its_experts(
    header: Header, experts: int, used: int, hidden: int, n_tokens: int, grown_mib: float
) -> None:
    """512 wide; what the peak was over the model that had no request."""
    shapes = {f"blk.0.ffn_{name}_exps.weight": (512, hidden, experts) for name in ("gate", "up")}
    sparse = with_tensors(header, dict.fromkeys(shapes, "Q4_K"), shapes)
    sparse = replace(sparse, meta={**sparse.meta, "llama.expert_used_count": used})
    found = parts(sparse, context_tokens=n_tokens)["experts of a prompt"]
    assert found.expected / MIB == pytest.approx(grown_mib, rel=0.05)
    assert found.high >= grown_mib * MIB
    notes = estimate(sparse, Settings(context_tokens=n_tokens), "mistral.rs", memory=RAM).notes
    assert any("for its experts" in note for note in notes) == (grown_mib > 1024)


@pytest.mark.parametrize("used", [None, "two", 0, -1, (2, 2), 1.5])
def test_a_number_of_experts_that_is_none_counts_one(header: Header, used: Any) -> None:
    shapes = {"blk.0.ffn_up_exps.weight": (512, 512, 8)}
    sparse = with_tensors(header, dict.fromkeys(shapes, "Q4_K"), shapes)
    sparse = replace(sparse, meta={**sparse.meta, "llama.expert_used_count": used})
    assert parts(sparse, context_tokens=100)["experts of a prompt"].expected == (8 + 100) * MIB


@pytest.mark.parametrize(
    ("tokenizer", "tokens", "took_mib"),
    [("gpt2", 1000, 36), ("gpt2", 16384, 58), ("gpt2", 49152, 107), ("llama", 65536, 223), ("llama", 262144, 836)],
)
def test_a_tokenizer_takes_its_tokens(header: Header, tokenizer: str, tokens: int, took_mib: float) -> None:
    found = parts(replace(header, tokenizer_model=tokenizer, vocab_size=tokens))["process"]
    assert found.low < took_mib * MIB < found.high
    assert found.expected / MIB == pytest.approx(took_mib, rel=0.12)


def test_the_positions_that_a_model_knows_have_a_table(header: Header) -> None:
    """6 MiB more where it knows 32,768 in place of 8,192 positions, 64 long; used or not."""
    known = [replace(header, context_length=n, rope_dimension=64) for n in (8192, 32768)]
    short, long = (parts(one, context_tokens=256)["position tables"].expected for one in known)
    assert (long - short) / MIB == pytest.approx(6, abs=0.1)


@pytest.mark.parametrize(("context", "grown_mib"), [(1024, 52), (2048, 161), (4096, 335), (8192, 847)])
def test_a_prompt_takes_its_activations_and_a_square_mask(header: Header, context: int, grown_mib: float) -> None:
    """Peaks of private memory over that of the loaded model (SmolLM2 135M as F16), which has a KV cache for a while."""
    none, found = parts(header, context_tokens=1)["KV cache"].expected, parts(header, context_tokens=context)
    grown = (found["KV cache"].expected - none + found["compute buffers"].expected) / MIB
    assert grown == pytest.approx(grown_mib, rel=0.2)


def test_layers_that_slide_keep_their_window(tmp_path: Path) -> None:
    """Gemma 3 270M: 1,185 MiB with 512 tokens of context, 1,346 with 3,072; its window is 512."""
    keys = {"block_count": 18, "embedding_length": 640, "feed_forward_length": 2048, "context_length": 32768}
    keys |= {"attention.head_count": 4, "attention.head_count_kv": 1, "attention.key_length": 256}
    keys |= {"attention.value_length": 256, "attention.sliding_window": 512}
    gemma = read_header(write_gguf(tmp_path / "m.gguf", keys=keys))
    assert (gemma.sliding_window, any(gemma.sliding)) == (512, False), "llama has no pattern"
    gemma = replace(gemma, sliding=tuple((layer + 1) % 6 != 0 for layer in range(18)))
    sizes = [parts(gemma, context_tokens=n) for n in (512, 3072)]
    less, more = (sum(one[name].expected for name in ("KV cache", "compute buffers")) for one in sizes)
    assert (more - less) / MIB == pytest.approx(1346 - 1185, rel=0.15)


def test_a_long_context_names_what_its_mask_takes(header: Header) -> None:
    """7 bytes for each pair of tokens, on a CPU."""
    (note,) = (note for note in estimate(header, Settings(), "mistral.rs", 32768, memory=RAM).notes if "mask" in note)
    assert "32,768 tokens takes 7.00 GiB" in note
    assert not any("mask" in note for note in estimate(header, Settings(), "mistral.rs", 4096, memory=RAM).notes)
