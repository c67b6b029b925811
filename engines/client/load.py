"""Send a batch of requests, in closed or open loop, and measure each."""

from __future__ import annotations

import asyncio
import gc
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from engines.client.client import STALL_S, capture_stream, client_session, parse_capture
from engines.client.record import StreamRecord
from engines.errors import BadInput
from engines.settings import Endpoint

try:
    import uvloop
except ImportError:  # not built for Windows; the standard loop measures too, about 1 ms later at 32 streams
    uvloop = None  # type: ignore[assignment, unused-ignore]

SETTLE_S = 0.002  # streams of one batch end together: the last chunks of all are stamped before the first is parsed


def measure(
    endpoint: Endpoint,
    bodies: Sequence[dict[str, Any]],
    *,
    concurrency: int = 1,
    open_loop_rate: float | None = None,
    seed: int = 0,
    stall_s: float = STALL_S,
    keep_text: bool = True,
    on_record: Callable[[StreamRecord], None] | None = None,
) -> list[StreamRecord]:
    """One record per body, in the order of `bodies`.

    Closed loop by default: `concurrency` requests at a time. With `open_loop_rate` (requests per second) requests
    leave on an absolute schedule with exponential gaps drawn from `seed`, however many are in progress; their latency
    counts from the schedule (no coordinated omission) and `dispatch_delay_ms` says how late the client itself was.
    `on_record` is called in this thread as each request ends: keep it short, the other streams wait for it.
    Ctrl-C closes the connections and comes out as KeyboardInterrupt.
    """
    if concurrency < 1:
        raise BadInput(f"concurrency {concurrency}: at least 1 request at a time is needed")
    if open_loop_rate is not None and not (open_loop_rate > 0 and math.isfinite(open_loop_rate)):
        raise BadInput(f"open_loop_rate {open_loop_rate}: a positive number of requests per second is needed")
    load = _Load(endpoint, bodies, stall_s, keep_text, on_record)
    gc.freeze()  # the collector looks at new objects only: a full walk takes 67 ms once Prefect is imported
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop if uvloop else None) as runner:
            return runner.run(load.closed(concurrency) if open_loop_rate is None else load.open(open_loop_rate, seed))
    except ExceptionGroup as several:  # the first cancelled the others; it is what the caller can act on
        raise several.exceptions[0] from None
    finally:
        gc.unfreeze()


@dataclass
class _Load:
    """Sends the bodies, in closed or in open loop, and keeps the records in their order."""

    endpoint: Endpoint
    bodies: Sequence[dict[str, Any]]
    stall_s: float
    keep_text: bool
    on_record: Callable[[StreamRecord], None] | None
    records: dict[int, StreamRecord] = field(default_factory=dict)
    one_parses: asyncio.Lock = field(default_factory=asyncio.Lock)
    in_progress: int = 0

    async def closed(self, concurrency: int) -> list[StreamRecord]:
        places = iter(range(len(self.bodies)))

        async def worker() -> None:
            for place in places:
                await self._send(session, place, None)

        async with client_session() as session, asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(self.bodies))):
                group.create_task(worker())
        return self._in_order()

    async def open(self, rate: float, seed: int) -> list[StreamRecord]:
        dice, due_ns = random.Random(seed), time.monotonic_ns()
        async with client_session() as session, asyncio.TaskGroup() as group:
            for place in range(len(self.bodies)):
                due_ns += int(dice.expovariate(rate) * 1e9)
                # uvloop's timers count whole ms and may ring a little early
                while (left_ns := due_ns - time.monotonic_ns()) > 0:  # noqa: ASYNC110 - it waits for a time, not an event
                    await asyncio.sleep(left_ns / 1e9)
                group.create_task(self._send(session, place, due_ns))
        return self._in_order()

    async def _send(self, session: aiohttp.ClientSession, place: int, scheduled_ns: int | None) -> None:
        self.in_progress += 1
        try:
            body = self.bodies[place]
            capture = await capture_stream(session, self.endpoint, body, self.stall_s, scheduled_ns=scheduled_ns)
        finally:
            self.in_progress -= 1
        if self.in_progress:
            await asyncio.sleep(SETTLE_S)
        # one at a time: streams that end together would otherwise all parse in the same turn of the loop
        async with self.one_parses:
            record = await parse_capture(capture, keep_text=self.keep_text)
        self.records[place] = record
        if self.on_record:
            self.on_record(record)

    def _in_order(self) -> list[StreamRecord]:
        return [self.records[place] for place in range(len(self.bodies))]
