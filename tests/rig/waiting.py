"""Waiting on a condition with a deadline: the only way tests wait."""

import time
from collections.abc import Callable


def until(condition: Callable[[], object], what: str, deadline_s: float = 60) -> None:
    """Return when `condition()` is true; fail naming `what` after `deadline_s`."""
    began = time.monotonic()
    while not condition():
        waited = time.monotonic() - began
        assert waited < deadline_s, f"waited {deadline_s} s for: {what}"
        time.sleep(min(max(0.02, waited / 50), 0.1))  # what comes late is looked for less often: looking costs CPU
