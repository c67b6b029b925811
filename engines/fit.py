"""How much memory a model will take under an engine, and whether this machine has it.

The formulas follow llama.cpp (`llama-kv-cache*.cpp`, `llama-hparams.cpp`, `src/models`); what each engine allocates on
top is stated beside the number. Every figure is low / expected / high with its reason. What cannot be sized is
`unknown`, never "fits".
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import psutil

from engines.driver import base_of
from engines.errors import BadInput
from engines.model.header import Header
from engines.settings import Settings
from engines.support import known_architectures

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# bytes per element: ggml's block size over its items
KV_BYTES = MappingProxyType(
    {
        "f32": Fraction(4),
        "f16": Fraction(2),
        "bf16": Fraction(2),
        "q8_0": Fraction(34, 32),
        "q5_1": Fraction(24, 32),
        "q5_0": Fraction(22, 32),
        "q4_1": Fraction(20, 32),
        "q4_0": Fraction(18, 32),
        "f8e4m3": Fraction(1),
    }
)
F32_BYTES = 4
SWA_CELL_PADDING = 256  # llama.cpp#17037
LLAMA_DEFAULT_UBATCH = 512
LLAMA_DEFAULT_HOST_CACHE_MIB = 8192
LLAMA_CONTEXT_CHECKPOINTS = 32  # --ctx-checkpoints, per slot
LLAMA_MARGIN = GIB  # --fit-target
CUDA_CONTEXT = (300 * MIB, 450 * MIB, 600 * MIB)
MISTRALRS_FREE_VRAM_SHARE = Fraction(9, 10)

# a layer is recurrent iff it has no KV head; for the second set: and no feed-forward part either
RECURRENT_WITHOUT_KV = frozenset({"granitehybrid", "jamba", "kimi-linear", "lfm2", "lfm2moe", "plamo2"})
RECURRENT_WITHOUT_KV_AND_FFN = frozenset({"nemotron_h", "nemotron_h_moe"})
# every full_attention_interval-th layer (default 4) is attention, the others are recurrent
RECURRENT_BY_INTERVAL = frozenset({"qwen3next", "qwen35", "qwen35moe"})
RECURRENT_ALL = frozenset({"arwkv7", "mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7"})
RECURRENT_BESIDE_ATTENTION = frozenset({"falcon-h1"})
# encoders, speech and diffusion models: they keep no KV cache of the kind sized here
NOT_SIZED = frozenset(
    {
        "bert",
        "clip",
        "dream",
        "eurobert",
        "gemma-embedding",
        "jina-bert-v2",
        "jina-bert-v3",
        "llada",
        "llada-moe",
        "llama-embed",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "rnd1",
        "t5",
        "t5encoder",
        "wavtokenizer-dec",
    }
)

Verdict = Literal["fits", "tight", "does not fit", "unknown"]
Device = Literal["ram", "vram"]
Engine = Literal["llama.cpp", "mistral.rs"]


@dataclass(frozen=True)
class FreeMemory:
    """Bytes that a new process may take now; None where it cannot be told (VRAM: or there is no NVIDIA GPU)."""

    ram_bytes: int | None
    vram_bytes: int | None = None
    n_gpus: int = 0
    ram_limited_by: str = "system"

    def of(self, device: Device) -> int | None:
        return self.ram_bytes if device == "ram" else self.vram_bytes


@dataclass(frozen=True)
class Part:
    """One thing that takes memory: bytes low / expected / high on one device, and why."""

    name: str
    device: Device
    low: int
    expected: int
    high: int
    why: str


@dataclass(frozen=True)
class Need:
    """What all parts on one device take together, in bytes, beside what is free there."""

    device: Device
    low: int
    expected: int
    high: int
    free: int | None


@dataclass(frozen=True)
class Fit:
    """Whether a model fits under an engine: the verdict, its reason, and the figures that it rests on."""

    engine: str
    verdict: Verdict
    why: str
    context_tokens: int | None
    parts: tuple[Part, ...] = ()
    needs: tuple[Need, ...] = ()
    notes: tuple[str, ...] = ()
    correction: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, to be stored."""
        return {
            **asdict(self),
            "parts": [asdict(part) for part in self.parts],
            "needs": [asdict(need) for need in self.needs],
            "notes": list(self.notes),
        }


