"""The meaning of a GGUF header: layers, heads, windows, recurrent sizes, tokenizer, chat template."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from engines.errors import BadInput
from engines.model.gguf import SHARD_NAME, GgufFile, LongArray, Tensor, Value, read_gguf, shard_paths
from engines.model.template import template_shows_tools

MAX_LAYERS = 2048

# every n-th layer is full attention, the others slide: `load_swa_pattern` in llama.cpp's src/models
SLIDING_PERIODS = MappingProxyType(
    {
        "afmoe": 4,
        "cohere2": 4,
        "exaone-moe": 4,
        "exaone4": 4,
        "gemma-embedding": 6,
        "gemma2": 2,
        "gemma3": 6,
        "gemma3n": 5,
        "gpt-oss": 2,
        "llama4": 4,
        "modern-bert": 3,
        "olmo2": 4,
        "plamo3": 8,
        "smallthinker": 4,
    }
)
FULL_LAYER_FIRST = frozenset({"modern-bert", "smallthinker"})
# windows that llama.cpp assumes where the file names none
DEFAULT_WINDOWS = MappingProxyType({"gemma2": 4096, "llama4": 8192, "exaone-moe": 128})
# llama.cpp switches the window off for these although their files name one
WINDOW_IGNORED = frozenset({"phi3"})


@dataclass(frozen=True)
class Ssm:
    """Sizes of the recurrent part, zero where the file names none; units as in the GGUF keys `ARCH.ssm.*` and kin."""

    conv_kernel: int = 0
    inner_size: int = 0
    state_size: int = 0
    group_count: int = 0
    shortconv_cache: int = 0
    wkv_head_size: int = 0
    token_shift_count: int = 0
    kda_head_dim: int = 0
    full_attention_interval: int = 0


@dataclass(frozen=True)
class Header:
    """Everything a GGUF header holds about its model, the shards of a split set taken together. Sizes in bytes."""

    path: Path
    shards: tuple[Path, ...]
    kind: str
    architecture: str
    name: str
    endianness: Literal["little", "big"]
    n_layers: int
    context_length: int | None
    embedding_length: int | None
    head_count: tuple[int, ...]
    head_count_kv: tuple[int, ...]
    feed_forward_length: tuple[int, ...]
    key_length: int | None
    value_length: int | None
    key_length_swa: int | None
    value_length_swa: int | None
    sliding_window: int | None
    sliding: tuple[bool, ...]
    shared_kv_layers: int  # so many of the last reuse the KV of earlier ones
    nextn_layers: int  # so many of the last predict further tokens (MTP); they have no part in an ordinary answer
    kv_lora_rank: int | None
    key_length_mla: int | None
    rope_dimension: int | None
    indexer_key_length: int | None
    ssm: Ssm
    tensors: tuple[Tensor, ...]
    tensor_bytes: int
    quant_types: Mapping[str, int]
    file_bytes: int
    tokenizer_model: str | None
    tokenizer_pre: str | None
    vocab_size: int | None
    chat_template: str | None
    template_shows_tools: bool | None
    notes: tuple[str, ...]
    meta: Mapping[str, Value]  # every pair of the first shard as it stands
    kinds: Mapping[str, str]  # see GgufFile

    @property
    def main_layers(self) -> int:
        """The layers that every token passes."""
        return self.n_layers - self.nextn_layers

    def items(self, key: str) -> int | None:
        """How many items the array `key` has; None where there is no such array."""
        value = self.meta.get(key)
        return value.count if isinstance(value, LongArray) else len(value) if isinstance(value, tuple) else None

    def tensor(self, name: str) -> Tensor | None:
        return next((tensor for tensor in self.tensors if tensor.name == name), None)


def read_header(path: Path | str) -> Header:
    """The header of the GGUF at `path`, or of the whole set when it is the first shard of a split one.

    Raises BadInput, in one line, on anything that is not a complete GGUF of version 2 or 3.
    """
    first = Path(path)
    opened = read_gguf(first)
    shards = [opened, *(read_gguf(other) for other in _other_shards(first, opened.meta))]
    declared, found = opened.meta.get("split.tensors.count"), sum(len(shard.tensors) for shard in shards)
    if len(shards) > 1 and isinstance(declared, int) and declared != found:
        why = f"the set declares {declared} tensors, its shards hold {found}: they are not of one set"
        raise BadInput(f"{first}: {why}")
    return _interpret(first, shards)


def _other_shards(first: Path, meta: dict[str, Value]) -> list[Path]:
    count = meta.get("split.count", 1)
    match = SHARD_NAME.match(first.name)
    if not isinstance(count, int) or count > 99_999:
        raise BadInput(f"{first}: split.count is {count!r}, not a number of shards")
    no = meta.get("split.no", 0)
    if not isinstance(no, int):
        raise BadInput(f"{first}: split.no is {no!r}, not the number of a shard")
    if count <= 1 and not (match and int(match["count"]) > 1):
        return []
    if match is None:
        # engines find the others by the name, and believe the count even of a file that was merged by hand
        why = f"split.count is {count}, yet the name does not end in -00001-of-{count:05d}.gguf: engines refuse it"
        fix = f"restore the name of a shard; a merged file needs `llama-gguf-split --merge` of all {count} shards"
        raise BadInput(f"{first}: {why}; {fix}")
    if count > 1 and count != int(match["count"]):
        why = f"the name has {int(match['count'])} shards, split.count in the header is {count}"
        fix = "fetch the whole set again, or make one file of the true set with `llama-gguf-split --merge`"
        raise BadInput(f"{first}: {why}; {fix}")
    if int(match["number"]) != 1 or no != 0:
        raise BadInput(f"{first} is not the first shard; name {match['stem']}-00001-of-{match['count']}.gguf")
    others = shard_paths(first)[1:]
    missing = [path.name for path in others if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BadInput(f"{first}: the shard {missing[0]}{more} is missing beside it; fetch the whole set")
    return others


class _Meta:
    """Typed access to the metadata of one architecture; a wrong type is BadInput that names the key."""

    def __init__(self, path: Path, values: dict[str, Value]) -> None:
        self.path = path
        self.values = values
        self.architecture = self.text("general.architecture") or ""
        if not self.architecture or not self.architecture.isprintable():
            raise BadInput(f"{path}: the header has no general.architecture; it is not a model that an engine can load")

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        return value if isinstance(value, str) else None

    def key(self, suffix: str) -> str:
        return f"{self.architecture}.{suffix}"

    def whole(self, suffix: str) -> int | None:
        value = self.values.get(self.key(suffix))
        return None if value is None else self._natural(self.key(suffix), value)

    def per_layer(self, suffix: str, n_layers: int) -> tuple[int, ...] | None:
        """One number for each layer, whether the file has one for all or an array; None when it has neither."""
        key = self.key(suffix)
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, tuple):
            return (self._natural(key, value),) * n_layers
        # some files leave out the layers that predict further tokens
        if len(value) < n_layers - self.nextn_layers:
            raise BadInput(f"{self.path}: {key} has {len(value)} values for {n_layers} layers; convert the model again")
        numbers = tuple(self._natural(key, item) for item in value[:n_layers])
        return numbers + (numbers[-1:] or (0,)) * (n_layers - len(numbers))

    @property
    def nextn_layers(self) -> int:
        return self.whole("nextn_predict_layers") or 0

    def _natural(self, key: str, value: Value) -> int:
        if not isinstance(value, int) or not 0 <= value < 1 << 40:
            raise BadInput(f"{self.path}: {key} is {value!r}, not a natural number; convert the model again")
        return int(value)


def _interpret(path: Path, shards: list[GgufFile]) -> Header:
    meta = _Meta(path, shards[0].meta)
    tensors = tuple(tensor for shard in shards for tensor in shard.tensors)
    n_layers = meta.whole("block_count")
    if n_layers is None:
        n_layers = 1 + max((layer for tensor in tensors if (layer := tensor.layer) is not None), default=-1)
    if n_layers > MAX_LAYERS:
        raise BadInput(f"{meta.path}: {meta.key('block_count')} is {n_layers}; no model has so many layers")
    shared = meta.whole("attention.shared_kv_layers")
    if shared is None:
        # llama.cpp: gemma3n keeps KV for its first 20 layers, whatever the file has
        shared = max(n_layers - 20, 0) if meta.architecture == "gemma3n" else 0
    head_count = meta.per_layer("attention.head_count", n_layers) or (0,) * n_layers
    heads = next((count for count in head_count if count), 0)
    embedding = meta.whole("embedding_length")
    default_length = embedding // heads if embedding and heads else None
    key_length, value_length = meta.whole("attention.key_length"), meta.whole("attention.value_length")
    window, sliding, notes = _sliding(meta, n_layers)
    template = meta.text("tokenizer.chat_template")
    named = [meta.text(key) for key in meta.values if key.startswith("tokenizer.chat_template.")]  # such as `tool_use`
    shows = [answer for text in (template, *named) if (answer := template_shows_tools(text)) is not None]
    return Header(
        path=path,
        shards=tuple(shard.path for shard in shards),
        kind=(meta.text("general.type") or "model").lower(),
        architecture=meta.architecture,
        name=meta.text("general.name") or path.stem,
        endianness="big" if shards[0].big_endian else "little",
        n_layers=n_layers,
        context_length=meta.whole("context_length"),
        embedding_length=embedding,
        head_count=head_count,
        head_count_kv=meta.per_layer("attention.head_count_kv", n_layers) or head_count,
        feed_forward_length=meta.per_layer("feed_forward_length", n_layers) or (0,) * n_layers,
        key_length=default_length if key_length is None else key_length,
        value_length=default_length if value_length is None else value_length,
        key_length_swa=meta.whole("attention.key_length_swa"),
        value_length_swa=meta.whole("attention.value_length_swa"),
        sliding_window=window,
        sliding=sliding,
        shared_kv_layers=min(shared, n_layers),
        nextn_layers=min(meta.nextn_layers, n_layers),
        kv_lora_rank=meta.whole("attention.kv_lora_rank"),
        key_length_mla=meta.whole("attention.key_length_mla"),
        rope_dimension=meta.whole("rope.dimension_count"),
        indexer_key_length=meta.whole("attention.indexer.key_length"),
        ssm=_ssm(meta),
        tensors=tensors,
        tensor_bytes=sum(tensor.n_bytes for tensor in tensors),
        quant_types=MappingProxyType(dict(Counter(tensor.type for tensor in tensors).most_common())),
        file_bytes=sum(shard.file_bytes for shard in shards),
        tokenizer_model=meta.text("tokenizer.ggml.model"),
        tokenizer_pre=meta.text("tokenizer.ggml.pre"),
        vocab_size=_vocab_size(meta, tensors),
        chat_template=template,
        template_shows_tools=any(shows) if shows else None,
        notes=notes,
        meta=MappingProxyType(meta.values),
        kinds=MappingProxyType(shards[0].kinds),
    )


def _sliding(meta: _Meta, n_layers: int) -> tuple[int | None, tuple[bool, ...], tuple[str, ...]]:
    """(window, which layers slide, notes); a window whose pattern is not known counts every layer as full attention."""
    architecture, full = meta.architecture, (False,) * n_layers
    window = meta.whole("attention.sliding_window")
    if window is None:
        window = 4096 if architecture == "exaone4" and n_layers == 64 else DEFAULT_WINDOWS.get(architecture)
    if not window or architecture in WINDOW_IGNORED:
        return None, full, ()
    declared = meta.values.get(meta.key("attention.sliding_window_pattern"))
    if isinstance(declared, tuple):
        slides = meta.per_layer("attention.sliding_window_pattern", n_layers) or ()
        return window, tuple(bool(layer) for layer in slides), ()
    period = meta.whole("attention.sliding_window_pattern") or SLIDING_PERIODS.get(architecture)
    if period is None:
        why = f"the file names a window of {window} tokens, but not which layers of {architecture} slide"
        return window, full, (f"{why}: every layer counts as full attention",)
    full_layer = 0 if architecture in FULL_LAYER_FIRST else period - 1
    return window, tuple(layer % period != full_layer for layer in range(n_layers)), ()


def _ssm(meta: _Meta) -> Ssm:
    return Ssm(
        conv_kernel=meta.whole("ssm.conv_kernel") or 0,
        inner_size=meta.whole("ssm.inner_size") or 0,
        state_size=meta.whole("ssm.state_size") or 0,
        group_count=meta.whole("ssm.group_count") or 0,
        shortconv_cache=meta.whole("shortconv.l_cache") or 0,
        wkv_head_size=meta.whole("wkv.head_size") or 0,
        token_shift_count=meta.whole("token_shift_count") or 0,
        kda_head_dim=meta.whole("kda.head_dim") or 0,
        full_attention_interval=meta.whole("full_attention_interval") or 0,
    )


def _vocab_size(meta: _Meta, tensors: tuple[Tensor, ...]) -> int | None:
    tokens = meta.values.get("tokenizer.ggml.tokens")
    if isinstance(tokens, LongArray):
        return tokens.count
    if isinstance(tokens, tuple):
        return len(tokens)
    embedding = next((tensor for tensor in tensors if tensor.name == "token_embd.weight"), None)
    return meta.whole("vocab_size") or (embedding.shape[1] if embedding and len(embedding.shape) > 1 else None)
