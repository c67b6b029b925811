"""Evidence on an engine that is about to be killed: a folder for each incident, the latest KEPT of them.

What an engine that hangs is asked, and what looks into it, has LIMIT_S together: the restart waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import psutil

from engines.deadline import in_thread
from engines.driver import Driver
from engines.errors import BadInput
from engines.process.process import LAUNCHER, ManagedProcess
from engines.redaction import redacted, redacted_text
from engines.yard.engine.connection import EngineConnection, Gone
from engines.yard.engine.in_flight import InFlight
from engines.yard.engine.launch_spec import LaunchSpec
from engines.yard.engine.stats import EngineStats

KEPT = 20
LIMIT_S, ASK_S, STACKS_S = 6.0, 1.0, 5.0
FILE_BYTES = 256 * 1024
MINUTE = 12  # samples of memory, one every 5 s
ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{4}")
# how each shows the stacks of a process; the first one that is here and knows its kind is used
PYTHON_STACKS = {"py-spy": ("dump", "--nonblocking", "--pid")}
STACKS = {"eu-stack": ("-p",), "gdb": ("-nx", "-q", "-batch", "-ex", "thread apply all bt 40", "-p")}
BARE = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}


async def keep_evidence(
    home: Path,
    spec: LaunchSpec,
    driver: Driver,
    child: ManagedProcess,
    connection: EngineConnection,
    in_flight: Collection[InFlight],
    stats: EngineStats,
    why: str,
) -> str:
    """The id of the incident under which the evidence is kept; "" where it could not be written."""
    incident = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    folder = home / "incidents" / incident
    now = time.monotonic()
    facts = {
        "id": incident,
        "at": time.time(),
        "model": spec.model_id,
        "engine": spec.engine,
        "version": spec.version,
        "why": why,
        "pid": child.pid,
        "argv": child.argv,
        "requests": [
            {"tokens": one.prompt_tokens, "chunks": one.chunks, "age_s": now - one.sent, "silent_s": now - one.moved}
            for one in in_flight
        ],
        "tokens_per_s": stats.tokens_per_s,
        "memory_bytes": list(stats.memory_series)[-MINUTE:],
        "ttft_ms": list(stats.ttft_ms_series)[-MINUTE:],
    }
    found = {"log.txt": "\n".join(child.log_tail())}

    async def add(name: str, work: Any) -> None:
        with contextlib.suppress(Gone, TimeoutError, OSError):
            found[name] = await work

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(
                add("progress.txt", _asked(connection, driver.progress_path)),
                *([add("metrics.txt", _asked(connection, "/metrics"))] if driver.progress_path != "/metrics" else []),
                add("threads.txt", in_thread(lambda: threads(child), name="threads of an engine", within_s=ASK_S)),
                add("stacks.txt", in_thread(lambda: stacks(child), name="stacks of an engine", within_s=LIMIT_S)),
            )
    try:
        await asyncio.to_thread(_write, folder, {"incident.json": json.dumps(redacted(facts), indent=1), **found})
    except OSError:
        return ""
    return incident


async def _asked(connection: EngineConnection, path: str) -> str:
    async with connection.ask("GET", path, timeout_s=ASK_S) as answer:
        return (await answer.read()).decode("utf-8", "replace")


def threads(child: ManagedProcess) -> str:
    """Each thread of the process tree, as the kernel shows it: state, CPU time, and where it waits."""
    lines = ["pid tid state cpu_s wchan name"]
    for process in child.tree():
        for task in sorted(Path(f"/proc/{process.pid}/task").glob("*")):
            with contextlib.suppress(OSError, ValueError, IndexError):
                name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
                fields = rest.split()
                cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
                wchan = (task / "wchan").read_text() or "-"
                lines.append(f"{process.pid} {task.name} {fields[0]} {cpu_s:.2f} {wchan} {name}")
    return "\n".join(lines)


def stacks(child: ManagedProcess) -> str:
    """The stacks of each process of the tree, by what this machine has for it; how to get one where it has nothing."""
    shown, until = [], time.monotonic() + STACKS_S
    for process in child.tree():
        with contextlib.suppress(psutil.Error):
            is_python = "python" in Path(process.exe()).name
            known = {**PYTHON_STACKS, **STACKS} if is_python else STACKS
            tool = next((tool for tool in known if shutil.which(tool, path=BARE["PATH"])), None)
            if tool is None:
                return f"no {' or '.join(known)} on this machine: with one of them the stacks of its threads were here"
            command = [tool, *known[tool], str(process.pid)]
            shown.append(f"$ {' '.join(command)}\n{_output(command, until - time.monotonic())}")
    return "\n".join(shown)


def _output(command: list[str], within_s: float) -> str:
    """What a command prints, in a session of its own that is killed after `within_s`."""
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid()), *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=BARE,
    )
    try:
        text, _ = child.communicate(timeout=max(within_s, 0.1))
        return text.decode("utf-8", "replace")
    except subprocess.TimeoutExpired as late:
        os.killpg(child.pid, signal.SIGKILL)  # not waited for yet: nobody else has its number
        child.communicate()
        return (late.stdout or b"").decode("utf-8", "replace") + f"\n(killed: it took longer than {within_s:.0f} s)"


def _write(folder: Path, files: Mapping[str, str]) -> None:
    """Write the files, for their owner only, and remove the oldest folders."""
    folder.mkdir(parents=True, mode=0o700)
    for name, text in files.items():
        with open(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(redacted_text(text).encode("utf-8", "replace")[-FILE_BYTES:])
    kept = sorted((one for one in folder.parent.iterdir() if ID.fullmatch(one.name)), reverse=True)
    for old in kept[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


# --- read back


def incidents(home: Path) -> list[dict[str, Any]]:
    """What each incident on disk is about, the latest first."""
    folder, found = home / "incidents", []
    for one in sorted(folder.iterdir(), reverse=True) if folder.is_dir() else []:
        if ID.fullmatch(one.name):
            with contextlib.suppress(OSError, ValueError):
                found.append(json.loads((one / "incident.json").read_text()))
    return found


def evidence(home: Path, incident: str) -> tuple[Path, dict[str, str]]:
    """The folder of one incident, and the text of each file in it. Raises BadInput for one that is not here."""
    folder = home / "incidents" / incident
    if not ID.fullmatch(incident) or not folder.is_dir():
        raise BadInput(f"no incident '{incident}' here: `switchyard incident` lists those whose evidence was kept")
    return folder, {file.name: file.read_text(errors="replace") for file in sorted(folder.iterdir())}
