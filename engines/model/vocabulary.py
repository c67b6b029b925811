"""What is wrong with the tokens and merges of a file: read in full, so only once for a file."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from engines.model.gguf import read_texts
from engines.model.header import Header


class Vocabulary(NamedTuple):
    """The first token that comes twice, and the first merge that is not two tokens whose whole is a token."""

    twice: str | None
    broken_merge: str | None


def vocabulary(header: Header) -> Vocabulary:
    stat = header.path.stat()
    return _read(header.path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4)
def _read(path: Path, _changed_ns: int, _size: int) -> Vocabulary:
    tokens, merges = read_texts(path, "tokenizer.ggml.tokens", "tokenizer.ggml.merges")
    known = set(tokens)
    broken = next((merge for merge in merges if not _joins(merge, known)), None)
    return Vocabulary(_shown(_twice(tokens) if len(known) < len(tokens) else None), _shown(broken))


def _joins(merge: bytes, known: set[bytes]) -> bool:
    left, _, right = merge.partition(b" ")
    return left in known and right in known and left + right in known


def _twice(tokens: tuple[bytes, ...]) -> bytes | None:
    seen = set[bytes]()
    for token in tokens:
        if token in seen:
            return token
        seen.add(token)
    return None


def _shown(text: bytes | None) -> str | None:
    return None if text is None else text.decode("utf-8", errors="replace")
