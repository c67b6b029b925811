"""Models of random weights, as wide as the formats of K quants ask for: what is measured of them is memory alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from numpy.typing import NDArray

# bytes of a block, and where its scales lie, as float16
BLOCKS = {"Q4_0": (32, 18, (0,)), "Q4_K": (256, 144, (0, 2)), "Q5_K": (256, 176, (0, 2)), "Q6_K": (256, 210, (208,))}
BLOCKS |= {"Q8_0": (32, 34, (0,))}
SCALE = 1e-4  # of random quants: small enough for any sum to be finite


@dataclass(frozen=True)
class Shape:
    """A model's sizes; with `experts`, each of `feed_forward`, a token takes four."""

    layers: int = 8
    width: int = 1536
    feed_forward: int = 4096
    heads: int = 24
    kv_heads: int = 8
    experts: int = 0

    @property
    def head(self) -> int:
        return self.width // self.heads


def write_random(path: Path, source: Path, shape: Shape, quant: str, output: str) -> None:
    """A model of `shape` with the vocabulary of `source`; matrices are `quant`, the tied output is `output`."""
    keys = GGUFReader(source).fields
    architecture = "qwen3moe" if shape.experts else "llama"
    writer = GGUFWriter(path, architecture)
    for name, field in keys.items():
        if name.startswith("tokenizer."):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)
    vocabulary = len(keys["tokenizer.ggml.tokens"].contents())
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(4)
        writer.add_expert_feed_forward_length(shape.feed_forward)
    else:
        writer.add_rope_dimension_count(shape.head)
        writer.add_vocab_size(vocabulary)
    dice = np.random.default_rng(1)
    for name, rows in _norms(shape).items():
        writer.add_tensor(name, np.ones(rows, np.float32))
    for name, sizes in {"token_embd.weight": (vocabulary, shape.width), **_matrices(shape)}.items():
        kind = output if name == "token_embd.weight" else quant
        writer.add_tensor(name, _blocks(dice, kind, sizes), raw_dtype=GGMLQuantizationType[kind])
    if shape.experts:
        for layer in range(shape.layers):
            gate = dice.standard_normal((shape.experts, shape.width), dtype=np.float32)
            writer.add_tensor(f"blk.{layer}.ffn_gate_inp.weight", gate)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _norms(shape: Shape) -> dict[str, int]:
    names = {"attn_norm": shape.width, "ffn_norm": shape.width}
    names |= {"attn_q_norm": shape.head, "attn_k_norm": shape.head} if shape.experts else {}
    found = {f"blk.{n}.{name}.weight": rows for n in range(shape.layers) for name, rows in names.items()}
    return found | {"output_norm.weight": shape.width}


def _matrices(shape: Shape) -> dict[str, tuple[int, ...]]:
    queries, keys, end = shape.heads * shape.head, shape.kv_heads * shape.head, "_exps" if shape.experts else ""
    up, down = (shape.feed_forward, shape.width), (shape.width, shape.feed_forward)
    stacked = (shape.experts,) if shape.experts else ()
    names = {
        "attn_q": (queries, shape.width),
        "attn_k": (keys, shape.width),
        "attn_v": (keys, shape.width),
        "attn_output": (shape.width, queries),
        f"ffn_gate{end}": (*stacked, *up),
        f"ffn_up{end}": (*stacked, *up),
        f"ffn_down{end}": (*stacked, *down),
    }
    return {f"blk.{n}.{name}.weight": sizes for n in range(shape.layers) for name, sizes in names.items()}


def _blocks(dice: np.random.Generator, quant: str, sizes: tuple[int, ...]) -> NDArray[np.uint8]:
    weights, n_bytes, scales = BLOCKS[quant]
    blocks = dice.integers(0, 256, (math.prod(sizes) // weights, n_bytes), dtype=np.uint8)
    for at in scales:
        blocks[:, at : at + 2] = np.full((1, 1), SCALE, np.float16).view(np.uint8)
    return blocks.reshape(*sizes[:-1], -1)
