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

from engines.process.telemetry import PSS_EVERY_S, Sampler, Telemetry, interval

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
    """Prints what one snapshot costs, with and without PSS, and what a running sampler costs."""
    plain = Telemetry(pid, pss_every_s=1e9)
    first = plain.snapshot()
    per_snapshot = cost_s(plain.snapshot, SNAPSHOTS)
    with_pss = cost_s(Telemetry(pid, pss_every_s=0).snapshot, SNAPSHOTS // 10)
    share = per_snapshot + (with_pss - per_snapshot) / PSS_EVERY_S
    memory = "memory not measured" if first["memory_bytes"] is None else f"{first['memory_bytes'] / 2**20:.0f} MiB"
    print(f"watched: {first['processes']} processes, {first['threads']} threads, {memory} anonymous")
    print(f"snapshot          {1e6 * per_snapshot:8.0f} us CPU (median of {SNAPSHOTS}, back to back)")
    print(f"snapshot with PSS {1e6 * with_pss:8.0f} us CPU (once in {PSS_EVERY_S:g} s)")
    sampled = sampled_share(pid, seconds=8)
    for what, value in {"from single snapshots": share, "of a sampler running 8 s": sampled}.items():
        mark = "reached    " if value < REACH else "not reached"
        print(f"{mark}  share of one core at 1 Hz, {what}: {100 * value:.3f} % (reach < {100 * REACH:g} %)")
    machine = interval(first, plain.snapshot())
    foreign = machine["foreign_cpu_fraction"]
    load = "not measured" if foreign is None else f"{100 * foreign:.0f} %"
    print(f"machine: {os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.2f}, CPU taken by others: {load}")


def sampled_share(pid: int, seconds: float) -> float:
    """CPU of this process, which does nothing but sample at 1 Hz, per second of wall time."""
    with Sampler(pid, 1.0):
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
