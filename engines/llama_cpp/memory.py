"""Memory that llama.cpp's server takes for a model."""

from __future__ import annotations

import math
from fractions import Fraction

from engines.model.free_memory import Device
from engines.model.memory import MIB, MemoryCase, Part, compute_bytes, exactly, gpu_overhead, kv_bytes, weights_bytes

DEFAULT_HOST_CACHE_MIB = 8192
CONTEXT_CHECKPOINTS = 32  # --ctx-checkpoints, per slot


def memory_parts(case: MemoryCase) -> list[Part]:
    """Everything it allocates, on its device; sizes beside the model's own as seen with build b10434 on Linux."""
    header, settings = case.header, case.settings
    weights, vocab = weights_bytes(header, case.gpu_layers), header.vocab_size or 0
    compute = compute_bytes(header, case.context, settings.sequences, case.ubatch)
    where: Device = "vram" if case.gpu_layers else "ram"
    kv_type = settings.kv_type or "f16"
    arguments = (header, case.context, settings.sequences, case.ubatch, kv_type)
    unified, split = kv_bytes(*arguments), kv_bytes(*arguments, unified=False)
    kv_sizes = min(unified, split), split, max(unified, split)
    cache_mib = DEFAULT_HOST_CACHE_MIB if settings.host_cache_mib is None else settings.host_cache_mib
    set_by = "llama.cpp's default" if settings.host_cache_mib is None else "as set"
    cache_why = f"grows with distinct prompts up to {cache_mib} MiB ({set_by})"
    # 317 MiB resident for SmolLM2 135M and 364 for Gemma 3 270M, less their buffers
    process = (12 * MIB, 16 * MIB + 160 * vocab, 128 * MIB + 320 * vocab)
    checkpoints = case.state_bytes * CONTEXT_CHECKPOINTS
    checkpoints_why = f"up to {CONTEXT_CHECKPOINTS} copies of the recurrent state per slot"
    return [
        exactly("weights", "ram", weights["ram"], "tensors on the CPU, mapped from the file"),
        exactly("weights", "vram", weights["vram"], f"{case.gpu_layers} GPU layers; token_embd stays on the CPU"),
        *_by_layer_share(case, "KV cache", kv_sizes, f"{case.context} tokens in all, {kv_type}"),
        *_by_layer_share(case, "recurrent state", (case.state_bytes,) * 3, f"f32, {settings.sequences} sequence(s)"),
        Part("compute buffers", where, *compute, f"logits, mask and activations at ubatch {case.ubatch}"),
        Part("process", "ram", *process, "libraries and vocabulary tables"),
        Part("host prompt cache", "ram", 0, 0, cache_mib * MIB, cache_why),
        *(gpu_overhead() if case.gpu_layers else []),
        Part("context checkpoints", "ram", 0, 0, checkpoints, checkpoints_why),
    ]


def _by_layer_share(case: MemoryCase, name: str, sizes: tuple[int, int, int], why: str) -> list[Part]:
    """`sizes` divided between RAM and VRAM by the share of layers on the GPU."""
    share = Fraction(min(case.gpu_layers, case.header.n_layers), case.header.n_layers or 1)
    low, expected, high = (math.ceil(size * share) for size in sizes)
    on_cpu = Part(name, "ram", sizes[0] - low, sizes[1] - expected, sizes[2] - high, why)
    return [on_cpu, Part(name, "vram", low, expected, high, why)]


def memory_notes(case: MemoryCase) -> list[str]:
    if case.settings.context_tokens is None:
        return ["with no context set, llama.cpp's --fit may shrink it quietly to what fits"]
    return []
