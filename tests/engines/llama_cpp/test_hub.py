"""`-hf` answered from what was downloaded before: folders, quants and projectors as llama-server chooses them."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.errors import BadInput
from engines.llama_cpp.commands import read_argv
from engines.llama_cpp.hub import downloaded

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "unsloth/gemma-GGUF"
PARTS = "Q8_0/a-Q8_0-0000"
FOLDERS = {
    "LLAMA_CACHE": "",
    "HF_HUB_CACHE": "",
    "HUGGINGFACE_HUB_CACHE": "",
    "HF_HOME": "hub",
    "XDG_CACHE_HOME": "huggingface/hub",
    "HOME": ".cache/huggingface/hub",
}


def cache(root: Path, *files: str, reference: str = "main") -> Path:
    """A hub's cache below `root` that holds the repository with `files`; the folder of its commit."""
    repository = root / "models--unsloth--gemma-GGUF"
    snapshot = repository / "snapshots" / COMMIT
    for name in files:
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(b"GGUF")
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / reference).write_text(COMMIT)
    return snapshot


@pytest.mark.parametrize("variable", FOLDERS)
def test_the_first_folder_that_is_named_counts(tmp_path: Path, variable: str) -> None:
    """As in get_cache_directory: the order of the variables, with their places inside."""
    names = list(FOLDERS)
    environ = {name: str(tmp_path / name) for name in names[names.index(variable) :]}
    snapshot = cache(tmp_path / variable / FOLDERS[variable], "gemma-Q4_K_M.gguf")
    assert downloaded(REPOSITORY, None, environ).model == snapshot / "gemma-Q4_K_M.gguf"


@pytest.mark.parametrize(
    ("files", "name", "chosen"),
    [
        (["a-Q8_0.gguf", "b-Q4_K_M.gguf"], REPOSITORY, "b-Q4_K_M.gguf"),
        (["a-BF16.gguf", "b-Q8_0.gguf"], REPOSITORY, "b-Q8_0.gguf"),
        (["a-BF16.gguf", "b-IQ2_M.gguf"], REPOSITORY, "a-BF16.gguf"),
        (["a-BF16.gguf", "a-UD-Q6_K_XL.gguf"], f"{REPOSITORY}:ud-q6_k_xl", "a-UD-Q6_K_XL.gguf"),
        (["a-Q4_K_M.gguf"], f"{REPOSITORY}:Q5_K_M", None),
        ([f"{PARTS}2-of-00002.gguf", f"{PARTS}1-of-00002.gguf"], f"{REPOSITORY}:Q8_0", f"{PARTS}1-of-00002.gguf"),
        (["mmproj-Q4_K_M.gguf", "imatrix-Q4_K_M.gguf", "a-Q4_K_M.gguf"], REPOSITORY, "a-Q4_K_M.gguf"),
        (["mtp-a-Q4_K_M.gguf"], REPOSITORY, None),
        ([], REPOSITORY, None),
    ],
)  # fmt: skip
def test_the_quant_is_the_one_that_llama_server_takes(
    tmp_path: Path, files: list[str], name: str, chosen: str | None
) -> None:
    snapshot = cache(tmp_path, *files)
    found = downloaded(name, None, {"HF_HUB_CACHE": str(tmp_path)})
    assert found.model == (snapshot / chosen if chosen else None)
    assert found.folder == tmp_path / "models--unsloth--gemma-GGUF"


def test_a_named_file_wins_over_the_quant(tmp_path: Path) -> None:
    snapshot = cache(tmp_path, "a-Q4_K_M.gguf", "sub/b-F16.gguf")
    found = downloaded(f"{REPOSITORY}:Q4_K_M", "sub/B-f16.gguf", {"HF_HUB_CACHE": str(tmp_path)})
    assert found.model == snapshot / "sub/b-F16.gguf"


def test_another_reference_counts_where_main_is_missing(tmp_path: Path) -> None:
    snapshot = cache(tmp_path, "a-Q8_0.gguf", reference="v2")
    assert downloaded(REPOSITORY, None, {"HF_HUB_CACHE": str(tmp_path)}).model == snapshot / "a-Q8_0.gguf"


def test_downloads_of_older_builds_lie_flat(tmp_path: Path) -> None:
    file = tmp_path / ".cache/llama.cpp/unsloth_gemma-GGUF_gemma-Q4_K_M.gguf"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"GGUF")
    assert downloaded(REPOSITORY, None, {"HOME": str(tmp_path)}).model == file


@pytest.mark.parametrize(
    ("flags", "projector"),
    [("", True), ("--no-mmproj", False), ("--no-mmproj-auto", False), ("--mmproj own.gguf", False)],
)
def test_the_projector_comes_with_the_model(tmp_path: Path, flags: str, projector: bool) -> None:
    """The one with the closest number of bits, unless the command says otherwise."""
    snapshot = cache(tmp_path, "a-Q8_0.gguf", "mmproj-F32.gguf", "mmproj-F16.gguf", "other/mmproj-Q8_0.gguf")
    command = read_argv(
        ["llama-server", "-hf", REPOSITORY, *flags.split()], environ={"HF_HUB_CACHE": str(tmp_path)}, cwd=Path("/w")
    )
    assert command.gguf == snapshot / "a-Q8_0.gguf"
    added = ("--mmproj", str(snapshot / "mmproj-F16.gguf"))
    assert (added == command.own.args[-2:]) is projector
    assert command.notes == []


def test_what_is_not_here_says_where_it_would_lie(tmp_path: Path) -> None:
    command = read_argv(["llama-server", "-hf", f"{REPOSITORY}:Q8_0"], environ={"HF_HUB_CACHE": str(tmp_path)})
    where = tmp_path / "models--unsloth--gemma-GGUF"
    line = f"-hf {REPOSITORY}:Q8_0: not on this machine (it would lie in {where}); name the file with --model"
    assert (command.gguf, command.notes) == (None, [line])


def test_a_preset_is_no_model(tmp_path: Path) -> None:
    cache(tmp_path, "preset.ini", "a-Q8_0.gguf")
    with pytest.raises(BadInput, match="a preset of several models"):
        read_argv(["llama-server", "-hf", REPOSITORY], environ={"HF_HUB_CACHE": str(tmp_path)})
