"""Memory that mistral.rs takes for a model."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from engines.errors import BadInput
from engines.mistral_rs.flags import OWN_ARGS
from engines.model.free_memory import Device
from engines.model.header import Header
from engines.model.memory import (
    DEFAULT_UBATCH,
    F32_BYTES,
    GIB,
    MIB,
    Cells,
    MemoryCase,
    Part,
    compute_bytes,
    exactly,
    gpu_overhead,
    kv_bytes,
    kv_bytes_per_token,
)
from engines.units import number_of, size

WIDENED = frozenset({"F16", "BF16"})
MASK_BYTES, MASK_MADE_BYTES = 4, 13  # of a token and a token: what stays, and the peak while it is made
FREED_BY_LOADING = 20 * MIB  # of the heap, and used again
FREE_VRAM_SHARE = Fraction(9, 10)


def memory_parts(case: MemoryCase) -> list[Part]:
    header, parallel = case.header, case.settings.sequences
    where: Device = "vram" if case.gpu_layers else "ram"
    # mistralrs-core/src/models/quantized_*.rs: token_embd is dequantized to f32 and, when tied, kept quantized as well
    embedding = header.tensor("token_embd.weight")
    elements = math.prod(embedding.shape) if embedding else 0
    # 0.9.5 on a CPU, beside weights and embedding: 24 MiB with SmolLM2 135M, 300 MiB with Gemma 3 270M, whose tokenizer
    # becomes a Unigram trie
    vocab = header.vocab_size or 0
    low, expected, high = (300, 1100, 3000) if header.tokenizer_model == "llama" else (50, 200, 600)
    process = (10 * MIB + low * vocab, 15 * MIB + expected * vocab, 160 * MIB + high * vocab)
    kv_cache = _kv_cache(case, where)
    if case.gpu_layers:
        compute = compute_bytes(header, Cells(case.context, 0), parallel, DEFAULT_UBATCH)
    else:
        compute = _prompt_bytes(header, case.context, kv_cache.expected)
    return [
        _weights(header, where),
        Part("token embedding", where, elements * 2, elements * 4, elements * 4, "token_embd again, dequantized"),
        Part("process", "ram", *process, "libraries and tokenizer"),
        kv_cache,
        exactly("recurrent state", where, case.state_bytes, f"f32, {number_of(parallel, 'sequence')}"),
        Part("compute buffers", where, *compute, "mask and activations of a prompt; rough"),
        *(gpu_overhead() if case.gpu_layers else []),
    ]


def _weights(header: Header, where: Device) -> Part:
    """Quantised tensors as they are; others are multiplied as f32 (candle-core/src/quantized, `QMatMul::from_arc`)."""
    widened = sum(
        math.prod(tensor.shape) * F32_BYTES if tensor.type in WIDENED else tensor.n_bytes for tensor in header.tensors
    )
    as_stored = header.tensor_bytes if where == "vram" else widened  # not seen on a GPU
    return Part("weights", where, as_stored, as_stored, widened, "a private copy of every tensor, F16 and BF16 as f32")


def _prompt_bytes(header: Header, n_tokens: int, kv_bytes: int) -> tuple[int, int, int]:
    """What reading a prompt of `n_tokens` takes on a CPU, beside its KV cache; low is that of a short one.

    It is not cut into batches: four times the feed-forward and ten times the embedding length for each token, in f32,
    and a square mask of f32. That takes three times as much while it is made, before there is a KV cache. By the peaks
    of SmolLM2 135M as F16 at 1,024 to 8,192 tokens (0.9.5).
    """
    embedding = header.embedding_length or 0
    widest = max((*header.feed_forward_length, embedding), default=0)
    activations, square = n_tokens * (4 * widest + 10 * embedding) * F32_BYTES, n_tokens**2
    peak = max(activations + MASK_BYTES * square, MASK_MADE_BYTES * square - kv_bytes) - FREED_BY_LOADING
    low = min(activations // 3, max(peak, 0))
    return low, max(peak, low), 2 * activations + MASK_MADE_BYTES * square


def _kv_cache(case: MemoryCase, where: Device) -> Part:
    flags = OWN_ARGS.flags(case.own)
    given = {name: flag.values[0] for name, flag in flags.items() if flag.values}
    asked = given.get("--pa-cache-type", case.settings.kv_type)
    kv_type = "f8e4m3" if where == "vram" and asked == "f8e4m3" else "f16"
    full = kv_bytes_per_token(case.header, kv_type) * case.context
    bounded = kv_bytes(case.header, case.context, case.settings.sequences, case.ubatch, kv_type)
    why = f"{case.context:,} tokens, {kv_type}; sliding-window layers counted in full"
    if where == "ram":
        return Part("KV cache", where, min(bounded, full), full, full, why)
    vram = case.free.vram_bytes or 0
    for name, unit in (("--pa-memory-mb", MIB), ("--pa-memory-fraction", vram)):
        if name in given:
            return exactly("KV cache", where, int(_number(name, given[name]) * unit), f"a pool as {name} sets it")
    if case.settings.context_tokens is not None:
        return exactly("KV cache", where, full, why)
    why += "; with no context_tokens set its pool takes 90% of free VRAM"
    return Part("KV cache", where, full, full, max(full, int(FREE_VRAM_SHARE * vram)), why)


def _number(name: str, text: str) -> float:
    if re.fullmatch(r"\d+(\.\d+)?", text) is None:
        raise BadInput(f"{name}: '{text}' is not a number; write the number itself")
    return float(text)


def memory_notes(case: MemoryCase) -> list[str]:
    notes = ["its prefix cache keeps the KV of finished sequences (16 by default); not counted"]
    if not case.gpu_layers and (mask := MASK_MADE_BYTES * case.context**2) > GIB:
        notes.append(f"a prompt of {case.context:,} tokens takes {size(mask)} for its mask; shorter ones take less")
    kv_type = case.settings.kv_type
    if kv_type not in (None, "f16") and not (case.gpu_layers and kv_type == "f8e4m3"):
        notes.append(f"it cannot keep KV as {kv_type} here: counted as f16")
    return notes
