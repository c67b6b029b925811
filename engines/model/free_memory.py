"""Memory that a new process may take on this machine now."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import psutil

Device = Literal["ram", "vram"]


@dataclass(frozen=True)
class FreeMemory:
    """Free bytes; None where they cannot be read (VRAM: or there is no NVIDIA GPU)."""

    ram_bytes: int | None
    vram_bytes: int | None = None
    n_gpus: int = 0

    def of(self, device: Device) -> int | None:
        return self.ram_bytes if device == "ram" else self.vram_bytes


def free_memory() -> FreeMemory:
    """What is free now: RAM under the tightest cgroup limit, and VRAM over all NVIDIA GPUs."""
    available, limited = psutil.virtual_memory().available, _cgroup_free()
    return FreeMemory(available if limited is None else min(available, limited), *_free_vram())


@cache
def nvml() -> tuple[Any, list[Any]]:
    """NVML and its devices; (None, []) without any that can be used."""
    try:
        import pynvml  # 70 ms that only a process which asks pays

        pynvml.nvmlInit()
        return pynvml, [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except Exception:  # no module, no driver, no permission, no device: all mean the same, nothing to measure
        return None, []


def _free_vram() -> tuple[int | None, int]:
    library, devices = nvml()
    try:
        free = [int(library.nvmlDeviceGetMemoryInfo(device).free) for device in devices]
    except library.NVMLError:
        return None, 0
    return (sum(free), len(free)) if free else (None, 0)


def _cgroup_free(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes left under the tightest memory limit of this process's cgroups (v2 or v1); None without a limit."""
    left = [
        free
        for limit, usage, folder in _cgroup_folders(root, own)
        if (free := _left(folder / limit, folder / usage, folder / "memory.stat")) is not None
    ]
    return min(left, default=None)


def _cgroup_folders(root: Path, own: Path) -> list[tuple[str, str, Path]]:
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        controllers, path = line.split(":", 2)[1:]
        v1 = "memory" in controllers.split(",")
        if controllers and not v1:
            continue
        base = root / "memory" if v1 else root
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
        leaf = base / path.lstrip("/")
        found += [(*names, folder) for folder in (leaf, *leaf.parents) if folder.is_relative_to(base)]
    return found


def _left(limit: Path, usage: Path, stat: Path) -> int | None:
    try:
        ceiling, used = int(limit.read_text()), int(usage.read_text())
    except (OSError, ValueError):  # "max" is how v2 spells "no limit"
        return None
    if ceiling >= 1 << 60:  # how v1 spells it
        return None
    reclaimable = 0
    with contextlib.suppress(OSError, ValueError):
        pairs = dict(line.split()[:2] for line in stat.read_text().splitlines())
        reclaimable = int(pairs.get("inactive_file", 0))
    return max(ceiling - used + reclaimable, 0)
