"""Memory that llama.cpp's server takes for a model.

Formulas as in llama.cpp's `src/llama-kv-cache*.cpp`, `llama-context.cpp` and `tools/server`; compared with what build
b10434 prints over a grid of settings (tests/engines/llama_cpp/test_memory_as_printed.py).
"""

from __future__ import annotations

import contextlib
import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from engines.errors import BadInput
from engines.llama_cpp.flags import OWN_ARGS
from engines.model.free_memory import Device
from engines.model.gguf import Tensor
from engines.model.header import MAX_LAYERS, Header, read_header
from engines.model.memory import (
    MIB,
    Cells,
    MemoryCase,
    Part,
    cells_bytes,
    compute_bytes,
    exactly,
    gpu_overhead,
    is_mla,
    kv_bytes,
    kv_cells,
    kv_layers,
    layer_kv_bytes,
    state_bytes_per_sequence,
    weights_bytes,
    why_unsized,
)
from engines.own_args import Flag
from engines.units import number_of

DEFAULT_HOST_CACHE_MIB = 8192
CONTEXT_CHECKPOINTS = 32  # --ctx-checkpoints, per slot
# of a prompt that fills a slot: near its end and at its end, and one each so many tokens (b10434 logs them)
PROMPT_CHECKPOINTS, CHECKPOINT_SPACING = 2, 8192
DRAFT_TOKENS = 3  # --spec-draft-n-max
EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"  # LLM_FFN_EXPS_REGEX
NO_FLASH_ATTENTION = frozenset({"grok"})  # llama.cpp switches it off
# ggml/src/ggml-cpu/repack.cpp: copied into a layout of the CPU's own, on AVX2; other CPUs take the second set as well
REPACKED = frozenset({"Q4_0", "Q4_K", "IQ4_NL"})
PERHAPS_REPACKED = REPACKED | {"Q2_K", "Q5_K", "Q6_K", "Q8_0", "MXFP4"}
COPIES = ("none", "mlock", "dio")  # --load-mode without a mapping
ADAPTERS = ("--lora", "--lora-scaled", "--control-vector", "--control-vector-scaled")
PROJECTOR_WORK = 512 * MIB
HOST = (8 * MIB, 15 * MIB, 40 * MIB)  # xllamacpp 2026.10.11549 beside the binary b10434, Python 3.11
F16_BYTES = 2


@dataclass(frozen=True)
class Asked:
    """What the user's own flags say about memory."""

    flags: list[Flag]

    def value(self, name: str, default: str = "") -> str:
        """The value of the last flag `name`."""
        given = [flag.values[0] for flag in self.flags if _option(flag) == name and flag.values]
        return given[-1] if given else default

    def number(self, name: str, default: int) -> int:
        """The number that the last flag `name` gives, not below zero."""
        number = _whole(self.value(name))
        return default if number is None else max(number, 0)

    def switch(self, name: str, default: bool) -> bool:
        """Whether the last flag of the switch `name` is on."""
        given = [flag.name in flag.option.names for flag in self.flags if flag.option and flag.option.name == name]
        return given[-1] if given else default

    @property
    def kv_types(self) -> tuple[str, str] | None:
        """Types of K and V, where one of them is named."""
        given = self.value("--cache-type-k"), self.value("--cache-type-v")
        return (given[0] or "f16", given[1] or "f16") if any(given) else None

    @property
    def is_mapped(self) -> bool:
        mapped = True
        for flag in self.flags:
            if _option(flag) == "--load-mode" and flag.values:
                mapped = flag.values[0] not in COPIES
            elif flag.key in ("--mmap", "--no-mmap"):
                mapped = flag.key == "--mmap"
            elif flag.key == "--direct-io":
                mapped = False
        return mapped

    @property
    def drafts_with_mtp(self) -> bool:
        return "draft-mtp" in self.value("--spec-type").split(",")

    @property
    def snapshots(self) -> int:
        """States that drafting keeps of each sequence, to go back to (`n_rs_seq`)."""
        drafts = "draft-" in self.value("--spec-type") or self.value("--spec-draft-model")
        return self.number("--spec-draft-n-max", DRAFT_TOKENS) if drafts else 0

    @property
    def places(self) -> list[tuple[re.Pattern[str], Device]]:
        """Where tensors go that a flag names: the first pattern that is found in a tensor's name counts."""
        found: list[tuple[re.Pattern[str], Device]] = []
        for flag in self.flags:
            if _option(flag) == "--cpu-moe":
                found.append((re.compile(EXPERTS), "ram"))
            elif _option(flag) == "--n-cpu-moe":
                count = _whole(flag.values[0]) or 0
                layers = "|".join(map(str, range(min(count, MAX_LAYERS))))
                found += [(re.compile(rf"blk\.({layers}){EXPERTS}"), "ram")] if layers else []
            elif _option(flag) == "--override-tensor":
                given = [part.partition("=") for part in flag.values[0].split(",")]
                for pattern, buffer in ((pattern, buffer) for pattern, equals, buffer in given if equals):
                    with contextlib.suppress(re.error):  # llama-server refuses what is no pattern
                        on_cpu = buffer.upper().startswith("CPU") or buffer.upper().endswith("_HOST")
                        found.append((re.compile(pattern), "ram" if on_cpu else "vram"))
        return found


