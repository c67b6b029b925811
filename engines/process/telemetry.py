"""What engine and machine were doing: memory, CPU, pressure and GPU of a process tree, as plain dicts.

A field that could not be read is None, never 0: a dead process, a kernel without PSI, a machine without NVML, or any
system but Linux. CPU time is counted per process between snapshots, so that a child that ends takes nothing back.

Memory of an engine is RssAnon + VmSwap (`memory_bytes`): what it would need again elsewhere, swapped out or not
(ollama#18106: RSS looked clean while 9 GiB sat in swap). A memory-mapped model is not in it; PSS shows that.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

PSS_EVERY_S = 30.0  # smaps_rollup walks the page tables: milliseconds per GB mapped
KEPT_SAMPLES = 3600

_LINUX = sys.platform.startswith("linux")
_PROC = Path("/proc")
_TICK_S = 1 / os.sysconf("SC_CLK_TCK") if _LINUX else 0.01
_CPU_SENSORS = frozenset({"coretemp", "k10temp", "zenpower", "cpu_thermal"})

Snapshot = dict[str, Any]


class Telemetry:
    """Reads one engine's process tree, our own, the machine and the GPUs. Not for two threads at once."""

    def __init__(self, pid: int, *, pss_every_s: float = PSS_EVERY_S) -> None:
        self.pid = pid
        self._started = _start_ticks(pid)
        self._cpu = _CpuLedger()
        self._pss_every_ns = pss_every_s * 1e9
        self._pss_due_ns = 0.0
        self._gpus = _Gpus()
        self._sensor = _cpu_sensor()
        self._freq_files = sorted(Path("/sys/devices/system/cpu/cpufreq").glob("policy*/scaling_cur_freq"))

    def snapshot(self) -> Snapshot:
        """All fields now. Times and `*_cpu_s` only mean something as differences: see `interval`.

        `pss_bytes` is read every `pss_every_s` and None in between. `client_cpu_s` is this process alone;
        `own_cpu_s` adds its children, without the engine's tree. `psi_cpu_some_avg10` is a fraction, no percentage.
        """
        engine = process_tree(self.pid) if self._alive() else []
        own = [pid for pid in process_tree(os.getpid()) if pid not in set(engine)]
        cpu_s = self._cpu.add(engine, own)
        return {
            "t_ns": time.monotonic_ns(),
            "pid": self.pid,
            "alive": bool(engine) if _LINUX else None,
            **_machine(),
            "engine_cpu_s": cpu_s["engine"] if engine else None,
            "own_cpu_s": cpu_s["own"] if _LINUX else None,
            "client_cpu_s": time.process_time(),
            **_tree_memory(engine),
            "pss_bytes": self._pss(engine),
            "fds": _total(_count_fds(pid) for pid in engine),
            "cpu_mhz": _mean(_read_number(path, 1e-3) for path in self._freq_files),
            "cpu_temperature_c": _read_number(self._sensor, 1e-3) if self._sensor else None,
            "gpus": self._gpus.read(engine),
        }

    def _alive(self) -> bool:
        # the kernel hands pids out again: the start time tells a successor from our process
        return self._started is not None and _start_ticks(self.pid) == self._started

    def _pss(self, engine: list[int]) -> int | None:
        now = time.monotonic_ns()
        if not engine or now < self._pss_due_ns:
            return None
        self._pss_due_ns = now + self._pss_every_ns
        return _total(_kib_field(_PROC / str(pid) / "smaps_rollup", "Pss:") for pid in engine)


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


def peak_rss(pid: int) -> int | None:
    """VmHWM of one process in bytes: the kernel's own peak of *all* resident pages, mapped model files included.

    It misses no spike, but it is not RssAnon and knows no swap; for those see `peak_memory` over samples.
    """
    return _kib_field(_PROC / str(pid) / "status", "VmHWM:")


def peak_memory(samples: Iterable[Snapshot]) -> int | None:
    """The largest RssAnon + VmSwap of the tree among `samples`, in bytes; what lies between samples is not seen."""
    return max((s["memory_bytes"] for s in samples if s["memory_bytes"] is not None), default=None)


