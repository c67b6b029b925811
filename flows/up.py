"""`switchyard up` and `down`: Prefect's server, the deployments and the yard on one host, started and ended together.

yard          outlives us when we are killed: an agent must not lose its model
Prefect       server and the process that runs the flows end with us, however we end
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from engines.errors import BadInput, SwitchyardError
from engines.home import home
from engines.process import Identity, ManagedProcess, end_orphans, start
from engines.yard.client import YardClient, public_address
from flows.options import Json, PlanFile
from flows.up_file import Up, found, up_file

app = typer.Typer()

PREFECT_PORT = 4200
DOWN_S = 90.0
WATCH_S = 1.0
SERVE_S = 120.0
SERVED = "deployments are served"  # what flows.runner says
STOP_S = 40.0


@app.command()
def up(
    plan: PlanFile = None,
    prefect_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port of Prefect's API and UI, on loopback.")
    ] = PREFECT_PORT,
    schedules: Annotated[
        bool, typer.Option(help="Let evaluations (nightly), soaks and upkeep run by themselves.")
    ] = True,
) -> None:
    """Start everything on this host: Prefect's server with its UI, the flows as deployments, and the yard.

    Runs until Ctrl-C or `switchyard down`, which stop all of it. Works offline, on loopback, without telemetry.
    """
    from flows.serve import plan_path
    from migrations.plan import load_plan

    folder, out = home(), Console(stderr=True)
    path = plan_path(plan, folder).absolute()
    loaded = load_plan(path)
    if (other := found(folder)) is not None:
        raise BadInput(f"it is up already (pid {other.pid}, {_ui(other.api_url)}): `switchyard down` ends it")
    for ended in end_orphans(folder):
        out.print(f"ended, left behind by a killed run: {ended}", style="dim", highlight=False)
    try:
        with _prefect(folder, prefect_port) as api_url, _declared(folder, api_url):
            _yard(loaded, path, folder, out)
            runner = _runner(folder, path, api_url, schedules)
            try:
                _print_addresses(out, folder, api_url)
                _until_something_ends({"the deployments": runner})
            finally:
                out.print("stopping the deployments", highlight=False)
                runner.stop(grace_s=STOP_S)
    finally:
        out.print("stopping the yard; requests in flight are finished first", highlight=False)
        _stop_yard(folder)


@app.command()
def down(json_: Json = False) -> None:
    """Stop what `switchyard up` started, and the yard; requests in flight are finished first."""
    folder = home()
    running = found(folder)
    if running is not None:
        process = Identity(running.pid, running.create_time).process()
        if process is not None:
            process.send_signal(signal.SIGTERM)
        _wait_for_end(running)
    ended = end_orphans(folder)
    yard = YardClient(folder)
    if was_serving := yard.runs():
        _stop_yard(folder)
    nothing = running is None and not was_serving and not ended
    done = "nothing was up" if nothing else "all is down"
    if json_:
        json.dump({"done": done}, sys.stdout)
        print()
    else:
        Console().print(done, highlight=False)


def _wait_for_end(running: Up) -> None:
    deadline = time.monotonic() + DOWN_S
    while running.lives():
        if time.monotonic() > deadline:
            raise SwitchyardError(f"`switchyard up` (pid {running.pid}) has not ended within {DOWN_S:.0f} s")
        time.sleep(0.1)


@contextlib.contextmanager
def _prefect(folder: Path, port: int) -> Iterator[str]:
    """Prefect's server with its UI and scheduler, while the block runs; its API's address."""
    from flows.prefect_server import PrefectServer, prepare_environment

    os.environ.update(prepare_environment(folder))
    os.environ.pop("PREFECT_API_URL", None)
    server = PrefectServer(folder, port=port, services=True, ui=True)
    server.start()
    try:
        server.ready()
        os.environ["PREFECT_API_URL"] = server.api_url
        yield server.api_url
    finally:
        server.stop()


@contextlib.contextmanager
def _declared(folder: Path, api_url: str) -> Iterator[None]:
    """Known to other commands while the block runs: they report to this Prefect."""
    me = Identity.of(os.getpid())
    up_file(folder).write_text(json.dumps(asdict(Up(me.pid, me.create_time, api_url))))
    try:
        yield
    finally:
        up_file(folder).unlink(missing_ok=True)


def _yard(plan: Any, path: Path, folder: Path, out: Console) -> None:
    from flows.serve import remember_plan
    from flows.yards import PlanYards, start_detached

    if YardClient(folder).runs():
        out.print("a yard runs already; it stays", highlight=False)
        return
    names = [model.id for model in plan.models if model.load == "start"]
    with out.status("the yard starts") as status:
        start_detached(
            PlanYards(plan, folder, path), names, lambda step: status.update(f"the yard starts [dim]{step}[/dim]")
        )
    remember_plan(path, folder)


def _runner(folder: Path, path: Path, api_url: str, schedules: bool) -> ManagedProcess:
    """The process that registers the deployments and runs their flows, once it says that it does."""
    argv = [sys.executable, "-m", "flows.runner", str(path), "--schedules" if schedules else "--no-schedules"]
    env = {**os.environ, "PREFECT_API_URL": api_url, "SWITCHYARD_HOME": str(folder)}
    runner = start("deployments", argv, state_dir=folder, log_path=folder / "logs" / "deployments.log", env=env)
    deadline = time.monotonic() + SERVE_S
    while not any(SERVED in line for line in runner.log_tail()):
        if runner.poll() is not None or time.monotonic() > deadline:
            words = "\n  ".join(runner.log_tail()[-5:])
            runner.stop()
            raise SwitchyardError(f"the deployments could not be served (log: {runner.log.path}):\n  {words}")
        time.sleep(0.1)
    return runner


def _until_something_ends(watched: dict[str, ManagedProcess]) -> None:
    """Return never, but for an interrupt; raises SwitchyardError when one of them dies."""
    waiting = threading.Event()
    while not waiting.wait(WATCH_S):
        for name, process in watched.items():
            if (code := process.poll()) is not None:
                raise SwitchyardError(f"{name} ended by themselves ({code}); log: {process.log.path}")


def _stop_yard(folder: Path) -> None:
    yard = YardClient(folder)
    if not yard.runs():
        return
    pid = yard.status()["pid"]
    with contextlib.suppress(SwitchyardError):
        identity = Identity.of(pid)
        yard.order("stop")
        deadline = time.monotonic() + DOWN_S
        while identity.process() is not None and time.monotonic() < deadline:
            time.sleep(0.1)


def _print_addresses(out: Console, folder: Path, api_url: str) -> None:
    address = public_address(YardClient(folder).status()["address"])
    out.print(f"the models   [bold]{address}/v1[/bold]", highlight=False)
    out.print(f"the yard     [bold]{address}/yard[/bold]", highlight=False)
    out.print(f"Prefect      [bold]{_ui(api_url)}[/bold]", highlight=False)
    out.print("Ctrl-C, or `switchyard down` elsewhere, stops all of it", style="dim", highlight=False)


def _ui(api_url: str) -> str:
    return api_url.removesuffix("/api")
