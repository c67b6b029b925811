"""Work that may hang (a locked database, a server that does not answer), waited for no longer than told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from engines.errors import SwitchyardError

T = TypeVar("T")


class Background(Generic[T]):
    """`work`, begun at once in a thread that ends with the process; `what` names it in an error."""

    def __init__(self, what: str, work: Callable[[], T]) -> None:
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

        threading.Thread(target=run, name=what, daemon=True).start()

    def result(self, within_s: float) -> T:
        """What `work` returns, or raises; SwitchyardError when it has not ended `within_s` seconds from now."""
        if not self._done.wait(within_s):
            raise SwitchyardError(f"{self._what} did not answer within {within_s:g} s")
        if self._problem is not None:
            raise self._problem
        return self._result
