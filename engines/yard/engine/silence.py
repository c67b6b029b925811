"""How long an engine has been silent by its own doing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

from engines.deadline import in_thread
from engines.process.cpu_wait import CpuWait
from engines.process.telemetry import process_tree

TICK_S = 0.25
STILL_S = 1.0  # from here on the engine's waits for a CPU are counted; a shorter silence is nothing to explain
LATE_S = 1.0  # a look that is late by so much was delayed by the yard, not by the engine

Result = TypeVar("Result")


class Silence:
    """Measures the silence of the process tree of `pid`, looked at every TICK_S.

    What does not count: time in which its threads waited for a CPU, and time in which the yard itself did not look.
    """

    def __init__(self, pid: int) -> None:
        self._waits = CpuWait(lambda: process_tree(pid))
        self._from: float | None = None
        self._marked = False
        self._looked = time.monotonic()
        self._unseen_s = self._waited_s = 0.0

    async def since(self, moved: float, limit_s: float) -> float:
        """Seconds since `moved` that count; looked at closely only where they matter."""
        now = time.monotonic()
        late_s = now - self._looked - TICK_S
        self._looked = now
        if moved != self._from:
            self._from, self._marked = moved, False
            self._unseen_s = self._waited_s = 0.0
        still_s = now - moved
        if late_s > LATE_S:
            self._unseen_s += min(late_s, still_s)
        if still_s < min(STILL_S, limit_s / 4):
            return still_s
        if not self._marked:
            self._marked = True
            await in_thread(self._waits.mark, name="waits for a CPU")
        elif still_s > limit_s:
            self._waited_s = await in_thread(self._waits.since_mark_s, name="waits for a CPU")
        return still_s - max(self._waited_s, self._unseen_s)

    def excused(self) -> str:
        return f", {self._waited_s:.1f} s of waiting for a CPU not counted" if self._waited_s > STILL_S else ""


async def in_time(pid: int, asked: Awaitable[Result], within_s: float) -> Result | None:
    """What an engine answers within so long, its waits for a CPU not counted; None when it is late."""
    began, silence = time.monotonic(), Silence(pid)
    task = asyncio.ensure_future(asked)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=TICK_S)
            if not task.done() and await silence.since(began, within_s) > within_s:
                return None
        return task.result()
    finally:
        task.cancel()
