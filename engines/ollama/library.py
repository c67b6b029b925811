"""The models of a user's Ollama: manifests and blobs of its store, which is only read.

A manifest `manifests/HOST/NAMESPACE/MODEL/TAG` lists layers by digest; the layer of a model is a GGUF file. Layout as
in `types/model/name.go` and `manifest/` of 0.32.15.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.errors import BadInput
from engines.llama_cpp.units import read_unit
from engines.units import number_of

SERVICE_STORE = Path("/usr/share/ollama/.ollama/models")  # of the system service that its installer makes
SERVICE = "ollama.service"
UNIT_FOLDERS = tuple(map(Path, ("/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system")))
DEFAULT_HOST, DEFAULT_NAMESPACE = "registry.ollama.ai", "library"
LAYER = "application/vnd.ollama.image."
DIGEST = re.compile(r"sha256-[0-9a-f]{64}")
MAGIC = b"GGUF"
PLACE = re.compile(r"\w[\w.:-]*(/\w[\w.-]*){3}", re.ASCII)  # HOST/NAMESPACE/MODEL/TAG, in Ollama's characters
LARGEST_TEXT = 4 * 1024 * 1024  # of a manifest, a template, parameters


class Unreadable(Exception):
    """A model that cannot be read, in one line."""


@dataclass(frozen=True)
class StoredModel:
    """One model as `ollama list` names it; `apart` are layers that only Ollama puts on top of its file."""

    name: str
    gguf: Path
    size: int
    template: str = ""
    system: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    apart: tuple[str, ...] = ()


def stores(env: Mapping[str, str], folders: Sequence[Path] = UNIT_FOLDERS) -> list[Path]:
    """Where a user's models can lie: what OLLAMA_MODELS names and nothing else, or the home's and the service's.

    That of the system service is what its unit or a drop-in in `folders` sets.
    """
    if named := env.get("OLLAMA_MODELS", "").strip().strip("\"'"):
        return [Path(os.path.expanduser(named)).absolute()]  # a ~user who is not there raises in pathlib
    set_there = read_unit(_unit_text(folders), None).env.get("OLLAMA_MODELS", "").strip()
    service = Path(set_there).absolute() if set_there else SERVICE_STORE
    return [Path(os.path.expanduser("~/.ollama/models")), service]


def _unit_text(folders: Sequence[Path]) -> str:
    """The service's unit with its drop-ins behind it, as systemd reads them; '' where there is none."""
    unit = next((path for folder in folders if (path := folder / SERVICE).is_file()), None)
    behind = {path.name: path for folder in reversed(folders) for path in (folder / f"{SERVICE}.d").glob("*.conf")}
    texts = list[str]()
    for path in [*([unit] if unit else []), *(behind[name] for name in sorted(behind))]:
        with contextlib.suppress(OSError):
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
    return "\n".join(texts)


def read_store(folder: Path) -> tuple[list[StoredModel], list[str]]:
    """The models of the store in `folder`, and a line for each that cannot be read. BadInput where it is no store."""
    manifests, closed = folder / "manifests", list[OSError]()
    walk = sorted(os.walk(manifests, onerror=closed.append))
    found = [Path(where, name) for where, _, names in walk for name in sorted(names)]
    for error in closed:
        if isinstance(error, FileNotFoundError):
            raise BadInput(f"{folder}: no store of Ollama (it has no manifests/); set OLLAMA_MODELS to one")
    models, problems = list[StoredModel](), [f"{error.filename}: {_closed(error)}" for error in closed]
    for path in found:
        if PLACE.fullmatch(path.relative_to(manifests).as_posix()) is None:
            shown = os.fsencode(path).decode(errors="backslashreplace")
            problems.append(f"{shown}: no manifest of a model (HOST/NAMESPACE/MODEL/TAG)")
            continue
        try:
            models.append(_model(folder, path))
        except Unreadable as problem:
            problems.append(f"{name_of(path)}: {problem}")
    return models, problems


def name_of(manifest: Path) -> str:
    """The model's name as clients send it: what is usual is left out, as `ollama list` does."""
    host, namespace, model, tag = manifest.parts[-4:]
    parts = [model] if (host, namespace) == (DEFAULT_HOST, DEFAULT_NAMESPACE) else [namespace, model]
    return "/".join([*([host] if host != DEFAULT_HOST else []), *parts]) + f":{tag}"


