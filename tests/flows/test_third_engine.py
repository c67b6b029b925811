"""Preflight, evaluation, yard, promotion and report with an engine that only the registry knows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf_files import LLAMA, write_gguf
from played import AMOUNTS, played
from processes import of_home
from switchyard_command import json_of
from waiting import until

from engines.process.serving import free_port

pytestmark = pytest.mark.usefixtures("prefect")
COMMAND = Path(__file__).parents[1] / "rig" / "third_engine" / "switchyard.py"
PLAN = """
[incumbent]
engine = "llama.cpp"
binary = "{binary}"
[candidate]
engine = "third"
[[models]]
id = "m"
gguf = "{gguf}"
[settings]
mlock = true
{amounts}
[yard]
port = {port}
"""


class Third:
    """The command with the third engine, on a plan that proposes it."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder, self._environment = folder, environment
        self.plan = folder / "plan.toml"
        gguf = write_gguf(folder / "m.gguf", keys=LLAMA)
        self.plan.write_text(
            PLAN.format(binary=played(folder, "llama-server"), gguf=gguf, amounts=AMOUNTS, port=free_port())
        )

    def argv(self, *arguments: object) -> list[str]:
        return [sys.executable, str(COMMAND), *map(str, arguments)]

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.argv(*arguments, "--json"),
            env=self._environment,
            cwd=self._folder,
            text=True,
            capture_output=True,
            timeout=300,
            check=False,
        )

    def serve(self) -> subprocess.Popen[bytes]:
        log = (self._folder / "serve.log").open("wb")
        return subprocess.Popen(self.argv("serve", self.plan), env=self._environment, stdout=log, stderr=log)

    def serving(self) -> str | None:
        status: dict[str, Any] = json.loads(self.run("status").stdout or "{}")
        models = (status.get("yard") or {}).get("models") or [{}]
        return models[0].get("serving")


@pytest.fixture
def third(tmp_path: Path, environment: dict[str, str]) -> Third:
    return Third(tmp_path, environment)


@pytest.fixture
def yard(third: Third, home: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = third.serve()
    yield process
    process.terminate()
    process.wait(60)
    assert of_home(home) == []


def test_it_is_examined_evaluated_and_reported(third: Third) -> None:
    """The plan is judged on what the engine's own driver says; the report names it."""
    examined = json_of(third.run("preflight", third.plan))["models"][0]
    assert [entry["engine"] for entry in examined["engines"]] == ["llama.cpp", "third"]
    assert examined["engines"][1]["why"] == "third engine 3.1 loads every architecture"

    outcome = json_of(third.run("evaluate", third.plan))
    checks = {check["check"]: check["verdict"] for check in outcome["models"][0]["checks"]}
    measured = ("preflight.loads", "compatibility.required_passed", "performance.errors", "faults.sigkill")
    assert {name: checks[name] for name in measured} == dict.fromkeys(measured, "PASS"), outcome
    page = Path(outcome["report"]).read_text(encoding="utf-8")
    assert "mlock: the third engine pins nothing" in page
    again = json_of(third.run("report", outcome["run_id"]))
    assert again["models"] == outcome["models"]


def test_it_serves_what_is_promoted_to_it(third: Third, yard: subprocess.Popen[bytes]) -> None:
    """The yard starts it, moves the model there, and shows it."""
    until(lambda: third.serving() == "llama.cpp" or yard.poll() is not None, "the yard", deadline_s=120)
    done = third.run("promote", "m", "--yes")
    assert done.returncode == 0, done.stderr
    assert third.serving() == "third"
    done = third.run("rollback", "m")
    assert done.returncode == 0, done.stderr
    assert third.serving() == "llama.cpp"
