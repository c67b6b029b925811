"""What a GGUF file says about its model, read in milliseconds and without trusting a byte of it.

`gguf.GGUFReader` builds several numpy views for every string of the vocabulary: seconds for a quarter of a million
tokens. This reader steps over them; the table of ggml types and their block sizes still comes from the gguf package.
Layout: ggml-org/ggml docs/gguf.md.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from engines.errors import BadInput

Scalar = int | float | bool | str
# more than any published vocabulary or merge list (about 0.5 million); a larger count is a corrupt length
MAX_ARRAY_ITEMS = 16_000_000
MAX_KEPT_ITEMS = 4096
MAX_KEPT_TEXT_BYTES = 4 << 20
MAX_NAME_BYTES = 4096
MAX_LAYERS = 2048
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
SUPPORTED_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

SHARD_NAME = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")

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
class Tensor:
    """One row of the tensor table; `type` is ggml's name, or `type 99` for a number the gguf package does not know."""

    name: str
    type: str
    shape: tuple[int, ...]
    n_bytes: int

    @property
    def layer(self) -> int | None:
        """The block it belongs to, or None for embeddings and output."""
        match = re.match(r"blk\.(\d+)\.", self.name)
        return int(match[1]) if match else None


@dataclass(frozen=True)
class Ssm:
    """Sizes of the recurrent part, zero where the file names none; units as in the GGUF keys `ARCH.ssm.*` and kin."""

    conv_kernel: int = 0
    inner_size: int = 0
    state_size: int = 0
    group_count: int = 0
    time_step_rank: int = 0
    shortconv_cache: int = 0
    wkv_head_size: int = 0
    token_shift_count: int = 0
    kda_head_dim: int = 0
    full_attention_interval: int = 0


@dataclass(frozen=True)
class Header:
    """All that a GGUF says about its model, the shards of a split set taken together. Sizes in bytes."""

    path: Path
    shards: tuple[Path, ...]
    kind: str
    architecture: str
    name: str
    gguf_version: int
    endianness: Literal["little", "big"]
    n_layers: int
    context_length: int | None
    embedding_length: int | None
    head_count: tuple[int, ...]
    head_count_kv: tuple[int, ...]
    feed_forward_length: tuple[int, ...]
    key_length: int | None
    value_length: int | None
    key_length_explicit: bool
    key_length_swa: int | None
    value_length_swa: int | None
    sliding_window: int | None
    sliding: tuple[bool, ...]
    shared_kv_layers: int
    kv_lora_rank: int | None
    key_length_mla: int | None
    rope_dimension: int | None
    indexer_key_length: int | None
    expert_count: int | None
    ssm: Ssm
    tensors: tuple[Tensor, ...]
    tensor_bytes: int
    quant_types: Mapping[str, int]
    file_bytes: int
    declared_bytes: int
    tokenizer_model: str | None
    tokenizer_pre: str | None
    vocab_size: int | None
    chat_template: str | None
    template_shows_tools: bool | None
    notes: tuple[str, ...]

    def tensor(self, name: str) -> Tensor | None:
        """The tensor called `name`, or None."""
        return next((tensor for tensor in self.tensors if tensor.name == name), None)


def read_header(path: Path | str) -> Header:
    """The header of the GGUF at `path`, or of the whole set when it is the first shard of a split one.

    Raises BadInput, in one line, on anything that is not a complete GGUF of version 2 or 3.
    """
    first = Path(path)
    opened = _read_shard(first)
    shards = [opened, *(_read_shard(other) for other in _other_shards(first, opened.meta))]
    if len(shards) > 1:
        _check_tensor_count(first, shards)
    return _interpret(first, shards)


# --- bytes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LongArray:
    """Stands for an array that was stepped over."""

    count: int


Value = Scalar | tuple[Scalar, ...] | LongArray