def _whole(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _option(flag: Flag) -> str:
    return flag.option.name if flag.option else flag.name


def memory_parts(case: MemoryCase) -> list[Part]:
    """Everything it allocates, on its device; sizes beside the model's own as seen with build b10434 on Linux."""
    asked = Asked(OWN_ARGS.in_order(case.own))
    if asked.value("--device") == "none":
        case = replace(case, gpu_layers=0)
    settings, vocab = case.settings, case.header.vocab_size or 0
    # 317 MiB resident for SmolLM2 135M and 364 for Gemma 3 270M, less their buffers
    process = (12 * MIB, 16 * MIB + 160 * vocab, 128 * MIB + 320 * vocab)
    state = case.state_bytes
    states = state, state * (1 + asked.snapshots), state * (1 + asked.snapshots)
    return [
        *_weights(case, asked),
        *_kv_cache(case, asked),
        *_by_layer_share(case, asked, "recurrent state", states, f"f32, {number_of(settings.sequences, 'sequence')}"),
        *_drafting(case, asked),
        _compute(case, asked),
        _converted_scores(case, asked),
        _projector(case, asked),
        Part("process", "ram", *process, "libraries and vocabulary tables"),
        *([Part("host", "ram", *HOST, "the Python process around the wheel")] if case.hosted else []),
        _host_cache(case),
        *(gpu_overhead() if case.gpu_layers else []),
        _checkpoints(case, asked),
    ]


def _weights(case: MemoryCase, asked: Asked) -> list[Part]:
    """Tensors on the CPU once: those of a type that is repacked as a private copy, others as mapped."""
    header, has_gpu, places = case.header, case.free.vram_bytes is not None, asked.places

    def elsewhere(tensor: Tensor) -> Device | None:
        device = next((device for pattern, device in places if pattern.search(tensor.name)), None)
        return device if has_gpu else None

    placed = weights_bytes(header, case.gpu_layers, elsewhere)
    # without --spec-type they are not even read
    idle = (
        0 if asked.drafts_with_mtp else sum(t.n_bytes for t in header.tensors if (t.layer or 0) >= header.main_layers)
    )
    on_gpu = Part(
        "weights",
        "vram",
        max(placed["vram"] - idle, 0),
        placed["vram"],
        placed["vram"],
        f"{case.gpu_layers} GPU layers; token_embd stays on the CPU",
    )
    low = max(placed["ram"] - idle, 0)
    if not asked.is_mapped:
        why = "tensors on the CPU, a private copy as flags ask for it"
        return [on_gpu, Part("weights", "ram", low, placed["ram"], placed["ram"], why)]
    # beside a GPU its host buffers come first, unless --no-host
    repacks = asked.switch("--repack", True) and (not has_gpu or asked.switch("--no-host", False))
    matrices = [t for t in header.tensors if repacks and t.layer is not None and len(t.shape) > 1]
    copied, perhaps = (
        min(sum(t.n_bytes for t in matrices if t.type in types), placed["ram"])
        for types in (REPACKED, PERHAPS_REPACKED)
    )
    mapped = max(low - perhaps, 0), placed["ram"] - copied, placed["ram"]
    return [
        on_gpu,
        Part("weights", "ram", *mapped, "tensors on the CPU, mapped from the file", kind="mapped"),
        Part("repacked weights", "ram", 0, copied, perhaps, "a private copy in a layout of the CPU's own"),
    ]


def _kv_cache(case: MemoryCase, asked: Asked) -> list[Part]:
    k_type, v_type = _kv_types(case, asked)
    expected = cells_bytes(case.header, _cells(case, asked), k_type, v_type)
    sizes = [
        kv_bytes(case.header, case.context, case.settings.sequences, case.ubatch, k_type, v_type, unified=unified)
        for unified in (True, False)
    ]
    types = k_type if k_type == v_type else f"K {k_type}, V {v_type}"
    low, high = min(*sizes, expected), max(*sizes, expected)  # builds differ in whether sequences share a cache
    return _by_layer_share(case, asked, "KV cache", (low, expected, high), f"{case.context:,} tokens in all, {types}")


def _kv_types(case: MemoryCase, asked: Asked) -> tuple[str, str]:
    kv_type = case.settings.kv_type
    neutral = kv_type if kv_type and kv_type != "f8e4m3" else "f16"
    k_type, v_type = asked.kv_types or (neutral, neutral)
    return k_type, k_type if is_mla(case.header) else v_type


def _cells(case: MemoryCase, asked: Asked) -> Cells:
    """One cache for all slots where their number is llama-server's choice, or --kv-unified; else one for each."""
    unified = case.settings.parallel == 0 or asked.switch("--kv-unified", False)
    cells = kv_cells(case.header, case.context, case.settings.sequences, case.ubatch, unified=unified)
    return replace(cells, sliding=cells.full) if asked.switch("--swa-full", False) else cells


def _by_layer_share(case: MemoryCase, asked: Asked, name: str, sizes: tuple[int, int, int], why: str) -> list[Part]:
    """`sizes` divided between RAM and VRAM by the share of layers on the GPU."""
    share = Fraction(min(case.gpu_layers, case.header.n_layers), case.header.n_layers or 1)
    if not asked.switch("--kv-offload", True):
        share = Fraction(0)
    low, expected, high = (math.ceil(size * share) for size in sizes)
    on_cpu = Part(name, "ram", sizes[0] - low, sizes[1] - expected, sizes[2] - high, why)
    return [on_cpu, Part(name, "vram", low, expected, high, why)]


def _is_flash(case: MemoryCase) -> bool:
    return case.settings.flash_attention is not False and case.header.architecture not in NO_FLASH_ATTENTION


def _compute(case: MemoryCase, asked: Asked) -> Part:
    header, cells, flash = case.header, _cells(case, asked), _is_flash(case)
    all_logits = asked.switch("--embedding", False) or asked.switch("--rerank", False)
    ubatch = min(case.ubatch, cells.full)

    def sized(cells: Cells) -> tuple[int, int, int]:
        return compute_bytes(header, cells, case.settings.sequences, ubatch, flash=flash, all_logits=all_logits)

    low, expected, high = sized(cells)
    high = max(high, sized(kv_cells(header, case.context, case.settings.sequences, case.ubatch))[2])
    how = "with flash attention" if flash else "without flash attention"
    why = f"logits, attention and activations at ubatch {ubatch}, {how}"
    return Part("compute buffers", "vram" if case.gpu_layers else "ram", low, expected, high, why)


def _converted_scores(case: MemoryCase, asked: Asked) -> Part:
    """Without flash attention the CPU multiplies V by the scores as f16: a copy of them in its work buffer.

    ggml/src/ggml-cpu/ggml-cpu.c, `ggml_graph_plan`; it is no buffer that llama-server prints.
    """
    header, cells = case.header, _cells(case, asked)
    scores = max((header.head_count[layer] * cells.of(header, layer) for layer in kv_layers(header)), default=0)
    n_bytes = 0 if _is_flash(case) or case.gpu_layers else scores * min(case.ubatch, cells.full) * F16_BYTES
    return Part("attention scores as f16", "ram", 0, n_bytes, n_bytes, "a copy for the CPU, without flash attention")


def _drafting(case: MemoryCase, asked: Asked) -> list[Part]:
    """The context that MTP layers draft in, or a draft model with its own."""
    header, found = case.header, list[Part]()
    types = asked.value("--spec-draft-type-k", "f16"), asked.value("--spec-draft-type-v", "f16")
    device: Device = "vram" if case.gpu_layers else "ram"
    cells = kv_cells(header, case.context, case.settings.sequences, case.ubatch, unified=True)
    if asked.drafts_with_mtp and header.nextn_layers:
        layers = range(header.main_layers, header.n_layers)
        own = math.ceil(sum(layer_kv_bytes(header, layer, *types) for layer in layers) * cells.full)
        # llama.cpp#28626: some builds and architectures keep a cache for every layer
        every = own + cells_bytes(header, cells, *types)
        found.append(Part("KV cache of drafting", device, own, own, every, number_of(header.nextn_layers, "MTP layer")))
    if draft := _header_of(asked.value("--spec-draft-model")):
        n_bytes = draft.tensor_bytes
        found.append(exactly("draft model", device, n_bytes, f"{draft.name}, for drafting"))
        if why_unsized(draft) is None:
            n_bytes = kv_bytes(draft, case.context, case.settings.sequences, case.ubatch, *types)
            found.append(Part("KV cache of drafting", device, n_bytes, n_bytes, 2 * n_bytes, "of the draft model"))
    return found


def _header_of(path: str) -> Header | None:
    with contextlib.suppress(BadInput):
        return read_header(path) if path else None
    return None


def _projector(case: MemoryCase, asked: Asked) -> Part:
    """`--mmproj` with what reading an image takes, and adapters: by the size of their files."""
    device: Device = "vram" if case.gpu_layers and asked.switch("--mmproj-offload", True) else "ram"
    projector = _size_of(asked.value("--mmproj"))
    adapters = [name for flag in asked.flags if flag.key in ADAPTERS for name in flag.values[0].split(",")]
    low = projector + sum(_size_of(name) or _size_of(name.rpartition(":")[0]) for name in adapters)
    return Part("projector", device, low, low, 2 * low + (PROJECTOR_WORK if projector else 0), "mmproj and adapters")


def _size_of(path: str) -> int:
    try:
        return Path(path).stat().st_size if path else 0
    except OSError:
        return 0


def _host_cache(case: MemoryCase) -> Part:
    asked = case.settings.host_cache_mib
    if asked == -1:  # as much as there is, and more
        return Part("host prompt cache", "ram", 0, 0, case.free.ram_bytes or 0, "grows without bound, as set")
    cache_mib, set_by = (DEFAULT_HOST_CACHE_MIB, "llama.cpp's default") if asked is None else (asked, "as set")
    why = f"grows with distinct prompts up to {cache_mib} MiB ({set_by})"
    return Part("host prompt cache", "ram", 0, 0, cache_mib * MIB, why)


def _checkpoints(case: MemoryCase, asked: Asked) -> Part:
    """Copies of what cannot be taken back token by token: recurrent states, and the window of sliding layers."""
    header, cells = case.header, _cells(case, asked)
    types = _kv_types(case, asked)
    window = min(header.sliding_window or 0, cells.full)
    sliding = [layer for layer in kv_layers(header) if header.sliding[layer] and not asked.switch("--swa-full", False)]
    one = state_bytes_per_sequence(header) + math.ceil(
        sum(layer_kv_bytes(header, layer, *types) * window for layer in sliding)
    )
    kept = asked.number("--ctx-checkpoints", CONTEXT_CHECKPOINTS)
    expected = min(kept, PROMPT_CHECKPOINTS + case.context // case.settings.sequences // CHECKPOINT_SPACING)
    low, usual, high = (one * n_copies * case.settings.sequences for n_copies in (0, expected, kept))
    why = f"{expected} to {kept} copies of recurrent states and sliding windows per slot"
    return Part("context checkpoints", "ram", low, usual, high, why)


def memory_notes(case: MemoryCase) -> list[str]:
    if case.settings.context_tokens is None:
        return ["with no context set, llama.cpp's --fit may shrink it quietly to what fits"]
    return []
