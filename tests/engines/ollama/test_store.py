"""Our store of models for Ollama: one link for each file, a copy only where there is room, manifests by parameters."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest

from engines.errors import BadInput
from engines.ollama.host import Store, main, store_key

CONTENT = b"GGUF and so on"
DIGEST = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    path.write_bytes(CONTENT)
    return path


def no_links(*_: object) -> NoReturn:
    raise OSError(18, "Invalid cross-device link")


def test_a_blob_is_the_file_itself(model: Path, tmp_path: Path) -> None:
    """No second copy of many GB; a name that is a link leads to the same blob."""
    (tmp_path / "other.gguf").symlink_to(model)
    store = Store(tmp_path / "store")
    assert store.blob(model) == store.blob(tmp_path / "other.gguf") == DIGEST
    (blob,) = (tmp_path / "store" / "blobs").iterdir()
    assert blob.name == DIGEST.replace(":", "-")
    assert os.path.samefile(blob, model)


def test_a_file_that_has_changed_is_another_blob(model: Path, tmp_path: Path) -> None:
    """Its digest is remembered for as long as it stays as it is."""
    store = Store(tmp_path / "store")
    store.blob(model)
    model.unlink()
    model.write_bytes(b"GGUF, another one")
    assert store.blob(model) == f"sha256:{hashlib.sha256(b'GGUF, another one').hexdigest()}"


def test_on_another_file_system_it_is_copied_where_there_is_room(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is written where there is none."""
    monkeypatch.setattr(os, "link", no_links)
    whole = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: whole._replace(free=1024))
        with pytest.raises(BadInput, match=r"blobs: .* free, and a copy of m\.gguf takes .*SWITCHYARD_HOME"):
            Store(tmp_path / "store").blob(model)
    assert list((tmp_path / "store" / "blobs").iterdir()) == []
    assert Store(tmp_path / "store").blob(model) == DIGEST
    (blob,) = (tmp_path / "store" / "blobs").iterdir()
    assert blob.read_bytes() == CONTENT
    assert not os.path.samefile(blob, model)


@pytest.mark.parametrize("change", [{"model_id": "n"}, {"files": {"m.gguf": "sha256:b"}}, {"parameters": {"seed": 1}}])
def test_another_import_has_manifests_of_its_own(change: dict[str, Any], tmp_path: Path) -> None:
    """Two engines with other settings never change each other's model; blobs are shared."""
    program = tmp_path / "ollama"
    program.write_text("")
    given: dict[str, Any] = {"program": str(program), "model_id": "m", "files": {"m.gguf": "sha256:a"}}
    given["parameters"] = {}
    assert store_key(**given) == store_key(**given)
    assert store_key(**given) != store_key(**{**given, **change})
    store = Store(tmp_path / "store")
    assert (store.models("a") / "blobs").resolve() == (store.models("b") / "blobs").resolve()


def test_what_cannot_be_imported_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No traceback in the log of an engine."""
    words = ["--program", "/bin/false", "--model-id", "m", "--port", "1", "--store", str(tmp_path / "store")]
    assert main([*words, "--gguf", str(tmp_path / "absent.gguf")]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "absent.gguf" in line
