"""A client on the public port for as long as a test wants it."""

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def traffic(ask: Callable[[int], int | None], pause_s: float) -> Iterator[list[int]]:
    """Requests one after the other, numbered, while the block runs; the status of each, where there is one."""
    stop, seen = threading.Event(), list[int]()

    def go() -> None:
        while not stop.wait(pause_s):
            if (status := ask(len(seen))) is not None:
                seen.append(status)

    client = threading.Thread(target=go)
    client.start()
    try:
        yield seen
    finally:
        stop.set()
        client.join()