class Sampler:
    """A thread that takes a snapshot every `every_s`: the last `keep` are in `samples`, each goes to `on_sample` too.

    A context manager. An error of `on_sample` ends the sampling and is raised by `stop`.
    """

    def __init__(
        self,
        pid: int,
        every_s: float = 1.0,
        *,
        keep: int = KEPT_SAMPLES,
        on_sample: Callable[[Snapshot], None] | None = None,
        pss_every_s: float = PSS_EVERY_S,
    ) -> None:
        self._telemetry = Telemetry(pid, pss_every_s=pss_every_s)
        self._every_s = every_s
        self._on_sample = on_sample
        self._samples: deque[Snapshot] = deque(maxlen=keep)
        self._stopping = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"telemetry-{pid}", daemon=True)

    @property
    def samples(self) -> list[Snapshot]:
        """The snapshots kept so far, oldest first."""
        return list(self._samples)

    def start(self) -> None:
        """Begins; the first snapshot is taken at once."""
        self._thread.start()

    def stop(self) -> None:
        """Ends, after a last snapshot; safe to call twice."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()
        error, self._error = self._error, None
        if error:
            raise error

    def __enter__(self) -> Sampler:
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
        sample = self._telemetry.snapshot()
        self._samples.append(sample)
        if self._on_sample:
            self._on_sample(sample)


# --- processes ----------------------------------------------------------------------------------------------------


def process_tree(pid: int) -> list[int]:
    """`pid` and its living descendants, parents first; empty when it is gone or where there is no /proc."""
    if not _LINUX or not (_PROC / str(pid)).exists():
        return []
    tree = [pid]
    for parent in tree:  # grows while we walk
        tree.extend(_children(parent))
    return tree


def _children(pid: int) -> list[int]:
    """Children by /proc/PID/task/TID/children: a few small reads, where a scan of all processes costs milliseconds."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                found.extend(map(int, _read(f"/proc/{pid}/task/{thread}/children").split()))
    return found


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


_STATUS_FIELDS = {
    "rss_anon_bytes": "RssAnon:",
    "rss_file_bytes": "RssFile:",
    "swap_bytes": "VmSwap:",
    "threads": "Threads:",
}


def _tree_memory(pids: list[int]) -> dict[str, int | None]:
    """Sums over the tree; None as soon as there is no process to ask."""
    rows = [row for row in map(_status, pids) if row]
    sums: dict[str, int | None] = {name: _total(row.get(name) for row in rows) for name in _STATUS_FIELDS}
    anon, swap = sums["rss_anon_bytes"], sums["swap_bytes"]
    return {
        **sums,
        "memory_bytes": None if anon is None or swap is None else anon + swap,
        "processes": len(rows) or None,
    }


def _status(pid: int) -> dict[str, int]:
    try:
        lines = _read(f"/proc/{pid}/status").splitlines()
    except OSError:
        return {}
    values = {line.split(None, 1)[0]: line.split()[1:] for line in lines if line.strip()}
    found = {name: values[label] for name, label in _STATUS_FIELDS.items() if values.get(label)}
    return {name: int(words[0]) * (1024 if words[-1] == "kB" else 1) for name, words in found.items()}


def _kib_field(path: Path, label: str) -> int | None:
    try:
        for line in _read(path).splitlines():
            if line.startswith(label):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _count_fds(pid: int) -> int | None:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:  # gone, or another user's
        return None


# --- machine ------------------------------------------------------------------------------------------------------


def _machine() -> dict[str, float | int | None]:
    ticks = _cpu_ticks()
    psi = _pressure()
    return {
        "cpus": os.cpu_count(),
        "cpu_total_s": sum(ticks) * _TICK_S if ticks else None,
        "cpu_busy_s": (ticks[0] + ticks[1] + ticks[2]) * _TICK_S if ticks else None,
        "cpu_steal_s": ticks[7] * _TICK_S if ticks else None,
        "psi_cpu_some_avg10": float(psi["avg10"]) / 100 if psi else None,
        "psi_cpu_some_us": int(psi["total"]) if psi else None,
    }