# --- the model -----------------------------------------------------------------------------------------------------


def why_unsized(header: Header) -> str | None:
    """Why this model's memory cannot be computed from its header; None when it can."""
    architecture = header.architecture
    if header.kind != "model":
        return f"the file holds a {header.kind}, not a model"
    if architecture not in known_architectures():
        return f"the memory layout of architecture {architecture!r} is not known"
    if architecture in NOT_SIZED:
        return f"{architecture!r} keeps no KV cache of the kind that is sized here"
    if header.indexer_key_length:
        return f"{architecture!r} keeps a sparse-attention index beside its KV cache, which is not sized here"
    if any(tensor.type.startswith("type ") for tensor in header.tensors):
        return "it has tensors of a type that the installed gguf package does not know"
    if any(attention_layers(header)) and not is_mla(header) and not (header.key_length and header.value_length):
        return "the header has neither key_length nor head_count with embedding_length"
    if any(recurrent_layers(header)) and _state_elements(header) is None:
        return "the header lacks the sizes of its recurrent layers"
    return None


def is_mla(header: Header) -> bool:
    """Whether the KV cache holds compressed latents; as llama.cpp, only where the file has the MLA head lengths."""
    return bool(header.kv_lora_rank and header.key_length_mla)


def recurrent_layers(header: Header) -> tuple[bool, ...]:
    """Which layers keep a state instead of (for falcon-h1: beside) KV cells."""
    architecture, layers = header.architecture, range(header.n_layers)
    if architecture in RECURRENT_ALL | RECURRENT_BESIDE_ATTENTION:
        return (True,) * header.n_layers
    if architecture in RECURRENT_WITHOUT_KV:
        return tuple(header.head_count_kv[layer] == 0 for layer in layers)
    if architecture in RECURRENT_WITHOUT_KV_AND_FFN:
        return tuple(header.head_count_kv[layer] == 0 and header.feed_forward_length[layer] == 0 for layer in layers)
    if architecture in RECURRENT_BY_INTERVAL:
        interval = header.ssm.full_attention_interval or 4
        return tuple((layer + 1) % interval != 0 for layer in layers)
    return (False,) * header.n_layers


def attention_layers(header: Header) -> tuple[bool, ...]:
    """Which layers keep KV cells of their own: those with KV heads that are not recurrent and do not share."""
    recurrent = recurrent_layers(header)
    own = header.n_layers - header.shared_kv_layers
    both = header.architecture in RECURRENT_BESIDE_ATTENTION
    return tuple(
        layer < own and header.head_count_kv[layer] > 0 and (both or not recurrent[layer])
        for layer in range(header.n_layers)
    )


def kv_bytes_per_token(header: Header, kv_type: str = "f16") -> int:
    """Bytes that one token adds to the KV cache while it is inside every layer's window; 0 for a recurrent model."""
    return math.ceil(sum(_layer_kv_bytes(header, layer, kv_type) for layer in _kv_layers(header)))


def kv_bytes(
    header: Header,
    context: int,
    parallel: int = 1,
    ubatch: int = LLAMA_DEFAULT_UBATCH,
    kv_type: str = "f16",
    *,
    unified: bool = True,
) -> int:
    """Bytes of the whole KV cache for `context` tokens over all sequences together.

    Sliding layers keep `min(context, pad(window * parallel + ubatch, 256))` cells. With `unified=False` each sequence
    has a cache of its own, as llama.cpp makes them when `--parallel` is given: the padding is then paid per sequence.
    """
    return math.ceil(
        sum(
            _layer_kv_bytes(header, layer, kv_type) * _cells(header, layer, context, parallel, ubatch, unified=unified)
            for layer in _kv_layers(header)
        )
    )


