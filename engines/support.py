"""What an engine can load: an answer with its reason, from lists kept as data beside this file."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from engines.driver import base_of
from engines.errors import BadInput
from engines.model.header import Header, Tensor

LISTS = Path(__file__).with_suffix(".toml")

Answer = Literal["yes", "no", "unknown"]


@dataclass(frozen=True)
class Loads:
    """Whether an engine loads a model, why, and what to watch although it does."""

    answer: Answer
    why: str
    warnings: tuple[str, ...] = ()


def loads(engine: str, header: Header, *, version: str | None = None) -> Loads:
    """Whether `engine` at `version` (None: not known) loads the model; the reason names the tensor, key or list.

    Raises BadInput for an engine that there is no list of.
    """
    engine = base_of(engine)
    if engine not in _ANSWERS:
        raise BadInput(f"what {engine!r} loads is not listed; the lists cover {' and '.join(_ANSWERS)}")
    if header.kind != "model":
        return Loads("no", f"the file holds a {header.kind}, not a model")
    return _ANSWERS[engine](header, version)


def alternatives(header: Header, *, blocked: bool, fits: bool = True) -> list[str]:
    """What a user can do when an engine does not load the model (`blocked`) or it does not fit; empty when neither."""
    if not blocked and fits:
        return []
    choices = []
    if not fits:
        choices.append("a smaller quantization of the same model: the weights are the largest part")
    if blocked and _refused_tensors(header):
        choices.append("another quantization of the same model without IQ*, TQ* or NVFP4 tensors: plain Q4_K_M, Q8_0")
    if blocked and header.architecture not in _lists()["mistral.rs"]["text"]:
        choices += [row["text"] for row in _lists()["alternatives"] if header.architecture in row["for"]]
    choices.append("stay on llama.cpp, with supervision that asks for a token rather than for /health")
    if blocked:
        choices.append("another engine that knows it: Ollama takes the GGUF, vLLM the original safetensors")
    return choices


@lru_cache(maxsize=1)
def known_architectures() -> frozenset[str]:
    """The architecture names of the installed gguf package."""
    from gguf.constants import MODEL_ARCH_NAMES

    return frozenset(MODEL_ARCH_NAMES.values())


@lru_cache(maxsize=1)
def _lists() -> dict[str, Any]:
    return tomllib.loads(LISTS.read_text(encoding="utf-8"))


# --- llama.cpp -----------------------------------------------------------------------------------------------------


def _llama_cpp(header: Header, version: str | None) -> Loads:
    names, package = known_architectures(), f"gguf {metadata.version('gguf')}"
    if header.endianness != sys.byteorder:
        return Loads("no", f"the file is {header.endianness}-endian and this machine is not; llama.cpp refuses it")
    if header.architecture not in names:
        why = f"architecture {header.architecture!r} is not among the {len(names)} names of {package}"
        return Loads("unknown", f"{why}; a newer llama.cpp may know it")
    strange = _first_of(header, lambda tensor: tensor.type.startswith("type "))
    if strange:
        return Loads("unknown", f"tensor {strange.name} is of ggml {strange.type}, which {package} does not know")
    return Loads("yes", f"architecture {header.architecture!r} is among the {len(names)} names of {package}")


# --- mistral.rs ----------------------------------------------------------------------------------------------------


def _mistral_rs(header: Header, version: str | None) -> Loads:
    lists = _lists()["mistral.rs"]
    asked = parse_version(version)
    obstacles = [*_architecture_obstacles(header, lists), *_file_obstacles(header, lists)]
    aged = _list_age(lists, version, asked)
    warnings = tuple(_mistral_rs_warnings(header))
    if obstacles:
        return Loads("no", "; ".join(obstacles) + aged, warnings)
    if header.architecture not in lists["text"]:
        why = f"{header.architecture!r} is listed as multimodal only: it needs its projector (mmproj) file"
        return Loads("unknown", why + aged, warnings)
    if asked and asked < _must_parse(lists["minimum_version"]):
        why = f"{header.architecture!r} is in the list read at {lists['read_at']}, but {version} is older than"
        why = f"{why} {lists['minimum_version']}, before which only a handful of architectures was there: update it"
        return Loads("unknown", why, warnings)
    why = f"architecture {header.architecture!r} and all {len(header.tensors)} tensors are of types in its source list"
    seen = lists["seen"].get(header.architecture)
    return Loads("yes", why + (f", and a model of it was seen to load with {seen}" if seen else "") + aged, warnings)


def _architecture_obstacles(header: Header, lists: dict[str, Any]) -> list[str]:
    architecture = header.architecture
    if architecture in lists["text"] or architecture in lists["projector"]:
        return []
    return [f"architecture {architecture!r} is not among the {len(lists['text'])} that mistral.rs reads from a GGUF"]


def _file_obstacles(header: Header, lists: dict[str, Any]) -> list[str]:
    obstacles = ["the file is big-endian; mistral.rs reads little-endian only"] if header.endianness == "big" else []
    refused = _refused_tensors(header)
    if refused:
        first = refused[0]
        others = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        obstacles.append(
            f"tensor {first.name} is {first.type}{others}; mistral.rs reads no {_family(first.type, lists)}"
        )
    return obstacles


def _refused_tensors(header: Header) -> list[Tensor]:
    lists = _lists()["mistral.rs"]
    only_for = lists["tensor_types_for"]
    readable = {*lists["tensor_types"], *(kind for kind, names in only_for.items() if header.architecture in names)}
    return [tensor for tensor in header.tensors if tensor.type not in readable]


def _family(kind: str, lists: dict[str, Any]) -> str:
    for prefix in ("IQ", "TQ"):
        if kind.startswith(prefix):
            return f"{prefix}* type"
    only_for = lists["tensor_types_for"].get(kind)
    return f"{kind} outside {', '.join(only_for)}" if only_for else f"{kind}"


def _list_age(lists: dict[str, Any], version: str | None, asked: tuple[int, ...] | None) -> str:
    """How the lists' version relates to the asked one, as the end of a sentence."""
    read_at = lists["read_at"]
    if asked is None:
        told = f"version {version!r} cannot be read as a number" if version else "the installed version is not known"
        return f" (list read at {read_at}; {told})"
    if asked > _must_parse(read_at):
        return f" (list read at {read_at}; {version} is newer and may differ)"
    return f" ({read_at} source list)"


def _mistral_rs_warnings(header: Header) -> list[str]:
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


def _first_of(header: Header, wanted: Callable[[Tensor], bool]) -> Tensor | None:
    return next((tensor for tensor in header.tensors if wanted(tensor)), None)


def parse_version(version: str | None) -> tuple[int, ...] | None:
    """`(0, 9, 5)` for "0.9.5", "v0.9.5" or "mistralrs 0.9.5"; None when there is no such number in it."""
    match = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", version or "")
    return tuple(int(part or 0) for part in match.groups()) if match else None


def _must_parse(version: str) -> tuple[int, ...]:
    parsed = parse_version(version)
    if parsed is None:
        raise BadInput(f"{LISTS.name}: {version!r} is not a version")
    return parsed


_ANSWERS = MappingProxyType({"llama.cpp": _llama_cpp, "mistral.rs": _mistral_rs})
