"""Control groups for tests: a process that is short of CPU, or held by the kernel in state D."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import until

ROOT = Path("/sys/fs/cgroup")
PREFIX = "switchyard-test-"
PERIOD_US = 100_000


@contextlib.contextmanager
def short_of_cpu(*pids: int, share: float) -> Iterator[None]:
    """Give all of these processes together that share of one CPU while the block runs."""
    with _group("cpu") as group:
        (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(int(PERIOD_US * share)))
        with _members(group, pids):
            yield


@contextlib.contextmanager
def frozen(*pids: int) -> Iterator[None]:
    """Hold these processes in the kernel, where SIGKILL does not reach them, until the block ends."""
    with _group("freezer") as group, _members(group, pids):
        state = group / "freezer.state"
        state.write_text("FROZEN")
        until(lambda: state.read_text().strip() == "FROZEN", "the processes to be held")
        try:
            yield
        finally:
            thaw(group)


def groups_of(pid: int) -> set[Path]:
    """The control groups of tests that a process is in."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        places = (line.split(":", 2)[1:] for line in lines if f":/{PREFIX}" in line)
        return {ROOT / controller / path.lstrip("/") for controller, path in places}
    return set()


def thaw(group: Path) -> None:
    """Let go of what `frozen` holds; other groups have nothing to thaw."""
    with contextlib.suppress(OSError):
        (group / "freezer.state").write_text("THAWED")


@contextlib.contextmanager
def _group(controller: str) -> Iterator[Path]:
    group = ROOT / controller / f"{PREFIX}{os.getpid()}-{os.urandom(3).hex()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"needs root and a version 1 {controller} control group: {error}")
    try:
        yield group
    finally:
        until(lambda: not (group / "cgroup.procs").read_text().strip(), "the control group to be empty")
        group.rmdir()


@contextlib.contextmanager
def _members(group: Path, pids: tuple[int, ...]) -> Iterator[None]:
    for pid in pids:
        (group / "cgroup.procs").write_text(str(pid))
    try:
        yield
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (group.parent / "cgroup.procs").write_text(pid)
