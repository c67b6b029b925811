"""`switchyard doctor`: what this machine has, what is missing, and how to fix it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Literal

import httpx
import typer

from engines.errors import SwitchyardError
from engines.home import home
from engines.model.free_memory import free_memory
from engines.registry import DRIVERS
from engines.units import number_of, size
from flows.cli.options import Json
from flows.cli.output import EXIT_CODES, next_command, out, print_json
from flows.orchestrator.server import PrefectServer, prepare_environment
from migrations.demo import GEMMA3, INSTALL, SMOLLM2
from tasks.records.store import open_records

PINS = {"prefect": ("3.8.8", "3.10"), "fastapi": ("0.139", "0.151"), "sqlalchemy": ("2.0.22", "2.2")}
PREFECT_3_8 = {"sqlalchemy": ("2.0.22", "2.1")}  # narrower: on 2.1 its scheduler dies
FREE_DISK = 2 * 2**30
SCHEDULED_S = 90.0  # the scheduler looks every 5 s for new deployments and every 60 s for all


@dataclass(frozen=True)
class Finding:
    """One thing examined: its state, what was found, and how to fix it."""

    what: str
    state: Literal["ok", "warning", "broken"]
    detail: str
    fix: str = ""


MARKS = {"ok": "[green]✓[/green]", "warning": "[yellow]![/yellow]", "broken": "[red]✗[/red]"}


def doctor(
    json_: Json = False,
    prefect: Annotated[bool, typer.Option("--prefect", help="Also test Prefect's server and schedules, 20 s.")] = False,
) -> None:
    """Check Python, packages, engines, models, records and memory, and print how to fix what is missing."""
    findings = examine(prefect=prefect)
    broken = sum(finding.state == "broken" for finding in findings)
    if json_:
        print_json({"findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            out.print(f"{MARKS[finding.state]} {finding.what}: {finding.detail}")
            if finding.fix:
                out.print(f"    {finding.fix}", style="cyan")
        out.print(f"{broken} to fix, see above" if broken else next_command("switchyard evaluate demo"))
    raise typer.Exit(EXIT_CODES["ERROR"] if broken else 0)


def examine(*, prefect: bool) -> list[Finding]:
    """All findings, in the order in which things are needed."""
    checks: list[Callable[[], Iterator[Finding]]] = [_packages, _engines, _models, _records, _disk, _memory]
    if prefect:
        checks.append(_prefect)
    return [finding for check in checks for finding in check()]


def _packages() -> Iterator[Finding]:
    yield Finding("Python", "ok" if sys.version_info >= (3, 11) else "broken", sys.version.split()[0])
    prefect = ""
    for package, pin in PINS.items():
        low, high = PREFECT_3_8.get(package, pin) if prefect.startswith("3.8.") else pin
        install = f"pip install '{package}>={low},<{high}'"
        try:
            found = version(package)
        except PackageNotFoundError:
            yield Finding(package, "broken", "not installed", install)
            continue
        prefect = found if package == "prefect" else prefect
        fits = _numbers(low) <= _numbers(found) < _numbers(high)
        why = "too old" if _numbers(found) < _numbers(low) else f"Prefect {prefect} does not work with it"
        why = "untested" if package == "prefect" else why
        yield Finding(package, "ok" if fits else "broken", found, "" if fits else f"{why}: {install}")


def _engines() -> Iterator[Finding]:
    for name, driver in DRIVERS.items():
        try:
            found = driver.find()
            note = f" ({found.note})" if found.note else ""
            yield Finding(name, "ok", f"{found.version}, {found.form}: {found.where}{note}")
        except SwitchyardError as error:
            pip = driver.installer.pip  # what nobody has to have is no fault
            yield Finding(name, "broken" if pip else "warning", str(error), f"switchyard install {name}" if pip else "")


def _models() -> Iterator[Finding]:
    for package in (SMOLLM2[0], GEMMA3):
        if importlib.util.find_spec(package) is not None:
            yield Finding(f"demo model {package}", "ok", "installed")
        else:
            yield Finding(f"demo model {package}", "warning", "missing", INSTALL)


def _records() -> Iterator[Finding]:
    try:
        with open_records() as records:
            n_runs = len(records.history(1000))
        yield Finding("records", "ok", f"{home()}: {number_of(n_runs, 'run')}, SQLite {sqlite3.sqlite_version}")
    except SwitchyardError as error:
        yield Finding("records", "broken", str(error), "set SWITCHYARD_HOME to a folder that can be written")


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(next(path for path in (home(), *home().parents) if path.exists())).free
    enough = free > FREE_DISK
    fix = "" if enough else f"free {size(FREE_DISK)} for records and reports"
    yield Finding("disk", "ok" if enough else "warning", f"{size(free)} free", fix)


def _memory() -> Iterator[Finding]:
    memory = free_memory()
    gpu = "no NVIDIA GPU (VRAM is not measured)" if memory.vram_bytes is None else f"{size(memory.vram_bytes)} of VRAM"
    yield Finding("memory", "ok", f"{size(memory.ram_bytes)} of RAM free, {gpu}")


def _prefect() -> Iterator[Finding]:
    """A real server, and a schedule on it: with a wrong SQLAlchemy it answers, and no schedule ever fires."""
    os.environ.update(prepare_environment(home()))
    server = PrefectServer(home(), services=True)
    server.start()
    try:
        server.ready()
        yield Finding("Prefect's API server", "ok", f"started and answered on {server.api_url}")
        yield _schedule(server.api_url)
    except SwitchyardError as error:
        yield Finding("Prefect's API server", "broken", str(error), "see the packages above")
    finally:
        server.stop()


def _schedule(api_url: str) -> Finding:
    """A deployment with an interval schedule, until its first run is planned; both are deleted again."""
    what, fix = "Prefect's schedules", "see the packages above: SQLAlchemy 2.1 stops every schedule of Prefect 3.8"
    every_minute = {"active": True, "schedule": {"interval": 60.0}}
    try:
        with httpx.Client(base_url=api_url, timeout=10, trust_env=False) as api:
            flow = _created(api, "/flows/", {"name": "switchyard-doctor"})
            body = {"name": "doctor", "flow_id": flow, "schedules": [every_minute]}
            deployment = _created(api, "/deployments/", body)
            try:
                planned = _planned_runs(api, deployment)
            finally:
                api.delete(f"/flows/{flow}")
    except (httpx.HTTPError, KeyError, ValueError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        return Finding(what, "broken", f"the server refused a deployment: {why}", fix)
    if not planned:
        return Finding(what, "broken", f"no run was planned within {SCHEDULED_S:.0f} s", fix)
    return Finding(what, "ok", f"a schedule of one minute has {number_of(planned, 'run')} planned")


def _created(api: httpx.Client, path: str, body: dict[str, Any]) -> str:
    deadline = time.monotonic() + SCHEDULED_S
    # its services write to the same new database: for some seconds it is busy
    while (reply := api.post(path, json=body)).status_code == 503 and time.monotonic() < deadline:
        time.sleep(0.5)
    return str(reply.raise_for_status().json()["id"])


def _planned_runs(api: httpx.Client, deployment: str) -> int:
    wanted = {"deployments": {"id": {"any_": [deployment]}}}
    deadline = time.monotonic() + SCHEDULED_S
    planned = 0
    while not planned and time.monotonic() < deadline:
        time.sleep(0.5)
        planned = int(api.post("/flow_runs/count", json=wanted).raise_for_status().json())
    return planned


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())
