"""`switchyard preflight`: folders, the exit code, and `--load`, which asks the engines themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from gguf_files import LLAMA, changed_copy, write_gguf
from installed import BOTH, smollm2
from played import plan_of, played
from switchyard_command import json_of
from taken_ports import first_ports_taken
from typer.testing import CliRunner

from engines.model.free_memory import FreeMemory
from engines.settings import Settings
from flows.cli.app import app
from flows.evaluation import load as loads
from migrations.plan import EngineChoice
from tasks.evidence import preflight as headers


def answers(done: subprocess.CompletedProcess[str]) -> dict[tuple[str, str], str]:
    return {(m["model"], e["engine"]): e["loads"] for m in json_of(done)["models"] for e in m["engines"]}


def test_a_folder_is_examined_and_what_is_no_model_is_named(switchyard, tmp_path):
    """The rest goes on, and the models alone decide the exit code."""
    folder = tmp_path / "models"
    folder.mkdir()
    good = write_gguf(folder / "good.gguf")
    (folder / "cut.gguf").write_bytes(good.read_bytes()[:100])
    (folder / "README.md").write_text("my models\n")
    (folder / "empty.gguf").touch()
    done = switchyard("preflight", folder, "--json")
    report = json_of(done)
    assert [model["model"] for model in report["models"]] == ["good"]
    assert [Path(other["path"]).name for other in report["not_models"]] == ["README.md", "cut.gguf", "empty.gguf"]
    assert done.returncode == switchyard("preflight", good).returncode


def test_an_engine_that_is_half_installed_stops_no_preflight(switchyard, environment, tmp_path):
    """Nobody named it: it was found where engines lie, and is not what its folder is called."""
    python = tmp_path / "switchyard" / "engines" / "vllm-0.32.0" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    environment["XDG_DATA_HOME"] = str(tmp_path)
    done = switchyard("preflight", write_gguf(tmp_path / "good.gguf"), "--json")
    assert ("good", "vllm") in answers(done), done.stderr


def test_an_overflow_that_does_not_fit_beside_is_said_and_exit_3(switchyard, tmp_path):
    plan = plan_of(tmp_path, "both-fine")
    plan.write_text(plan.read_text() + '[models.overflow]\nengine = "mistral.rs"\nwaiting = 1\n')
    assert switchyard("preflight", plan).returncode == 0
    done = switchyard("preflight", plan, "--context", 10**13)
    assert done.returncode == 3
    assert "overflow: mistral.rs does not fit beside it: RAM:" in " ".join(done.stdout.split())


def test_fit_finds_the_largest_context_that_preflight_calls_fitting(switchyard, tmp_path):
    """Of the plan's engines, as its settings ask for them; the table has the same rows."""
    plan = plan_of(tmp_path, "both-fine")
    done = switchyard("preflight", plan, "--fit", "--json")
    assert done.returncode == 0, done.stderr
    engines = json_of(done)["models"][0]["engines"]
    (first, *_) = engines[0]["largest"]
    assert (first["fits_tokens"], first["trained_tokens"], first["kv_types"]) == (4096, 4096, ["f16", "f16"])
    shown = switchyard("preflight", plan, "--context", first["fits_tokens"], "--json")
    assert json_of(shown)["models"][0]["engines"][0]["fit"]["verdict"] == "fits"
    table = switchyard("preflight", plan, "--fit").stdout
    rows = [line.split() for line in table.split("largest context in")[1].splitlines()[2:]]
    assert len(rows) == sum(len(entry["largest"]) for entry in engines)
    assert rows[0][:5] == ["llama.cpp", "1", "f16", "4,096*", "4,096*"]


@pytest.mark.parametrize("more", [("--context", "4096"), ("--load",)])
def test_fit_beside_what_contradicts_it_is_one_line_and_exit_2(switchyard, tmp_path, more):
    done = switchyard("preflight", write_gguf(tmp_path / "m.gguf"), "--fit", *more)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert f"{more[0]} cannot be combined" in done.stderr


def test_a_model_that_fits_with_no_context_is_exit_3(monkeypatch, tmp_path):
    """The candidate's own answer; without `--fit` memory alone closes nothing."""
    monkeypatch.setattr(headers, "free_memory", lambda: FreeMemory(ram_bytes=1 << 20))
    gguf = write_gguf(tmp_path / "m.gguf")
    for fit, code in ((["--fit"], 3), ([], 0)):
        assert CliRunner().invoke(app, ["preflight", str(gguf), *fit]).exit_code == code