def _model(folder: Path, path: Path) -> StoredModel:
    manifest = _json(path, "manifest")
    layers = manifest.get("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise Unreadable(f"{path} lists no layers; pull the model anew")
    by_kind = [(str(layer.get("mediaType", "")).removeprefix(LAYER), layer) for layer in layers]
    files = [_blob(folder, layer) for kind, layer in by_kind if kind == "model"]
    if not files:
        raise Unreadable("it has no model file on this machine (a cloud model, or one of safetensors)")
    if len(files) > 1:
        raise Unreadable(f"its model is split over {number_of(len(files), 'file')}; merge them first")
    if _magic(files[0]) != MAGIC:
        raise Unreadable(f"{files[0]} is no GGUF file")
    texts = {kind: _blob(folder, layer) for kind, layer in by_kind if kind in ("template", "system", "params")}
    return StoredModel(
        name=name_of(path),
        gguf=files[0],
        size=_size(files[0]),
        template=_text(texts["template"]) if "template" in texts else "",
        system=_text(texts["system"]) if "system" in texts else "",
        parameters=_json(texts["params"], "parameters") if "params" in texts else {},
        apart=tuple(kind for kind, _ in by_kind if kind in ("adapter", "projector", "draft", "messages")),
    )


def _blob(folder: Path, layer: Mapping[str, Any]) -> Path:
    digest = str(layer.get("digest", "")).replace(":", "-", 1)
    if DIGEST.fullmatch(digest) is None:  # it becomes part of a path
        raise Unreadable(f"digest {digest[:80]!r} is not sha256- and 64 hex digits; pull the model anew")
    blob = folder / "blobs" / digest
    _size(blob)
    return blob


def _size(path: Path) -> int:
    """Bytes of a regular file; another one could block whoever opens it. Raises Unreadable."""
    try:
        state = path.stat()
    except FileNotFoundError:
        raise Unreadable(f"blob {path} is missing; pull the model anew") from None
    except OSError as error:
        raise Unreadable(f"{path} {_closed(error)}") from error
    if not stat.S_ISREG(state.st_mode):
        raise Unreadable(f"{path} is no regular file; pull the model anew")
    return state.st_size


def _magic(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC))
    except OSError as error:
        raise Unreadable(f"{path} {_closed(error)}") from error


def _text(path: Path) -> str:
    if (size := _size(path)) > LARGEST_TEXT:
        raise Unreadable(f"{path} is too large for a text: {size} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise Unreadable(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise Unreadable(f"{path} {_closed(error)}") from error


def _closed(error: OSError) -> str:
    return f"cannot be read ({error.strerror}); run as a user who may read it, or copy the store"


def _json(path: Path, what: str) -> dict[str, Any]:
    try:
        found = json.loads(_text(path))
    except (ValueError, RecursionError):
        raise Unreadable(f"{what} {path} is not JSON; pull the model anew") from None
    if not isinstance(found, dict):
        raise Unreadable(f"{what} {path} is not a JSON object; pull the model anew")
    return found


def differences(model: StoredModel) -> Iterator[str]:
    """What Ollama adds to the model's file and another engine does not, one line each."""
    if model.template:
        yield "template: its Go template is not converted; others use the Jinja template in the file"
    if model.system:
        yield "system: its SYSTEM text is not in the file; have clients send it"
    settings = settings_of(model)
    for name, value in sorted(model.parameters.items()):
        shown = f"parameter {name} {json.dumps(value)[:200]}"
        if name not in SETTINGS:
            yield f"{shown}: Ollama's default of requests; send it instead"
        elif SETTINGS[name] not in settings and value not in OWN_CHOICE:
            yield f"{shown}: no value of `{SETTINGS[name]}`, and left out"
    for kind in model.apart:
        yield f"{kind}: a layer of its own, which is not carried over"


# options of a model that are settings of a plan (api/types.go)
SETTINGS = {
    "num_ctx": "context_tokens",
    "num_thread": "threads",
    "num_batch": "batch_tokens",
    "num_gpu": "gpu_layers",
    "seed": "seed",
}
OWN_CHOICE = (0, -1)  # leaves it to Ollama
BEYOND = 2**31  # no setting is as large
DEFAULT_CONTEXT = 4096  # of Ollama on a CPU; up to 262,144 with much VRAM


def settings_of(model: StoredModel) -> dict[str, int]:
    """The model's parameters that are settings, where they hold a number that says something."""
    given = {ours: model.parameters.get(theirs) for theirs, ours in SETTINGS.items()}
    numbers = {name: n for name, n in given.items() if isinstance(n, int | float) and not isinstance(n, bool)}
    least = {"gpu_layers": 0, "seed": 0}
    return {name: int(n) for name, n in numbers.items() if least.get(name, 1) <= n < BEYOND}
