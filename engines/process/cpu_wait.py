"""Time in which the threads of a process tree waited for a CPU: it does not count against an engine.

From `/proc/PID/task/TID/schedstat` (time on a CPU, time runnable and waiting; Linux `kernel/sched/stats.h`), which
counts the time that a cgroup's CPU quota holds a thread back as well (seen on 6.18). A thread that waits at this moment
is not in it yet: one that is runnable and has not moved since it was last looked at counts as waiting since then.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass
class _Thread:
    ran_ns: int
    waited_ns: int
    moved_at: float  # monotonic; when one of the two was first seen at its present value
    waited_before_s: float  # up to the mark


class CpuWait:
    """How long the threads of `pids` have waited for a CPU since a mark. Reads files: not for an event loop."""

    def __init__(self, pids: Callable[[], Iterable[int]]) -> None:
        self._pids = pids
        self._threads: dict[int, _Thread] = {}
        self._marked_at = time.monotonic()

    def mark(self) -> None:
        self._threads = {}
        self._marked_at = time.monotonic()
        for thread_id, ran_ns, waited_ns, _ in _threads(self._pids()):
            self._threads[thread_id] = _Thread(ran_ns, waited_ns, self._marked_at, waited_ns / 1e9)

    def since_mark_s(self) -> float:
        """The most that one thread has waited (others sleep at the next barrier); 0 where that is not reported."""
        now, most = time.monotonic(), 0.0
        for thread_id, ran_ns, waited_ns, runnable in _threads(self._pids()):
            known = self._threads.setdefault(thread_id, _Thread(ran_ns, waited_ns, now, 0.0))
            if (known.ran_ns, known.waited_ns) != (ran_ns, waited_ns):
                known.ran_ns, known.waited_ns, known.moved_at = ran_ns, waited_ns, now
            pending_s = now - known.moved_at if runnable else 0.0
            most = max(most, known.waited_ns / 1e9 + pending_s - known.waited_before_s)
        return min(most, now - self._marked_at)


def is_stopped(pid: int) -> bool:
    """True for a process in state T: SIGSTOP, or job control. One that a debugger holds (t) is not."""
    return _state(f"/proc/{pid}/stat") == "T"


def _threads(pids: Iterable[int]) -> Iterable[tuple[int, int, int, bool]]:
    """Thread id, ns on a CPU, ns of waiting for one, and whether it is runnable, of every thread."""
    for pid in pids:
        with contextlib.suppress(OSError):
            for thread_id in os.listdir(f"/proc/{pid}/task"):
                folder = f"/proc/{pid}/task/{thread_id}"
                with contextlib.suppress(OSError, ValueError), open(f"{folder}/schedstat", encoding="ascii") as file:
                    ran_ns, waited_ns, _ = map(int, file.read().split())
                    yield int(thread_id), ran_ns, waited_ns, _state(f"{folder}/stat") == "R"


def _state(path: str) -> str:
    with contextlib.suppress(OSError, IndexError), open(path, encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()[0]  # the name before it may hold brackets and blanks
    return ""
