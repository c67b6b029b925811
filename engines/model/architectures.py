"""What the file of an architecture has to have, by `architectures.toml`: what llama.cpp was seen to ask of it."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from engines.model.header import Header
from engines.model.layout import tensors_of_blocks, unusual_shapes

LISTS = Path(__file__).with_suffix(".toml")
FUSED, PARTS = "attn_qkv", ("attn_q", "attn_k", "attn_v")  # one tensor may stand for three


def missing_keys(header: Header, table: str = "keys") -> Iterator[str]:
    """A sentence on each key that the architecture is refused without; of `keys_of_some`, may be."""
    for name, architectures in _lists()[table].items():
        key = f"{header.architecture}.{name}"
        if header.architecture in architectures and key not in header.meta:
            yield f"the key {key} is missing"


def doubtful_keys(header: Header) -> Iterator[str]:
    """The same of keys whose need depends on more than the architecture."""
    yield from missing_keys(header, "keys_of_some")
    blocks = tensors_of_blocks(header)
    sparse = [any("_exps." in name for name in found) for found in blocks.values()]
    if any(sparse) and not all(sparse):
        yield from missing_keys(header, "keys_of_mixed")
    if any("_shexp." in name for found in blocks.values() for name in found):
        yield from missing_keys(header, "keys_of_shared")
    if header.meta.get(f"{header.architecture}.expert_used_count") and not header.meta.get(
        f"{header.architecture}.expert_count"
    ):
        yield f"the key {header.architecture}.expert_count is missing"
    by_length = any("ffn_down.weight" in found for found in blocks.values())
    by_length |= any(sparse) and f"{header.architecture}.expert_feed_forward_length" not in header.meta
    if by_length and not any(header.feed_forward_length):
        yield f"the key {header.architecture}.feed_forward_length is missing or 0"


def odd_layout(header: Header) -> Iterator[str]:
    """Tensors that the smallest file of the architecture has and this one lacks."""
    kind = "experts" if header.meta.get(f"{header.architecture}.expert_count") else "dense"
    whole, every, *some = (_lists()[table].get(header.architecture, ()) for table in ("whole", "every", "some", kind))
    for name in whole:
        if header.tensor(_full(name)) is None:
            yield f"tensor {_full(name)} is missing"
    blocks = tensors_of_blocks(header)
    gated = any("ffn_gate_exps.weight" in found for found in blocks.values())
    for layer in range(header.main_layers):
        found = blocks.get(layer, set())
        for name in every:
            if _full(name) not in found and _is_due(header, layer, name) and not _is_fused(name, found):
                yield f"tensor blk.{layer}.{_full(name)} is missing"
        yield from _odd_feed_forward(layer, found, gated)
    for name in (*some[0], *some[1]):
        if not any(_full(name) in found or _is_fused(name, found) for found in blocks.values()):
            yield f"no block has a tensor {_full(name)}"


def _odd_feed_forward(layer: int, found: set[str], gated: bool) -> Iterator[str]:
    """Where a block has one or two of the three matrices: up and down need no gate, unless others have one."""
    for kind in ("", "_exps", "_shexp"):
        parts = [part for part in ("up", "down", "gate") if f"ffn_{part}{kind}.weight" in found]
        whole = len(parts) in (0, 3) or (parts == ["up", "down"] and not gated)
        if not whole and f"ffn_gate_up{kind}.weight" not in found:
            yield f"of ffn_up{kind}, ffn_down{kind} and ffn_gate{kind} block {layer} has only {' and '.join(parts)}"


def odd_shapes(header: Header) -> Iterator[str]:
    """Tensors of another shape than the keys give, where the architecture has no shapes of its own."""
    own = _lists()["other_shapes"].get(header.architecture, ())
    yield from unusual_shapes(header, {_full(name) for name in own})


def _full(name: str) -> str:
    return name.removesuffix(".") if name.endswith((".", ".bias")) else f"{name}.weight"


def _is_fused(name: str, found: set[str]) -> bool:
    return name in PARTS and _full(FUSED) in found


def _is_due(header: Header, layer: int, name: str) -> bool:
    """Whether the block has what the tensor is of: a block without heads has no attention."""
    shared = header.meta.get(f"{header.architecture}.attention.shared_kv_layers", 0)  # they use earlier blocks' K and V
    if name.startswith(("attn_k", "attn_v")) and isinstance(shared, int) and layer >= header.main_layers - shared:
        return False
    if name.startswith("attn_") and not name.startswith("attn_norm"):
        return _at(header.head_count, layer) and _at(header.head_count_kv, layer)
    return not name.startswith("ffn_") or "norm" in name or "exp" in name or _at(header.feed_forward_length, layer)


def _at(counts: tuple[int, ...], layer: int) -> bool:
    return layer >= len(counts) or counts[layer] != 0


@lru_cache(maxsize=1)
def _lists() -> dict[str, dict[str, tuple[str, ...]]]:
    tables = tomllib.loads(LISTS.read_text(encoding="utf-8"))
    return {
        name: {key: tuple(text.split()) for key, text in table.items()}
        for name, table in tables.items()
        if name != "source"
    }
