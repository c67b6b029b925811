"""Where an engine's weights are: by its processes' GPU memory, by the buffers that GGML prints, by devices it has open.

Not by "offloaded N/M layers to GPU": a machine without a GPU prints that as well, over buffers on the CPU. Builds of
2026 print neither unless they are told to (-lv 4); a process that has no GPU open computes on the CPU all the same.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from engines.process.process import ManagedProcess
from engines.process.telemetry import vram_bytes
from engines.units import size

Where = Literal["gpu", "cpu", "unknown"]
# `load_tensors:   CPU_Mapped model buffer size =   138.10 MiB`
BUFFER = re.compile(r"(\S+) model buffer size\s*=\s*([0-9]+(?:\.[0-9]+)?) MiB")
GPUS = re.compile(r"/dev/(nvidia\d+|dri/(renderD|card)\d+|kfd|dxg|accel/\w+|davinci\d+)")
IN_RAM = re.compile(r"CPU(_\w+)?|\w+_Host|BLAS|AMX|HBM|ACCEL|RAM")  # names of GGML's buffers that no GPU computes on


@dataclass(frozen=True)
class Device:
    """`where` the weights are, and the evidence in words; no evidence is "unknown"."""

    where: Where
    why: str


def weights_on(child: ManagedProcess) -> Device:
    """The device of an engine that serves."""
    pids = [process.pid for process in child.tree()]
    return device_of(child.buffer_lines, vram_bytes(pids), has_gpu_open(pids))


def device_of(lines: Sequence[str], vram: int | None, gpu_open: bool | None) -> Device:
    """The device by what was printed, by the GPU memory that its processes hold and whether one has a GPU open.

    None of the latter two: it cannot be seen.
    """
    mib: dict[str, float] = {}
    for line in lines:
        if (found := BUFFER.search(line)) is not None:
            mib[found[1]] = mib.get(found[1], 0.0) + float(found[2])
    buffers = ", ".join(f"{size(int(amount * 2**20))} in {name}" for name, amount in mib.items())
    if any(IN_RAM.fullmatch(name) is None for name in mib):
        return Device("gpu", buffers)
    if vram:
        return Device("gpu", f"its processes hold {size(vram)} of GPU memory")
    if mib:
        return Device("cpu", f"all its weights are in RAM: {buffers}")
    if gpu_open is False:
        return Device("cpu", "none of its processes has a GPU open")
    return Device("unknown", "it prints no buffers of weights, and no GPU memory of its processes is seen")


def has_gpu_open(pids: Iterable[int]) -> bool | None:
    """Whether one of these processes has a GPU's device file open; None where the system does not show that."""
    seen = None
    for pid in pids if sys.platform == "linux" else ():
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                seen = seen or False
                with contextlib.suppress(OSError):  # closed meanwhile
                    if GPUS.fullmatch(os.readlink(f"/proc/{pid}/fd/{fd}")):
                        return True
    return seen
