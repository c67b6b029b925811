"""Telemetry on real child processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engines.process.telemetry import (
    MemorySampler,
    ProcessTree,
    Telemetry,
    interval,
    mapped_bytes,
    private_bytes,
    process_tree,
    vram_bytes,
)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

MIB = 1 << 20
PARENT = f"""
import subprocess, sys
ballast = bytearray(b"x") * {32 * MIB}
child = subprocess.Popen([sys.executable, "-c", "print('up', flush=True); input()"], stdin=subprocess.PIPE)
input()
sum(i * i for i in range(3_000_000))
print("worked", flush=True)
input()
"""


@contextmanager
def busy_tree() -> Iterator[subprocess.Popen[str]]:
    """A parent with 32 MiB and one child; each line on its stdin lets it go one step further."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", PARENT], text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        try:
            yield process
        finally:
            process.kill()


def say_go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_memory_is_summed_over_the_tree() -> None:
    """The parent's 32 MiB and its child are both seen."""
    with busy_tree() as process:
        tree = process_tree(process.pid)
        whole, alone = private_bytes(tree), private_bytes([process.pid])
    assert len(tree) == 2
    assert whole is not None
    assert alone is not None
    assert whole > alone > 32 * MIB


def test_what_a_forked_child_shares_counts_once() -> None:
    """vLLM forks its engine: all that the parent had imported would be counted for each of its processes."""
    fork_it = f"""if True:
        import os
        ballast = bytearray(b"x") * {32 * MIB}
        until_it_ends, ours = os.pipe()
        if os.fork():
            input()
        else:
            os.close(ours)
            own = bytearray(b"y") * {8 * MIB}
            print("up", flush=True)
            os.read(until_it_ends, 1)
    """
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", fork_it], **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        tree = process_tree(process.pid)
        whole = private_bytes(tree)
        process.kill()
    assert len(tree) == 2
    assert whole is not None
    assert 40 * MIB < whole < 64 * MIB, "32 of both and 8 of the child"


def test_a_mapped_file_counts_once_whoever_else_maps_it(tmp_path: Path) -> None:
    """Two processes of a tree that map it hold one set of pages; a name that points to it is the same file."""
    file, alias = tmp_path / "weights.bin", tmp_path / "alias.bin"
    file.write_bytes(bytes(8 * MIB))
    alias.symlink_to(file)
    map_it = (
        f"import mmap; f = open({str(file)!r}, 'rb'); m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ);"
        "sum(m[::4096]); print('up', flush=True); input()"
    )
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        subprocess.Popen([sys.executable, "-c", map_it], **pipes) as one,
        subprocess.Popen([sys.executable, "-c", map_it], **pipes) as other,
    ):
        for process in (one, other):
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
        pids = [one.pid, other.pid]
        assert mapped_bytes(pids, [alias]) == mapped_bytes(pids[:1], [file]) == 8 * MIB
        assert mapped_bytes(pids, []) == 0
        for process in (one, other):
            process.communicate("\n")


