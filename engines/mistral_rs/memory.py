"""Memory that mistral.rs takes for a model."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from types import MappingProxyType

from engines.cpu import cpu_flags
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
    cells_bytes,
    compute_bytes,
    exactly,
    gpu_overhead,
    kv_bytes,
    kv_bytes_per_token,
)
from engines.units import number_of, size

WIDENED = frozenset({"F16", "BF16"})
# candle-core/src/quantized/repack_x86.rs: bytes a weight of the copy that is multiplied, of matrices whose rows and
# columns are multiples of these; not of an output that is Q6_K (seen)
REPACKED = MappingProxyType({"Q4_K": Fraction(3, 4), "Q6_K": Fraction(5, 4), "Q8_0": Fraction(17, 16)})
REPACKED_ROWS, REPACKED_COLUMNS = 16, 256
WITH_VNNI, VNNI = frozenset({"Q8_0"}), frozenset({"avx512_vnni", "avx_vnni"})  # kernels for a CPU with one of these
REPACKED_ELSEWHERE = frozenset({"Q4_0", "Q5_K", *REPACKED})  # repack.rs, on ARM: as large as they are
CACHE_TOKENS, CACHE_COPIES = 512, 2  # grown by so many; the sequence has a cache, and the pipeline another
MASK_BYTES, MASK_MADE_BYTES = 4, 7  # of a token and a token: what stays, and the peak while it is made
FREE_VRAM_SHARE = Fraction(9, 10)


def memory_parts(case: MemoryCase) -> list[Part]:
    """By the wheel 0.9.5 on a CPU (benchmarks/memory.py); what earlier versions do is within low and high."""
    header, parallel = case.header, case.settings.sequences
    where: Device = "vram" if case.gpu_layers else "ram"
    kv_cache = _kv_cache(case, where)
    if case.gpu_layers:
        compute = compute_bytes(header, Cells(case.context, 0), parallel, DEFAULT_UBATCH)
        on_cpu = []
    else:
        compute = _prompt_bytes(header, case.context, kv_cache.expected)
        on_cpu = [_repacked(header), *_experts(header, case.context)]
    return [
        _weights(header, where),
        *on_cpu,
        _embedding(header, where),
        _positions(header, where),
        _process(header),
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


def _repacked(header: Header) -> Part:
    """What is kept beside the weights, in a layout of the CPU's own; none before 0.9."""
    output = "output.weight" if header.tensor("output.weight") else "token_embd.weight"
    flags = cpu_flags()
    here = REPACKED.keys() if not flags or flags & VNNI else REPACKED.keys() - WITH_VNNI
    copied = at_most = 0
    for tensor in header.tensors:
        if len(tensor.shape) != 2 or (tensor.layer is None and tensor.name != output):
            continue
        columns, rows = tensor.shape
        fits = rows % REPACKED_ROWS == 0 and columns % REPACKED_COLUMNS == 0
        share = int(REPACKED.get(tensor.type, 0) * columns * rows) if fits else 0
        copied += share if tensor.type in here and (tensor.name, tensor.type) != (output, "Q6_K") else 0
        at_most += max(share, tensor.n_bytes if tensor.type in REPACKED_ELSEWHERE else 0)
    return Part("repacked weights", "ram", 0, copied, at_most, "a second copy, in a layout of the CPU's own")


