"""vLLM: its environment, its command, the directory it is given, and what is left when it ends."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
from gguf_files import LLAMA, write_gguf
from processes import runs
from waiting import until

from engines.driver import Installation
from engines.errors import BadInput, EngineNotFound
from engines.home import engines_folder
from engines.openai.call import parse
from engines.process.serving import free_port, serving
from engines.process.telemetry import process_tree
from engines.registry import driver
from engines.settings import EngineArgs, Serve, Settings
from engines.vllm.convert import convert
from migrations.pairs import pair_of
from migrations.plan import content_hash
from migrations.plan_file import load_plan, plan_to_toml
from tasks.evidence.faults import _cut_short

FOUND = Installation("vllm", "binary", ("/env/bin/python", "-m", "vllm.entrypoints.openai.api_server"), "0.32.0+cpu")


def python_that_says(path: Path, line: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{line}'\n")
    path.chmod(0o755)
    return path


def plan_file(folder: Path, sources: str, candidate: str = "") -> Path:
    python_that_says(folder / "python", "vllm 0.32.0+cpu")
    gguf, path = write_gguf(folder / "m.gguf", keys=LLAMA), folder / "plan.toml"
    path.write_text(
        f'[incumbent]\nengine = "llama.cpp"\n[candidate]\nengine = "vllm"\npython = "python"\n{candidate}'
        f'[[models]]\nid = "m"\ngguf = "{gguf}"\n{sources}'
    )
    return path


def hf_directory(folder: Path, content: str = "weights") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(content * 1000)
    return folder


def test_its_environment_is_named_or_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest of those got once for this user; another program says so."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert engines_folder() == tmp_path / "switchyard" / "engines"
    with pytest.raises(EngineNotFound, match="set `python` in the plan"):
        driver("vllm").find()
    for version in ("0.31.0", "0.32.0"):
        python_that_says(engines_folder() / f"vllm-{version}" / "bin" / "python", f"vllm {version}+cpu")
    assert driver("vllm").find().version == "0.32.0+cpu"
    with pytest.raises(BadInput, match="is not the Python of an environment with vLLM"):
        driver("vllm").find(binary=Path(sys.executable))


def test_its_command_and_its_environment() -> None:
    """One sequence's context, a key that no argv shows, and nothing of the shell's own variables."""
    settings = Settings.model_validate({"context_tokens": 4096, "parallel": 2, "threads": 3, "api_key": "sesame"})
    serve = Serve(model_id="m", gguf=Path("/hf/m"), port=8080, settings=settings)
    argv = " ".join(driver("vllm").argv(FOUND, serve))
    assert "--model /hf/m --served-model-name m --host 127.0.0.1 --port 8080" in argv
    assert "--max-model-len 2048 --max-num-seqs 2 --enforce-eager" in argv
    assert "sesame" not in argv
    env = driver("vllm").environment(FOUND, serve, {"PATH": "/bin", "VLLM_USE_V1": "0", "HF_ENDPOINT": "http://a"})
    assert env == {
        "PATH": "/bin",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "3",
        "VLLM_API_KEY": "sesame",
    }


def test_a_plan_without_its_tool_flags_is_told_so() -> None:
    """It answers 400 to any request with tools, which a client of llama.cpp sends without asking."""
    bare = Serve(model_id="m", gguf=Path("/hf/m"), port=8080)
    own = EngineArgs(args=("--enable-auto-tool-choice", "--tool-call-parser", "hermes"))
    told = [driver("vllm").unsupported(FOUND, one) for one in (bare, bare.model_copy(update={"own": own}))]
    assert [any(line.startswith("tools: ") for line in lines) for lines in told] == [True, False]


def test_its_tokens_are_its_progress() -> None:
    """As vllm-cpu 0.32.0 prints them."""
    printed = (
        b"# TYPE vllm:prompt_tokens_total counter\n"
        b'vllm:prompt_tokens_total{engine="0",model_name="smollm2"} 65.0\n'
        b'vllm:generation_tokens_total{engine="0",model_name="smollm2"} 25.0\n'
        b'vllm:prompt_tokens_by_source_total{engine="0",source="local_compute"} 65.0\n'
    )
    assert driver("vllm").progress(printed) == (65, 25)


def test_llama_cpps_words_are_vllms() -> None:
    asked = parse("/v1/chat/completions", b'{"model":"m","n_predict":5,"cache_prompt":false,"repeat_penalty":1.1}')
    sent = json.loads(driver("vllm").dialect(FOUND)(asked, "there").request())
    assert (sent["model"], sent["max_tokens"], sent["repetition_penalty"]) == ("there", 5, 1.1)
    assert not {"n_predict", "cache_prompt", "repeat_penalty"} & sent.keys()


@pytest.mark.parametrize(
    ("path", "asked", "limit"),
    [
        ("/v1/chat/completions", {"max_tokens": 9999}, 512),  # above the context vLLM answers 400
        ("/v1/chat/completions", {"n_predict": 9999}, 512),
        ("/v1/chat/completions", {"max_tokens": 400}, 400),  # what the prompt leaves vLLM clamps to itself
        ("/v1/chat/completions", {"max_tokens": -1}, "absent"),
        ("/v1/completions", {}, None),  # vLLM's own default is 16 tokens, llama.cpp's is no limit
        ("/v1/completions", {"max_tokens": -1}, None),
        ("/v1/completions", {"max_tokens": 7}, 7),
    ],
)
def test_an_answer_is_as_long_as_on_llama_cpp(path: str, asked: dict[str, int], limit: int | str | None) -> None:
    dialect = driver("vllm").dialect(FOUND)(parse(path, json.dumps(asked).encode()), "m", context_tokens=512)
    assert json.loads(dialect.request()).get("max_tokens", "absent") == limit


def test_a_plan_gives_it_a_directory(tmp_path: Path) -> None:
    """By content in the identity, and back from TOML as it was."""
    folder = hf_directory(tmp_path / "hf")
    path = plan_file(tmp_path, '[models.sources]\nvllm = "hf"\n')
    plan = load_plan(path)
    assert (plan.given("m", "vllm"), plan.given("m", "llama.cpp")) == (folder, tmp_path / "m.gguf")
    assert plan.candidate.find().program[0] == str(tmp_path / "python")
    assert pair_of(plan).risks[0].risk == "the directory holds other weights than the GGUF"
    again = tmp_path / "again.toml"
    again.write_text(plan_to_toml(plan))
    before = content_hash(plan)
    assert (load_plan(again), content_hash(load_plan(again))) == (plan, before)
    hf_directory(folder, "others!")
    assert content_hash(plan) != before


@pytest.mark.parametrize(
    ("sources", "candidate", "said"),
    [
        ("", "", "models.sources.vllm of m is missing: vllm is given a directory of float weights"),
        ('[models.sources]\nvllm = "nowhere"\n', "", "no directory of a model: it has no config.json"),
        ('[models.sources]\n"llama.cpp" = "hf"\nvllm = "hf"\n', "", "no engine that takes a directory"),
        ('[models.sources]\nvllm = "hf"\n', 'binary = "python"\n', "name its `python` instead"),
        ('[models.sources]\nvllm = "hf"\n', 'args = ["--api-key", "x"]\n', "the yard sets a key of its own"),
        ('[models.sources]\nvllm = "hf"\n', 'args = ["--trust-remote-code"]\n', "it runs code out of the model's"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, sources: str, candidate: str, said: str) -> None:
    hf_directory(tmp_path / "hf")
    with pytest.raises(BadInput) as refused:
        load_plan(plan_file(tmp_path, sources, candidate))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_python_is_for_engines_of_an_environment(tmp_path: Path) -> None:
    path = plan_file(tmp_path, "")
    path.write_text(path.read_text().replace('engine = "vllm"', 'engine = "mistral.rs"'))
    with pytest.raises(BadInput, match=r"python is for llama\.cpp and vllm; for mistral\.rs remove it"):
        load_plan(path)


def test_what_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    """Before anything starts, and nothing is left."""
    llama = write_gguf(tmp_path / "m.gguf", keys=LLAMA)
    other = write_gguf(tmp_path / "other.gguf", architecture="granite")
    with pytest.raises(BadInput, match="transformers reads no GGUF of architecture granite"):
        convert(FOUND, other, tmp_path / "hf", tmp_path)
    with pytest.raises(BadInput, match="is there already"):
        convert(FOUND, llama, tmp_path, tmp_path)
    assert not (tmp_path / "hf").exists()


def test_a_directory_is_cut_short_in_a_copy(tmp_path: Path) -> None:
    """The drill of a model file that ends early, for an engine of directories."""
    whole = hf_directory(tmp_path / "hf")
    (tmp_path / "drill").mkdir()
    cut = _cut_short(whole, tmp_path / "drill")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (whole, cut)]
    assert sizes == [7000, 4200]
    assert (cut / "config.json").read_text() == "{}"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Installation, Path]:
    """The vLLM that is here, and SmolLM2 as it converts it."""
    import installed

    try:
        found = driver("vllm").find()
    except EngineNotFound as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("converted")
    convert(found, installed.smollm2(), folder / "hf", folder)
    return found, folder / "hf"


@pytest.mark.engine
def test_a_tokenizer_that_is_converted_reads_digits_one_by_one(converted: tuple[Installation, Path]) -> None:
    """SmolLM2's splitting rule, which the GGUF names `smollm`, and of which transformers makes GPT-2's."""
    splits = json.loads((converted[1] / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"]
    assert [one["type"] for one in splits] == ["Digits", "ByteLevel"]
    assert splits[0]["individual_digits"]
    assert (splits[1]["add_prefix_space"], splits[1]["use_regex"]) == (False, True)


@pytest.mark.engine
def test_it_serves_what_was_converted_and_leaves_nothing(converted: tuple[Installation, Path], tmp_path: Path) -> None:
    """It gives a token, and no process of it outlives the death of its parent."""
    found, directory = converted
    serve = Serve(model_id="m", gguf=directory, port=free_port(), settings=Settings(context_tokens=512))
    with serving(driver("vllm"), found, serve, state_dir=tmp_path, log_path=tmp_path / "log", stall_s=300) as served:
        tree = [psutil.Process(pid) for pid in process_tree(served.process.pid)]
        assert len(tree) >= 3
        os.kill(served.process.pid, signal.SIGKILL)
        until(lambda: served.process.poll() is not None, "its end")
    assert [process for process in tree if runs(process)] == []
