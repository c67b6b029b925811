"""Ports that another process was quicker to take."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from engines.process.serving import free_port
from tasks.evidence import engine_under_test


@contextlib.contextmanager
def first_ports_taken(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[None]:
    """While the block runs, so many ports that are chosen for engines under test have a listener already."""
    with contextlib.ExitStack() as held, monkeypatch.context() as patched:
        taken = []
        for _ in range(number):
            listener = held.enter_context(socket.create_server(("127.0.0.1", 0)))
            taken.append(listener.getsockname()[1])
        patched.setattr(engine_under_test, "free_port", lambda: taken.pop(0) if taken else free_port())
        yield
