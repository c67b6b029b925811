"""Flow tests: the real command in a process of its own, in a home of its own."""

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
from switchyard_command import command, environment_of
from waiting import until

from engines.yard.client import YardClient
from flows.orchestrator.server import PrefectServer, prepare_environment
from flows.progress import Progress, progress


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty $SWITCHYARD_HOME."""
    return tmp_path / "home"


@pytest.fixture
def environment(home: Path) -> dict[str, str]:
    return environment_of(home)


@dataclass(frozen=True)
class Prefect:
    """A server that runs, and a database as the first start of one makes it."""

    url: str
    database: Path

    def put_database(self, home: Path) -> None:
        """As in a home in which Prefect has run before."""
        (home / "prefect").mkdir(mode=0o700, parents=True)
        shutil.copy(self.database, home / "prefect" / "prefect.db")


@pytest.fixture(scope="session")
def prefect_of_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    """For all tests that only need one: its start takes a command five seconds, and the first one in a home ten."""
    folder = tmp_path_factory.mktemp("prefect")
    server = PrefectServer(folder)
    with mock.patch.dict(os.environ, prepare_environment(folder)):
        server.start()
    try:
        server.ready()
        made, database = folder / "prefect" / "prefect.db", folder / "new.db"
        with contextlib.closing(sqlite3.connect(made)) as source, contextlib.closing(sqlite3.connect(database)) as copy:
            source.backup(copy)
        yield Prefect(server.api_url, database)
    finally:
        server.stop()


@pytest.fixture
def prefect(environment: dict[str, str], prefect_of_all: Prefect) -> None:
    """A user whose commands report to a Prefect server that runs."""
    environment["PREFECT_API_URL"] = prefect_of_all.url


@pytest.fixture
def prefect_database(home: Path, prefect_of_all: Prefect) -> None:
    """A home in which Prefect has run before."""
    prefect_of_all.put_database(home)


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