def test_an_interval_gives_the_engines_cpu_to_the_engine() -> None:
    """Work done by the tree between two snapshots is its CPU time, and fractions stay fractions."""
    with busy_tree() as process:
        telemetry = Telemetry(process.pid)
        before = telemetry.snapshot()
        say_go(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "worked\n"
        found = interval(before, telemetry.snapshot())
    assert found["engine_cpu_s"] is not None
    assert found["engine_cpu_s"] > 0
    assert found["foreign_cpu_fraction"] is not None
    assert 0 <= found["foreign_cpu_fraction"] <= 1
    assert found["client_cpu_s"] is not None


def test_a_dead_process_leaves_none_not_zero() -> None:
    """After the end the engine's fields are None, the machine's go on, and nothing is raised."""
    with busy_tree() as process:
        telemetry = Telemetry(process.pid)
        before = telemetry.snapshot()
        process.kill()
        process.wait()
        after = telemetry.snapshot()
    assert after["engine_cpu_s"] is None
    assert after["cpu_total_s"] is not None
    found = interval(before, after)
    assert found["engine_cpu_s"] is None
    assert found["foreign_cpu_fraction"] is None
    assert private_bytes([process.pid]) is None
    assert mapped_bytes([process.pid], []) is None
    assert process_tree(process.pid) == []


def test_a_child_that_lived_between_snapshots_is_ours() -> None:
    """What a short-lived child of ours used is not foreign; what our stopped engine had used before is not counted."""
    with busy_tree() as process:
        say_go(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "worked\n"
        telemetry = Telemetry(process.pid)
        before = telemetry.snapshot()
        reaped_s = children_cpu_s()
        subprocess.run([sys.executable, "-c", "sum(i * i for i in range(2_000_000))"], check=True)
        reaped_s = children_cpu_s() - reaped_s
        ours_s = interval(before, telemetry.snapshot())["own_cpu_s"]
        process.kill()
        process.wait()
        stopped_s = interval(before, telemetry.snapshot())["own_cpu_s"]
    assert ours_s is not None
    assert stopped_s is not None
    assert ours_s >= reaped_s - 0.03  # ticks of 10 ms
    assert stopped_s - ours_s < before["engine_cpu_s"]


def children_cpu_s() -> float:
    used = os.times()
    return used.children_user + used.children_system


def test_watching_ourselves_still_tells_what_others_used() -> None:
    """An engine hosted by this very process leaves no tree of our own: 0 s, and a foreign share all the same."""
    telemetry = Telemetry(os.getpid())
    before = telemetry.snapshot()
    while telemetry.snapshot()["cpu_total_s"] == before["cpu_total_s"]:
        pass
    found = interval(before, telemetry.snapshot())
    assert found["own_cpu_s"] == 0
    assert found["foreign_cpu_fraction"] is not None


def test_foreign_time_is_what_neither_engine_nor_we_used() -> None:
    """busy - engine - own over total, and None where one of them is missing."""
    zero = {"t_ns": 0, "cpu_total_s": 0.0, "cpu_busy_s": 0.0, "cpu_steal_s": 0.0, "psi_cpu_some_us": 0}
    before = {**zero, "engine_cpu_s": 1.0, "own_cpu_s": 0.5, "client_cpu_s": 0.5}
    after = {
        "t_ns": 10**10,
        "cpu_total_s": 20.0,
        "cpu_busy_s": 9.0,
        "cpu_steal_s": 1.0,
        "psi_cpu_some_us": 2_500_000,
        "engine_cpu_s": 6.0,
        "own_cpu_s": 1.5,
        "client_cpu_s": 1.0,
    }
    found = interval(before, after)
    assert found["foreign_cpu_fraction"] == pytest.approx(3 / 20)
    assert found["steal_fraction"] == pytest.approx(0.05)
    assert found["psi_cpu_some"] == pytest.approx(0.25)
    assert interval(before, after | {"psi_cpu_some_us": None})["psi_cpu_some"] is None


def test_without_nvml_the_gpu_is_not_measured() -> None:
    """None, not 0, for a process that holds none, with an NVIDIA driver or without."""
    assert vram_bytes([os.getpid()]) is None


def test_a_sampler_keeps_the_peak_and_reports_each() -> None:
    """The largest sample stays, over the death of the process; after that a sample is None."""
    seen: list[int | None] = []
    seen_dead = threading.Event()

    def keep(memory: int | None) -> None:
        seen.append(memory)
        if memory is None:
            seen_dead.set()

    with busy_tree() as process, MemorySampler(process.pid, 0.01, on_sample=keep) as sampler:
        process.kill()
        assert seen_dead.wait(10)
    assert seen[-1] is None
    assert sampler.peak == max((memory for memory in seen if memory is not None), default=None)
    sampler.stop()  # twice is fine


def test_an_error_while_storing_comes_out_at_the_end() -> None:
    """A callback that fails is not lost in its thread."""
    failed = threading.Event()

    def broken(_: int | None) -> None:
        failed.set()
        raise RuntimeError("disk full")

    def watch(on_sample: Callable[[int | None], None]) -> None:
        with MemorySampler(os.getpid(), 0.01, on_sample=on_sample):
            assert failed.wait(10)

    with pytest.raises(RuntimeError, match="disk full"):
        watch(broken)


def test_a_pid_that_never_was_has_no_tree() -> None:
    """A process that ended before we looked raises nothing."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert ProcessTree(process.pid).pids() == []
