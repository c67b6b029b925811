"""Flow tests: the real command in a process of its own, in a home of its own."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import HOME
from switchyard_command import command
from waiting import until

from engines.yard.client import YardClient
from flows.progress import Progress, progress


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty $SWITCHYARD_HOME."""
    return tmp_path / "home"


@pytest.fixture
def environment(home: Path) -> dict[str, str]:
    """The environment of a user who has set nothing but SWITCHYARD_HOME."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "SWITCHYARD_"))}
    return {**kept, "SWITCHYARD_HOME": str(home), HOME: str(home), "COLUMNS": "200"}


Switchyard = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def switchyard(environment: dict[str, str], tmp_path: Path) -> Switchyard:
    """`switchyard ARG ...` run to its end; text of both streams and the exit code."""

    def run(*arguments: object, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments),
            env=environment,
            cwd=tmp_path,
            text=True,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )

    return run


@pytest.fixture
def yard(plan: Path, home: Path, environment: dict[str, str]) -> Iterator[YardClient]:
    """A yard that serves the `plan` of the test's module."""
    home.mkdir()
    with (home / "yard.log").open("wb") as output:
        process = subprocess.Popen(command("serve", plan), env=environment, stdout=output, stderr=subprocess.STDOUT)
    client = YardClient(home)
    until(lambda: process.poll() is not None or client.runs(), "a yard that runs")
    assert process.poll() is None, (home / "yard.log").read_text()
    yield client
    process.send_signal(signal.SIGTERM)
    process.wait(30)


@pytest.fixture
def notes() -> Iterator[list[str]]:
    """The lines that stay on the terminal."""
    lines: list[str] = []

    class Noted(Progress):
        def note(self, text: str) -> None:
            lines.append(text)

    before = progress.set(Noted())
    yield lines
    progress.reset(before)
