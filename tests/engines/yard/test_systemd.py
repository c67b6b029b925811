"""What systemd is told, by a notify socket of our own: ready, who serves what, and that the yard is not hung."""

import contextlib
import os
import signal
import socket

import pytest

from engines.yard.systemd import Systemd


@pytest.fixture
def notified(tmp_path, monkeypatch):
    """The socket that systemd would read, for whatever this process starts."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as reader:
        reader.bind(str(tmp_path / "notify"))
        reader.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "300000")
        yield reader


def received(reader):
    return reader.recv(4096).decode().splitlines()


def test_a_yard_is_ready_when_its_port_is_open_and_reports_until_it_hangs(start_yard, notified):
    yard = start_yard()
    assert received(notified) == ["READY=1"]
    yard.ready()
    while "STATUS=m: old ready" not in (report := received(notified)):
        pass
    assert "WATCHDOG=1" in report
    os.kill(yard.process.pid, signal.SIGSTOP)
    notified.settimeout(1)
    with contextlib.suppress(TimeoutError):
        for _ in range(100):  # what was sent before
            received(notified)
    with pytest.raises(TimeoutError):
        received(notified)
    os.kill(yard.process.pid, signal.SIGCONT)
    notified.settimeout(20)
    assert "WATCHDOG=1" in received(notified)
    yard.process.send_signal(signal.SIGTERM)
    while received(notified) != ["STOPPING=1"]:
        pass


def test_its_variables_are_for_the_yard_alone_and_nobody_need_listen(tmp_path):
    environment = {
        "NOTIFY_SOCKET": str(tmp_path / "none"),
        "WATCHDOG_USEC": "1000",
        "WATCHDOG_PID": "1",
        "PATH": "/bin",
    }
    Systemd(environment).tell("READY=1")
    assert environment == {"PATH": "/bin"}
