"""A yard in a process of its own over two fake engines, with a client and its orders."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from gguf_files import write_gguf
from processes import of_home
from waiting import until

from engines.process.serving import free_port
from engines.yard.client import YardClient

ROOT = Path(__file__).parents[3]
RIG = ROOT / "tests" / "rig"


@dataclasses.dataclass
class FakeYard:
    """The process, its port and its home; `again` starts another one on the same home and port."""

    process: subprocess.Popen[bytes]
    port: int
    home: Path
    argv: list[str]
    log: Path
    counted: str = ""  # its metrics when the test began

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def orders(self) -> YardClient:
        return YardClient(self.home)

    def http(self, **how: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, verify=False, **how)

    def ask(self, answers: list[httpx.Response], **body: Any) -> threading.Thread:
        """A chat in a thread of its own; its answer goes to `answers`."""
        chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 40, **body}

        def go() -> None:
            with self.http() as http:
                answers.append(http.post("/v1/chat/completions", json=chat))

        thread = threading.Thread(target=go)
        thread.start()
        return thread

    def grown(self, counter: str) -> float:
        """How much the metrics that begin with `counter` have grown since the test began."""
        now, before = (
            sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(counter))
            for text in (self.metrics(), self.counted)
        )
        return now - before

    def metrics(self) -> str:
        with self.http() as http:
            return http.get("/metrics").text

    def health(self) -> int:
        with self.http() as http:
            return http.get("/health").status_code

    def ready(self) -> "FakeYard":
        until(lambda: self.process.poll() is not None or self._answers(), f"a yard that serves: {self.said()}")
        assert self.process.poll() is None, self.said()
        return self

    def _answers(self) -> bool:
        return self.health_or_none() == 200

    def health_or_none(self) -> int | None:
        """As `health`; None while the port does not answer."""
        try:
            return self.health()
        except httpx.HTTPError:
            return None

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def engine(self, name: str, model: str = "m") -> dict[str, Any]:
        (route,) = [m for m in self.orders.status()["models"] if m["id"] == model]
        (engine,) = [e for e in route["engines"] if e["engine"] == name]
        return engine

    def route(self, model: str = "m") -> dict[str, Any]:
        (route,) = [m for m in self.orders.status()["models"] if m["id"] == model]
        return route

    def again(self) -> "FakeYard":
        self.process = _start(self.argv, self.log)
        return self

    def engines_left(self) -> list[psutil.Process]:
        """Fake engines of this yard that are alive."""
        return [found for found in of_home(self.home, "FAKE_YARD_HOME") if found.pid != self.process.pid]

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise


def _start(argv: list[str], log: Path) -> subprocess.Popen[bytes]:
    home = argv[argv.index("--home") + 1]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "FAKE_YARD_HOME": home}
    with log.open("ab") as output:
        return subprocess.Popen(argv, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


StartYard = Callable[..., FakeYard]


@pytest.fixture
def start_yard(tmp_path: Path) -> Iterator[StartYard]:
    """Starts a yard; keyword arguments are fake_yard.py's options, `settings` a dict of YardSettings."""
    with yards(tmp_path) as start:
        yield start


@pytest.fixture(scope="module")
def yard_of_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeYard]:
    """One yard for all tests of a module that leave it as they find it."""
    with yards(tmp_path_factory.mktemp("yard")) as start:
        yield start().ready()


@pytest.fixture
def yard(yard_of_all: FakeYard) -> FakeYard:
    """It, serving, for a test that counts what it adds."""
    yard_of_all.counted = yard_of_all.metrics()
    return yard_of_all


@contextlib.contextmanager
def yards(tmp_path: Path) -> Iterator[StartYard]:
    """What starts yards in a folder; all of them have ended when the block ends."""
    gguf = tmp_path / "model.gguf"
    write_gguf(gguf)
    started: list[FakeYard] = []

    def start(*, settings: dict[str, Any] | None = None, **options: Any) -> FakeYard:
        home, port = tmp_path / f"home{len(started)}", free_port()
        home.mkdir()
        quick = {"restart_window_s": 60, "load_stall_s": 20, "memory_back_s": 2}
        argv = [sys.executable, str(RIG / "fake_yard.py"), "--home", str(home), "--port", str(port)]
        argv += ["--gguf", str(gguf), f"--settings={json.dumps({**quick, **(settings or {})})}"]
        argv += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        yard = FakeYard(_start(argv, home / "yard.log"), port, home, argv, home / "yard.log")
        started.append(yard)
        return yard

    try:
        yield start
    finally:
        for yard in started:
            yard.end()
            until(lambda yard=yard: not yard.engines_left(), "every engine to be gone")
