"""What llama.cpp loads: the architectures and tensor types of the gguf package, and the rules in `support.toml`."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from engines.model.architectures import doubtful_keys, missing_keys, odd_layout, odd_shapes
from engines.model.header import Header
from engines.model.layout import layout, named, odd_tensors, unknown_names
from engines.model.loads import Loads, known_architectures, wrong_kinds
from engines.model.template import template_beyond, template_error, template_refuses
from engines.model.vocabulary import vocabulary

RULES = Path(__file__).with_suffix(".toml")
INSIDE = ("v.", "mm.", "mtp.")  # in one file with the model, as Ollama keeps them
NEWER = "; a newer llama.cpp may know it"


def loads(header: Header, version: str | None = None) -> Loads:
    """Whether llama.cpp loads the model, whatever its `version`; what the lists do not know is unknown."""
    names, package = known_architectures(), f"gguf {metadata.version('gguf')}"
    if obstacles := list(_obstacles(header, _rules())):
        return Loads("no", "; ".join(obstacles))
    if doubts := list(_doubts(header, _rules(), package)):
        return Loads("unknown", doubts[0])
    return Loads("yes", f"architecture {header.architecture!r} is among the {len(names)} names of {package}")


@lru_cache(maxsize=1)
def _rules() -> dict[str, Any]:
    return tomllib.loads(RULES.read_text(encoding="utf-8"))


def _obstacles(header: Header, rules: dict[str, Any]) -> Iterator[str]:
    if header.endianness != sys.byteorder:
        yield f"the file is {header.endianness}-endian and this machine is not; llama.cpp refuses it"
    if header.architecture in rules["projectors"]:
        yield "the file holds a projector, not a model"
        return
    if adapter := next((tensor for tensor in header.tensors if tensor.name.endswith((".lora_a", ".lora_b"))), None):
        yield f"the file holds an adapter, not a model (tensor {adapter.name})"
        return
    if not header.tensors:
        yield "the file has no tensors: it is a vocabulary alone"
        return
    if odd := next((tensor for tensor in header.tensors if tensor.type in rules["no_weights"]), None):
        yield f"tensor {odd.name} is {odd.type}, which no weight is"
    yield from _keys(header, rules)
    yield from _tokenizer(header, rules)
    yield from of_ollama(header)
    found = layout(header)
    if found is None:
        return
    if found.missing:
        yield named(found.missing, "is missing")
    if found.surplus:
        yield f"{named(found.surplus, 'is surplus')}: llama.cpp refuses a file with more tensors than it reads"
    if header.key_length == header.value_length:  # else it depends on the architecture which of them counts
        yield from found.misshapen[:1]
    for key in found.zero:
        yield f"the key {key} is missing or 0"


def of_ollama(header: Header) -> Iterator[str]:
    """How a file differs that only Ollama's patches to llama.cpp read: many of its library do (llama.cpp#25334)."""
    key = f"{header.architecture}.rope.dimension_sections"
    if (items := header.items(key)) not in (None, 4):
        yield f"the key {key} has {items} entries, llama.cpp reads 4"
    inside = next((tensor for tensor in header.tensors if tensor.name.startswith(INSIDE)), None)
    if inside:
        yield f"tensor {inside.name} is of a projector or a drafter, which llama.cpp reads from a file of its own"


def _keys(header: Header, rules: dict[str, Any]) -> Iterator[str]:
    arch, meta = header.architecture, header.meta
    for name in rules["required"]:
        if (key := f"{arch}.{name}") not in meta:
            yield f"the key {key} is missing"
    yield from missing_keys(header)
    if meta.get(f"{arch}.expert_count") and not meta.get(f"{arch}.expert_used_count"):
        yield f"the key {arch}.expert_used_count is missing or 0"
    scaling = meta.get(f"{arch}.rope.scaling.type", "none")
    if scaling not in rules["rope_scaling"]:
        yield f"{arch}.rope.scaling.type is {scaling!r}, which llama.cpp does not know"
    if arch in rules["rope_is_head"] and header.rope_dimension not in (None, header.key_length):
        yield f"{arch}.rope.dimension_count is {header.rope_dimension}, a head has {header.key_length}"
    yield from wrong_kinds(header, rules["kinds"], "llama.cpp")


def _tokenizer(header: Header, rules: dict[str, Any]) -> Iterator[str]:
    meta, model = header.meta, header.tokenizer_model
    if model is None:
        yield "the key tokenizer.ggml.model is missing"
    if model in rules["no_vocabulary"]:
        yield f"tokenizer.ggml.model is {model!r}: there is no vocabulary to read a prompt with"
    merged = model in rules["bpe"] and header.tokenizer_pre not in rules["without_merges"]
    if merged and "tokenizer.ggml.merges" not in meta:
        yield "the key tokenizer.ggml.merges is missing"
    if "tokenizer.ggml.tokens" not in meta:
        yield "the key tokenizer.ggml.tokens is missing"
    for name in ("token_type", "scores"):
        if (items := header.items(f"tokenizer.ggml.{name}")) is not None and items < (header.vocab_size or 0):
            yield f"tokenizer.ggml.{name} has {items} values for {header.vocab_size} tokens"
    if twice := vocabulary(header).twice:
        yield f"the token {twice!r} comes twice in tokenizer.ggml.tokens"


def _doubts(header: Header, rules: dict[str, Any], package: str) -> Iterator[str]:
    names = known_architectures()
    if header.architecture not in names:
        yield f"architecture {header.architecture!r} is not among the {len(names)} names of {package}{NEWER}"
    if unknown := next((tensor for tensor in header.tensors if tensor.type.startswith("type ")), None):
        yield f"tensor {unknown.name} is of ggml {unknown.type}, which {package} does not know{NEWER}"
    if odd := next((t for t in header.tensors if t.name.endswith("norm.weight") and t.type != "F32"), None):
        yield f"tensor {odd.name} is {odd.type}; on a CPU only an F32 norm is computed with"
    if isinstance(step := header.meta.get("general.alignment", 32), int) and step % 32:
        yield f"general.alignment is {step}: no multiple of 32, which the kernels want"
    if why := template_error(header.chat_template):
        yield f"the chat template is not valid Jinja ({why})"
    if lacking := template_beyond(header.chat_template, rules["template"]):
        yield f"the chat template uses {lacking}, which llama.cpp {rules['read_at']} does not have{NEWER}"
    if refusal := template_refuses(header.chat_template):
        yield f"the chat template refuses any chat: {refusal}"
    if header.kinds.get("tokenizer.ggml.token_type", "[i") not in ("[i", "[I"):
        yield "tokenizer.ggml.token_type are no whole numbers of 32 bits"
    yield from doubtful_keys(header)
    yield from odd_layout(header)
    yield from (odd_shapes if (found := layout(header)) is None else unknown_names)(header)
    yield from odd_tensors(header) if found is None else found.misshapen
    if header.kind != "model" and layout(header) is None:
        yield f"general.type says {header.kind}, not model"
    if header.tokenizer_model not in rules["tokenizer_models"]:
        yield f"tokenizer.ggml.model {header.tokenizer_model!r} is not in the list of {rules['read_at']}{NEWER}"
    elif header.tokenizer_model in rules["bpe"] and (header.tokenizer_pre or "") not in rules["pre_tokenizers"]:
        yield f"tokenizer.ggml.pre {header.tokenizer_pre!r} is not in the list of {rules['read_at']}{NEWER}"
