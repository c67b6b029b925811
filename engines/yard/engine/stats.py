"""Memory and speed of one engine, as measured on its processes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable

from engines.deadline import in_thread
from engines.process.process import ManagedProcess
from engines.process.telemetry import private_bytes, process_tree, vram_bytes
from engines.yard.engine.health import Rate
from engines.yard.engine.in_flight import InFlight

SERIES = 240  # 20 minutes of memory, the last 240 first tokens


class EngineStats:
    """What is remembered of an engine over its restarts; memory and tokens/s are those of its present process."""

    def __init__(self) -> None:
        self.memory_bytes: int | None = None  # private, with swap
        self.vram_bytes: int | None = None
        self.held_bytes: int | None = None  # the most that was seen of both together
        self.tokens_per_s: float | None = None
        self.memory_series: deque[int] = deque(maxlen=SERIES)
        self.ttft_ms_series: deque[float] = deque(maxlen=SERIES)
        self.prefill, self.token_gap = Rate(), Rate()
        self.sampled_at = 0.0
        self._tokens = self._tokens_then = 0

    def learn(self, running: InFlight) -> None:
        if (ttft_ms := running.ttft_ms) is not None:
            self._tokens += running.chunks
            self.ttft_ms_series.append(ttft_ms)
            if (gap_s := running.gap_s) is not None:
                self.token_gap.learn(gap_s)
        # never learnt from the time to the first token: a prompt that lay in the cache would look 100 times faster
        if (rate := running.prefill_rate) is not None:
            # nor from an answer that does not say what lay there (mistralrs 0.8.1), unless it is a slow one
            unsure = running.cached_share is None and self.prefill.value is not None
            self.prefill.learn(min(rate, self.prefill.value or rate) if unsure else rate)

    async def sample(self, child: ManagedProcess, in_flight: Iterable[InFlight]) -> None:
        """Measure the memory of the process tree, and tokens/s since the last sample (in flight included)."""
        now, tokens = time.monotonic(), self._tokens + sum(running.chunks for running in in_flight)
        if self.sampled_at:
            self.tokens_per_s = max(tokens - self._tokens_then, 0) / (now - self.sampled_at)
        self.sampled_at, self._tokens_then = now, tokens

        def measured() -> tuple[int | None, int | None]:
            pids = process_tree(child.pid)
            return private_bytes(pids), vram_bytes(pids)

        self.memory_bytes, self.vram_bytes = await in_thread(measured, name="memory of an engine")
        if self.memory_bytes is not None:
            self.memory_series.append(self.memory_bytes)
            self.held_bytes = max(self.held_bytes or 0, self.memory_bytes + (self.vram_bytes or 0))

    def forget_process(self) -> None:
        self.memory_bytes = self.vram_bytes = self.tokens_per_s = None
        self.sampled_at, self._tokens_then = 0.0, self._tokens
