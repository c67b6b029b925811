"""Serving: ready means one token from our own child; died, late and wrong listener are three different errors."""

import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest
from fake_driver import FAKE_ENGINE, FakeDriver
from processes import runs
from waiting import until

from engines.errors import EngineExited, EngineStalled, PortTaken, WrongListener
from engines.process.process import ManagedProcess
from engines.process.serving import free_port, serving
from engines.settings import Serve


@pytest.fixture
def serve(tmp_path):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    return Serve(model_id="m", gguf=gguf, port=free_port())


def serving_fake(serve, tmp_path, *habits, **options):
    driver = FakeDriver(*habits)
    return serving(driver, driver.find(), serve, state_dir=tmp_path, log_path=tmp_path / "engine.log", **options)


def test_it_serves_inside_the_block_and_is_gone_after_it(serve, tmp_path):
    with serving_fake(serve, tmp_path) as served:
        pid = served.process.pid
        assert served.endpoint.context_tokens == 4096
        assert httpx.get(serve.base_url + "/v1/models").json()["data"][0]["id"] == "m"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_loading_is_waited_for(serve, tmp_path):
    with serving_fake(serve, tmp_path, "--load-s", "0.5") as served:
        assert served.load_s >= 0.5


def test_an_engine_that_dies_while_loading_is_quoted(serve, tmp_path):
    with (
        pytest.raises(EngineExited, match="exit status 3") as caught,
        serving_fake(serve, tmp_path, "--exit-code", "3"),
    ):
        pass
    assert caught.value.returncode == 3
    assert "error: invalid argument: --mlock" in str(caught.value)


def test_an_engine_for_another_cpu_is_named_as_one(serve, tmp_path):
    with (
        pytest.raises(EngineExited, match=r"signal SIGILL while loading model\.gguf: it was compiled for another CPU"),
        serving_fake(serve, tmp_path, "--illegal"),
    ):
        pass


@pytest.mark.parametrize("habit", ["--never-listens", "--health-lies"])
def test_an_engine_that_makes_no_progress_is_late(serve, tmp_path, habit):
    """A 200 on /health is not readiness; only a token is."""
    with (
        pytest.raises(EngineStalled, match="made no progress while loading"),
        serving_fake(serve, tmp_path, habit, stall_s=1.5),
    ):
        pass


def test_a_taken_port_is_said_before_anything_is_started(serve, tmp_path):
    stale = subprocess.Popen([sys.executable, str(FAKE_ENGINE), "--port", str(serve.port)])
    try:
        until(lambda: answers(serve.base_url), "the stale server to listen")
        with (
            pytest.raises(PortTaken, match=rf"port {serve.port} is taken by .*pid {stale.pid}"),
            serving_fake(serve, tmp_path),
        ):
            pass
        assert not (tmp_path / "engine.log").exists()
    finally:
        stale.kill()
        stale.wait()


class ElsewhereDriver(FakeDriver):
    """Its child serves another port while a stale server answers on ours."""

    def argv(self, installation, serve):
        other = serve.model_copy(update={"port": free_port()})
        self.stale = subprocess.Popen([sys.executable, str(FAKE_ENGINE), "--port", str(serve.port)])
        return super().argv(installation, other)


def test_a_stale_server_on_the_port_is_detected_not_believed(serve, tmp_path):
    driver = ElsewhereDriver()
    try:
        with (
            pytest.raises(WrongListener, match="not by the fake that was started"),
            serving(driver, driver.find(), serve, state_dir=tmp_path, log_path=tmp_path / "log"),
        ):
            pass
    finally:
        driver.stale.kill()
        driver.stale.wait()


def test_a_descendant_that_a_look_misses_is_no_stale_server(serve, tmp_path, monkeypatch):
    """On a busy machine the list of an engine's processes was without the one that served."""
    monkeypatch.setattr(ManagedProcess, "listens_on", lambda _, port: False)
    with serving_fake(serve, tmp_path) as served:
        assert served.endpoint.base_url.endswith(str(serve.port))


class SnatchedDriver(FakeDriver):
    """Its port is taken between the look at it and the start, by nobody that listens."""

    def argv(self, installation, serve):
        self.held = socket.socket()
        self.held.bind((serve.host, serve.port))
        return super().argv(installation, serve)


def test_a_port_taken_at_the_last_moment_is_no_failure_of_the_engine(serve, tmp_path):
    driver = SnatchedDriver()
    with (
        pytest.raises(PortTaken, match=f"port {serve.port} was taken when fake wanted it"),
        serving(driver, driver.find(), serve, state_dir=tmp_path, log_path=tmp_path / "log"),
    ):
        pass
    driver.held.close()


@pytest.mark.parametrize("habit", ["--ignore-sigterm", "--needs-two-sigterms", "--chatty", "--child"])
def test_bad_habits_do_not_survive_the_block(serve, tmp_path, habit):
    with serving_fake(serve, tmp_path, habit) as served:
        tree = served.process.tree()
    until(lambda: not any(map(runs, tree)), "every process to be gone")


def test_an_exception_in_the_block_still_ends_the_engine(serve, tmp_path):
    with pytest.raises(RuntimeError, match="boom"), serving_fake(serve, tmp_path) as served:
        raise RuntimeError("boom")
    assert served.process.poll() is not None


def test_ctrl_c_while_stopping_leaves_nothing(serve, tmp_path):
    """The interrupt is held until the engine is gone, then delivered."""
    with pytest.raises(KeyboardInterrupt), serving_fake(serve, tmp_path, "--ignore-sigterm") as served:
        signal.raise_signal(signal.SIGINT)
    assert served.process.poll() is not None


def answers(base_url):
    try:
        return httpx.get(base_url + "/health", verify=False).status_code == 200
    except httpx.HTTPError:
        return False
