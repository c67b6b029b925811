"""The command line: one clear line and the right exit code for everything a user can get wrong."""

import importlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from gguf_files import nemotron_keys, write_gguf
from switchyard_command import json_of
from typer.testing import CliRunner

from flows import cli
from flows.cli.app import COMMANDS, app, load_command

ROOT = Path(cli.__file__).parents[2]
TWELVE_FLAGS = (
    "--port 8080 --ctx-size 524288 --parallel 1 --n-gpu-layers 40 --threads 14 --batch-size 256 --ubatch-size 128 "
    "--flash-attn on --jinja --no-prefill-assistant --mlock --cache-reuse 256"
)


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path)
    return path


def plan_toml(tmp_path, gguf, **replaced):
    """A plan with one thing wrong: keys of `replaced` overwrite lines of the good one."""
    lines = {
        "name": 'name = "test"',
        "incumbent": '[incumbent]\nengine = "llama.cpp"',
        "candidate": '[candidate]\nengine = "mistral.rs"',
        "models": f'[[models]]\nid = "m"\ngguf = "{gguf}"',
        "limits": "",
    }
    path = tmp_path / "plan.toml"
    path.write_text("\n".join({**lines, **replaced}.values()) + "\n")
    return path


def assert_one_clear_line(done, exit_code, *words):
    assert done.returncode == exit_code, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("replaced", "words"),
    [
        ({"candidate": '[candidate]\nengine = "vulcan"'}, ("candidate.engine", "vulcan", "mistral.rs")),
        ({"limits": "[limits]\nttft_p50_ratio = 0.5"}, ("limits.ttft_p50_ratio", "0.5", "1.0")),
        ({"limits": "[limits]\nttft_p50_ration = 1.2"}, ("ttft_p50_ration", "ttft_p50_ratio")),
        ({"models": '[[models]]\nid = "m"\ngguf = "nowhere.gguf"'}, ("nowhere.gguf",)),
        ({"limits": "[limits"}, ("plan.toml",)),
        ({"limits": '[client]\nrequires = ["stop_strin"]'}, ("stop_strin", "stop_string")),
        ({"name": 'name = "x"\napi_key_env = "NO_SUCH_VARIABLE"'}, ("NO_SUCH_VARIABLE",)),
    ],
)
def test_a_bad_plan_is_one_line_and_exit_2(switchyard, tmp_path, home, gguf, replaced, words):
    done = switchyard("evaluate", plan_toml(tmp_path, gguf, **replaced))
    assert_one_clear_line(done, 2, *words)
    assert not (home / "switchyard.db").exists()


@pytest.mark.parametrize("command", [("evaluate",), ("serve",), ("migrate",), ("up",), ("preflight",), ("retire",)])
def test_two_engines_of_one_name_are_refused_by_every_command(switchyard, tmp_path, home, gguf, command):
    """Two builds without names of their own, say: the yard could not tell them apart."""
    plan = plan_toml(tmp_path, gguf, candidate='[candidate]\nengine = "llama.cpp"\nform = "hosted"')
    assert_one_clear_line(switchyard(*command, plan), 2, "llama.cpp", 'name = "llama.cpp@new"', "plan.toml")
    assert not (home / "switchyard.db").exists()