def _kv_layers(header: Header) -> list[int]:
    return [layer for layer, keeps in enumerate(attention_layers(header)) if keeps]


def _layer_kv_bytes(header: Header, layer: int, kv_type: str) -> Fraction:
    if kv_type not in KV_BYTES:
        raise BadInput(f"kv_type {kv_type!r} is not one of {', '.join(KV_BYTES)}")
    element = KV_BYTES[kv_type]
    if is_mla(header):
        return element * ((header.kv_lora_rank or 0) + (header.rope_dimension or 0))
    key, value = header.key_length or 0, header.value_length or 0
    if header.sliding[layer]:
        key, value = header.key_length_swa or key, header.value_length_swa or value
    return element * header.head_count_kv[layer] * (key + value)


def _cells(header: Header, layer: int, context: int, parallel: int, ubatch: int, *, unified: bool) -> int:
    if not header.sliding[layer] or not header.sliding_window:
        return context
    if unified:
        return min(context, _padded(header.sliding_window * parallel + ubatch))
    return parallel * min(math.ceil(context / parallel), _padded(header.sliding_window + ubatch))


def _padded(cells: int) -> int:
    return -(-cells // SWA_CELL_PADDING) * SWA_CELL_PADDING


def state_bytes_per_sequence(header: Header) -> int:
    """Bytes of recurrent state, f32, for one sequence; 0 for a model without recurrent layers.

    Raises BadInput where the header lacks the sizes.
    """
    n_recurrent = sum(recurrent_layers(header))
    if not n_recurrent:
        return 0
    elements = _state_elements(header)
    if elements is None:
        raise BadInput(f"{header.path}: the header lacks the sizes of its recurrent layers; convert the model again")
    return n_recurrent * elements * F32_BYTES


def _state_elements(header: Header) -> int | None:
    """Elements of one layer's state: `n_embd_r + n_embd_s` of llama-hparams.cpp; None when the header lacks a size."""
    ssm, embedding = header.ssm, header.embedding_length or 0
    if ssm.wkv_head_size:
        return (ssm.token_shift_count or 2) * embedding + embedding * ssm.wkv_head_size
    if ssm.shortconv_cache:
        return embedding * (ssm.shortconv_cache - 1)
    if ssm.kda_head_dim:
        heads, taps = max(header.head_count, default=0), ssm.conv_kernel - 1 if ssm.conv_kernel else 3
        return 3 * taps * heads * ssm.kda_head_dim + heads * ssm.kda_head_dim**2
    if not (ssm.conv_kernel and ssm.inner_size and ssm.state_size):
        return None
    convolution = (ssm.conv_kernel - 1) * (ssm.inner_size + 2 * ssm.group_count * ssm.state_size)
    return convolution + ssm.state_size * ssm.inner_size


def weights_bytes(header: Header, gpu_layers: int = 0) -> dict[Device, int]:
    """Tensor bytes per device as llama.cpp places them: the last `gpu_layers` layers and, over n_layers, the output.

    `token_embd` stays on the CPU; it counts again on the GPU when the output is tied to it.
    """
    first_on_gpu = max(header.n_layers + 1 - gpu_layers, 0)
    output_on_gpu = gpu_layers > header.n_layers
    placed: dict[Device, int] = {"ram": 0, "vram": 0}
    for tensor in header.tensors:
        on_gpu = tensor.layer >= first_on_gpu if tensor.layer is not None else output_on_gpu
        placed["vram" if on_gpu and not _is_input(tensor.name) else "ram"] += tensor.n_bytes
    tied = header.tensor("token_embd.weight")
    if output_on_gpu and tied and not header.tensor("output.weight"):
        placed["vram"] += tied.n_bytes
    return placed


def _is_input(name: str) -> bool:
    return name.startswith(("token_embd", "per_layer_token_embd", "position_embd", "token_types"))


def compute_bytes(header: Header, context: int, parallel: int, ubatch: int) -> tuple[int, int, int]:
    """Low, expected, high bytes of scratch buffers: logits, attention mask, the widest layer's activations. Rough.

    Recent llama.cpp reserves logits for one output per sequence, older builds for the whole micro-batch; the mask takes
    2 bytes per cell with flash attention, 4 without.
    """
    vocab, embedding = header.vocab_size or 0, header.embedding_length or 0
    widest = max((*header.feed_forward_length, embedding), default=0)
    cells = context if _kv_layers(header) else 0
    activations = ubatch * (2 * widest + 6 * embedding) * F32_BYTES
    low = vocab * parallel * F32_BYTES + cells * ubatch * 2 + activations // 2
    expected = vocab * parallel * F32_BYTES + cells * ubatch * 2 + activations
    high = vocab * ubatch * F32_BYTES + cells * ubatch * 4 + 2 * activations
    return low, expected, high


# --- the machine ---------------------------------------------------------------------------------------------------


def free_memory() -> FreeMemory:
    """What this machine has free now: RAM under the tightest cgroup limit, and VRAM over all NVIDIA GPUs."""
    available = psutil.virtual_memory().available
    limited = _cgroup_free()
    vram, n_gpus = _free_vram()
    if limited is not None and limited < available:
        return FreeMemory(limited, vram, n_gpus, "cgroup")
    return FreeMemory(available, vram, n_gpus)


def _free_vram() -> tuple[int | None, int]:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no driver, no library, no permission: each says the same, that no NVIDIA GPU can be used
        return None, 0
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        free = [int(pynvml.nvmlDeviceGetMemoryInfo(handle).free) for handle in handles]
        return (sum(free), len(free)) if free else (None, 0)
    except pynvml.NVMLError:
        return None, 0
    finally:
        pynvml.nvmlShutdown()


def _cgroup_free(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes left under the tightest memory limit of this process's cgroups (v2 or v1); None without a limit."""
    rooms = [
        room
        for limit, usage, folder in _cgroup_folders(root, own)
        if (room := _room(folder / limit, folder / usage, folder / "memory.stat")) is not None
    ]
    return min(rooms, default=None)


def _cgroup_folders(root: Path, own: Path) -> list[tuple[str, str, Path]]:
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        controllers, path = line.split(":", 2)[1:]
        v1 = "memory" in controllers.split(",")
        if controllers and not v1:
            continue
        base = root / "memory" if v1 else root
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
        leaf = base / path.lstrip("/")
        found += [(*names, folder) for folder in (leaf, *leaf.parents) if folder.is_relative_to(base)]
    return found


def _room(limit: Path, usage: Path, stat: Path) -> int | None:
    try:
        ceiling, used = int(limit.read_text()), int(usage.read_text())
    except (OSError, ValueError):  # "max" is how v2 spells "no limit"
        return None
    if ceiling >= 1 << 60:  # how v1 spells it
        return None
    return max(ceiling - used + _reclaimable(stat), 0)


def _reclaimable(stat: Path) -> int:
    try:
        pairs = dict(line.split()[:2] for line in stat.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(pairs.get("inactive_file", 0))


# --- the engines ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    """What the parts of an estimate are computed from."""

    header: Header
    settings: Settings
    context: int
    gpu_layers: int
    free: FreeMemory

    @property
    def ubatch(self) -> int:
        return self.settings.ubatch_tokens or LLAMA_DEFAULT_UBATCH

    @property
    def whole_model_on_gpu(self) -> bool:
        return self.gpu_layers > self.header.n_layers


def estimate(
    header: Header,
    settings: Settings,
    engine: str,
    context_tokens: int | None = None,
    *,
    memory: FreeMemory | None = None,
    correction: float | None = None,
) -> Fit:
    """Whether the model fits under `engine` with `settings`, against `memory` (default: what is free now).

    `context_tokens` is for all sequences together; without it the setting counts, then the trained context.
    `correction` is a stored ratio of measured to expected bytes: it moves the expected figure, and widens the range.
    """
    engine = base_of(engine)
    if engine not in _PARTS:
        raise BadInput(f"memory is estimated for {' and '.join(_PARTS)}, not for {engine!r}")
    if context_tokens is not None and context_tokens < 1:
        raise BadInput(f"context_tokens is {context_tokens}; a context has one token or more")
    if correction is not None and not (math.isfinite(correction) and correction > 0):
        raise BadInput(f"correction is {correction}, not a ratio above zero")
    free = memory or free_memory()
    context = context_tokens or settings.context_tokens or header.context_length
    why = why_unsized(header) or _why_unplaced(settings, free)
    if context is None:
        why = why or "neither the settings nor the header name a context length"
    if why or context is None:
        return Fit(engine, "unknown", why or "", context, notes=header.notes, correction=correction)
    case = _Case(header, settings, context, _gpu_layers(header, settings, free), free)
    parts = tuple(part for part in _PARTS[engine](case) if part.high)
    needs = tuple(_need(device, parts, free, correction) for device in _devices(parts))
    verdict, reason = _verdict(needs)
    return Fit(engine, verdict, reason, context, parts, needs, _notes(engine, case), correction)


def _why_unplaced(settings: Settings, free: FreeMemory) -> str | None:
    if settings.gpu_layers and free.vram_bytes is None:
        return f"gpu_layers is {settings.gpu_layers}, but the memory of no GPU can be read here"
    return None


def _gpu_layers(header: Header, settings: Settings, free: FreeMemory) -> int:
    """Layers on the GPU, n_layers + 1 meaning the output too; engines take the whole GPU when they are not told."""
    if free.vram_bytes is None:
        return 0
    everything = header.n_layers + 1
    return everything if settings.gpu_layers is None else min(settings.gpu_layers, everything)


def _llama_cpp_parts(case: _Case) -> list[Part]:
    header, settings = case.header, case.settings
    weights = weights_bytes(header, case.gpu_layers)
    parts = [
        _sure("weights", "ram", weights["ram"], "tensors on the CPU, mapped from the file"),
        _sure("weights", "vram", weights["vram"], f"{case.gpu_layers} GPU layers; token_embd stays on the CPU"),
    ]
    parts += _by_layer_share(case, "KV cache", _llama_kv(case), f"{case.context} tokens in all, {_kv_type(case)}")
    state = state_bytes_per_sequence(header) * settings.parallel
    parts += _by_layer_share(case, "recurrent state", (state,) * 3, f"f32, {settings.parallel} sequence(s)")
    compute = compute_bytes(header, case.context, settings.parallel, case.ubatch)
    where: Device = "vram" if case.gpu_layers else "ram"
    parts.append(Part("compute buffers", where, *compute, f"logits, mask and activations at ubatch {case.ubatch}"))
    parts.append(_llama_process(header))
    parts.append(_llama_host_cache(settings))
    if case.gpu_layers:
        parts += _gpu_overhead()
    checkpoint = state_bytes_per_sequence(header) * settings.parallel * LLAMA_CONTEXT_CHECKPOINTS
    why = f"up to {LLAMA_CONTEXT_CHECKPOINTS} copies of the recurrent state per slot"
    parts.append(Part("context checkpoints", "ram", 0, 0, checkpoint, why))
    return parts


def _llama_kv(case: _Case) -> tuple[int, int, int]:
    arguments = (case.header, case.context, case.settings.parallel, case.ubatch, _kv_type(case))
    unified, split = kv_bytes(*arguments), kv_bytes(*arguments, unified=False)
    return min(unified, split), split, max(unified, split)


def _kv_type(case: _Case) -> str:
    return case.settings.kv_type or "f16"


def _llama_process(header: Header) -> Part:
    # 317 MiB resident for SmolLM2 135M and 364 for Gemma 3 270M, less their buffers, with build b10434 on Linux
    vocab = header.vocab_size or 0
    why = "libraries and vocabulary tables"
    return Part("process", "ram", 12 * MIB, 16 * MIB + 160 * vocab, 128 * MIB + 320 * vocab, why)


def _llama_host_cache(settings: Settings) -> Part:
    mib = LLAMA_DEFAULT_HOST_CACHE_MIB if settings.host_cache_mib is None else settings.host_cache_mib
    told = "llama.cpp's default" if settings.host_cache_mib is None else "as set"
    return Part("host prompt cache", "ram", 0, 0, mib * MIB, f"grows with distinct prompts up to {mib} MiB ({told})")


def _gpu_overhead() -> list[Part]:
    return [
        Part("CUDA context", "vram", *CUDA_CONTEXT, "driver and kernels"),
        Part("margin", "vram", 0, 0, LLAMA_MARGIN, "what llama.cpp's --fit leaves free; a desktop takes it"),
    ]


def _by_layer_share(case: _Case, name: str, sizes: tuple[int, int, int], why: str) -> list[Part]:
    """`sizes` divided between RAM and VRAM by the share of layers on the GPU."""
    share = Fraction(min(case.gpu_layers, case.header.n_layers), case.header.n_layers or 1)
    on_gpu = [math.ceil(size * share) for size in sizes]
    on_cpu = [size - moved for size, moved in zip(sizes, on_gpu, strict=True)]
    return [
        Part(name, "ram", on_cpu[0], on_cpu[1], on_cpu[2], why),
        Part(name, "vram", on_gpu[0], on_gpu[1], on_gpu[2], why),
    ]


def _mistral_rs_parts(case: _Case) -> list[Part]:
    header = case.header
    where: Device = "vram" if case.gpu_layers else "ram"
    parts = [
        _sure("weights", where, header.tensor_bytes, "a private copy of every tensor, not a mapping of the file"),
        _dequantized_embedding(header, where),
        _mistral_rs_process(header),
        _mistral_rs_kv(case, where),
    ]
    state = state_bytes_per_sequence(header) * case.settings.parallel
    parts.append(_sure("recurrent state", where, state, f"f32, {case.settings.parallel} sequence(s)"))
    # prefill is not cut into micro-batches up to 0.9.2: activations follow the prompt
    low, expected, high = compute_bytes(header, case.context, case.settings.parallel, LLAMA_DEFAULT_UBATCH)
    parts.append(Part("compute buffers", where, low, expected, high, "logits, mask and activations; rough"))
    if case.gpu_layers:
        parts += _gpu_overhead()
    return parts


def _dequantized_embedding(header: Header, where: Device) -> Part:
    # mistralrs-core/src/models/quantized_*.rs: token_embd is dequantized to f32 and, when tied, kept quantized as well
    embedding = header.tensor("token_embd.weight")
    elements = math.prod(embedding.shape) if embedding else 0
    return Part("token embedding", where, elements * 2, elements * 4, elements * 4, "token_embd again, dequantized")


def _mistral_rs_process(header: Header) -> Part:
    # Gemma 3 270M with 0.9.5 on CPU: some 500 MiB beside weights and embedding, the trie of its Unigram tokenizer
    vocab = header.vocab_size or 0
    low, expected, high = (300, 1500, 3000) if header.tokenizer_model == "llama" else (50, 200, 600)
    sizes = (20 * MIB + low * vocab, 40 * MIB + expected * vocab, 160 * MIB + high * vocab)
    return Part("process", "ram", *sizes, "libraries and tokenizer")


def _mistral_rs_kv(case: _Case, where: Device) -> Part:
    kv_type = "f8e4m3" if where == "vram" and case.settings.kv_type == "f8e4m3" else "f16"
    full = kv_bytes_per_token(case.header, kv_type) * case.context
    bounded = kv_bytes(case.header, case.context, case.settings.parallel, case.ubatch, kv_type)
    why = f"{case.context} tokens, {kv_type}; sliding-window layers counted in full"
    if where == "ram":
        return Part("KV cache", where, min(bounded, full), full, full, why)
    if case.settings.context_tokens is not None:
        return Part("KV cache", where, full, full, full, why)
    pool = int(MISTRALRS_FREE_VRAM_SHARE * (case.free.vram_bytes or 0))
    why += "; with no context_tokens set its pool takes 90 % of free VRAM"
    return Part("KV cache", where, full, full, max(full, pool), why)


_PARTS = MappingProxyType({"llama.cpp": _llama_cpp_parts, "mistral.rs": _mistral_rs_parts})


def _sure(name: str, device: Device, n_bytes: int, why: str) -> Part:
    return Part(name, device, n_bytes, n_bytes, n_bytes, why)


# --- the verdict ---------------------------------------------------------------------------------------------------


def _devices(parts: tuple[Part, ...]) -> list[Device]:
    devices: tuple[Device, ...] = ("ram", "vram")
    return [device for device in devices if any(part.device == device for part in parts)]


def _need(device: Device, parts: tuple[Part, ...], free: FreeMemory, correction: float | None) -> Need:
    here = [part for part in parts if part.device == device]
    low, expected, high = (sum(getattr(part, level) for part in here) for level in ("low", "expected", "high"))
    if correction is not None:
        expected = math.ceil(expected * correction)
        low, high = min(low, expected), max(high, expected)
    return Need(device, low, expected, high, free.of(device))


def _verdict(needs: tuple[Need, ...]) -> tuple[Verdict, str]:
    """The worst device's verdict, with the numbers of every device."""
    verdicts = [_verdict_of(need) for need in needs]
    order: tuple[Verdict, ...] = ("fits", "tight", "unknown", "does not fit")
    worst: Verdict = max(verdicts, key=order.index) if verdicts else "unknown"
    return worst, "; ".join(_in_words(need, verdict) for need, verdict in zip(needs, verdicts, strict=True))


def _verdict_of(need: Need) -> Verdict:
    if need.free is None:
        return "unknown"
    if need.high <= need.free:
        return "fits"
    return "tight" if need.expected <= need.free else "does not fit"


def _in_words(need: Need, verdict: Verdict) -> str:
    if need.free is None:
        return f"{need.device.upper()}: needs {_gib(need.expected)}, how much is free cannot be read"
    numbers = f"needs {_gib(need.expected)} (up to {_gib(need.high)}), {_gib(need.free)} free"
    return f"{need.device.upper()} {verdict}: {numbers}"


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / GIB:.2f} GiB"


def _notes(engine: str, case: _Case) -> tuple[str, ...]:
    header, settings = case.header, case.settings
    notes = list(header.notes)
    if header.context_length and case.context > header.context_length * settings.parallel:
        notes.append(f"{case.context} tokens are more than the trained context of {header.context_length} per sequence")
    if case.free.n_gpus > 1:
        notes.append(f"the free VRAM of {case.free.n_gpus} GPUs is added up; each must hold its own share")
    if case.gpu_layers and settings.gpu_layers is None:
        notes.append("gpu_layers is not set: counted as the whole model on the GPU")
    if engine == "llama.cpp" and settings.context_tokens is None:
        notes.append("with no context set, llama.cpp's --fit may shrink it quietly to what fits")
    if engine == "mistral.rs":
        notes.append("its prefix cache keeps the KV of finished sequences (16 by default); not counted")
        if settings.kv_type not in (None, "f16") and not (case.gpu_layers and settings.kv_type == "f8e4m3"):
            notes.append(f"it cannot keep KV as {settings.kv_type} here: counted as f16")
    return tuple(notes)
