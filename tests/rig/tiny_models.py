"""Tiny models of several architectures that a real llama-server loads: zero weights, SmolLM2's tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFWriter

EMBEDDING, FEED_FORWARD, HEAD = 64, 128, 32


def tiny_model(path: Path, tokenizer_of: Path, architecture: str, keys: Mapping[str, Any]) -> Path:
    """A model of `architecture` with `keys` over the defaults, its tensors by that architecture's rule below."""
    keys = {
        "context_length": 32768,
        "embedding_length": EMBEDDING,
        "feed_forward_length": FEED_FORWARD,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": HEAD,
    } | dict(keys)
    reader, writer = GGUFReader(tokenizer_of), GGUFWriter(path, architecture)
    for key, value in keys.items():
        name = f"{architecture}.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[1] if field.types[1:] else None)
    vocabulary = len(reader.fields["tokenizer.ggml.tokens"].contents())
    shapes = {"token_embd.weight": (EMBEDDING, vocabulary), "output_norm.weight": (EMBEDDING,)}
    for layer in range(keys["block_count"]):
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in TENSORS[architecture](keys, layer).items()}
    for name, shape in shapes.items():
        writer.add_tensor(
            name.removesuffix(".weight") if name.endswith((".ssm_a.weight", "bias.weight")) else name,
            np.zeros(shape[::-1], dtype=np.float32),
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _dense(keys: Mapping[str, Any], _: int) -> dict[str, tuple[int, ...]]:
    width, kv_width = keys["attention.head_count"] * HEAD, keys["attention.head_count_kv"] * HEAD
    return {
        "attn_norm": (EMBEDDING,),
        "attn_q": (EMBEDDING, width),
        "attn_k": (EMBEDDING, kv_width),
        "attn_v": (EMBEDDING, kv_width),
        "attn_output": (width, EMBEDDING),
        "ffn_norm": (EMBEDDING,),
        "ffn_gate": (EMBEDDING, FEED_FORWARD),
        "ffn_up": (EMBEDDING, FEED_FORWARD),
        "ffn_down": (FEED_FORWARD, EMBEDDING),
    }


def _gemma3(keys: Mapping[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    norms = {"attn_q_norm": (HEAD,), "attn_k_norm": (HEAD,)}
    return _dense(keys, layer) | norms | {"post_attention_norm": (EMBEDDING,), "post_ffw_norm": (EMBEDDING,)}


def _qwen3moe(keys: Mapping[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    dense = {name: shape for name, shape in _dense(keys, layer).items() if name[:4] == "attn" or name == "ffn_norm"}
    n, ff = keys["expert_count"], keys["expert_feed_forward_length"]
    experts = {
        "ffn_gate_exps": (EMBEDDING, ff, n),
        "ffn_up_exps": (EMBEDDING, ff, n),
        "ffn_down_exps": (ff, EMBEDDING, n),
    }
    norms = {"attn_q_norm": (HEAD,), "attn_k_norm": (HEAD,), "ffn_gate_inp": (EMBEDDING, n)}
    return dense | norms | experts


def _qwen35(keys: Mapping[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    dense = _dense(keys, layer)
    common = {name: dense[name] for name in ("attn_norm", "ffn_gate", "ffn_up", "ffn_down")}
    common |= {"post_attention_norm": (EMBEDDING,)}
    main = keys["block_count"] - keys.get("nextn_predict_layers", 0)
    if layer >= main or (layer + 1) % keys["full_attention_interval"] == 0:
        width = keys["attention.head_count"] * HEAD
        found = common | {name: dense[name] for name in ("attn_k", "attn_v", "attn_output")}
        found |= {"attn_q": (EMBEDDING, 2 * width), "attn_q_norm": (HEAD,), "attn_k_norm": (HEAD,)}
        if layer >= main:
            found |= {
                "nextn.eh_proj": (2 * EMBEDDING, EMBEDDING),
                "nextn.enorm": (EMBEDDING,),
                "nextn.hnorm": (EMBEDDING,),
            }
        return found
    inner, state, groups = keys["ssm.inner_size"], keys["ssm.state_size"], keys["ssm.group_count"]
    heads, convolved = keys["ssm.time_step_rank"], inner + 2 * groups * state
    return common | {
        "attn_qkv": (EMBEDDING, convolved),
        "attn_gate": (EMBEDDING, inner),
        "ssm_conv1d": (keys["ssm.conv_kernel"], convolved),
        "ssm_dt.bias": (heads,),
        "ssm_a": (heads,),
        "ssm_alpha": (EMBEDDING, heads),
        "ssm_beta": (EMBEDDING, heads),
        "ssm_norm": (state,),
        "ssm_out": (inner, EMBEDDING),
    }


TENSORS = {"llama": _dense, "gemma3": _gemma3, "qwen3moe": _qwen3moe, "qwen35": _qwen35}
