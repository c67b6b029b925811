"""`switchyard up`: Prefect's server, the deployments and the yard on one host, started and ended together."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from engines.errors import BadInput, SwitchyardError
from engines.home import home, host
from engines.up import declared_up, running_up
from engines.yard.client import YardClient, public_address
from flows.cli.keep_up import STOP_S, DeploymentsProcess, GaveUp, YardProcess, keep_up
from flows.cli.options import PlanFile
from flows.cli.order import stop_yard
from flows.cli.output import errors, prepared_home, print_step
from flows.orchestrator.server import PrefectServer, prepare_process
from flows.schedules import schedule_lines
from migrations.plan_file import load_plan, plan_path
from tasks.records.store import open_records


def up(
    plan: PlanFile = None,
    prefect_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of Prefect's API and UI.")] = 4200,
    schedules: Annotated[bool, typer.Option(help="Run evaluations (nightly), soaks and upkeep.")] = True,
) -> None:
    """Start everything on this host: Prefect's server with its UI, the flows as deployments, and the yard.

    Runs until Ctrl-C or `switchyard down`, which stop all of it. Works offline, on loopback, without telemetry.
    """
    folder = home()
    path = plan_path(plan, folder)
    loaded = load_plan(path)
    with _only_one(folder):
        prepared_home()
        ends_with_us = not YardClient(folder).runs()  # before it is ours, one that runs already is left alone
        try:
            with _prefect(folder, prefect_port) as server:
                yard = YardProcess(loaded, path, folder)
                yard.start()  # beside Prefect, which takes 10 s, and which no model waits for
                ends_with_us = True
                server.ready()
                deployments = DeploymentsProcess(folder, path, server.api_url, schedules)
                with declared_up(folder, server.api_url):
                    try:
                        deployments.start()
                        _print_start(folder, server, schedules, bool(loaded.upgrade.watch))
                        keep_up(yard, server, deployments)
                    finally:
                        errors.print("stopping the deployments")
                        deployments.stop(STOP_S)
        except GaveUp:
            ends_with_us = False
            raise
        finally:
            if ends_with_us:
                stop_yard(folder)


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """While the block runs no other `up` of this home gets in; the kernel lets go when we die. BadInput if one did."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / "up.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            other = running_up(folder)
            which = f"running (pid {other.pid}, {other.api_url.removesuffix('/api')})" if other else "starting"
            raise BadInput(f"`switchyard up` is already {which}: `switchyard down` ends it") from error
        yield


@contextlib.contextmanager
def _prefect(folder: Path, port: int) -> Iterator[PrefectServer]:
    """Prefect's server, starting; stopped when the block ends."""
    prepare_process(folder)
    os.environ.pop("PREFECT_API_URL", None)
    server = PrefectServer(folder, port=port, services=True, ui=True)
    server.start()
    os.environ["PREFECT_API_URL"] = server.api_url
    try:
        yield server
    finally:
        server.stop()


def _print_start(folder: Path, server: PrefectServer, schedules: bool, watches: bool) -> None:
    """Addresses, what runs on a schedule, and how to stop it all."""
    address = public_address(YardClient(folder).status()["address"])
    errors.print(f"the models   [bold]{address}/v1[/bold]")
    errors.print(f"the yard     [bold]{address}/yard[/bold]")
    errors.print(f"Prefect      [bold]{server.api_url.removesuffix('/api')}[/bold]")
    if schedules:
        errors.print("on a schedule (`switchyard up --no-schedules` turns all of it off):")
        for line in schedule_lines(last_evaluation_s=_last_evaluation_s(), watches=watches):
            errors.print(f"  {line}", markup=False)
        print_step("pause one of them on its page under Deployments in Prefect")
    else:
        errors.print("nothing runs on a schedule (--no-schedules)")
    print_step("Ctrl-C, or `switchyard down` elsewhere, stops all of it")


def _last_evaluation_s() -> float | None:
    """Seconds from start to end of the last evaluation on record; None without one."""
    with contextlib.suppress(SwitchyardError), open_records() as records:
        for run in records.history(20, kind="evaluate", host=host()):
            if run.status == "done" and run.ended_at is not None:
                return (run.ended_at - run.started_at).total_seconds()
    return None
