"""Memory and CPU time of an engine's process tree, CPU time of ours and of the machine.

A field that could not be read is None, never 0: a dead process, a kernel without PSI, or any system but Linux. CPU time
is counted per process between snapshots, so that a child that ends takes nothing back.

Memory of an engine is RssAnon + VmSwap (`private_bytes`): what it would need again elsewhere, swapped out or not
(ollama#18106: RSS looked clean while 9 GiB sat in swap), pages of forked processes once. A memory-mapped model is not
in it; `mapped_bytes` has it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from engines.model.free_memory import nvml

_LINUX = sys.platform.startswith("linux")
_PROC = Path("/proc")
_TICK_S = 1 / os.sysconf("SC_CLK_TCK") if _LINUX else 0.01

Snapshot = dict[str, Any]


class Telemetry:
    """CPU time of one engine's process tree, of our own, and of the machine. Not for two threads at once."""

    def __init__(self, pid: int) -> None:
        self._tree = ProcessTree(pid)
        self._cpu = _CpuLedger()

    def snapshot(self) -> Snapshot:
        """All fields now. Times and `*_cpu_s` only mean something as differences: see `interval`.

        `client_cpu_s` is this process alone; `own_cpu_s` adds its children, without the engine's tree.
        """
        engine = self._tree.pids()
        own = [pid for pid in process_tree(os.getpid()) if pid not in set(engine)]
        cpu_s = self._cpu.add(engine, own)
        return {
            "t_ns": time.monotonic_ns(),
            **_machine(),
            "engine_cpu_s": cpu_s["engine"] if engine else None,
            "own_cpu_s": cpu_s["own"] if _LINUX else None,
            "client_cpu_s": time.process_time(),
        }


def interval(before: Snapshot, after: Snapshot) -> dict[str, float | None]:
    """What happened between two snapshots of one Telemetry: fractions of all CPUs of the machine, and CPU seconds.

    foreign = user + nice + system time of the machine - engine tree - our own tree. Interrupts are left out: loopback
    traffic of the measurement itself causes them. CPU time comes in ticks of 10 ms: keep intervals above a second.
    `psi_cpu_some` is the share of wall time in which some task waited for a CPU (the engine's own tasks too).
    """
    wall_s = (after["t_ns"] - before["t_ns"]) / 1e9
    total, busy, steal = (_delta(before, after, key) for key in ("cpu_total_s", "cpu_busy_s", "cpu_steal_s"))
    engine, own, client = (_delta(before, after, key) for key in ("engine_cpu_s", "own_cpu_s", "client_cpu_s"))
    psi_us = _delta(before, after, "psi_cpu_some_us")
    foreign = None if busy is None or engine is None or own is None else max(0.0, busy - engine - own)
    return {
        "wall_s": wall_s,
        "foreign_cpu_fraction": _ratio(foreign, total),
        "busy_cpu_fraction": _ratio(busy, total),
        "steal_fraction": _ratio(steal, total),
        "psi_cpu_some": None if psi_us is None else _ratio(psi_us / 1e6, wall_s),
        "engine_cpu_s": engine,
        "own_cpu_s": own,
        "client_cpu_s": client,
    }


class MemorySampler:
    """A thread that reads the memory of a process tree every `every_s`; `stop` raises what ended it early."""

    def __init__(
        self, pid: int, every_s: float = 1.0, *, on_sample: Callable[[int | None], None] = lambda _: None
    ) -> None:
        self.peak: int | None = None  # bytes; what lies between samples is not seen
        self._tree = ProcessTree(pid)
        self._every_s = every_s
        self._on_sample = on_sample
        self._stopping = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"memory of {pid}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends, after a last sample; safe to call twice."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()
        error, self._error = self._error, None
        if error:
            raise error

    def __enter__(self) -> MemorySampler:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        # what went wrong inside the context matters more than what went wrong while watching it
        with contextlib.suppress(*(() if error is None else (Exception,))):
            self.stop()

    def _run(self) -> None:
        due = time.monotonic()
        try:
            while not self._stopping.wait(max(0.0, due - time.monotonic())):
                self._take()
                due = max(due + self._every_s, time.monotonic())
            self._take()
        except Exception as problem:
            self._error = problem

    def _take(self) -> None:
        memory = private_bytes(self._tree.pids())
        if memory is not None:
            self.peak = max(memory, self.peak or 0)
        self._on_sample(memory)


