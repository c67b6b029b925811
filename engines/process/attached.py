"""An engine that others run, in place of a process of ours: let go of, never started, stopped or signalled."""

from __future__ import annotations

import os
import threading

import psutil

from engines.process.process import ManagedProcess

NO_PID = 0


class AttachedEngine(ManagedProcess):
    """Runs until it is let go of: whether it lives, only its answers show."""

    def __init__(self, name: str) -> None:
        self.name, self.argv = name, []
        self.ended_because, self.given_up = "", False
        self._let_go = threading.Event()

    @property
    def pid(self) -> int:
        """The pid of no process: nothing is read of it, and nothing can be sent to it."""
        return NO_PID

    @property
    def bytes_logged(self) -> int:
        return 0

    def poll(self) -> int | None:
        return os.EX_OK if self._let_go.is_set() else None

    def wait(self) -> int:
        self._let_go.wait()
        return os.EX_OK

    def tree(self) -> list[psutil.Process]:
        return []

    def listens_on(self, port: int) -> bool:
        return False

    def log_tail(self) -> tuple[str, ...]:
        return ()

    def stop(self, *, grace_s: float = 5.0) -> int | None:
        self._let_go.set()
        return os.EX_OK

    def send_signal(self, number: int) -> None:
        raise ProcessLookupError(f"{self.name} is attached: others run it, and it gets no signal")
