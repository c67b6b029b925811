"""GGUF files as bytes: key-value pairs and the tensor table, read without trusting a byte.

`gguf.GGUFReader` builds several numpy views for every string of the vocabulary: seconds for a quarter of a million
tokens. This reader steps over long arrays, or decodes them where asked. Layout: ggml-org/ggml docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from engines.errors import BadInput

Scalar = int | float | bool | str
# more than any published vocabulary or merge list (about 0.5 million); a larger count is a corrupt length
MAX_ARRAY_ITEMS = 16_000_000
MAX_KEPT_ITEMS = 4096
MAX_KEPT_TEXTS = 64
MAX_KEPT_TEXT_BYTES = 4 << 20
MAX_NAME_BYTES = 4096
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
SUPPORTED_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

SHARD_NAME = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


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
class LongArray:
    """Stands for an array or a text that was stepped over; its items or bytes."""

    count: int


Value = Scalar | tuple[Scalar, ...] | LongArray

_STRING, _ARRAY = 8, 9
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_LETTERS = {**_CODES, _STRING: "s", _ARRAY: "["}


@dataclass(frozen=True)
class GgufFile:
    """One file: its key-value pairs and tensors; `declared_bytes` is the size that its tensor table needs."""

    path: Path
    big_endian: bool
    meta: dict[str, Value]
    kinds: dict[str, str]  # of the values, as struct letters; "s" a text, "[I" an array
    tensors: tuple[Tensor, ...]
    file_bytes: int
    declared_bytes: int


def read_gguf(path: Path) -> GgufFile:
    """The pairs and the tensor table of one file; long arrays are counted, not kept. Raises BadInput, in one line."""
    with _reader(path) as reader:
        n_tensors, n_keys = reader.open()
        meta = reader.pairs(n_keys)
        rows = []
        for _ in range(n_tensors):
            name = reader.name("a tensor name")
            n_dimensions = reader.whole("I", name)
            if n_dimensions > MAX_DIMENSIONS:
                raise reader.bad(f"the tensor {name!r} claims {n_dimensions} dimensions")
            shape = tuple(reader.whole("Q", name) for _ in range(n_dimensions))
            rows.append(_Row(name, shape, reader.whole("I", name), reader.whole("Q", name)))
        alignment = meta.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise reader.bad(f"general.alignment is {alignment!r}, not a power of two")
        tensors, declared = _place(reader, rows, alignment)
        return GgufFile(path, reader.order == ">", meta, reader.kinds, tensors, reader.size, declared)


def read_metadata(path: Path) -> dict[str, Value]:
    """The key-value pairs alone, the vocabulary and every other array in full. Raises BadInput, in one line."""
    with _reader(path, keeps_all=True) as reader:
        return reader.pairs(reader.open()[1])


def read_texts(path: Path, *keys: str) -> Iterator[tuple[bytes, ...]]:
    """The arrays of texts under `keys`, not decoded: half the time. An empty one where a key has none."""
    with _reader(path, keeps_all=True) as reader:
        reader.decodes = False
        found: dict[str, Any] = dict(reader.pairs(reader.open()[1]))
    for key in keys:
        yield found[key] if reader.kinds.get(key) == "[s" else ()


def shard_paths(path: Path) -> list[Path]:
    """All files of the split set that `path` belongs to by its name, in order; `path` alone for a single file."""
    match = SHARD_NAME.match(path.name)
    if match is None or int(match["count"]) < 2:
        return [path]
    numbers = range(1, int(match["count"]) + 1)
    return [path.with_name(f"{match['stem']}-{number:05}-of-{match['count']}.gguf") for number in numbers]


class GgufReader:
    """Reads forward through the file; every length is checked against what is left before it is believed."""

    def __init__(self, data: mmap.mmap, path: Path, keeps_all: bool) -> None:
        self.data = data
        self.size = len(data)
        self.path = path
        self.at = 0
        self.order = "<"
        self.kinds: dict[str, str] = {}
        self.decodes = True  # the items of arrays
        self._keeps_all = keeps_all

    def open(self) -> tuple[int, int]:
        """The tensor count and the key count; sets the byte order on the way."""
        if self.data[:4] != b"GGUF":
            raise BadInput(f"{self.path} is not a GGUF file (it starts with {bytes(self.data[:4])!r})")
        self.at = 4
        version = self.whole("I", "the version")
        if version & 0xFFFF == 0:  # read the wrong way round it is a huge number
            self.order, self.at = ">", 4
            version = self.whole("I", "the version")
        if version not in SUPPORTED_VERSIONS:
            raise BadInput(f"{self.path} is GGUF version {version}; versions 2 and 3 are read: convert the model again")
        n_tensors, n_keys = self.whole("Q", "the tensor count"), self.whole("Q", "the key count")
        # 13 bytes is the shortest key-value pair, 24 the shortest tensor row
        if n_keys * 13 + n_tensors * 24 > self.size:
            raise self.bad(f"the header claims {n_keys} keys and {n_tensors} tensors")
        return n_tensors, n_keys

    def pairs(self, n_keys: int) -> dict[str, Value]:
        meta: dict[str, Value] = {}
        for _ in range(n_keys):
            key = self.name("a key")
            if key in meta:
                raise self.bad(f"the key {key!r} comes twice")
            kind = self.whole("I", key)
            self.kinds[key] = _LETTERS.get(kind, "")
            meta[key] = self._value(kind, key)
        return meta

    def bad(self, what: str) -> BadInput:
        return BadInput(f"{self.path}: {what} at byte {self.at}: the file is damaged or incomplete; fetch it again")

    def whole(self, code: str, what: str) -> int:
        return int(self._number(code, what))

    def name(self, what: str) -> str:
        name = self._text(what, MAX_NAME_BYTES)
        if not name.isprintable():  # error messages quote names, and are one line
            raise self.bad(f"{what} is not readable text")
        return name

    def _need(self, n_bytes: int, what: str) -> None:
        if n_bytes > self.size - self.at:
            raise self.bad(f"{what} runs past the end of the file")

    def _number(self, code: str, what: str) -> int | float | bool:
        size = struct.calcsize(self.order + code)
        self._need(size, what)
        value: int | float | bool = struct.unpack_from(self.order + code, self.data, self.at)[0]
        self.at += size
        return value

    def _text(self, what: str, limit: int) -> str:
        length = self.whole("Q", what)
        self._need(length, what)
        if length > limit:
            raise self.bad(f"{what} is {length} bytes long")
        raw = self.data[self.at : self.at + length]
        self.at += length
        return raw.decode("utf-8", errors="replace")

    def _value(self, type_number: int, key: str) -> Value:
        if type_number == _STRING:
            (length,) = struct.unpack_from(self.order + "Q", self.data, self.at)
            if MAX_KEPT_TEXT_BYTES < length <= self.size - self.at - 8:
                self.at += 8 + length
                return LongArray(length)
            return self._text(f"the value of {key!r}", MAX_KEPT_TEXT_BYTES)
        if type_number == _ARRAY:
            return self._array(key)
        if type_number not in _CODES:
            raise self.bad(f"the value of {key!r} has the unknown type {type_number}")
        return self._number(_CODES[type_number], key)

    def _array(self, key: str) -> Value:
        item_type, count = self.whole("I", key), self.whole("Q", key)
        code = _CODES.get(item_type)
        self.kinds[key] += _LETTERS.get(item_type, "")
        if code is None and item_type != _STRING:
            raise self.bad(f"the array {key!r} has items of the unknown type {item_type}")
        width = struct.calcsize("<" + code) if code else 8
        if count > MAX_ARRAY_ITEMS or count * width > self.size - self.at:
            raise self.bad(f"the array {key!r} claims {count} items")
        if code is None:
            return self._texts(key, count)
        start = self.at
        self.at += count * width
        if count > MAX_KEPT_ITEMS and not self._keeps_all:
            return LongArray(count)
        return struct.unpack_from(f"{self.order}{count}{code}", self.data, start)

    def _texts(self, key: str, count: int) -> Value:
        # the one hot loop: a vocabulary has 10^5 strings
        unpack = struct.Struct(self.order + "Q").unpack_from
        data, at, kept = self.data, self.at, list[bytes]()
        keeps = self._keeps_all or count <= MAX_KEPT_TEXTS
        for _ in range(count):
            start = at + 8
            at = start + unpack(data, at)[0]
            if keeps:
                if at > self.size or at - start > MAX_KEPT_TEXT_BYTES:
                    raise self.bad(f"an item of {key!r} is {at - start} bytes long")
                kept.append(data[start:at])
        if at > self.size:
            raise self.bad(f"the array {key!r} runs past the end of the file")
        self.at = at
        if not keeps:
            return LongArray(count)
        items: tuple[Any, ...] = tuple(kept)
        return tuple(text.decode("utf-8", errors="replace") for text in kept) if self.decodes else items


@contextmanager
def _reader(path: Path, *, keeps_all: bool = False) -> Iterator[GgufReader]:
    """A reader at the start of the file; a path that cannot be mapped, or an impossible length, is BadInput."""
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
        reader = GgufReader(data, path, keeps_all)
        try:
            yield reader
        except (struct.error, OverflowError, MemoryError) as error:
            raise reader.bad("a length or offset is impossible") from error


@dataclass(frozen=True)
class _Row:
    name: str
    shape: tuple[int, ...]
    type_number: int
    offset: int


def _place(reader: GgufReader, rows: list[_Row], alignment: int) -> tuple[tuple[Tensor, ...], int]:
    data_start = -(-reader.at // alignment) * alignment if rows else reader.at
    ends = sorted({row.offset for row in rows} | {max(reader.size - data_start, 0)})
    following = dict(pairwise(ends))
    seen: set[str] = set()
    tensors, declared = [], data_start
    for row in rows:
        if row.name in seen:
            raise reader.bad(f"the tensor {row.name!r} comes twice")
        if row.offset % alignment:
            raise reader.bad(f"the tensor {row.name!r} starts at an odd place")
        seen.add(row.name)
        tensor = _sized(reader, row, following.get(row.offset, row.offset) - row.offset)
        tensors.append(tensor)
        declared = max(declared, data_start + row.offset + tensor.n_bytes)
    if declared > reader.size:
        sizes = f"its header declares {declared} bytes, the file has {reader.size}"
        raise BadInput(f"{reader.path} is truncated: {sizes}; fetch it again")
    return tuple(tensors), declared


def _sized(reader: GgufReader, row: _Row, gap: int) -> Tensor:
    known = _ggml_types().get(row.type_number)
    if known is None:
        # a type newer than the installed gguf package: the distance to the next tensor is its size, padding included
        return Tensor(row.name, f"type {row.type_number}", row.shape, gap)
    name, block_items, block_bytes = known
    if row.shape and row.shape[0] % block_items:
        raise reader.bad(f"the tensor {row.name!r} has rows of {row.shape[0]}, not whole {name} blocks")
    return Tensor(row.name, name, row.shape, math.prod(row.shape) // block_items * block_bytes)


@lru_cache(maxsize=1)
def _ggml_types() -> dict[int, tuple[str, int, int]]:
    """ggml type number -> (name, items per block, bytes per block)."""
    from gguf.constants import GGML_QUANT_SIZES  # pulls in numpy: 0.2 s that only a process which reads a model pays

    return {int(kind): (kind.name, items, n_bytes) for kind, (items, n_bytes) in GGML_QUANT_SIZES.items()}
