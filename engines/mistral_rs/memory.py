"""Memory that mistral.rs takes for a model."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from engines.errors import BadInput
from engines.mistral_rs.flags import OWN_ARGS
from engines.model.free_memory import Device
from engines.model.memory import (
    DEFAULT_UBATCH,
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

FREE_VRAM_SHARE = Fraction(9, 10)


def memory_parts(case: MemoryCase) -> list[Part]:
    header, parallel = case.header, case.settings.sequences
    where: Device = "vram" if case.gpu_layers else "ram"
    # mistralrs-core/src/models/quantized_*.rs: token_embd is dequantized to f32 and, when tied, kept quantized as well
    embedding = header.tensor("token_embd.weight")
    elements = math.prod(embedding.shape) if embedding else 0
    # Gemma 3 270M with 0.9.5 on CPU: some 500 MiB beside weights and embedding, the trie of its Unigram tokenizer
    vocab = header.vocab_size or 0
    low, expected, high = (300, 1500, 3000) if header.tokenizer_model == "llama" else (50, 200, 600)
    process = (20 * MIB + low * vocab, 40 * MIB + expected * vocab, 160 * MIB + high * vocab)
    # prefill is not cut into micro-batches up to 0.9.2: activations follow the prompt
    compute = compute_bytes(header, Cells(case.context, 0), parallel, DEFAULT_UBATCH)
    return [
        exactly("weights", where, header.tensor_bytes, "a private copy of every tensor, not a mapping of the file"),
        Part("token embedding", where, elements * 2, elements * 4, elements * 4, "token_embd again, dequantized"),
        Part("process", "ram", *process, "libraries and tokenizer"),
        _kv_cache(case, where),
        exactly("recurrent state", where, case.state_bytes, f"f32, {parallel} sequence(s)"),
        Part("compute buffers", where, *compute, "logits, mask and activations; rough"),
        *(gpu_overhead() if case.gpu_layers else []),
    ]


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
    why += "; with no context_tokens set its pool takes 90 % of free VRAM"
    return Part("KV cache", where, full, full, max(full, int(FREE_VRAM_SHARE * vram)), why)


def _number(name: str, text: str) -> float:
    if re.fullmatch(r"\d+(\.\d+)?", text) is None:
        raise BadInput(f"{name}: '{text}' is not a number; write the number itself")
    return float(text)


def memory_notes(case: MemoryCase) -> list[str]:
    notes = ["its prefix cache keeps the KV of finished sequences (16 by default); not counted"]
    kv_type = case.settings.kv_type
    if kv_type not in (None, "f16") and not (case.gpu_layers and kv_type == "f8e4m3"):
        notes.append(f"it cannot keep KV as {kv_type} here: counted as f16")
    return notes
