"""Bytes that a model takes in any engine: weights, KV cache, recurrent state, scratch buffers; from its GGUF header.

The formulas follow llama.cpp (`llama-kv-cache*.cpp`, `llama-hparams.cpp`, `src/models`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType
from typing import Literal

from engines.errors import BadInput
from engines.model.free_memory import Device, FreeMemory
from engines.model.gguf import Tensor
from engines.model.header import Header
from engines.model.loads import known_architectures
from engines.settings import EngineArgs, Settings

MIB, GIB = 1 << 20, 1 << 30

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
        "iq4_nl": Fraction(18, 32),
        "f8e4m3": Fraction(1),
    }
)
F32_BYTES = 4
CELL_PADDING = 256  # llama.cpp#17037
DEFAULT_BATCH, DEFAULT_UBATCH = 2048, 512
GPU_MARGIN = GIB  # --fit-target
CUDA_CONTEXT = (300 * MIB, 450 * MIB, 600 * MIB)

# a layer is recurrent iff it has no KV head; for the second set: and no feed-forward part either
RECURRENT_WITHOUT_KV = frozenset({"granitehybrid", "jamba", "kimi-linear", "lfm2", "lfm2moe", "plamo2"})
RECURRENT_WITHOUT_KV_AND_FFN = frozenset({"nemotron_h", "nemotron_h_moe"})
# every full_attention_interval-th layer (default 4) is attention, the others are recurrent
RECURRENT_BY_INTERVAL = frozenset({"qwen3next", "qwen35", "qwen35moe"})
RECURRENT_ALL = frozenset({"arwkv7", "mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7"})
RECURRENT_BESIDE_ATTENTION = frozenset({"falcon-h1"})
# encoders, speech and diffusion models: they keep no KV cache of the kind sized here
# fmt: off
NOT_SIZED = frozenset((
    "bert", "clip", "dream", "eurobert", "gemma-embedding", "jina-bert-v2", "jina-bert-v3", "llada", "llada-moe",
    "llama-embed", "modern-bert", "neo-bert", "nomic-bert", "nomic-bert-moe", "rnd1", "t5", "t5encoder",
    "wavtokenizer-dec",
))
# fmt: on


Kind = Literal["private", "mapped"]


@dataclass(frozen=True)
class Part:
    """One thing that takes memory: bytes low / expected / high on one device, and why.

    What is mapped lies in the page cache: it is held once, whoever maps it, and the system may drop it.
    """

    name: str
    device: Device
    low: int
    expected: int
    high: int
    why: str
    kind: Kind = "private"


@dataclass(frozen=True)
class MemoryCase:
    """What an engine's parts are computed from; `gpu_layers` of n_layers + 1 means the output too."""

    header: Header
    settings: Settings
    context: int
    gpu_layers: int
    free: FreeMemory
    own: EngineArgs = field(default_factory=EngineArgs)
    hosted: bool = False  # a wheel behind a server of ours, in a Python process

    @property
    def ubatch(self) -> int:
        """Tokens computed at once; no more than the logical batch has."""
        return min(self.settings.ubatch_tokens or DEFAULT_UBATCH, self.settings.batch_tokens or DEFAULT_BATCH)

    @property
    def state_bytes(self) -> int:
        return state_bytes_per_sequence(self.header) * self.settings.sequences


def why_unsized(header: Header) -> str | None:
    """Why this model's memory cannot be computed from its header; None when it can."""
    architecture = header.architecture
    if header.kind != "model":
        return f"the file is of type {header.kind}, not a model"
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
    """Which of the main layers keep a state instead of (for falcon-h1: beside) KV cells."""
    architecture, layers = header.architecture, range(header.main_layers)
    if architecture in RECURRENT_ALL | RECURRENT_BESIDE_ATTENTION:
        return (True,) * header.main_layers
    if architecture in RECURRENT_WITHOUT_KV:
        return tuple(header.head_count_kv[layer] == 0 for layer in layers)
    if architecture in RECURRENT_WITHOUT_KV_AND_FFN:
        return tuple(header.head_count_kv[layer] == 0 and header.feed_forward_length[layer] == 0 for layer in layers)
    if architecture in RECURRENT_BY_INTERVAL:
        interval = header.ssm.full_attention_interval or 4
        return tuple((layer + 1) % interval != 0 for layer in layers)
    return (False,) * header.main_layers


def attention_layers(header: Header) -> tuple[bool, ...]:
    """Which main layers keep KV cells of their own: those with KV heads that are not recurrent and do not share."""
    recurrent = recurrent_layers(header)
    own = header.n_layers - header.shared_kv_layers
    both = header.architecture in RECURRENT_BESIDE_ATTENTION
    return tuple(
        layer < own and header.head_count_kv[layer] > 0 and (both or not recurrent[layer])
        for layer in range(header.main_layers)
    )


def kv_bytes_per_token(header: Header, k_type: str = "f16", v_type: str | None = None) -> int:
    """Bytes that one token adds to the KV cache while it is inside every layer's window; 0 for a recurrent model."""
    return math.ceil(sum(layer_kv_bytes(header, layer, k_type, v_type) for layer in kv_layers(header)))


@dataclass(frozen=True)
class Cells:
    """KV cells of one cache in a layer of full attention and in one that slides; `caches` of them are kept.

    One cache serves all sequences (unified), or each has its own, as llama.cpp makes them when `--parallel` is given:
    the padding is then paid per sequence.
    """

    full: int
    sliding: int
    caches: int = 1

    def of(self, header: Header, layer: int) -> int:
        return self.sliding if header.sliding[layer] and header.sliding_window else self.full


