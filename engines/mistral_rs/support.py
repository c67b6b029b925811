"""What mistral.rs loads from a GGUF, by the lists in `support.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from engines.errors import BadInput
from engines.model.architectures import missing_keys, odd_layout
from engines.model.gguf import Tensor
from engines.model.header import Header
from engines.model.layout import layout, named, odd_tensors
from engines.model.loads import Loads, Slow, parse_version, wrong_kinds
from engines.model.template import template_error
from engines.model.vocabulary import vocabulary

TOKENIZER = "the model's own tokenizer.json beside the file: settings.tokenizer_json"
LISTS = Path(__file__).with_suffix(".toml")


def loads(header: Header, version: str | None = None) -> Loads:
    """Whether mistral.rs at `version` (None: not known) loads the model; the reason names the tensor, key or list."""
    lists = _lists()
    return replace(_loads(header, version, lists), slow=tuple(_slow(header, lists["cpu"])))


def _loads(header: Header, version: str | None, lists: dict[str, Any]) -> Loads:
    installed = parse_version(version)
    aged, warnings, refused = (
        _list_age(lists, version, installed),
        tuple(_warnings(header)),
        _refused(header, lists),
    )
    obstacles = _obstacles(header, lists, refused)
    if obstacles:
        return Loads("no", "; ".join(obstacles) + aged, warnings, tuple(_alternatives(header, lists, refused)))
    if unreadable := _tokenizer_obstacles(header, lists):
        newer = installed is not None and installed > _must_parse(lists["rules_read_at"])
        why = f"{'; '.join(unreadable)} (list read at {lists['rules_read_at']})"
        return Loads("unknown" if newer else "no", why, warnings, (TOKENIZER,), by_tokenizer=True)
    if header.architecture not in lists["text"]:
        why = f"{header.architecture!r} is listed as multimodal only: it needs its projector (mmproj) file"
        return Loads("unknown", why + aged, warnings, tuple(_alternatives(header, lists, refused)))
    if installed and installed < _must_parse(lists["minimum_version"]):
        seen_at, known = _must_parse(lists["older"]), header.architecture in lists["older_text"]
        if installed == seen_at and not known:
            why = f"{header.architecture!r} is not in the list of {version}; {lists['minimum_version']} is to have it"
            return Loads("no", why, warnings)
        if installed < seen_at or not known:
            why = f"{header.architecture!r} is in the list read at {lists['read_at']}, but {version} is older than"
            why = f"{why} {lists['minimum_version']}, before which only a handful of architectures was there: update it"
            return Loads("unknown", why, warnings)
    if doubts := list(_doubts(header, lists)):
        return Loads("unknown", doubts[0] + aged, warnings)
    why = f"architecture {header.architecture!r} and all {len(header.tensors)} tensors are of types in its source list"
    seen = lists["seen"].get(header.architecture)
    return Loads("yes", why + (f", and a model of it was seen to load with {seen}" if seen else "") + aged, warnings)


@lru_cache(maxsize=1)
def _lists() -> dict[str, Any]:
    return tomllib.loads(LISTS.read_text(encoding="utf-8"))


def _obstacles(header: Header, lists: dict[str, Any], refused: list[Tensor]) -> list[str]:
    obstacles, architecture = [], header.architecture
    if architecture in lists["projectors"]:
        return ["the file holds a projector, not a model"]
    if not header.tensors:
        return ["the file has no tensors: it is a vocabulary alone"]
    if architecture not in lists["text"] and architecture not in lists["projector"]:
        known = len(lists["text"])
        obstacles.append(f"architecture {architecture!r} is not among the {known} that mistral.rs reads from a GGUF")
    if header.endianness == "big":
        obstacles.append("the file is big-endian; mistral.rs reads little-endian only")
    if refused:
        kind, more = refused[0].type, f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        only_for = lists["tensor_types_for"].get(kind)
        family = f"{kind} outside {', '.join(only_for)}" if only_for else kind
        family = f"{kind[:2]}* type" if kind.startswith(("IQ", "TQ")) else family
        obstacles.append(f"tensor {refused[0].name} is {kind}{more}; mistral.rs reads no {family}")
    found = layout(header)
    if found and found.missing:
        obstacles.append(named(found.missing, "is missing"))
    obstacles += wrong_kinds(header, lists["kinds"], "mistral.rs")
    return obstacles + _missing_keys(header, lists)


def _doubts(header: Header, lists: dict[str, Any]) -> Iterator[str]:
    """What may keep it from loading, as far as a header tells."""
    found, rows = layout(header), header.tensor("token_embd.weight")
    if found is None:
        yield from missing_keys(header)  # a list of llama.cpp's: without a part of it the file is none that is known
        yield from odd_layout(header)
        yield from (odd for odd in odd_tensors(header) if "is missing" in odd)
    if found and found.misshapen:
        yield found.misshapen[0]
    for key in found.zero if found else ():
        yield f"the key {key} is missing or 0"
    if rows and len(rows.shape) > 1 and (header.vocab_size or 0) < rows.shape[1]:
        yield f"the vocabulary has {header.vocab_size} tokens, the embeddings {rows.shape[1]} rows"
    if header.n_layers == 0:
        yield f"{header.architecture}.block_count is 0"
    yield from _rope(header, lists["rope_scaling"])
    if odd := next((t for t in header.tensors if t.name.endswith("_norm.weight") and len(t.shape) > 1), None):
        yield f"tensor {odd.name} has {len(odd.shape)} dimensions"
    if header.meta.get("general.alignment", 32) not in (32, 64, 128):
        yield f"general.alignment is {header.meta['general.alignment']}"
    if "split.count" in header.meta and ("split.no" not in header.meta or header.meta["split.count"] == 0):
        yield "split.count is 0, or split.no is missing beside it"
    if header.kind != "model":
        yield f"general.type says {header.kind}, not model"
    if why := template_error(header.chat_template):
        yield f"the chat template is not valid Jinja ({why})"


def _rope(header: Header, scalings: dict[str, Any]) -> Iterator[str]:
    """What of the scaling of the rotary embedding it does not rebuild from the header alone."""
    arch, known = header.architecture, scalings.get(header.architecture)
    scaling, factors = header.meta.get(f"{arch}.rope.scaling.type", "none"), _baked(header)
    if scaling != "none" and not factors and scaling not in (known or {}):
        yield f"{arch}.rope.scaling.type is {scaling!r}, which mistral.rs does not rebuild without the original config"
    elif factors and known is None:
        yield f"the file holds {factors}, which mistral.rs does not read for {arch}"
    elif scaling != "none" and not factors:
        for name in (known or {})[scaling]:
            if (key := f"{arch}.rope.scaling.{name}") not in header.meta:
                yield f"the key {key} is missing"


def _baked(header: Header) -> str | None:
    return next(
        (tensor.name for tensor in header.tensors if tensor.name.startswith(("rope_freqs", "rope_factors"))), None
    )


def _missing_keys(header: Header, lists: dict[str, Any]) -> list[str]:
    missing = []
    for names in (*lists["required"], *lists["required_for"].get(header.architecture, [])):
        keys = [f"{header.architecture}.{name}" for name in ([names] if isinstance(names, str) else names)]
        if not any(key in header.meta for key in keys):
            missing.append(f"the key {' or '.join(keys)} is missing")
    return missing


def _tokenizer_obstacles(header: Header, lists: dict[str, Any]) -> list[str]:
    """Why it cannot build the tokenizer from the file; a tokenizer.json beside it may serve instead."""
    model, pre, meta = header.tokenizer_model, header.tokenizer_pre, header.meta
    if model not in lists["tokenizer_models"]:
        return [f"tokenizer.ggml.model is {model!r}, which mistral.rs does not read"]
    needed = [*lists["tokenizer_keys"], *(["scores"] if model in lists["unigram"] else ["merges"])]
    why = [f"the key tokenizer.ggml.{name} is missing" for name in needed if f"tokenizer.ggml.{name}" not in meta]
    if model == "gpt2" and pre not in lists["pre_tokenizers"]:
        why.append(f"tokenizer.ggml.pre is {pre!r}, not among the {len(lists['pre_tokenizers'])} that mistral.rs reads")
    why += wrong_kinds(header, lists["tokenizer_kinds"], "mistral.rs")
    if model == "gpt2" and not why and (broken := vocabulary(header).broken_merge) is not None:
        why.append(f"the merge {broken!r} is not two tokens that make a third")
    for name in ("bos", "eos", "unknown"):
        number, size = meta.get(f"tokenizer.ggml.{name}_token_id"), header.vocab_size
        if isinstance(number, int) and size is not None and number >= size:
            why.append(f"tokenizer.ggml.{name}_token_id is {number}, beyond the {size} tokens")
    return why


def _refused(header: Header, lists: dict[str, Any]) -> list[Tensor]:
    only_for = lists["tensor_types_for"]
    readable = {*lists["tensor_types"], *(kind for kind, names in only_for.items() if header.architecture in names)}
    return [tensor for tensor in header.tensors if tensor.type not in readable]


def _alternatives(header: Header, lists: dict[str, Any], refused: list[Tensor]) -> list[str]:
    choices = []
    if refused:
        choices.append("another quantization of the same model without IQ*, TQ* or NVFP4 tensors: plain Q4_K_M, Q8_0")
    if header.architecture not in lists["text"]:
        choices += [row["text"] for row in lists["alternatives"] if header.architecture in row["for"]]
    return choices


def _list_age(lists: dict[str, Any], version: str | None, installed: tuple[int, ...] | None) -> str:
    read_at = lists["read_at"]
    if installed is None:
        why = f"version {version!r} cannot be read as a number" if version else "the installed version is not known"
        return f" (list read at {read_at}; {why})"
    if installed > _must_parse(read_at):
        return f" (list read at {read_at}; {version} is newer and may differ)"
    return f" ({read_at} source list)"


def _warnings(header: Header) -> list[str]:
    warnings = []
    if header.tokenizer_model == "llama":
        warnings.append(
            "tokenizer.ggml.model is 'llama': mistral.rs builds a Unigram tokenizer from it, which may split text "
            "differently (seen with 0.9.5: into letters, without an error); compare token counts first, or give it "
            "the model's tokenizer.json"
        )
    if header.template_shows_tools is False:
        warnings.append("the chat template never names tools: a request's tools are dropped without an error")
    if header.chat_template is None:
        warnings.append("the file has no chat template: chat requests need one from elsewhere")
    return warnings


def _slow(header: Header, cpu: dict[str, Any]) -> Iterator[Slow]:
    """Which weights are slow on a CPU, by how much where that was measured, and which quant of the model is not."""
    best, times = min(cpu["ratios"].items(), key=lambda item: item[1][0])
    for kind, count in header.quant_types.items():
        measured = cpu["ratios"].get(kind)
        if kind not in cpu["scalar"] and (measured is None or measured[0] <= cpu["beyond"]):
            continue
        why = "mistral.rs has no SIMD kernel for them on a CPU" if kind in cpu["scalar"] else "slow on a CPU"
        took = f": {measured[0]:g} times llama.cpp's time for a prompt, {measured[1]:g} for a token" if measured else ""
        line = f"{count} of {len(header.tensors)} tensors are {kind}, {why}{took}"
        yield Slow("CPU", kind, count, line, best, tuple(times), cpu["source"])


def _must_parse(version: str) -> tuple[int, ...]:
    parsed = parse_version(version)
    if parsed is None:
        raise BadInput(f"{LISTS.name}: {version!r} is not a version")
    return parsed