def test_a_truncated_model_is_refused_before_anything_starts(switchyard, tmp_path, home, gguf):
    whole = gguf.read_bytes()
    gguf.write_bytes(whole[: len(whole) * 2 // 3])
    assert_one_clear_line(switchyard("evaluate", plan_toml(tmp_path, gguf)), 2, "model.gguf")
    assert not (home / "switchyard.db").exists()


def test_an_engine_that_is_not_there_is_exit_5(switchyard, tmp_path, gguf):
    """The binary named in the plan exists and is no engine."""
    binary = tmp_path / "mistralrs"
    binary.write_text("#!/bin/sh\nexit 3\n")
    binary.chmod(0o755)
    plan = plan_toml(tmp_path, gguf, candidate=f'[candidate]\nengine = "mistral.rs"\nbinary = "{binary}"')
    assert_one_clear_line(switchyard("evaluate", plan), 5, "mistralrs", "--version")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("evaluate", "no-such-plan.toml"), ("no-such-plan.toml",)),
        (("evaluate",), ("demo",)),
        (("evaluate", "--resume", "latest"), ("no run",)),
        (("evaluate", "demo", "--soak", "soon"), ("--soak", "90s")),
        (("report",), ("no run",)),
        (("init",), ("--from-port",)),
        (("init", "--from-port", "1", "--from-command", "x"), ("exclude",)),
        (("init", "--from-command", "llama-server -m nowhere.gguf"), ("nowhere.gguf",)),
        (("init", "--from-port", "1"), ("port 1",)),
        (("preflight", "nowhere.gguf"), ("nowhere.gguf",)),
        (("install", "vulcan"), ("vulcan", "mistral.rs")),
    ],
)
def test_bad_input_is_one_line_and_exit_2(switchyard, arguments, words):
    assert_one_clear_line(switchyard(*arguments), 2, *words)


def test_version_and_short_help(switchyard):
    assert switchyard("--version").stdout.startswith("switchyard 0.")
    assert "--to" in switchyard("promote", "-h").stdout


def test_an_unknown_command_is_exit_2(switchyard):
    done = switchyard("evalute")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_preflight_says_no_to_the_users_model(switchyard, tmp_path):
    """Nemotron-3-Nano: mistral.rs has no nemotron_h_moe; 512K of context would have cost 3 GiB."""
    path = tmp_path / "nemotron.gguf"
    write_gguf(path, "nemotron_h_moe", keys=nemotron_keys())
    done = switchyard("preflight", path, "--context", 524288, "--json")
    assert done.returncode == 3
    (model,) = json_of(done)["models"]
    answers = {entry["engine"]: entry for entry in model["engines"]}
    assert answers["mistral.rs"]["loads"] == "no"
    assert "nemotron_h_moe" in answers["mistral.rs"]["why"]
    assert model["memory"]["kv_bytes_per_token"] == 6144
    assert model["memory"]["kv_bytes"] == 3 * 2**30
    assert model["memory"]["state_bytes_per_sequence"] / 2**20 == pytest.approx(47.6, abs=0.1)
    assert model["alternatives"]


def test_init_reads_the_twelve_flags_whole(switchyard, tmp_path, gguf):
    output = tmp_path / "switchyard.toml"
    done = switchyard("init", "--from-command", f"llama-server -m {gguf} {TWELVE_FLAGS}", "-o", output, "--json")
    written = json_of(done)
    assert written["settings"] == {
        "context_tokens": 524288,
        "parallel": 1,
        "gpu_layers": 40,
        "threads": 14,
        "batch_tokens": 256,
        "ubatch_tokens": 128,
        "flash_attention": True,
        "jinja": True,
        "prefill_assistant": False,
        "mlock": True,
        "cache_reuse_tokens": 256,
    }
    assert written["unknown"] == []
    unsupported = {line.partition(":")[0] for line in written["unsupported"]}
    assert {"mlock", "cache_reuse_tokens", "flash_attention", "ubatch_tokens"} <= unsupported
    assert switchyard("preflight", output).returncode == 0
    assert_one_clear_line(switchyard("init", "--from-command", f"llama-server -m {gguf}", "-o", output), 2, "--force")


def test_status_and_history_work_before_the_first_run(switchyard):
    assert json_of(switchyard("status", "--json"))["running"] == []
    assert json_of(switchyard("history", "--json"))["runs"] == []
    assert "switchyard evaluate demo" in switchyard("history").stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches_every_command(name):
    """The line in the list of commands is the first of the command's own help."""
    first, *_ = str(load_command(name).help).splitlines()
    assert first == COMMANDS[name]
    done = CliRunner().invoke(app, [name, "--help"])
    assert done.exit_code == 0
    assert "Usage" in done.stdout


def test_every_command_has_a_file_of_its_name():
    shared = {"__init__", "__main__", "app", "keep_up", "may_move", "options", "order", "output"}
    assert {path.stem for path in Path(cli.__file__).parent.glob("*.py")} == {*COMMANDS, *shared}