def kv_cells(
    header: Header, context: int, parallel: int = 1, ubatch: int = DEFAULT_UBATCH, *, unified: bool = True
) -> Cells:
    """Cells for `context` tokens over all sequences; sliding layers keep `pad(window * sequences + ubatch, 256)`."""
    caches = 1 if unified else parallel
    full = _padded(_padded(context) // caches)
    window = (header.sliding_window or 0) * (parallel if unified else 1)
    return Cells(full, min(full, _padded(window + ubatch)), caches)


def kv_bytes(
    header: Header,
    context: int,
    parallel: int = 1,
    ubatch: int = DEFAULT_UBATCH,
    k_type: str = "f16",
    v_type: str | None = None,
    *,
    unified: bool = True,
) -> int:
    """Bytes of the whole KV cache for `context` tokens over all sequences together."""
    return cells_bytes(header, kv_cells(header, context, parallel, ubatch, unified=unified), k_type, v_type)


def cells_bytes(header: Header, cells: Cells, k_type: str = "f16", v_type: str | None = None) -> int:
    """Bytes of a KV cache of so many cells."""
    layers = kv_layers(header)
    one = sum(layer_kv_bytes(header, layer, k_type, v_type) * cells.of(header, layer) for layer in layers)
    return math.ceil(one * cells.caches)


def kv_layers(header: Header) -> list[int]:
    return [layer for layer, keeps in enumerate(attention_layers(header)) if keeps]


def layer_kv_bytes(header: Header, layer: int, k_type: str = "f16", v_type: str | None = None) -> Fraction:
    """Bytes of one cell in one layer; without `v_type` V is of K's type. MLA keeps one latent, of K's type."""
    for kv_type in filter(None, (k_type, v_type)):
        if kv_type not in KV_BYTES:
            raise BadInput(f"kv_type {kv_type!r} is not one of {', '.join(KV_BYTES)}")
    if is_mla(header):
        return KV_BYTES[k_type] * ((header.kv_lora_rank or 0) + (header.rope_dimension or 0))
    key, value = header.key_length or 0, header.value_length or 0
    if header.sliding[layer]:
        key, value = header.key_length_swa or key, header.value_length_swa or value
    return header.head_count_kv[layer] * (KV_BYTES[k_type] * key + KV_BYTES[v_type or k_type] * value)


def _padded(cells: int) -> int:
    return -(-cells // CELL_PADDING) * CELL_PADDING


def state_bytes_per_sequence(header: Header) -> int:
    """Bytes of recurrent state, f32, for one sequence; 0 without recurrent layers. BadInput where sizes are missing."""
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


INPUTS = ("token_embd", "per_layer_token_embd", "position_embd", "token_types")  # stay on the CPU


Place = Callable[[Tensor], Device | None]


def weights_bytes(header: Header, gpu_layers: int = 0, elsewhere: Place = lambda _: None) -> dict[Device, int]:
    """Tensor bytes per device as llama.cpp places them: the last `gpu_layers` layers and, over n_layers, the output.

    `token_embd` stays on the CPU; it counts again on the GPU when the output is tied to it. `elsewhere` says where a
    tensor lies that flags have moved.
    """
    first_on_gpu = max(header.n_layers + 1 - gpu_layers, 0)
    output_on_gpu = gpu_layers > header.n_layers
    placed: dict[Device, int] = {"ram": 0, "vram": 0}
    for tensor in header.tensors:
        on_gpu = tensor.layer >= first_on_gpu if tensor.layer is not None else output_on_gpu
        usual: Device = "vram" if on_gpu and not tensor.name.startswith(INPUTS) else "ram"
        placed[elsewhere(tensor) or usual] += tensor.n_bytes
    tied = header.tensor("token_embd.weight")
    if output_on_gpu and tied and not header.tensor("output.weight"):
        placed["vram"] += tied.n_bytes
    return placed


def compute_bytes(
    header: Header, cells: Cells, parallel: int, ubatch: int, *, flash: bool = True, all_logits: bool = False
) -> tuple[int, int, int]:
    """Low, expected, high bytes of scratch buffers: logits, attention, the widest layer's activations. Rough.

    Recent llama.cpp reserves logits for one output per sequence (`all_logits`: for every token, as embeddings need
    it), older builds for the whole micro-batch. With flash attention there is a mask of 2 bytes for each cell and
    token, without it one of 4, and a score of each head.
    """
    vocab, embedding = header.vocab_size or 0, header.embedding_length or 0
    widest = max((*header.feed_forward_length, embedding), default=0)
    layers = kv_layers(header)
    masks = sum({header.sliding[layer]: cells.of(header, layer) for layer in layers}.values())
    scores = max((header.head_count[layer] * cells.of(header, layer) for layer in layers), default=0)
    attention = ubatch * (masks * 2 if flash else (masks + scores) * F32_BYTES)
    activations = ubatch * (2 * widest + 6 * embedding) * F32_BYTES
    logits, whole = vocab * parallel * F32_BYTES, vocab * ubatch * F32_BYTES
    high = whole + max(attention, ubatch * masks * F32_BYTES) + 2 * activations
    if all_logits:  # only the larger one of the two is needed at a time
        return max(whole, attention), max(whole, attention + activations), high
    # without flash attention the scores are the peak: a part of the activations is freed before them
    expected = activations if flash else activations // 2
    return logits + attention + activations // 3, logits + attention + expected, high


def exactly(name: str, device: Device, n_bytes: int, why: str) -> Part:
    return Part(name, device, n_bytes, n_bytes, n_bytes, why)


def gpu_overhead() -> list[Part]:
    """What any engine takes on a GPU beside the model, and what should stay free."""
    return [
        Part("CUDA context", "vram", *CUDA_CONTEXT, "driver and kernels"),
        Part("margin", "vram", 0, 0, GPU_MARGIN, "what llama.cpp's --fit leaves free; a desktop takes it"),
    ]
