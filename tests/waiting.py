"""Waiting on a condition with a deadline: the only way tests wait."""

import time
from collections.abc import Callable


def until(condition: Callable[[], object], what: str, deadline_s: float = 30) -> None:
    """Return when `condition()` is true; fail naming `what` after `deadline_s`."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"waited {deadline_s} s for: {what}"
        time.sleep(0.02)
