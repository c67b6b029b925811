"""Building an engine's program from crates.io with cargo, once for this user."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from engines.driver import Driver
from engines.environment import of_child
from engines.errors import BadInput, EngineError
from engines.home import cargo_folder, engines_folder
from engines.process.process import LAUNCHER
from engines.units import size

GIB = 1024**3
JOB_BYTES = 4 * GIB  # a compiler and the linker at the end
DISK_BYTES = 3 * GIB  # of which one build took 1.8


def install_from_crates(driver: Driver, free_bytes: int | None, say: Callable[[str], None]) -> Path:
    """The engine's program under `engines_folder`, built for this CPU; at once where it is there already.

    cargo shows its progress on standard error. What is compiled stays under `cargo_folder`: after an interruption the
    same call resumes. Raises BadInput where something needed is missing, EngineError when cargo fails.
    """
    name, _, version = driver.installer.crate.partition("==")
    if not name:
        raise BadInput(f"{driver.name} is not on crates.io: leave --from-crates away")
    root = engines_folder() / f"{driver.installer.crate_program}-{version}"
    program = root / "bin" / driver.installer.crate_program
    if program.exists():
        return program
    cargo, jobs = _cargo(), _jobs(free_bytes)
    target = cargo_folder()
    for folder in (target, root):
        folder.mkdir(parents=True, exist_ok=True)
        if (left := shutil.disk_usage(folder).free) < DISK_BYTES:
            raise BadInput(f"{folder}: {size(left)} free, building {name} takes {size(DISK_BYTES)}; free some")
    say(f"building {name} {version}, {jobs} at a time: 40 to 90 minutes on 2 cores; the same command resumes it")
    # without target-cpu every quantised kernel is a scalar one: the repository's own cargo config is not in the crate
    flags = f"{os.environ.get('RUSTFLAGS', '')} -C target-cpu=native".strip()
    env = of_child(os.environ) | {"CARGO_TARGET_DIR": str(target), "RUSTFLAGS": flags}
    build = [cargo, "install", "--locked", name, "--version", version, "--root", str(root), "--jobs", str(jobs)]
    if status := _run(build, env):
        raise EngineError(f"cargo could not build {name} {version} (exit status {status}, see above); rerun to resume")
    return program


def _cargo() -> str:
    own = os.environ.get("CARGO_HOME", "").strip() or "~/.cargo"
    cargo = shutil.which("cargo") or shutil.which("cargo", path=str(Path(own).expanduser() / "bin"))
    if cargo is None:
        raise BadInput(
            "no cargo on PATH or in ~/.cargo/bin: install Rust 1.88 or later (https://rustup.rs), then rerun"
        )
    if shutil.which("cc") is None:
        raise BadInput("no C compiler (cc) on PATH, which cargo links with: install one (build-essential), then rerun")
    return cargo


def _jobs(free_bytes: int | None) -> int:
    cores = os.cpu_count() or 1
    if free_bytes is None:
        return cores
    if free_bytes < JOB_BYTES:
        raise BadInput(
            f"{size(free_bytes)} of memory free, a build takes {size(JOB_BYTES)}: stop something, then rerun"
        )
    return min(cores, free_bytes // JOB_BYTES)


def _run(command: list[str], env: dict[str, str]) -> int:
    """The exit status; its whole group ends with this call, and it with this process."""
    launched = [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid()), *command]
    child = subprocess.Popen(
        launched, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno(), env=env, start_new_session=True
    )
    try:
        return child.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