def _cpu_ticks() -> list[int] | None:
    """user, nice, system, idle, iowait, irq, softirq, steal of all CPUs (proc(5)); guest time is already in user."""
    try:
        return [int(word) for word in _read("/proc/stat").split("\n", 1)[0].split()[1:9]]
    except OSError:
        return None


def _pressure() -> dict[str, str] | None:
    """The `some` line of /proc/pressure/cpu; None on a kernel without PSI."""
    try:
        line = _read("/proc/pressure/cpu").split("\n", 1)[0]
    except OSError:
        return None
    return dict(word.split("=") for word in line.split()[1:])


def _cpu_sensor() -> Path | None:
    for name in sorted(Path("/sys/class/hwmon").glob("hwmon*/name")):
        with contextlib.suppress(OSError):
            if _read(name).strip() in _CPU_SENSORS and (name.parent / "temp1_input").exists():
                return name.parent / "temp1_input"
    return None


# --- GPU ----------------------------------------------------------------------------------------------------------


def private_bytes(pids: Iterable[int]) -> int | None:
    """RssAnon + swap of these processes together; None where there is none to ask."""
    return _tree_memory(list(pids))["memory_bytes"]


def vram_bytes(pids: Iterable[int]) -> int | None:
    """GPU memory that these processes hold together; None without NVML, or where it does not see them."""
    return _total(gpu["process_bytes"] for gpu in _gpus().read(list(pids)) or ())


@cache
def _gpus() -> _Gpus:
    return _Gpus()


class _Gpus:
    """NVML, if there is one."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        except Exception:  # no module, no driver, no device: all mean the same here, nothing to measure
            self._handles = []

    def read(self, pids: list[int]) -> list[dict[str, Any]] | None:
        """One dict a GPU; None without NVML. `process_bytes` is None when NVML does not see the tree (containers)."""
        if not self._handles:
            return None
        return [self._read_one(index, handle, set(pids)) for index, handle in enumerate(self._handles)]

    def _read_one(self, index: int, handle: Any, pids: set[int]) -> dict[str, Any]:
        memory = self._ask(self._nvml.nvmlDeviceGetMemoryInfo, handle)
        rates = self._ask(self._nvml.nvmlDeviceGetUtilizationRates, handle)
        milliwatts = self._ask(self._nvml.nvmlDeviceGetPowerUsage, handle)
        return {
            "index": index,
            "used_bytes": memory.used if memory else None,
            "total_bytes": memory.total if memory else None,
            "process_bytes": self._used_by(handle, pids),
            "utilisation": rates.gpu / 100 if rates else None,
            "power_w": milliwatts / 1000 if milliwatts is not None else None,
        }

    def _used_by(self, handle: Any, pids: set[int]) -> int | None:
        # a Vulkan engine is listed among the graphics processes, or among both
        used: dict[int, int] = {}
        for ask in (self._nvml.nvmlDeviceGetComputeRunningProcesses, self._nvml.nvmlDeviceGetGraphicsRunningProcesses):
            for process in self._ask(ask, handle) or ():
                if process.pid in pids and process.usedGpuMemory is not None:
                    used[process.pid] = max(used.get(process.pid, 0), process.usedGpuMemory)
        return sum(used.values()) if used else None

    def _ask(self, question: Callable[[Any], Any], handle: Any) -> Any:
        try:
            return question(handle)
        except self._nvml.NVMLError:  # not supported by this card, or the card is gone
            return None


# --- small things -------------------------------------------------------------------------------------------------


def _read(path: str | Path) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def _read_number(path: Path, factor: float) -> float | None:
    try:
        return int(_read(path)) * factor
    except (OSError, ValueError):
        return None


def _total(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _delta(before: Snapshot, after: Snapshot, key: str) -> float | None:
    earlier, later = before.get(key), after.get(key)
    return None if earlier is None or later is None else later - earlier


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole
