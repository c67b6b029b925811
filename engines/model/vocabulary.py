"""What is wrong with the tokens and merges of a file: read in full, so only once for a file."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from engines.model.gguf import read_metadata
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
    meta = read_metadata(path)
    tokens, merges = (meta.get(f"tokenizer.ggml.{name}") for name in ("tokens", "merges"))
    texts = [token for token in tokens if isinstance(token, str)] if isinstance(tokens, tuple) else []
    known = set(texts)
    broken = (merge for merge in merges if not _joins(str(merge), known)) if isinstance(merges, tuple) else iter(())
    return Vocabulary(_twice(texts) if len(known) < len(texts) else None, next(map(str, broken), None))


def _joins(merge: str, known: set[str]) -> bool:
    left, _, right = merge.partition(" ")
    return left in known and right in known and left + right in known


def _twice(tokens: list[str]) -> str | None:
    seen = set[str]()
    for token in tokens:
        # bytes that are no text all read as the same character
        if token in seen and "\ufffd" not in token:
            return token
        seen.add(token)
    return None
