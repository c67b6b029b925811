"""Signals that wait for a moment at which nothing is lost."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def signals_held(heard: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block ends, and are raised again then. `heard` is called when one comes.

    In another thread than the main one, which gets no signals, nothing is held.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []

    def hold(number: int, _: object) -> None:
        pending.append(number)
        heard()

    previous = {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for held in dict.fromkeys(pending):
            signal.raise_signal(held)
