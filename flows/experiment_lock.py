"""One experiment at a time on this home: two would measure each other, or undo each other's steps."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from engines.errors import BadInput

_held: set[Path] = set()


class Refused(BadInput):
    """Nothing was begun, and nothing is wrong: what is asked for has to wait."""


class Busy(Refused):
    """Another process has the home for its experiment."""


SOAK = "a window of the soak"  # short: others wait for its end
WAIT_S = 900.0
POLL_S = 1.0


@contextlib.contextmanager
def alone(home: Path, what: str) -> Iterator[None]:
    """The only experiment of this home while the block runs; a part of one that this process has begun is let in.

    The kernel lets go of the lock when the process dies, however it dies. Raises Busy, which names the other one; the
    end of a soak's window is waited for.
    """
    path = home / "experiment.lock"
    if path in _held:
        yield
        return
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with path.open("a+") as lock:
        deadline = time.monotonic() + WAIT_S
        while other := _taken(lock):
            if not other.startswith(SOAK) or what.startswith(SOAK) or time.monotonic() > deadline:
                raise Busy(f"{other} is under way already: see `switchyard status`, or wait for it")
            time.sleep(POLL_S)
        lock.truncate(0)
        lock.write(f"{what} (pid {os.getpid()})")
        lock.flush()
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)
            lock.truncate(0)


def _taken(lock: TextIO) -> str | None:
    """Who has the lock; None when it is ours now."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        return lock.read().strip() or "another experiment"
    return None
