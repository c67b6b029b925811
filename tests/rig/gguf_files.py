"""Small synthetic GGUF files for tests, written with the gguf package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFEndian, GGUFReader, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

TOKENS = ["</s>", "h", "e", "he"]
LLAMA = {
    "block_count": 2,
    "context_length": 4096,
    "embedding_length": 64,
    "feed_forward_length": 128,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}

OTHERS = {"token_embd.weight": "F32", "blk.0.attn_q.weight": "Q8_0"}


def llama_shapes(keys: Mapping[str, Any], vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a llama of these sizes, fastest dimension first."""
    width, hidden = keys["embedding_length"], keys["feed_forward_length"]
    heads, kv_heads = keys["attention.head_count"], keys["attention.head_count_kv"]
    query, value = (keys.get(f"attention.{kind}_length", width // heads) for kind in ("key", "value"))
    block = {
        "attn_norm": (width,),
        "attn_q": (width, heads * query),
        "attn_k": (width, kv_heads * query),
        "attn_v": (width, kv_heads * value),
        "attn_output": (heads * value, width),
        "ffn_norm": (width,),
        "ffn_gate": (width, hidden),
        "ffn_up": (width, hidden),
        "ffn_down": (hidden, width),
    }
    whole: dict[str, tuple[int, ...]] = {"token_embd.weight": (width, vocabulary), "output_norm.weight": (width,)}
    for layer in range(keys["block_count"]):
        whole |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return whole


def write_gguf(
    path: Path,
    architecture: str = "llama",
    *,
    keys: Mapping[str, Any] = LLAMA,
    general: Mapping[str, Any] | None = None,
    tensors: Mapping[str, str] | None = None,
    tokens: Sequence[str] = TOKENS,
    tokenizer: str = "gpt2",
    template: str | None = "{{ messages }}{% if tools %}{{ tools }}{% endif %}",
    endian: GGUFEndian = GGUFEndian.LITTLE,
) -> Path:
    """Writes a model with `keys` under `ARCHITECTURE.` and `general` verbatim; `tensors` maps names to ggml types."""
    writer = GGUFWriter(path, architecture, endianess=endian)
    for key, value in {**{f"{architecture}.{key}": value for key, value in keys.items()}, **(general or {})}.items():
        _add(writer, key, value)
    writer.add_tokenizer_model(tokenizer)
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(list(tokens))
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(0)
    if template is not None:
        writer.add_chat_template(template)
    if tensors is None and architecture == "llama" and not any(isinstance(value, list) for value in keys.values()):
        for name, shape in llama_shapes(keys, len(tokens)).items():
            writer.add_tensor(name, np.zeros(shape[::-1], dtype=np.float32))
        tensors = {}
    for name, kind in (tensors or ({} if tensors is not None else OTHERS)).items():
        _add_tensor(writer, name, GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_f16(path: Path, source: Path) -> Path:
    """Writes the model of `source` with F16 weights: for mistral.rs on a CPU some 20 times as fast as Q4_1."""
    reader = GGUFReader(source)
    writer = GGUFWriter(path, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kinds = [*field.types, None]
            writer.add_key_value(name, field.contents(), kinds[0], kinds[1])
    for tensor in reader.tensors:
        weights = tensor.data
        if tensor.tensor_type not in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            weights = dequantize(weights, tensor.tensor_type).astype(np.float16)
        writer.add_tensor(tensor.name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list | tuple):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _add_tensor(writer: GGUFWriter, name: str, kind: GGMLQuantizationType) -> None:
    """A tensor of four rows of 256 zeros: a multiple of every block size."""
    items, n_bytes = GGML_QUANT_SIZES[kind]
    if kind is GGMLQuantizationType.F32:
        writer.add_tensor(name, np.zeros((4, 256), dtype=np.float32))
        return
    writer.add_tensor(name, np.zeros((4, 256 // items * n_bytes), dtype=np.uint8), raw_dtype=kind)


def write_split(folder: Path, n_shards: int) -> list[Path]:
    """A split set of `n_shards` files, one tensor in each; the first holds the metadata."""
    paths = [folder / f"model-{number:05d}-of-{n_shards:05d}.gguf" for number in range(1, n_shards + 1)]
    for number, path in enumerate(paths):
        split = {"split.no": number, "split.count": n_shards, "split.tensors.count": n_shards}
        write_gguf(path, general=split, tensors={f"blk.{number}.attn_q.weight": "F32"})
    return paths


def nemotron_keys() -> dict[str, Any]:
    """The sizes of Nemotron-3-Nano-30B-A3B: 52 layers, 23 Mamba-2, 23 mixture-of-experts, 6 attention."""
    # the order of the kinds changes no sum: what matters is which layers have KV heads and which a feed-forward part
    kinds = ["mamba", "moe"] * 23 + ["attention"] * 6
    return {
        "block_count": len(kinds),
        "context_length": 1 << 20,
        "embedding_length": 2688,
        "feed_forward_length": [1856 if kind == "moe" else 0 for kind in kinds],
        "attention.head_count": [32 if kind == "attention" else 0 for kind in kinds],
        "attention.head_count_kv": [2 if kind == "attention" else 0 for kind in kinds],
        "attention.key_length": 128,
        "attention.value_length": 128,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.layer_norm_epsilon": 1e-5,
        "ssm.conv_kernel": 4,
        "ssm.inner_size": 4096,
        "ssm.state_size": 128,
        "ssm.group_count": 8,
        "ssm.time_step_rank": 64,
        "expert_count": 128,
        "expert_used_count": 6,
    }


def changed_copy(
    source: Path, target: Path, *, values: Mapping[str, str] | None = None, without_tensor: str | None = None
) -> Path:
    """A copy of a real model with other text values (by key), or without one of its tensors."""
    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = (values or {}).get(name, field.contents())
        writer.add_key_value(name, value, field.types[0], field.types[1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        if tensor.name != without_tensor:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
