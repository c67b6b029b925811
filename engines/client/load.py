"""Send a batch of requests, some at a time, and measure each."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from typing import Any

import aiohttp

from engines.client.client import STALL_S, capture_stream, client_session, parse_capture
from engines.client.record import StreamRecord
from engines.errors import BadInput
from engines.settings import Endpoint
from engines.signals import signals_held

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
    stall_s: float = STALL_S,
    keep_text: bool = True,
) -> list[StreamRecord]:
    """One record per body, in order: closed loop, `concurrency` requests at a time. Ctrl-C is KeyboardInterrupt."""
    if concurrency < 1:
        raise BadInput(f"concurrency {concurrency}: at least 1 request at a time is needed")

    def end() -> None:  # uvloop drops what is raised in its callbacks: a KeyboardInterrupt there would go nowhere
        if not loop.is_closed():
            loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])

    loop = uvloop.new_event_loop() if uvloop else asyncio.new_event_loop()
    gc.freeze()  # the collector looks at new objects only: a full walk takes 67 ms once Prefect is imported
    try:
        with signals_held(end), asyncio.Runner(loop_factory=lambda: loop) as runner:
            return runner.run(_closed_loop(endpoint, bodies, concurrency, stall_s, keep_text))
    except ExceptionGroup as several:  # the first cancelled the others; it is what the caller can act on
        raise several.exceptions[0] from None
    finally:
        gc.unfreeze()


async def _closed_loop(
    endpoint: Endpoint, bodies: Sequence[dict[str, Any]], concurrency: int, stall_s: float, keep_text: bool
) -> list[StreamRecord]:
    records: dict[int, StreamRecord] = {}
    one_parses, in_progress, waiting = asyncio.Lock(), 0, iter(range(len(bodies)))

    async def worker(session: aiohttp.ClientSession) -> None:
        nonlocal in_progress
        for place in waiting:
            in_progress += 1
            try:
                capture = await capture_stream(session, endpoint, bodies[place], stall_s)
            finally:
                in_progress -= 1
            if in_progress:
                await asyncio.sleep(SETTLE_S)
            # one at a time: streams that end together would otherwise all parse in the same turn of the loop
            async with one_parses:
                records[place] = await parse_capture(capture, keep_text=keep_text)

    async with client_session() as session, asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(bodies))):
            group.create_task(worker(session))
    return [records[place] for place in range(len(bodies))]
