"""One request that an engine works on: when it moved last, and the speed that it shows."""

from __future__ import annotations

import time
from collections.abc import Callable

from engines.openai.call import reported_cached, reported_prefill_rate
from engines.process.process import ManagedProcess


class InFlight:
    """One request on an engine's process. Times are monotonic seconds; `gap` takes the seconds between chunks."""

    def __init__(
        self,
        prompt_tokens: int,
        process: ManagedProcess | None,
        gap: Callable[[float], None] | None = None,
        *,
        light: bool = False,
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.light = light  # it takes no slot, and is no evidence on the engine
        self.process = process
        self.held = False  # its client takes nothing and the buffer is full: the engine is not read, nor judged by it
        self.held_s = 0.0
        self.generates = False  # its outcome shows whether the engine still completes anything
        self.failure = ""  # how the engine failed it, the client's own faults apart
        self.lost = False  # its connection broke
        self.sent = self.moved = time.monotonic()
        self.first: float | None = None  # first chunk with content
        self.chunks = 0  # chunks with content, and those after the first of them
        self.prefill_rate: float | None = None  # tokens/s, where the engine's answer reports it
        self.cached: tuple[int, int] | None = None  # tokens of the prompt, and all of it, likewise
        self._held_at = 0.0
        self._gap = gap

    def chunk(self, *, content: bool) -> None:
        """Note a piece of the answer; `content` once it holds anything to show (all pieces behind it count)."""
        now = time.monotonic()
        if self.first is not None:
            self.chunks += 1
            if self._gap is not None:
                self._gap(now - self.moved)
        elif content:
            self.first, self.chunks = now, 1
        self.moved = now

    def reported(self, end: bytes) -> None:
        """Take from the end of an answer what the engine says of its prompt."""
        self.prefill_rate, self.cached = reported_prefill_rate(end), reported_cached(end)

    @property
    def cached_share(self) -> float | None:
        """Share of the prompt that lay in the engine's cache."""
        return None if self.cached is None else self.cached[0] / self.cached[1]

    @property
    def ttft_ms(self) -> float | None:
        """From the request to its first chunk with content; None before that."""
        return None if self.first is None else (self.first - self.sent) * 1000

    @property
    def gap_s(self) -> float | None:
        """Seconds between chunks, the client's own delays not counted; None before the second one."""
        if self.first is None or self.chunks < 2:
            return None
        return (self.moved - self.first - self.held_s) / (self.chunks - 1)

    @property
    def process_ended(self) -> str:
        return "" if self.process is None else self.process.ended_because

    def hold(self) -> None:
        """Note that the engine is not read until `release`: its client takes nothing, and no more may be kept."""
        self.held, self._held_at = True, time.monotonic()

    def release(self) -> None:
        """Note that the engine is read again: from now on silence is its own."""
        self.held, self.moved = False, time.monotonic()
        self.held_s += self.moved - self._held_at
