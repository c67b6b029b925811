"""Work in a thread that somebody waits for: its result, its end in time, and a cancellation at any moment of it."""

import asyncio
import threading

import pytest

from engines.deadline import in_thread


async def cancelled_after(steps):
    """Whether a wait is cancelled that is asked to end `steps` of the loop after its work has ended; None: too late."""
    begins, told = threading.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    call_soon = loop.call_soon_threadsafe

    def telling(*told_what):
        call_soon(*told_what)
        told.set()

    loop.call_soon_threadsafe = telling
    task = asyncio.ensure_future(in_thread(begins.wait, name="work", within_s=60))
    await asyncio.sleep(0)
    begins.set()
    assert told.wait(30)
    for _ in range(steps):
        await asyncio.sleep(0)
    if not task.cancel():
        return None
    await asyncio.wait([task])
    return task.cancelled()


def test_a_cancellation_that_comes_with_the_end_of_the_work_is_not_lost():
    """A yard that was told to stop at once went on for ever where it was."""
    found = [asyncio.run(cancelled_after(steps)) for steps in range(8)]
    assert set(found) == {True, None}


def test_work_that_is_late_is_left_behind():
    ends = threading.Event()
    with pytest.raises(TimeoutError):
        asyncio.run(in_thread(ends.wait, name="work", within_s=0.05))
    ends.set()