class ProcessTree:
    """The tree under `pid`; empty once that process has ended, although the kernel hands its pid out again."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._started = _start_ticks(pid)

    def pids(self) -> list[int]:
        alive = self._started is not None and _start_ticks(self._pid) == self._started
        return process_tree(self._pid) if alive else []


def process_tree(pid: int) -> list[int]:
    """`pid` and its living descendants, parents first; empty when it is gone or where there is no /proc."""
    if not _LINUX or not (_PROC / str(pid)).exists():
        return []
    tree = [pid]
    for parent in tree:  # grows while we walk
        # a few small reads, where a scan of all processes costs milliseconds
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{parent}/task"):
                with contextlib.suppress(OSError):
                    tree.extend(map(int, _read(f"/proc/{parent}/task/{thread}/children").split()))
    return tree


class _CpuLedger:
    """CPU seconds of two changing sets of processes, the engine's and ours; neither ever falls.

    A child that lived between two snapshots is found in its parent's waited-for time. One that we had seen is in there
    too once it is reaped (an engine that we stopped, say) and is subtracted: its time has been counted.
    """

    def __init__(self) -> None:
        self._sums = {"engine": 0.0, "own": 0.0}
        self._last: dict[tuple[int, int], tuple[float, float]] = {}

    def add(self, engine: list[int], own: list[int]) -> dict[str, float]:
        groups = {"engine": _cpu_of(engine), "own": _cpu_of(own)}
        living = groups["engine"] | groups["own"]
        counted = sum(itself + waited for key, (itself, waited) in self._last.items() if key not in living)
        for name, group in groups.items():
            before = [self._last.get(key, (0.0, 0.0)) for key in group]
            itself = sum(now[0] - last[0] for now, last in zip(group.values(), before, strict=True))
            waited = sum(now[1] - last[1] for now, last in zip(group.values(), before, strict=True))
            self._sums[name] += itself + max(0.0, waited - counted)
        self._last = living
        return dict(self._sums)


def _cpu_of(pids: Iterable[int]) -> dict[tuple[int, int], tuple[float, float]]:
    """(pid, start) -> seconds of the process itself and of the children it has waited for."""
    found = {}
    for pid in pids:
        fields = _stat_fields(pid)
        if fields:
            utime, stime, cutime, cstime = map(int, fields[11:15])
            found[pid, int(fields[19])] = ((utime + stime) * _TICK_S, (cutime + cstime) * _TICK_S)
    return found


def _stat_fields(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third on (the name before them may hold blanks); None when it is gone."""
    try:
        fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields  # a zombie holds nothing any more


def _start_ticks(pid: int) -> int | None:
    fields = _stat_fields(pid)
    return int(fields[19]) if fields else None


def private_bytes(pids: Iterable[int]) -> int | None:
    """RssAnon + swap of these processes together; None where there is none to ask.

    Of those that run the same program it is their share (Pss): what a child has had since it was forked counts once.
    """
    programs = {pid: _program(pid) for pid in pids}
    several = {name for name, n in Counter(programs.values()).items() if name and n > 1}
    return _total(_private(pid, is_shared=name in several) for pid, name in programs.items())


def _private(pid: int, *, is_shared: bool) -> int | None:
    # the share is found by walking the page tables, milliseconds per GB: only where it can differ
    share = _kib(pid, "smaps_rollup", "Pss_Anon:", "SwapPss:") if is_shared else None
    return _kib(pid, "status", "RssAnon:", "VmSwap:") if share is None else share


def _program(pid: int) -> str | None:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/exe")
    return None


def mapped_bytes(pids: Iterable[int], files: Iterable[Path]) -> int | None:
    """Resident bytes of these files as the processes map them, each file once, whoever else maps it too.

    None where no process can be asked. Walks the page tables: milliseconds per GB mapped.
    """
    wanted, found, is_seen = {str(file.resolve()) for file in files}, dict[str, int](), False
    for pid in pids:
        resident, path = dict[str, int](), ""
        with contextlib.suppress(OSError):
            for line in _read(f"/proc/{pid}/smaps").splitlines():
                words = line.split(maxsplit=5)
                if not words[0].endswith(":"):  # a mapping: addresses, permissions, offset, device, inode, path
                    path = words[5] if len(words) > 5 else ""
                elif path in wanted and words[0] == "Rss:":
                    resident[path] = resident.get(path, 0) + int(words[1]) * 1024
            is_seen = True
        found |= {file: max(n_bytes, found.get(file, 0)) for file, n_bytes in resident.items()}
    return sum(found.values()) if is_seen else None


def _kib(pid: int, file: str, *labels: str) -> int | None:
    """The sum of the fields `labels` of /proc/PID/`file`, in bytes; None where one is missing."""
    found = []
    with contextlib.suppress(OSError):
        found = [int(line.split()[1]) for line in _read(f"/proc/{pid}/{file}").splitlines() if line.startswith(labels)]
    return sum(found) * 1024 if len(found) == len(labels) else None


def _machine() -> dict[str, float | None]:
    found: dict[str, float | None] = dict.fromkeys(("cpu_total_s", "cpu_busy_s", "cpu_steal_s", "psi_cpu_some_us"))
    with contextlib.suppress(OSError):
        # user, nice, system, idle, iowait, irq, softirq, steal of all CPUs (proc(5)); guest time is already in user
        ticks = [int(word) * _TICK_S for word in _read("/proc/stat").split("\n", 1)[0].split()[1:9]]
        found |= {"cpu_total_s": sum(ticks), "cpu_busy_s": sum(ticks[:3]), "cpu_steal_s": ticks[7]}
    with contextlib.suppress(OSError):  # a kernel without PSI
        found["psi_cpu_some_us"] = int(_read("/proc/pressure/cpu").split("\n", 1)[0].rpartition("total=")[2])
    return found


def vram_bytes(pids: Iterable[int]) -> int | None:
    """GPU memory that these processes hold together; None without NVML, or where it does not see them (containers)."""
    library, devices = nvml()
    ours = set(pids)
    return _total(_used_on(library, device, ours) for device in devices)


def _used_on(library: Any, device: Any, pids: set[int]) -> int | None:
    used: dict[int, int] = {}
    # a Vulkan engine is listed among the graphics processes, or among both
    for ask in (library.nvmlDeviceGetComputeRunningProcesses, library.nvmlDeviceGetGraphicsRunningProcesses):
        with contextlib.suppress(library.NVMLError):  # not supported by this card, or the card is gone
            for process in ask(device):
                if process.pid in pids and process.usedGpuMemory is not None:
                    used[process.pid] = max(used.get(process.pid, 0), process.usedGpuMemory)
    return sum(used.values()) if used else None


def _read(path: str | Path) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def _total(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _delta(before: Snapshot, after: Snapshot, key: str) -> float | None:
    earlier, later = before.get(key), after.get(key)
    return None if earlier is None or later is None else later - earlier


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole
