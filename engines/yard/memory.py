"""Memory of a stopped engine, seen to come back before another one takes its place."""

from __future__ import annotations

import asyncio
import time

from engines.errors import SwitchyardError
from engines.model.free_memory import FreeMemory, free_memory

SHARE = 0.75  # of what the stopped engine held, as Ollama waits for; the rest is the driver's own
POLL_S = 0.25
SETTLES_S = 2.0  # where NVML does not say how much a process holds


class MemoryHeld(SwitchyardError):
    """A stopped engine's memory did not come back in time."""


async def memory_back(vram_held: int | None, before: FreeMemory, within_s: float) -> str:
    """What was seen to come back since `before`, in words. Raises MemoryHeld when VRAM does not come back.

    RAM is back when the process is gone, and it is gone. VRAM is the driver's to give back, and may take a while.
    """
    if before.vram_bytes is None:
        return "its memory is back: the process is gone, and there is no GPU"
    began, seen = time.monotonic(), 0
    while True:
        waited, last = time.monotonic() - began, seen
        free = await asyncio.to_thread(free_memory)
        seen = max((free.vram_bytes or 0) - before.vram_bytes, 0)
        if vram_held is not None and seen >= SHARE * vram_held:
            return f"VRAM is back: {mib(seen)} of {mib(vram_held)} after {waited:.1f} s"
        if vram_held is None and waited >= SETTLES_S and seen == last:
            return f"VRAM has settled {waited:.1f} s after the stop, {mib(seen)} more are free"
        if waited > within_s:
            raise MemoryHeld(
                f"only {mib(seen)} of {mib(vram_held or 0)} of VRAM came back within {waited:.0f} s; "
                "`nvidia-smi` shows who holds it"
            )
        await asyncio.sleep(POLL_S)


def mib(n_bytes: int) -> str:
    """`512 MiB`."""
    return f"{n_bytes / 2**20:.0f} MiB"
