"""Whether the tensor table of a file is the one that its architecture has: missing, surplus and misshapen tensors."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from engines.model.header import Header
from engines.model.loads import tensor_stems

LAYOUTS = Path(__file__).with_name("layouts.toml")
BLOCKS = "blk."


@dataclass(frozen=True)
class Layout:
    """Names of tensors that are absent or too many, and sentences on those of another shape than the keys say."""

    missing: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    zero: list[str] = field(default_factory=list)  # keys without a number that the shapes need


def layout(header: Header) -> Layout | None:
    """What is wrong with the tensors; None for an architecture, or a variant of it, whose layout is not listed."""
    lists = _lists()
    more = lists["more"].get(header.architecture)
    if more is None or header.tensor("blk.0.attn_qkv.weight") is not None:
        return None
    block = {**lists["block"], **more}
    sparse = header.architecture in lists["sparse"] and bool(header.meta.get(f"{header.architecture}.expert_count"))
    if sparse:
        block = {name: sizes for name, sizes in block.items() if "ff" not in sizes} | lists["experts"]
    required = dict(_expected(lists["global"], block, header.n_layers))
    optional = dict(_expected(lists["global_optional"], lists["block_optional"], header.n_layers))
    known = {**optional, **required}
    found = {tensor.name: tensor.shape for tensor in header.tensors}
    shapes = [
        why for name, names in known.items() if name in found for why in _misshapen(header, name, found[name], names)
    ]
    return Layout(
        missing=[name for name in required if name not in found],
        surplus=[name for name in found if name not in known and not sparse],
        misshapen=shapes,
        zero=[f"{header.architecture}.{key}" for key, values in _counts(header, sparse).items() if not all(values)],
    )


def odd_tensors(header: Header) -> Iterator[str]:
    """For an architecture whose layout is not listed: a block that lacks what others have, names it does not have."""
    blocks = tensors_of_blocks(header)
    sets = list(blocks.values())
    for layer, names in blocks.items():
        fuller = next((other for other in sets if names < other), None)
        if fuller and sets.count(names) == 1:  # several alike are a kind of block of their own
            yield f"tensor {BLOCKS}{layer}.{min(fuller - names)} is missing, which other blocks have"
    yield from unknown_names(header)


def unknown_names(header: Header) -> Iterator[str]:
    """Tensors that the gguf package does not know for the architecture."""
    stems = tensor_stems().get(header.architecture)
    for tensor in header.tensors if stems else ():
        stem = re.sub(r"\.\d+\.", ".{bid}.", tensor.name, count=1).removesuffix(".weight").removesuffix(".bias")
        if stem not in (stems or ()):
            yield f"tensor {tensor.name} is not among those of {header.architecture}"


def tensors_of_blocks(header: Header) -> dict[int, set[str]]:
    """Names of the tensors of each block, without the block's number."""
    blocks = dict[int, set[str]]()
    for tensor in header.tensors:
        if (layer := tensor.layer) is not None and layer < header.main_layers:
            blocks.setdefault(layer, set()).add(tensor.name.split(".", 2)[2])
    return blocks


def unusual_shapes(header: Header, other: Collection[str]) -> Iterator[str]:
    """Tensors of a common name that are not of the common shape; `other` are names that have one of their own."""
    lists = _lists()
    common = {**lists["block"], **lists["more"]["qwen3"], **lists["global"], "output.weight": ["embd", "vocab"]}
    for tensor in header.tensors:
        stem = tensor.name.split(".", 2)[2] if tensor.layer is not None else tensor.name
        if stem in common and stem not in other and (tensor.layer or 0) < header.main_layers:
            yield from _misshapen(header, tensor.name, tensor.shape, common[stem])


def _misshapen(header: Header, name: str, shape: tuple[int, ...], names: list[str]) -> Iterator[str]:
    sizes = _sizes(header, name, names)
    if names and None not in sizes and _differ(shape, sizes):
        yield f"tensor {name} is {list(shape)}, by the keys it is {sizes}"


def _counts(header: Header, sparse: bool) -> dict[str, tuple[int | None, ...]]:
    return {
        "context_length": (header.context_length,),
        "embedding_length": (header.embedding_length,),
        "attention.head_count": header.head_count,
        "attention.head_count_kv": header.head_count_kv,
        "feed_forward_length": (1,) if sparse else header.feed_forward_length,
    }


def named(names: list[str], what: str) -> str:
    """`tensor a is missing (and 2 more)`"""
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"tensor {names[0]} {what}{more}"


@lru_cache(maxsize=1)
def _lists() -> dict[str, Any]:
    return tomllib.loads(LAYOUTS.read_text(encoding="utf-8"))


def _expected(whole: Mapping[str, Any], block: Mapping[str, Any], n_layers: int) -> Iterator[tuple[str, list[str]]]:
    yield from whole.items()
    for layer in range(n_layers):
        for name, sizes in block.items():
            yield f"{BLOCKS}{layer}.{name}", sizes


def _sizes(header: Header, name: str, names: list[str]) -> list[int | None]:
    layer = int(name.split(".")[1]) if name.startswith(BLOCKS) else 0
    heads, kv = (counts[layer] if counts else 0 for counts in (header.head_count, header.head_count_kv))
    key, value = header.key_length or 0, header.value_length or 0
    sizes = {
        "embd": header.embedding_length,
        "q": heads * key,
        "k": kv * key,
        "v": kv * value,
        "o": heads * value,
        "head": key,
        "half": (header.rope_dimension or key) // 2,
        "ff": header.feed_forward_length[layer] if header.feed_forward_length else 0,
        "vocab": header.vocab_size,
    }
    return [sizes[size] or None for size in names]


def _differ(found: tuple[int, ...], sizes: list[int | None]) -> bool:
    """Trailing dimensions of one are no difference."""
    return list(found) != sizes and [*found, *[1] * 4][:4] != [*sizes, *[1] * 4][:4]
