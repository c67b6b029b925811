"""A user's store of Ollama is read, never written; what cannot be read is one line and hides nothing else."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from ollama_store import LAYER, OllamaStore

from engines.errors import BadInput
from engines.ollama.library import differences, read_store, settings_of, stores

GGUF = b"GGUF\x03\x00\x00\x00"


@pytest.fixture
def store(tmp_path: Path) -> OllamaStore:
    return OllamaStore(tmp_path / "models")


def test_models_have_the_names_of_ollama_list(store: OllamaStore) -> None:
    """And the file, the template and the parameters of each."""
    params = {"num_ctx": 8192, "stop": ["<|im_end|>"]}
    digest = store.add("library/smollm2/135m", GGUF, params=params, template="{{ .P }}")
    store.add("someone/qwen3/latest", GGUF + b"2", system="Be brief.", adapter="a")
    models, problems = read_store(store.folder)
    assert problems == []
    assert [model.name for model in models] == ["smollm2:135m", "someone/qwen3:latest"]
    assert models[0].gguf == store.path(digest)
    assert settings_of(models[0]) == {"context_tokens": 8192}
    assert [line.partition(":")[0] for line in differences(models[0])] == ["template", 'parameter stop ["<|im_end|>"]']
    assert [line.partition(":")[0] for line in differences(models[1])] == ["system", "adapter"]


@pytest.mark.parametrize(
    ("digest", "said"),
    [
        ("sha256:" + "0" * 64, "blob .* is missing; pull the model anew"),
        ("sha256:" + "0" * 63, "is not sha256- and 64 hex digits"),
        ("sha256-../../../etc/passwd", "is not sha256- and 64 hex digits"),
        ("md5:" + "0" * 32, "is not sha256- and 64 hex digits"),
        ("", "is not sha256- and 64 hex digits"),
    ],
)
def test_a_model_whose_file_is_not_there_is_one_line(store: OllamaStore, digest: str, said: str) -> None:
    """No path is made of a digest that is none; the others are read all the same."""
    store.manifest("library/bad/latest", {"layers": [{"mediaType": f"{LAYER}model", "digest": digest}]})
    store.add("library/good/latest", GGUF)
    models, problems = read_store(store.folder)
    assert [model.name for model in models] == ["good:latest"]
    (line,) = problems
    assert line.startswith("bad:latest: ")
    assert re.search(said, line)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("not json", "is not JSON"),
        ("[]", "is not a JSON object"),
        ({"layers": "none"}, "lists no layers"),
        ({"layers": []}, "no model file on this machine"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_manifest_that_is_none_is_one_line(store: OllamaStore, content: object, said: str) -> None:
    """With the way out of it."""
    store.manifest("library/bad/latest", content)
    models, problems = read_store(store.folder)
    assert models == []
    assert len(problems) == 1
    assert said in problems[0]


def test_a_blob_that_is_no_gguf_and_a_stray_file_are_named(store: OllamaStore) -> None:
    """Safetensors in a layer for models, or a download that was broken off."""
    store.add("library/bad/latest", b"<html>")
    store.manifest("stray", "{}")
    models, problems = read_store(store.folder)
    assert models == []
    assert "is no GGUF file" in problems[1]
    assert "no manifest of a model" in problems[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user whom the kernel keeps out of a folder: not root")
def test_what_may_not_be_read_is_one_line(store: OllamaStore) -> None:
    """As the store of the system service often is."""
    path = store.path(store.add("library/closed/latest", GGUF))
    path.chmod(0)
    assert "run as a user who may read it" in read_store(store.folder)[1][0]
    path.parent.chmod(0)
    assert "run as a user who may read it" in read_store(store.folder)[1][0]
    path.parent.chmod(0o700)
    (store.folder / "manifests").chmod(0)
    assert "run as a user who may read it" in read_store(store.folder)[1][0]
    (store.folder / "manifests").chmod(0o700)


def test_files_that_could_block_and_names_that_are_none_hide_nothing(store: OllamaStore) -> None:
    """A pipe, a name that is not UTF-8, a file of the desktop's."""
    place = store.path(store.add("library/good/latest", GGUF)).parents[1] / "manifests/registry.ollama.ai/library/good"
    os.mkfifo(place / "pipe")
    for name in (b"\xff", b".DS_Store", b"a b"):
        Path(os.fsdecode(os.fsencode(place) + b"/" + name)).write_text("{}")
    models, problems = read_store(store.folder)
    assert [model.name for model in models] == ["good:latest"]
    assert sum("no manifest of a model" in line for line in problems) == 3
    assert sum("good:pipe: " in line and "is no regular file" in line for line in problems) == 1
    assert "".join(problems).encode()


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 10**30, True, "8192", [1], None, -2])
def test_a_parameter_that_is_no_value_of_a_setting_is_named(store: OllamaStore, value: object) -> None:
    """And left out of the plan; 0 and -1 leave it to Ollama, which is no difference."""
    store.add("library/m/latest", GGUF, params={"num_ctx": value, "num_thread": 0, "num_gpu": -1})
    (model,) = read_store(store.folder)[0]
    assert settings_of(model) == {}
    (line,) = differences(model)
    assert line.startswith("parameter num_ctx ")
    assert line.endswith("no value of `context_tokens`, and left out")


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    """With the variable that names one."""
    with pytest.raises(BadInput, match=r"no store of Ollama .* set OLLAMA_MODELS"):
        read_store(tmp_path)


def test_a_store_that_is_named_is_the_only_one() -> None:
    """As Ollama itself has it; without a name the user's and the system service's are looked at."""
    assert stores({"OLLAMA_MODELS": "/data/models"}) == [Path("/data/models")]
    assert stores({"OLLAMA_MODELS": "~nobody-of-this-name/models"})[0].name == "models"
    assert stores({}, ()) == [Path("~/.ollama/models").expanduser(), Path("/usr/share/ollama/.ollama/models")]


def test_the_services_store_is_what_its_drop_ins_say(tmp_path: Path) -> None:
    """As `systemctl edit ollama` writes them: the last one wins, one of the same name in /etc hides another."""
    etc, lib = tmp_path / "etc", tmp_path / "lib"
    written = {
        lib / "ollama.service": 'Environment="OLLAMA_MODELS=/of/the/unit"\nExecStart=/usr/bin/ollama serve\n',
        lib / "ollama.service.d" / "10-disk.conf": "Environment=OLLAMA_MODELS=/hidden\n",
        lib / "ollama.service.d" / "20-last.conf": "Environment=OLLAMA_HOST=0.0.0.0 'OLLAMA_MODELS=/big disk/models'\n",
        etc / "ollama.service.d" / "10-disk.conf": "Environment=OLLAMA_MODELS=/early\n",
        etc / "ollama.service.d" / "30-closed.conf": "",
    }
    for path, text in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"[Service]\n{text}")
    assert stores({}, (etc, lib))[1] == Path("/big disk/models")
    (lib / "ollama.service.d" / "20-last.conf").unlink()
    assert stores({}, (etc, lib))[1] == Path("/early")
    (etc / "ollama.service.d" / "10-disk.conf").unlink()
    (lib / "ollama.service.d" / "10-disk.conf").unlink()
    assert stores({}, (etc, lib))[1] == Path("/of/the/unit")