def test_a_folder_without_a_model_is_one_line_and_exit_2(switchyard, tmp_path):
    (tmp_path / "notes.txt").write_text("no model\n")
    done = switchyard("preflight", tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert str(tmp_path) in done.stderr


@pytest.mark.parametrize(("model", "code"), [("candidate-refuses", 3), ("incumbent-refuses", 0), ("both-fine", 0)])
def test_a_real_load_decides_by_the_candidate(switchyard, tmp_path, home, model, code):
    """Whatever the header says; the engine's own words are the reason, and nothing stays behind."""
    done = switchyard("preflight", plan_of(tmp_path, model), "--load", "--json")
    assert done.returncode == code, done.stderr
    for entry in json_of(done)["models"][0]["engines"]:
        arm = {"llama.cpp": "incumbent", "mistral.rs": "candidate"}[entry["engine"]]
        assert entry["loads"] == ("no" if model == f"{arm}-refuses" else "yes")
        assert ("the played engine does not know this model" in entry["why"]) is (entry["loads"] == "no")
        assert entry["header"]["why"]
    assert list((home / "processes").glob("*.json")) == []


def test_a_load_waits_for_no_other_experiment(switchyard, tmp_path, home):
    """It would disturb what is measured."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom flows.experiment_lock import alone\n"
        "with alone(Path(sys.argv[1]), 'an evaluation'): print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    done = switchyard("preflight", plan_of(tmp_path, "both-fine"), "--load")
    other.communicate("")
    assert done.returncode == 2
    assert "an evaluation" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("header", ["yes", "no"])
def test_what_does_not_fit_is_not_loaded(tmp_path, monkeypatch, header):
    """No engine is started beside what runs; what the header refuses stays refused."""
    monkeypatch.setattr(loads, "free_beside", lambda *_: FreeMemory(ram_bytes=1 << 20))
    monkeypatch.setattr(loads.EngineUnderTest, "up", lambda _: pytest.fail("it was started"))
    gguf = write_gguf(tmp_path / "m.gguf")
    engine = EngineChoice(engine="llama.cpp", binary=played(tmp_path, "llama-server"))
    report = {"models": [{"model": "m", "engines": [{"engine": "llama.cpp", "loads": header, "why": "by its list"}]}]}
    asked = [loads.Load("m", gguf, engine, Settings(context_tokens=512))]
    (entry,) = loads.judged_by_load(report, asked, tmp_path)["models"][0]["engines"]
    assert entry["loads"] == ("no" if header == "no" else "unknown")
    assert "does not fit beside what runs" in entry["why"]
    assert entry["header"] == {"loads": header, "why": "by its list"}


@pytest.mark.parametrize(("taken", "answer"), [(1, "yes"), (2, "yes"), (3, "unknown")])
def test_a_port_that_another_process_takes_is_no_word_on_the_model(tmp_path, monkeypatch, taken, answer):
    gguf = write_gguf(tmp_path / "m.gguf", keys=LLAMA)
    engine = EngineChoice(engine="llama.cpp", binary=played(tmp_path, "llama-server"))
    load = loads.Load("m", gguf, engine, Settings(context_tokens=512))
    with first_ports_taken(monkeypatch, taken):
        assert loads._tried(load, tmp_path)[0] == answer


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        (
            ["E llama_model_load: error loading model: tensor 'a' not found", "failed to load model"],
            "tensor 'a' not found",
        ),
        (["error: cannot load /m/x.gguf: BPE tokenizer must include merges"], "BPE tokenizer must include merges"),
        (["loading", "thread panicked at src/x.rs:4"], "panicked at src/x.rs:4"),
        (["loading", ""], "it ended"),
    ],
)
def test_the_cause_is_the_engines_own_line(lines, cause):
    error = loads.EngineExited("it ended\nand more", returncode=1, log_tail=tuple(lines))
    assert loads._cause(error) == cause


@pytest.mark.engine
def test_real_engines_decide_where_the_header_does_not_know(switchyard, tmp_path):
    """A pre-tokenizer that llama.cpp has and mistral.rs has not; a tensor that is missing."""
    source = smollm2(*BOTH)
    odd = changed_copy(source, tmp_path / "odd.gguf", values={"tokenizer.ggml.pre": "refact"})
    cut = changed_copy(source, tmp_path / "cut.gguf", without_tensor="blk.5.ffn_up.weight")
    done = switchyard("preflight", odd, cut, "--load", "--json")
    assert done.returncode == 3
    expected = {
        ("odd", "llama.cpp"): "yes",
        ("odd", "mistral.rs"): "no",
        ("cut", "llama.cpp"): "no",
        ("cut", "mistral.rs"): "no",
    }
    assert answers(done).items() >= expected.items()  # an engine that only this machine has answers as well
    assert "blk.5.ffn_up.weight" in done.stdout
