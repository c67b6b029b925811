"""Memory of mistral.rs on a CPU: what was seen of the wheel 0.9.5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf_files import LLAMA, write_gguf

from engines.fit import estimate
from engines.model.free_memory import FreeMemory
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


def parts(header: Header, memory: FreeMemory = RAM, **settings: Any) -> dict[str, Part]:
    return {part.name: part for part in estimate(header, Settings(**settings), "mistral.rs", memory=memory).parts}


def test_weights_that_are_not_quantised_are_kept_as_f32(tmp_path: Path) -> None:
    """SmolLM2 135M as F16 takes twice its file; what is quantised, and f32, stays as it is."""
    types = {"token_embd.weight": "F16", "blk.0.attn_q.weight": "Q8_0", "blk.0.attn_norm.weight": "F32"}
    header = read_header(write_gguf(tmp_path / "m.gguf", keys=LLAMA, tensors=types))
    embedding = next(tensor.n_bytes for tensor in header.tensors if tensor.type == "F16")
    assert parts(header)["weights"].expected == header.tensor_bytes + embedding
    on_gpu = parts(header, FreeMemory(512 * GIB, vram_bytes=80 * GIB, n_gpus=1))["weights"]
    assert (on_gpu.expected, on_gpu.high) == (header.tensor_bytes, header.tensor_bytes + embedding)


@pytest.mark.parametrize(("context", "grown_mib"), [(1024, 52), (2048, 161), (4096, 335), (8192, 847)])
def test_a_prompt_takes_its_activations_and_a_square_mask(tmp_path: Path, context: int, grown_mib: float) -> None:
    """Peaks of private memory over that of the loaded model (SmolLM2 135M as F16), the KV cache among them."""
    found = parts(read_header(write_gguf(tmp_path / "m.gguf", keys=SMOLLM2)), context_tokens=context)
    grown = (found["KV cache"].expected + found["compute buffers"].expected) / MIB
    assert grown == pytest.approx(grown_mib, rel=0.2)
    assert found["compute buffers"].low < 20 * MIB + found["compute buffers"].expected / 3


def test_a_long_context_names_what_its_mask_takes(tmp_path: Path) -> None:
    """13 bytes for each pair of tokens, on a CPU."""
    header = read_header(write_gguf(tmp_path / "m.gguf", keys=SMOLLM2))
    (note,) = (note for note in estimate(header, Settings(), "mistral.rs", 32768, memory=RAM).notes if "mask" in note)
    assert "32,768 tokens takes 13.00 GiB" in note
    assert not any("mask" in note for note in estimate(header, Settings(), "mistral.rs", 4096, memory=RAM).notes)