_STRING, _ARRAY = 8, 9
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class _Cursor:
    """Reads forward through the file; every length is checked against what is left before it is believed."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.size = len(data)
        self.path = path
        self.at = 0
        self.order = "<"

    def bad(self, what: str) -> BadInput:
        return BadInput(f"{self.path}: {what} at byte {self.at}: the file is damaged or incomplete; fetch it again")

    def need(self, n_bytes: int, what: str) -> None:
        if n_bytes > self.size - self.at:
            raise self.bad(f"{what} runs past the end of the file")

    def number(self, code: str, what: str) -> int | float | bool:
        size = struct.calcsize(self.order + code)
        self.need(size, what)
        (value,) = struct.unpack_from(self.order + code, self.data, self.at)
        self.at += size
        return value

    def whole(self, code: str, what: str) -> int:
        return int(self.number(code, what))

    def text(self, what: str, limit: int) -> str:
        length = self.whole("Q", what)
        self.need(length, what)
        if length > limit:
            raise self.bad(f"{what} is {length} bytes long")
        raw = self.data[self.at : self.at + length]
        self.at += length
        return raw.decode("utf-8", errors="replace")

    def name(self, what: str) -> str:
        name = self.text(what, MAX_NAME_BYTES)
        if not name.isprintable():  # error messages quote names, and are one line
            raise self.bad(f"{what} is not readable text")
        return name

    def value(self, type_number: int, key: str) -> Value:
        if type_number == _STRING:
            return self._long_text(key)
        if type_number == _ARRAY:
            return self._array(key)
        if type_number not in _CODES:
            raise self.bad(f"the value of {key!r} has the unknown type {type_number}")
        return self.number(_CODES[type_number], key)

    def _long_text(self, key: str) -> Value:
        (length,) = struct.unpack_from(self.order + "Q", self.data, self.at)
        if MAX_KEPT_TEXT_BYTES < length <= self.size - self.at - 8:
            self.at += 8 + length
            return LongArray(length)
        return self.text(f"the value of {key!r}", MAX_KEPT_TEXT_BYTES)

    def _array(self, key: str) -> Value:
        item_type, count = self.whole("I", key), self.whole("Q", key)
        code = _CODES.get(item_type)
        if code is None and item_type != _STRING:
            raise self.bad(f"the array {key!r} has items of the unknown type {item_type}")
        width = struct.calcsize("<" + code) if code else 8
        if count > MAX_ARRAY_ITEMS or count * width > self.size - self.at:
            raise self.bad(f"the array {key!r} claims {count} items")
        if code is None:
            return self._texts(key, count)
        start = self.at
        self.at += count * width
        if count > MAX_KEPT_ITEMS:
            return LongArray(count)
        return struct.unpack_from(f"{self.order}{count}{code}", self.data, start)

    def _texts(self, key: str, count: int) -> Value:
        if count <= 64:
            return tuple(self.text(f"an item of {key!r}", MAX_KEPT_TEXT_BYTES) for _ in range(count))
        # the one hot loop: a vocabulary has 10^5 strings, so nothing but the length is looked at
        unpack = struct.Struct(self.order + "Q").unpack_from
        data, at = self.data, self.at
        for _ in range(count):
            at += 8 + unpack(data, at)[0]
        if at > self.size:
            raise self.bad(f"the array {key!r} runs past the end of the file")
        self.at = at
        return LongArray(count)


@dataclass(frozen=True)
class _Shard:
    path: Path
    version: int
    big_endian: bool
    meta: dict[str, Value]
    tensors: tuple[Tensor, ...]
    file_bytes: int
    declared_bytes: int


def _read_shard(path: Path) -> _Shard:
    with _mapped(path) as data:
        cursor = _Cursor(data, path)
        try:
            return _parse(cursor)
        except (struct.error, OverflowError, MemoryError) as error:
            raise cursor.bad("a length or offset is impossible") from error


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    """The file's bytes as a read-only map; a path that cannot be mapped is BadInput."""
    if path.is_dir():
        raise BadInput(f"{path} is a directory; name the .gguf file in it")
    if path.exists() and not path.is_file():
        raise BadInput(f"{path} is not a regular file; name a .gguf file")
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise BadInput(f"{path} does not exist; check the path of the model") from error
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise BadInput(f"{path} is empty; fetch the model again") from error
    with data:
        yield data


