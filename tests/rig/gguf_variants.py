"""SmolLM2, two blocks of it, with one thing changed in its header: what engines refuse and preflight has to know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFValueType, GGUFWriter

U32, F32, TEXT, ARRAY = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING, GGUFValueType.ARRAY
T, L = "tokenizer.ggml.", "llama."
Key = tuple[Any, GGUFValueType, GGUFValueType | None]


@dataclass
class Draft:
    """A model before it is written."""

    architecture: str
    keys: dict[str, Key]
    tensors: dict[str, tuple[Any, Type]]

    def copy(self) -> Draft:
        return Draft(self.architecture, dict(self.keys), dict(self.tensors))

    def write(self, path: Path) -> Path:
        writer = GGUFWriter(path, self.architecture)
        for name, (value, kind, items) in self.keys.items():
            writer.add_key_value(name, value, kind, items)
        for name, (weights, kind) in self.tensors.items():
            writer.add_tensor(name, weights, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


Change = Callable[[Draft], object]


def draft(source: Path, blocks: int = 2, n_tokens: int = 1000) -> Draft:
    """The first blocks and tokens of `source`, with the merges that they need: it loads in a moment."""
    reader = GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    keys = {
        name: (field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None)
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.") and name != "general.architecture"
    }
    keys[f"{architecture}.block_count"] = (blocks, U32, None)
    tensors = {
        tensor.name: (tensor.data, tensor.tensor_type)
        for tensor in reader.tensors
        if not tensor.name.startswith("blk.") or int(tensor.name.split(".")[1]) < blocks
    }
    tokens = keys[f"{T}tokens"][0][:n_tokens]
    known = set(tokens)
    merges = [merge for merge in keys[f"{T}merges"][0] if {merge.replace(" ", "", 1), *merge.split(" ")} <= known]
    short = {"tokens": tokens, "token_type": keys[f"{T}token_type"][0][:n_tokens], "merges": merges}
    keys |= {f"{T}{name}": (values, *keys[f"{T}{name}"][1:]) for name, values in short.items()}
    keys[f"{architecture}.vocab_size"] = (n_tokens, U32, None)
    rows, kind = tensors["token_embd.weight"]
    return Draft(architecture, keys, tensors | {"token_embd.weight": (rows[:n_tokens], kind)})


def item(key: str, at: int, value: str) -> Change:
    """The array `key` with another item at one place."""

    def change(model: Draft) -> None:
        values, *kinds = model.keys[key]
        model.keys[key] = ([*values[:at], value, *values[at + 1 :]], *kinds)

    return change


def scaled(kind: str, **keys: float) -> Change:
    scaling = f"{L}rope.scaling."
    return several(put(f"{scaling}type", kind), *(put(f"{scaling}{key}", value, F32) for key, value in keys.items()))


RAISES = "{{% if {} %}}{{{{ raise_exception('no') }}}}{{% endif %}}{{{{ m.content }}}}"


def each(text: str) -> str:
    return f"{{% for m in messages %}}{text}{{% endfor %}}"


def template(text: str) -> Change:
    return put("tokenizer.chat_template", text)


def put(key: str, value: Any, kind: GGUFValueType = TEXT, items: GGUFValueType | None = None) -> Change:
    return lambda model: model.keys.update({key: (value, kind, items)})


def drop(key: str) -> Change:
    return lambda model: model.keys.pop(key)


def cut(key: str, length: int) -> Change:
    return lambda model: model.keys.update({key: (model.keys[key][0][:length], *model.keys[key][1:])})


def grow(model: Draft) -> None:
    for key, more in {"tokens": [f"zzqq{n}" for n in range(64)], "token_type": [1] * 64}.items():
        values, *kinds = model.keys[f"tokenizer.ggml.{key}"]
        model.keys[f"tokenizer.ggml.{key}"] = ([*values, *more], *kinds)


def without(tensor: str) -> Change:
    return lambda model: model.tensors.pop(tensor)


def tensor(name: str, *shape: int, kind: Type = Type.F32, dtype: Any = np.float32) -> Change:
    return lambda model: model.tensors.update({name: (np.ones(shape, dtype=dtype), kind)})


def several(*changes: Change) -> Change:
    return lambda model: [change(model) for change in changes]


def renamed(architecture: str) -> Change:
    def change(model: Draft) -> None:
        old, model.architecture = model.architecture, architecture
        keys = model.keys.items()
        model.keys = {f"{architecture}{k[len(old) :]}" if k.startswith(f"{old}.") else k: v for k, v in keys}

    return change


def extra_block(model: Draft) -> None:
    model.tensors.update({n.replace("blk.1.", "blk.2."): t for n, t in model.tensors.items() if n.startswith("blk.1.")})


EPS = f"{L}attention.layer_norm_rms_epsilon"
CASES: dict[str, Change] = {
    "whole": lambda model: None,
    "pre refact": put(f"{T}pre", "refact"),
    "pre unknown": put(f"{T}pre", "made-up"),
    "pre default": put(f"{T}pre", "default"),
    "pre of another known": put(f"{T}pre", "llama-bpe"),
    "pre dropped": drop(f"{T}pre"),
    "tokenizer unknown": put(f"{T}model", "made-up"),
    "tokenizer dropped": drop(f"{T}model"),
    "tokenizer none": put(f"{T}model", "none"),
    "tokenizer no_vocab": put(f"{T}model", "no_vocab"),
    "tokenizer llama without scores": put(f"{T}model", "llama"),
    "tokenizer bert": put(f"{T}model", "bert"),
    "tokenizer t5": put(f"{T}model", "t5"),
    "tokenizer rwkv": put(f"{T}model", "rwkv"),
    "tokenizer gemma4": put(f"{T}model", "gemma4"),
    "merges dropped": drop(f"{T}merges"),
    "tokens dropped": drop(f"{T}tokens"),
    "tokens fewer than embeddings": several(cut(f"{T}tokens", 900), cut(f"{T}token_type", 900)),
    "tokens more than embeddings": grow,
    "token types dropped": drop(f"{T}token_type"),
    "token types short": cut(f"{T}token_type", 100),
    "bos beyond": put(f"{T}bos_token_id", 99999, U32),
    "eos beyond": put(f"{T}eos_token_id", 99999, U32),
    "bos dropped": drop(f"{T}bos_token_id"),
    "eos dropped": drop(f"{T}eos_token_id"),
    "template dropped": drop("tokenizer.chat_template"),
    "template broken": put("tokenizer.chat_template", "{% for x in %}"),
    "epsilon dropped": drop(EPS),
    "epsilon a text": put(EPS, "1e-5"),
    "epsilon a double": put(EPS, 1e-5, GGUFValueType.FLOAT64),
    "epsilon a number": put(EPS, 1, U32),
    "epsilon 0": put(EPS, 0.0, F32),
    **{
        f"{key} dropped": drop(f"{L}{key}")
        for key in (
            "block_count",
            "context_length",
            "embedding_length",
            "feed_forward_length",
            "attention.head_count",
            "attention.head_count_kv",
            "rope.freq_base",
            "rope.dimension_count",
            "vocab_size",
        )
    },
    "heads a text": put(f"{L}attention.head_count", "9"),
    "heads of 64 bits": put(f"{L}attention.head_count", 9, GGUFValueType.UINT64),
    "heads 0": put(f"{L}attention.head_count", 0, U32),
    "heads 10": put(f"{L}attention.head_count", 10, U32),
    "kv heads 2": put(f"{L}attention.head_count_kv", 2, U32),
    "kv heads an array": put(f"{L}attention.head_count_kv", [3, 3], ARRAY, U32),
    "context of 64 bits": put(f"{L}context_length", 8192, GGUFValueType.UINT64),
    "context 0": put(f"{L}context_length", 0, U32),
    "one block more": put(f"{L}block_count", 3, U32),
    "one block less": put(f"{L}block_count", 1, U32),
    "no block": put(f"{L}block_count", 0, U32),
    "embedding off": put(f"{L}embedding_length", 512, U32),
    "feed-forward off": put(f"{L}feed_forward_length", 1024, U32),
    "rope dimensions off": put(f"{L}rope.dimension_count", 32, U32),
    "vocabulary size off": put(f"{L}vocab_size", 900, U32),
    "experts in a dense model": several(put(f"{L}expert_count", 4, U32), put(f"{L}expert_used_count", 2, U32)),
    "key length off": put(f"{L}attention.key_length", 128, U32),
    "a tensor dropped": without("blk.1.ffn_up.weight"),
    "a norm dropped": without("blk.1.attn_norm.weight"),
    "output norm dropped": without("output_norm.weight"),
    "embeddings dropped": without("token_embd.weight"),
    "no tensors": lambda model: model.tensors.clear(),
    "a tensor more": tensor("blk.1.made_up.weight", 576),
    "a tensor more outside": tensor("made_up", 4),
    "a vision tensor": tensor("v.blk.0.attn_q.weight", 8, 8),
    "a bias": tensor("blk.0.attn_q.bias", 576),
    "rope factors": tensor("rope_freqs.weight", 32),
    "a block more than said": extra_block,
    "feed-forward misshapen": tensor("blk.1.ffn_up.weight", 512, 576),
    "norm misshapen": tensor("blk.1.attn_norm.weight", 512),
    "norm of two dimensions": tensor("blk.1.attn_norm.weight", 1, 576),
    "embeddings misshapen": tensor("token_embd.weight", 900, 576, kind=Type.F16, dtype=np.float16),
    "norm F16": tensor("blk.1.attn_norm.weight", 576, kind=Type.F16, dtype=np.float16),
    "feed-forward I32": tensor("blk.1.ffn_up.weight", 1536, 576, kind=Type.I32, dtype=np.int32),
    "feed-forward F64": tensor("blk.1.ffn_up.weight", 1536, 576, kind=Type.F64, dtype=np.float64),
    "norm I8": tensor("blk.1.attn_norm.weight", 576, kind=Type.I8, dtype=np.int8),
    "feed-forward IQ4": tensor("blk.1.ffn_up.weight", 1536, 324, kind=Type.IQ4_NL, dtype=np.uint8),
    "split count 1": put("split.count", 1, GGUFValueType.UINT16),
    "split count 3": several(put("split.count", 3, GGUFValueType.UINT16), put("split.no", 0, GGUFValueType.UINT16)),
    "type adapter": put("general.type", "adapter"),
    "type mmproj": put("general.type", "mmproj"),
    "type imatrix": put("general.type", "imatrix"),
    "type dropped": drop("general.type"),
    "as qwen2": renamed("qwen2"),
    "as qwen3": renamed("qwen3"),
    "as smollm3": renamed("smollm3"),
    "as granite": renamed("granite"),
    "as an unknown architecture": renamed("made-up"),
    "as clip": several(renamed("clip"), drop("general.type")),
    "alignment 64": put("general.alignment", 32, GGUFValueType.UINT64),
    "a token twice": lambda model: item(f"{T}tokens", 5, model.keys[f"{T}tokens"][0][2])(model),
    "a token emptied": item(f"{T}tokens", 900, ""),
    "no newline": lambda model: item(f"{T}tokens", model.keys[f"{T}tokens"][0].index("\u010a"), "zq")(model),
    "a merge without a space": item(f"{T}merges", 3, "ab"),
    "a merge of three": item(f"{T}merges", 3, "a b c"),
    "a merge of nothing": item(f"{T}merges", 3, ""),
    "a merge of half": item(f"{T}merges", 3, " ab"),
    "a merge of no tokens": item(f"{T}merges", 3, "zzzq xxxq"),
    "a merge into no token": item(f"{T}merges", 3, "z z"),
    "merges of numbers": put(f"{T}merges", [1, 2, 3], ARRAY, U32),
    "tokens of numbers": put(f"{T}tokens", [1] * 1000, ARRAY, U32),
    "token types long": put(f"{T}token_type", [1] * 1200, ARRAY, GGUFValueType.INT32),
    "token types floats": put(f"{T}token_type", [1.0] * 1000, ARRAY, F32),
    "token types unsigned": put(f"{T}token_type", [1] * 1000, ARRAY, U32),
    "scores short": put(f"{T}scores", [0.0] * 10, ARRAY, F32),
    "scores long": put(f"{T}scores", [0.0] * 2000, ARRAY, F32),
    "bos -1": put(f"{T}bos_token_id", -1, GGUFValueType.INT32),
    "bos of 64 bits": put(f"{T}bos_token_id", 1, GGUFValueType.UINT64),
    "eos signed": put(f"{T}eos_token_id", 2, GGUFValueType.INT32),
    "eos a text": put(f"{T}eos_token_id", "2"),
    "eos one beyond": put(f"{T}eos_token_id", 1000, U32),
    "unknown beyond": put(f"{T}unknown_token_id", 5000, U32),
    "padding beyond": put(f"{T}padding_token_id", 5000, U32),
    "add bos a number": put(f"{T}add_bos_token", 1, U32),
    "pre a number": put(f"{T}pre", 3, U32),
    "pre of a newer llama.cpp": put(f"{T}pre", "spark2_5"),
    "embeddings more": tensor("token_embd.weight", 1100, 576, kind=Type.F16, dtype=np.float16),
    "template unclosed": template("{% for x in messages %}{{ x }}"),
    "template with a filter unknown": template("{{ messages | nosuch }}"),
    "template with a test unknown": template("{% if messages is nosuch %}a{% endif %}"),
    "template with a function unknown": template("{{ nosuch(messages) }}"),
    "template with a tag unknown": template("{% nosuch %}"),
    "template with a block": template("{% block a %}{{ messages }}{% endblock %}"),
    "template with with": template("{% with a = 1 %}{{ a }}{% endwith %}"),
    "template with an import": template('{% import "a" as b %}'),
    "template with a macro": template("{% macro f(x) %}{{ x }}{% endmacro %}{{ f(1) }}"),
    "template with methods": template('{{ messages[0].content.split("x")[-1].lstrip() }}'),
    "template that raises": template("{{ raise_exception('no') }}"),
    "template that raises for each message": template(each("{{ raise_exception(m.role) }}")),
    "template that raises without tools": template("{% if not tools %}{{ raise_exception('tools!') }}{% endif %}"),
    "template that raises for a system message": template(each(RAISES.format("m.role == 'system'"))),
    "template that raises unless they alternate": template(
        each(RAISES.format("(m.role == 'user') != (loop.index0% 2 == 0)"))
    ),
    "template that raises for an answer": template(each(RAISES.format("m.role == 'assistant'"))),
    "template a number": put("tokenizer.chat_template", 3, U32),
    "rope yarn": scaled("yarn", factor=4.0),
    "rope linear": scaled("linear", factor=4.0),
    "rope linear without a factor": scaled("linear"),
    "rope longrope": scaled("longrope", factor=4.0),
    "rope dynamic": scaled("dynamic"),
    "rope factors of another length": tensor("rope_freqs.weight", 16),
}
