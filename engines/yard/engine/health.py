"""Health of an engine: its states, and the arithmetic that separates busy from wedged. Pure; it has no clock.

stopped -> loading -> ready <-> busy
busy -> wedged                  requests in flight, and no token and no prompt progress for too long
ready -> failing                idle, and no answer to liveness probes
loading, ready, busy -> dead    the process ended
wedged, failing, dead           a restart, within the budget; then the fallback
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum

UNKNOWN_PREFILL_RATE = 2.0  # tokens/s; slower than any engine seen at work (mistral.rs, 1 busy core: 15)
UNKNOWN_TOKEN_S = 1.0
PATIENCE = 4.0  # times the expected time of the next sign of progress: prefill slows down as the context grows
BACK_OFF_S = (0.0, 1.0, 4.0, 15.0, 60.0)


class Health(StrEnum):
    STOPPED = "stopped"
    LOADING = "loading"
    READY = "ready"
    BUSY = "busy"
    WEDGED = "wedged"
    FAILING = "failing"
    DEAD = "dead"

    @property
    def serves(self) -> bool:
        return self in (Health.READY, Health.BUSY)


@dataclass(frozen=True)
class Transition:
    """A change of state: when (s since the epoch), to what, and on which evidence."""

    at: float
    state: Health
    why: str


def stall_limit_s(
    *, least_s: float, prompt_tokens: int, prefill_rate: float | None, sees_prompt_progress: bool, batch_tokens: int
) -> float:
    """How long a request that has no token yet may go without progress before its engine counts as wedged.

    Where the engine reports how far the prompt is, the wait is for its next batch; else it is for the whole prompt.
    `prefill_rate` in tokens/s as measured on this engine, None before there is one.
    """
    rate = prefill_rate if prefill_rate else UNKNOWN_PREFILL_RATE
    awaited = min(prompt_tokens, batch_tokens) if sees_prompt_progress else prompt_tokens
    return max(least_s, PATIENCE * awaited / rate)


def token_limit_s(*, least_s: float, token_s: float | None) -> float:
    """How long a request that has had tokens may go without the next one; `token_s` is the usual gap."""
    return max(least_s, 10 * PATIENCE * (token_s if token_s else UNKNOWN_TOKEN_S / 10))


class Rate:
    """A running mean that forgets: one fifth of it is the newest observation."""

    def __init__(self) -> None:
        self.value: float | None = None

    def learn(self, seen: float) -> None:
        """Take one more observation, in units per second or seconds per unit."""
        self.value = seen if self.value is None else 0.8 * self.value + 0.2 * seen


class RestartBudget:
    """So many restarts in so long; each waits longer than the one before it."""

    def __init__(self, restarts: int, window_s: float) -> None:
        self.exhausted = False  # nothing starts it until `reset`
        self._restarts = restarts
        self._window_s = window_s
        self._used: deque[float] = deque()

    def spend(self, now: float) -> float | None:
        """Seconds to wait before the restart that is due now (monotonic seconds); None when the budget is spent."""
        while self._used and now - self._used[0] > self._window_s:
            self._used.popleft()
        used = len(self._used)
        if used >= self._restarts:
            return None
        self._used.append(now)
        return BACK_OFF_S[min(used, len(BACK_OFF_S) - 1)]

    def reset(self) -> None:
        """Give the whole budget back: to an engine that was asked for, or once `try_again_s` has passed."""
        self._used.clear()
        self.exhausted = False
