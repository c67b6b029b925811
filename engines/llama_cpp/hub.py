"""Where `-hf USER/REPO[:QUANT]` lies on this machine: files that llama-server once downloaded, found without a network.

Cache folders, the choice of a quant and of a projector as in llama.cpp `common/hf-cache.cpp` and `common/download.cpp`;
before those, downloads lay flat in `~/.cache/llama.cpp`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDERS = (
    ("LLAMA_CACHE", ""),
    ("HF_HUB_CACHE", ""),
    ("HUGGINGFACE_HUB_CACHE", ""),
    ("HF_HOME", "hub"),
    ("XDG_CACHE_HOME", "huggingface/hub"),
    ("HOME", ".cache/huggingface/hub"),
)
FLAT_FOLDERS = (("LLAMA_CACHE", ""), ("XDG_CACHE_HOME", "llama.cpp"), ("HOME", ".cache/llama.cpp"))
QUANTS = ("Q4_K_M", "Q8_0")  # without a quant in the name, in this order; else the first file
NO_MODEL = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
PART = re.compile(r"-(\d{5})-of-\d{5}\.gguf$")


@dataclass(frozen=True)
class Downloaded:
    """What of a repository is here. `folder` is where it would lie; `preset` that it is a preset and no model."""

    folder: Path
    model: Path | None = None
    projector: Path | None = None
    preset: bool = False


def downloaded(
    name: str, file: str | None, environ: Mapping[str, str], outside: Callable[[str], str] = str
) -> Downloaded:
    """The model that `-hf name` (and `-hff file`) loads, and the projector that comes with it.

    `outside` is where a folder of a container's `environ` lies on this machine.
    """
    repository, _, quant = name.partition(":")
    folder = Path(outside(str(_first(FOLDERS, environ)))) / f"models--{repository.replace('/', '--')}"
    flat = Path(outside(str(_first(FLAT_FOLDERS, environ)))).glob(f"{repository.replace('/', '_')}_*.gguf")
    files = _snapshot(folder) or sorted(flat)
    if any(path.name == "preset.ini" for path in files):
        return Downloaded(folder, preset=True)
    model = _model(files, quant, file)
    return Downloaded(folder, model, _projector(files, model) if model else None)


def _first(folders: tuple[tuple[str, str], ...], environ: Mapping[str, str]) -> Path:
    given = (Path(environ[variable]) / inside for variable, inside in folders if environ.get(variable))
    return next(given, Path.home() / folders[-1][1])


def _snapshot(folder: Path) -> list[Path]:
    """The files of the commit that `main` names, else of another reference."""
    references = sorted((folder / "refs").glob("*"), key=lambda path: (path.name != "main", path.name))
    for reference in references:
        snapshot = folder / "snapshots" / reference.read_text(encoding="utf-8").strip()
        if snapshot.is_dir():
            return sorted(path for path in snapshot.rglob("*") if path.is_file())
    return []


def _model(files: list[Path], quant: str, file: str | None) -> Path | None:
    if file:
        return next((path for path in files if str(path).lower().endswith(f"/{file}".lower())), None)
    models = [path for path in files if path.suffix == ".gguf" and not any(part in path.name for part in NO_MODEL)]
    models = [path for path in models if (part := PART.search(path.name)) is None or int(part[1]) == 1]
    for wanted in (quant,) if quant else QUANTS:
        pattern = re.compile(f"{re.escape(wanted)}[.-]", re.IGNORECASE)
        if found := next((path for path in models if pattern.search(str(path))), None):
            return found
    return None if quant or not models else models[0]


def _projector(files: list[Path], model: Path) -> Path | None:
    """The projector nearest to the model: deepest common folder, then the number of bits closest to the model's."""
    found = [
        path for path in files if path.suffix == ".gguf" and "mmproj" in str(path) and model.is_relative_to(path.parent)
    ]
    return min(found, key=lambda path: (-len(path.parts), abs(_bits(path) - _bits(model))), default=None)


def _bits(path: Path) -> int:
    """4 for Q4_K_M, 16 for F16: the first number of the quant in the file's name."""
    number = re.search(r"\d+", PART.sub("", path.name).removesuffix(".gguf").rpartition("-")[2])
    return int(number[0]) if number else 0