def _parse(cursor: _Cursor) -> _Shard:
    version = _open_gguf(cursor)
    n_tensors, n_keys = cursor.whole("Q", "the tensor count"), cursor.whole("Q", "the key count")
    # 13 bytes is the shortest key-value pair, 24 the shortest tensor row
    if n_keys * 13 + n_tensors * 24 > cursor.size:
        raise cursor.bad(f"the header claims {n_keys} keys and {n_tensors} tensors")
    meta: dict[str, Value] = {}
    for _ in range(n_keys):
        key = cursor.name("a key")
        if key in meta:
            raise cursor.bad(f"the key {key!r} comes twice")
        meta[key] = cursor.value(cursor.whole("I", key), key)
    rows = [_tensor_row(cursor) for _ in range(n_tensors)]
    tensors, declared = _place(cursor, rows, _alignment(cursor, meta))
    return _Shard(cursor.path, version, cursor.order == ">", meta, tensors, cursor.size, declared)


def _open_gguf(cursor: _Cursor) -> int:
    """The format version; sets the byte order on the way (a version read the wrong way round is a huge number)."""
    if cursor.data[:4] != b"GGUF":
        raise BadInput(f"{cursor.path} is not a GGUF file (it starts with {bytes(cursor.data[:4])!r})")
    cursor.at = 4
    version = cursor.whole("I", "the version")
    if version & 0xFFFF == 0:
        cursor.order, cursor.at = ">", 4
        version = cursor.whole("I", "the version")
    if version not in SUPPORTED_VERSIONS:
        raise BadInput(f"{cursor.path} is GGUF version {version}; versions 2 and 3 are read: convert the model again")
    return version


@dataclass(frozen=True)
class _Row:
    name: str
    shape: tuple[int, ...]
    type_number: int
    offset: int


def _tensor_row(cursor: _Cursor) -> _Row:
    name = cursor.name("a tensor name")
    n_dimensions = cursor.whole("I", name)
    if n_dimensions > MAX_DIMENSIONS:
        raise cursor.bad(f"the tensor {name!r} claims {n_dimensions} dimensions")
    shape = tuple(cursor.whole("Q", name) for _ in range(n_dimensions))
    return _Row(name, shape, cursor.whole("I", name), cursor.whole("Q", name))


def _alignment(cursor: _Cursor, meta: dict[str, Value]) -> int:
    alignment = meta.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.bad(f"general.alignment is {alignment!r}, not a power of two")
    return alignment


