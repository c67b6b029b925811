"""The cost of watching one engine: CPU per snapshot, as a share of one core at 1 Hz.

    python -m benchmarks.telemetry [--pid PID]

Without --pid a stand-in is watched: one child of its own, 16 idle threads, 512 MiB touched.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from engines.process.telemetry import MemorySampler, Telemetry, interval, mapped_bytes, private_bytes, process_tree

REACH = 0.01
SNAPSHOTS = 200
STAND_IN = """
import subprocess, sys, threading
ballast = bytearray(b"x") * (512 << 20)
for _ in range(16):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
print("up", flush=True)
input()
"""


def cost_s(work: Callable[[], object], times: int) -> float:
    """Median CPU seconds of this thread for one call, kernel time included."""
    costs = []
    for _ in range(times):
        before = time.thread_time()
        work()
        costs.append(time.thread_time() - before)
    return statistics.median(costs)


def watch(pid: int) -> None:
    """Prints what one CPU snapshot, one sample of memory and one of PSS cost, and what a running sampler costs."""
    telemetry, tree = Telemetry(pid), process_tree(pid)
    first, memory = telemetry.snapshot(), private_bytes(tree)
    shown = "memory not measured" if memory is None else f"{memory / 2**20:.0f} MiB"
    print(f"watched: {len(tree)} processes, {shown} anonymous")
    sample_s = cost_s(lambda: private_bytes(process_tree(pid)), SNAPSHOTS)
    print(f"CPU snapshot     {1e6 * cost_s(telemetry.snapshot, SNAPSHOTS):8.0f} us CPU (median of {SNAPSHOTS})")
    print(f"sample of memory {1e6 * sample_s:8.0f} us CPU")
    print(f"mapped files     {1e6 * cost_s(lambda: mapped_bytes(tree, []), SNAPSHOTS // 10):8.0f} us CPU")
    sampled = sampled_share(pid, seconds=8)
    for what, value in {"from single samples": sample_s, "of a sampler running 8 s": sampled}.items():
        mark = "reached    " if value < REACH else "not reached"
        print(f"{mark}  share of one core at 1 Hz, {what}: {100 * value:.3f}% (reach < {100 * REACH:g}%)")
    machine = interval(first, telemetry.snapshot())
    foreign = machine["foreign_cpu_fraction"]
    load = "not measured" if foreign is None else f"{100 * foreign:.0f}%"
    print(f"machine: {os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.2f}, CPU taken by others: {load}")


def sampled_share(pid: int, seconds: float) -> float:
    """CPU of this process, which does nothing but sample at 1 Hz, per second of wall time."""
    with MemorySampler(pid, 1.0):
        wall, cpu = time.monotonic(), time.process_time()
        time.sleep(seconds)
        return (time.process_time() - cpu) / (time.monotonic() - wall)


def main() -> None:
    """Watches --pid, or a stand-in."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--pid", type=int)
    chosen = parser.parse_args()
    if chosen.pid:
        watch(chosen.pid)
        return
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen([sys.executable, "-c", STAND_IN], stdin=pipe, stdout=pipe, stderr=nowhere) as child:
        assert child.stdout is not None
        child.stdout.readline()
        try:
            watch(child.pid)
        finally:
            child.kill()


if __name__ == "__main__":
    main()