def test_help_and_completion_load_no_command():
    code = """
        import sys
        from typer.testing import CliRunner
        from flows.cli.app import app
        assert "canary" in CliRunner().invoke(app, ["--help"]).stdout
        asked = {"_SWITCHYARD_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "switchyard re"}
        assert "restore" in CliRunner().invoke(app, prog_name="switchyard", env=asked).stdout
        print([name for name in sys.modules if name.startswith("flows.cli.")])
    """
    assert ran(code) == "['flows.cli.app']"


def test_no_command_imports_prefect():
    """Half of them work when it is broken, and the others set what it reads at its import first."""
    code = """
        import sys
        from flows.cli.app import COMMANDS, load_command
        for name in COMMANDS:
            load_command(name)
        print("prefect" in sys.modules)
    """
    assert ran(code) == "False"


def ran(code: str) -> str:
    """The last line that these lines of Python print."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, text=True, capture_output=True, check=True
    )
    return done.stdout.strip().splitlines()[-1]


def test_domain_code_does_not_import_prefect():
    """A check or an engine has to work when Prefect is broken or gone."""
    code = """
        import pkgutil, sys, importlib
        for package in ("engines", "tasks", "migrations"):
            for module in pkgutil.walk_packages([package], package + "."):
                if "versions" not in module.name and not module.name.endswith(".env"):
                    importlib.import_module(module.name)
        print("prefect" in sys.modules)
    """
    assert ran(code) == "False"


def test_json_output_is_nothing_but_json(switchyard):
    json.loads(switchyard("doctor", "--json").stdout)


@pytest.mark.parametrize(
    ("installed", "broken"),
    [
        ({}, ""),
        ({"prefect": "3.8.8", "sqlalchemy": "2.0.58"}, ""),
        ({"prefect": "3.8.8"}, "sqlalchemy"),
        ({"prefect": "3.8.7", "sqlalchemy": "2.0.58"}, "prefect"),
        ({"prefect": "3.10.0"}, "prefect"),
        ({"fastapi": "0.151.0"}, "fastapi"),
        ({"sqlalchemy": "2.2.0"}, "sqlalchemy"),
        ({"sqlalchemy": "2.0.21"}, "sqlalchemy"),
    ],
)
def test_doctor_knows_which_packages_prefect_works_with(monkeypatch, installed, broken):
    """Its server does not start on a newer FastAPI; 3.8 fires no schedule on SQLAlchemy 2.1, and 3.9 does."""
    doctor = importlib.import_module("flows.cli.doctor")
    versions = {"prefect": "3.9.1", "fastapi": "0.150.0", "sqlalchemy": "2.1.9", **installed}
    monkeypatch.setattr(doctor, "version", versions.__getitem__)
    wrong = [finding for finding in doctor._packages() if finding.state != "ok"]
    assert [finding.what for finding in wrong] == ([broken] if broken else [])
    assert all(f"pip install '{broken}>=" in finding.fix for finding in wrong)


@pytest.mark.engine
def test_doctor_sees_a_schedule_make_runs(switchyard):
    """With a wrong SQLAlchemy Prefect's server answers, and no schedule ever fires."""
    findings = {f["what"]: f for f in json_of(switchyard("doctor", "--prefect", "--json"))["findings"]}
    assert findings["Prefect's API server"]["state"] == "ok"
    assert findings["Prefect's schedules"]["state"] == "ok", findings["Prefect's schedules"]


LOST_IN_A_CALLBACK = """
import signal, sys, threading
from flows.cli import app

app.INTERRUPT_S = 600  # the last resort is another way out

class Ends:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

with app._terminated_like_ctrl_c(threading.Event()):
    try:
        Ends()
        signal.pause()
    except KeyboardInterrupt:
        sys.exit(130)
"""


def test_an_interrupt_that_python_drops_comes_again():
    """One that meets the end of an object is ignored by Python: without a second one nothing would end."""
    done = subprocess.run([sys.executable, "-c", LOST_IN_A_CALLBACK], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 130, done.stderr
