"""Blocking calls beside the event loop, none of which can keep the yard from going on or from ending.

`asyncio.to_thread` waits for its threads when the program ends; a call that the kernel holds (a file under /proc of a
process that a driver holds, say) would keep the yard from being stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


async def in_thread(function: Callable[[], Result], *, name: str, within_s: float | None = None) -> Result:
    """The result of `function`, called in a daemon thread. Raises TimeoutError; the thread is left behind then."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Result] = loop.create_future()

    def settle(result: Result | None, error: BaseException | None) -> None:
        if done.done():  # nobody waits any more
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def call() -> None:
        result, failure = None, None
        try:
            result = function()
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=call, name=name, daemon=True).start()
    return await asyncio.wait_for(done, within_s)
