"""Whether an engine loads a model, as an answer with its reason."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from engines.model.header import Header


@dataclass(frozen=True)
class Slow:
    """Weights that an engine computes slowly on a device, and the quant that it is fastest with there.

    `times` are that quant's measured times over those of llama.cpp: to read a prompt, to write a token.
    """

    device: Literal["CPU", "GPU"]
    quant: str
    tensors: int
    why: str
    faster: str
    times: tuple[float, float]
    source: str

    def __str__(self) -> str:
        other = f"as {self.faster} {self.times[0]:g} and {self.times[1]:g} ({self.source})"
        return f"{self.why}; {other}: `switchyard requantize MODEL --to {self.faster}` makes one to try"


@dataclass(frozen=True)
class Loads:
    """Whether an engine loads a model, why, what to watch although it does, and what else a user could do."""

    answer: Literal["yes", "no", "unknown"]
    why: str
    warnings: tuple[str, ...] = ()
    alternatives: tuple[str, ...] = ()
    by_tokenizer: bool = False  # only the tokenizer in the file stands in the way: a tokenizer.json may replace it
    slow: tuple[Slow, ...] = ()


@lru_cache(maxsize=1)
def known_architectures() -> frozenset[str]:
    """The architecture names of the installed gguf package."""
    from gguf.constants import MODEL_ARCH_NAMES  # pulls in numpy: 0.2 s that only a process which reads a model pays

    return frozenset(MODEL_ARCH_NAMES.values())


@lru_cache(maxsize=1)
def tensor_stems() -> dict[str, frozenset[str]]:
    """The tensors that the installed gguf package knows for each architecture, without `.weight`; `{bid}` a block."""
    from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES  # slow, as above

    return {
        MODEL_ARCH_NAMES[arch]: frozenset(TENSOR_NAMES[tensor] for tensor in tensors)
        for arch, tensors in MODEL_TENSORS.items()
    }


def wrong_kinds(header: Header, kinds: Mapping[str, Sequence[str]], engine: str) -> Iterator[str]:
    """Keys whose value has a type that `engine` does not read: `kinds` by key, `ARCH` for the architecture."""
    for name, read in kinds.items():
        key = name.replace("ARCH", header.architecture)
        if header.kinds.get(key, read[0]) not in read:
            yield f"the key {key} is of another type than {engine} reads"


def parse_version(version: str | None) -> tuple[int, ...] | None:
    """`(0, 9, 5)` for "0.9.5", "v0.9.5" or "mistralrs 0.9.5"; None when there is no such number in it."""
    match = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", version or "")
    return tuple(int(part or 0) for part in match.groups()) if match else None