def _experts(header: Header, n_tokens: int) -> list[Part]:
    """A prompt's experts as f32, gathered for each of its tokens (mistralrs-quant/src/gguf/cpu.rs); not on ARM."""
    stacks = [tensor for tensor in header.tensors if len(tensor.shape) == 3 and "_exps" in tensor.name]
    if not stacks:
        return []
    widest = max(stacks, key=lambda tensor: math.prod(tensor.shape))
    counted = header.meta.get(f"{header.architecture}.expert_used_count")
    used = counted if isinstance(counted, int) and counted > 0 else 1
    whole, one = (math.prod(widest.shape[:n]) * F32_BYTES for n in (3, 2))
    expected = whole + n_tokens * used * one
    return [Part("experts of a prompt", "ram", 0, expected, expected * 5 // 4 + whole, f"f32, {used} for each token")]


def _embedding(header: Header, where: Device) -> Part:
    embedding = header.tensor("token_embd.weight")
    as_f32 = math.prod(embedding.shape) * F32_BYTES if embedding else 0
    return Part("token embedding", where, 0, 0, as_f32, "token_embd once more, dequantized, before 0.9")


def _positions(header: Header, where: Device) -> Part:
    """Cosine and sine of each position that the model knows, as f32; layers that slide have another table."""
    table = (header.context_length or 0) * (header.rope_dimension or header.key_length or 0) * F32_BYTES
    n_tables = 1 + any(header.sliding)
    return Part("position tables", where, 0, n_tables * table, 2 * table, f"{header.context_length or 0:,} positions")


def _process(header: Header) -> Part:
    """Libraries and tokenizer: 107 MiB with SmolLM2's 49,152 tokens, 880 with Gemma's 262,144 (a Unigram trie)."""
    vocab = header.vocab_size or 0
    low, expected, high = (1000, 3300, 5000) if header.tokenizer_model == "llama" else (300, 1550, 3000)
    sizes = (10 * MIB + low * vocab, 33 * MIB + expected * vocab, 100 * MIB + high * vocab)
    return Part("process", "ram", *sizes, "libraries and tokenizer")


def _prompt_bytes(header: Header, n_tokens: int, kv_bytes: int) -> tuple[int, int, int]:
    """What reading a prompt of `n_tokens` takes on a CPU, beside its KV cache; low is that of a short one.

    It is not cut into batches: 3.5 times the feed-forward and 5.5 times the embedding length for each token, in f32,
    and a square mask of f32. That takes more while it is made, before there is a KV cache. By the peaks of 11 models
    of 1 to 48 layers, 256 to 1,024 wide, at 512 to 12,288 tokens (0.9.5).
    """
    embedding = header.embedding_length or 0
    widest = max((*header.feed_forward_length, embedding), default=0)
    activations, square = n_tokens * (7 * widest + 11 * embedding) * F32_BYTES // 2, n_tokens**2
    peak = max(activations + MASK_BYTES * square, MASK_MADE_BYTES * square - kv_bytes)
    return activations // 3, peak, 2 * activations + 2 * MASK_MADE_BYTES * square


def _kv_cache(case: MemoryCase, where: Device) -> Part:
    flags = OWN_ARGS.flags(case.own)
    given = {name: flag.values[0] for name, flag in flags.items() if flag.values}
    asked = given.get("--pa-cache-type", case.settings.kv_type)
    kv_type = "f8e4m3" if where == "vram" and asked == "f8e4m3" else "f16"
    full = kv_bytes_per_token(case.header, kv_type) * case.context
    bounded = kv_bytes(case.header, case.context, case.settings.sequences, case.ubatch, kv_type)
    why = f"{case.context:,} tokens, {kv_type}; sliding-window layers counted in full"
    if where == "ram":
        cells = -(-case.context // CACHE_TOKENS) * CACHE_TOKENS
        sliding = min(cells, (case.header.sliding_window or 0) + CACHE_TOKENS)
        grown = CACHE_COPIES * cells_bytes(case.header, Cells(cells, sliding), kv_type)
        why = f"{case.context:,} tokens, {kv_type}, twice"
        return Part("KV cache", where, min(bounded, full), grown, grown * 5 // 4, why)
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
    experts = sum(part.expected for part in _experts(case.header, case.context))
    for what, taken in (("mask", MASK_MADE_BYTES * case.context**2), ("experts", experts)):
        if taken > GIB and not case.gpu_layers:
            asked = f"a prompt of {case.context:,} tokens"
            notes.append(f"{asked} takes {size(taken)} for its {what}; shorter ones take less")
    kv_type = case.settings.kv_type
    if kv_type not in (None, "f16") and not (case.gpu_layers and kv_type == "f8e4m3"):
        notes.append(f"it cannot keep KV as {kv_type} here: counted as f16")
    return notes
