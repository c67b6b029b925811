"""Work that may hang (a locked database, a file under /proc that a driver holds), with a limit to the wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from engines.errors import SwitchyardError

T = TypeVar("T")


class Background(Generic[T]):
    """`work`, begun at once in a daemon thread; `what` names it in an error, `done` is called there at its end."""

    def __init__(self, what: str, work: Callable[[], T], done: Callable[[], object] = lambda: None) -> None:
        self._what = what
        self._done = threading.Event()
        self._result: T
        self._problem: BaseException | None = None

        def run() -> None:
            try:
                self._result = work()
            except BaseException as problem:
                self._problem = problem
            finally:
                self._done.set()
                done()

        threading.Thread(target=run, name=what, daemon=True).start()

    def result(self, within_s: float) -> T:
        """What `work` returns, or raises; SwitchyardError when it has not ended `within_s` seconds from now."""
        if not self._done.wait(within_s):
            raise SwitchyardError(f"{self._what} did not answer within {within_s:g} s")
        if self._problem is not None:
            raise self._problem
        return self._result


async def in_thread(work: Callable[[], T], *, name: str, within_s: float | None = None) -> T:
    """The result of `work`, called in a daemon thread. Raises TimeoutError; the thread is left behind then.

    `asyncio.to_thread` waits for its threads when the program ends: one that hangs would keep it from ending.
    """
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def tell_loop() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(ended.set)

    background = Background(name, work, tell_loop)
    async with asyncio.timeout(within_s):
        await ended.wait()
    return background.result(0)