def _place(cursor: _Cursor, rows: list[_Row], alignment: int) -> tuple[tuple[Tensor, ...], int]:
    """The tensors with their sizes, and the file size that they need."""
    data_start = -(-cursor.at // alignment) * alignment if rows else cursor.at
    ends = sorted({row.offset for row in rows} | {max(cursor.size - data_start, 0)})
    following = dict(pairwise(ends))
    seen: set[str] = set()
    tensors, declared = [], data_start
    for row in rows:
        if row.name in seen:
            raise cursor.bad(f"the tensor {row.name!r} comes twice")
        if row.offset % alignment:
            raise cursor.bad(f"the tensor {row.name!r} starts at an odd place")
        seen.add(row.name)
        tensor = _sized(cursor, row, following.get(row.offset, row.offset) - row.offset)
        tensors.append(tensor)
        declared = max(declared, data_start + row.offset + tensor.n_bytes)
    if declared > cursor.size:
        raise BadInput(
            f"{cursor.path} is truncated: its header declares {declared} bytes, "
            f"the file has {cursor.size}; fetch it again"
        )
    return tuple(tensors), declared


def _sized(cursor: _Cursor, row: _Row, gap: int) -> Tensor:
    known = _ggml_types().get(row.type_number)
    if known is None:
        # a type newer than the installed gguf package: the distance to the next tensor is its size, padding included
        return Tensor(row.name, f"type {row.type_number}", row.shape, gap)
    name, block_items, block_bytes = known
    items = 1
    for length in row.shape:
        items *= length
    if row.shape and row.shape[0] % block_items:
        raise cursor.bad(f"the tensor {row.name!r} has rows of {row.shape[0]}, not whole {name} blocks")
    return Tensor(row.name, name, row.shape, items // block_items * block_bytes)


@lru_cache(maxsize=1)
def _ggml_types() -> dict[int, tuple[str, int, int]]:
    """ggml type number -> (name, items per block, bytes per block)."""
    # importing gguf pulls in numpy: a quarter of a second that only a process which reads a model should pay
    from gguf.constants import GGML_QUANT_SIZES

    return {int(kind): (kind.name, items, n_bytes) for kind, (items, n_bytes) in GGML_QUANT_SIZES.items()}


# --- split sets ----------------------------------------------------------------------------------------------------


def _other_shards(first: Path, meta: dict[str, Value]) -> list[Path]:
    """The paths of shards 2..n; empty for a file that stands alone."""
    count = meta.get("split.count", 1)
    match = SHARD_NAME.match(first.name)
    if not isinstance(count, int) or count > 99_999:
        raise BadInput(f"{first}: split.count is {count!r}, not a number of shards")
    if count <= 1 and not (match and int(match["count"]) > 1):
        return []
    if match is None:
        raise BadInput(
            f"{first} is shard 1 of {count}, but its name does not end in -00001-of-{count:05d}.gguf: rename it"
        )
    if count > 1 and count != int(match["count"]):
        raise BadInput(
            f"{first}: the name says {int(match['count'])} shards, the header {count}: rename it or fetch it again"
        )
    if int(match["number"]) != 1 or meta.get("split.no", 0) != 0:
        raise BadInput(f"{first} is not the first shard; name {match['stem']}-00001-of-{match['count']}.gguf")
    others = [
        first.with_name(f"{match['stem']}-{number:05d}-of-{match['count']}.gguf")
        for number in range(2, int(match["count"]) + 1)
    ]
    missing = [path.name for path in others if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BadInput(f"{first}: the shard {missing[0]}{more} is missing beside it; fetch the whole set")
    return others


def _check_tensor_count(first: Path, shards: list[_Shard]) -> None:
    declared, found = shards[0].meta.get("split.tensors.count"), sum(len(shard.tensors) for shard in shards)
    if isinstance(declared, int) and declared != found:
        raise BadInput(
            f"{first}: the set declares {declared} tensors, its shards hold {found}: they are not of one set"
        )


# --- meaning -------------------------------------------------------------------------------------------------------


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
        if len(value) < n_layers:
            raise BadInput(f"{self.path}: {key} has {len(value)} values for {n_layers} layers; convert the model again")
        return tuple(self._natural(key, item) for item in value[:n_layers])

    def _natural(self, key: str, value: Value) -> int:
        if not isinstance(value, int) or not 0 <= value < 1 << 40:
            raise BadInput(f"{self.path}: {key} is {value!r}, not a natural number; convert the model again")
        return int(value)


def _interpret(path: Path, shards: list[_Shard]) -> Header:
    meta = _Meta(path, shards[0].meta)
    tensors = tuple(tensor for shard in shards for tensor in shard.tensors)
    n_layers = _n_layers(meta, tensors)
    head_count = meta.per_layer("attention.head_count", n_layers) or (0,) * n_layers
    heads = next((count for count in head_count if count), 0)
    embedding = meta.whole("embedding_length")
    default_length = embedding // heads if embedding and heads else None
    key_length, value_length = meta.whole("attention.key_length"), meta.whole("attention.value_length")
    window, sliding, notes = _sliding(meta, n_layers)
    template = meta.text("tokenizer.chat_template")
    return Header(
        path=path,
        shards=tuple(shard.path for shard in shards),
        kind=(meta.text("general.type") or "model").lower(),
        architecture=meta.architecture,
        name=meta.text("general.name") or path.stem,
        gguf_version=shards[0].version,
        endianness="big" if shards[0].big_endian else "little",
        n_layers=n_layers,
        context_length=meta.whole("context_length"),
        embedding_length=embedding,
        head_count=head_count,
        head_count_kv=meta.per_layer("attention.head_count_kv", n_layers) or head_count,
        feed_forward_length=meta.per_layer("feed_forward_length", n_layers) or (0,) * n_layers,
        key_length=default_length if key_length is None else key_length,
        value_length=default_length if value_length is None else value_length,
        key_length_explicit=key_length is not None,
        key_length_swa=meta.whole("attention.key_length_swa"),
        value_length_swa=meta.whole("attention.value_length_swa"),
        sliding_window=window,
        sliding=sliding,
        shared_kv_layers=_shared_kv_layers(meta, n_layers),
        kv_lora_rank=meta.whole("attention.kv_lora_rank"),
        key_length_mla=meta.whole("attention.key_length_mla"),
        rope_dimension=meta.whole("rope.dimension_count"),
        indexer_key_length=meta.whole("attention.indexer.key_length"),
        expert_count=meta.whole("expert_count"),
        ssm=_ssm(meta),
        tensors=tensors,
        tensor_bytes=sum(tensor.n_bytes for tensor in tensors),
        quant_types=MappingProxyType(dict(Counter(tensor.type for tensor in tensors).most_common())),
        file_bytes=sum(shard.file_bytes for shard in shards),
        declared_bytes=sum(shard.declared_bytes for shard in shards),
        tokenizer_model=meta.text("tokenizer.ggml.model"),
        tokenizer_pre=meta.text("tokenizer.ggml.pre"),
        vocab_size=_vocab_size(meta, tensors),
        chat_template=template,
        template_shows_tools=_any_template_shows_tools(meta, template),
        notes=notes,
    )


def _n_layers(meta: _Meta, tensors: tuple[Tensor, ...]) -> int:
    declared = meta.whole("block_count")
    if declared is None:
        declared = 1 + max((layer for tensor in tensors if (layer := tensor.layer) is not None), default=-1)
    if declared > MAX_LAYERS:
        raise BadInput(f"{meta.path}: {meta.key('block_count')} is {declared}; no model has so many layers")
    return declared


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


def _shared_kv_layers(meta: _Meta, n_layers: int) -> int:
    """How many of the last layers reuse the KV of earlier ones."""
    shared = meta.whole("attention.shared_kv_layers")
    if shared is None:
        # llama.cpp: gemma3n keeps KV for its first 20 layers, whatever the file says
        shared = max(n_layers - 20, 0) if meta.architecture == "gemma3n" else 0
    return min(shared, n_layers)


def _ssm(meta: _Meta) -> Ssm:
    return Ssm(
        conv_kernel=meta.whole("ssm.conv_kernel") or 0,
        inner_size=meta.whole("ssm.inner_size") or 0,
        state_size=meta.whole("ssm.state_size") or 0,
        group_count=meta.whole("ssm.group_count") or 0,
        time_step_rank=meta.whole("ssm.time_step_rank") or 0,
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


# --- chat template -------------------------------------------------------------------------------------------------

_OPENING = re.compile(r"\{[{%#]")
_CLOSING = MappingProxyType({"{": "}}", "%": "%}", "#": "#}"})
_QUOTED = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"")


def template_shows_tools(template: str | None) -> bool | None:
    """Whether the template's code (not its prose, comments or quoted text) names `tools`; None without a template.

    A template that never does cannot show the request's tools to the model, and engines then drop them silently.
    """
    if not template:
        return None
    return any(re.search(r"\btools\b", _QUOTED.sub("''", code)) for code in _jinja_code(template))


def _jinja_code(template: str) -> Iterator[str]:
    """The inside of every `{{ }}` and `{% %}`, in order; `{# #}` is skipped, and so is what is never closed."""
    at = 0
    while opened := _OPENING.search(template, at):
        mark = template[opened.start() + 1]
        closed = template.find(_CLOSING[mark], opened.end())
        if closed < 0:
            return
        if mark != "#":
            yield template[opened.end() : closed]
        at = closed + 2


def _any_template_shows_tools(meta: _Meta, template: str | None) -> bool | None:
    """As `template_shows_tools`, with the named templates (`tokenizer.chat_template.tool_use`) counted in."""
    named = [
        value
        for key, value in meta.values.items()
        if key.startswith("tokenizer.chat_template.") and isinstance(value, str)
    ]
    answers = [answer for text in [template, *named] if (answer := template_shows_tools(text)) is not None]
    return any(answers) if answers else None
