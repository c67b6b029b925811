"""`switchyard up` and `down`: Prefect's server, the deployments and the yard on one host, started and ended together.

yard          outlives us when we are killed: an agent must not lose its model
Prefect       server and the process that runs the flows end with us, however we end

What dies of them is started again; a yard that somebody stopped stays so.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import typer
from rich.console import Console

from engines.environment import without_proxies
from engines.errors import BadInput, SwitchyardError
from engines.home import home
from engines.process.process import Identity, ManagedProcess, end_orphans, start
from engines.process.serving import exit_reason
from engines.yard.client import YardClient, public_address, socket_path
from flows.cli.options import Json, PlanFile, print_json
from flows.orchestrator.up_file import Up, found, up_file

if TYPE_CHECKING:
    from flows.orchestrator.server import PrefectServer

app = typer.Typer()

PREFECT_PORT = 4200
DOWN_S = 90.0
WATCH_S = 1.0
SERVE_S = 120.0
ALWAYS_THERE = "reconcile"  # a deployment
SERVED = "deployments are served"  # what flows.runner says
STOP_S = 12.0  # an interrupted command has 20 s in all, and the yard is told to stop after the deployments
RESTARTS = 3
RESTART_WINDOW_S = 600.0


class GaveUp(SwitchyardError):
    """Something died once too often; a yard that still serves goes on."""


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
    from flows.rollout.yard_config import plan_path
    from migrations.plan_file import load_plan

    folder, out = home(), Console(stderr=True)
    path = plan_path(plan, folder).absolute()
    loaded = load_plan(path)
    with _only_one(folder):
        for ended in end_orphans(folder):
            out.print(f"ended, left behind by a killed run: {ended}", style="dim", highlight=False)
        ends_with_us = not YardClient(folder).runs()  # before it is ours, one that runs already is left alone
        try:
            with _prefect(folder, prefect_port) as server, _declared(folder, server.api_url):
                yard = Yard(loaded, path, folder, out)
                yard.start()
                ends_with_us = True
                deployments = Deployments(folder, path, server.api_url, schedules)
                try:
                    deployments.start()
                    _print_addresses(out, folder, server.api_url)
                    _print_schedules(out, schedules)
                    out.print("Ctrl-C, or `switchyard down` elsewhere, stops all of it", style="dim", highlight=False)
                    _keep_up(yard, server, deployments, out)
                finally:
                    out.print("stopping the deployments", highlight=False)
                    deployments.stop()
        except GaveUp:
            ends_with_us = False
            raise
        finally:
            if ends_with_us:
                _stop_yard(folder, out)


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
        _stop_yard(folder, Console(stderr=True))
    nothing = running is None and not was_serving and not ended
    done = "nothing was up" if nothing else "all is down"
    if json_:
        print_json({"done": done})
    else:
        Console().print(done, highlight=False)


def _wait_for_end(running: Up) -> None:
    deadline = time.monotonic() + DOWN_S
    while running.lives():
        if time.monotonic() > deadline:
            raise SwitchyardError(f"`switchyard up` (pid {running.pid}) has not ended within {DOWN_S:.0f} s")
        time.sleep(0.1)


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """While the block runs no other `up` of this home gets in; the kernel lets go when we die. BadInput if one did."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / "up.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            other = found(folder)
            which = f"it is up already (pid {other.pid}, {_ui(other.api_url)})" if other else "it is coming up already"
            raise BadInput(f"{which}: `switchyard down` ends it") from error
        yield


@contextlib.contextmanager
def _prefect(folder: Path, port: int) -> Iterator[PrefectServer]:
    """Prefect's server with its UI and scheduler, while the block runs."""
    from flows.orchestrator.server import PrefectServer, prepare_process

    prepare_process(folder)
    os.environ.pop("PREFECT_API_URL", None)
    server = PrefectServer(folder, port=port, services=True, ui=True)
    server.start()
    try:
        server.ready()
        os.environ["PREFECT_API_URL"] = server.api_url
        yield server
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


class Yard:
    """The yard of this home: one that runs already stays, whoever started it."""

    def __init__(self, plan: Any, path: Path, folder: Path, out: Console) -> None:
        self._plan, self._path, self._folder, self._out = plan, path, folder, out
        self._client = YardClient(folder)
        self._running: Identity | None = None

    def start(self) -> None:
        """Return once it serves. Raises SwitchyardError in its own words when it does not come up."""
        from flows.rollout.yard_config import remember_plan
        from flows.rollout.yards import PlanYards, start_detached

        if self._client.runs():
            self._out.print("a yard runs already; it stays", highlight=False)
        else:
            names = [model.id for model in self._plan.models if model.load == "start"]
            yards = PlanYards(self._plan, self._folder, self._path)
            try:
                with self._out.status("the yard starts") as status:
                    start_detached(yards, names, lambda step: status.update(f"the yard starts [dim]{step}[/dim]"))
            except BaseException:
                _end_what_starts()
                raise
            remember_plan(self._path, self._folder)
        self._look()

    def died(self) -> str | None:
        """That it was killed: it is gone and has not taken its socket away, as one that is stopped does."""
        if self._running is not None and self._running.process() is not None:
            return None
        self._look()
        gone = self._running is None and socket_path(self._folder).exists()
        return f"killed, or out of memory; log: {self._folder / 'logs' / 'yard.log'}" if gone else None

    def _look(self) -> None:
        self._running = None
        with contextlib.suppress(SwitchyardError, psutil.Error):
            self._running = Identity.of(self._client.status()["pid"])


def _end_what_starts() -> None:
    """End the yard that is coming up: it does not take orders yet, but it is a child of ours."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "serve" in child.cmdline():
                child.terminate()
                child.wait(STOP_S)


class Deployments:
    """The process that registers the deployments and runs their flows."""

    def __init__(self, folder: Path, plan: Path, api_url: str, schedules: bool) -> None:
        self._folder = folder
        self._argv = [sys.executable, "-m", "flows.runner", str(plan), "--schedules" if schedules else "--no-schedules"]
        self._env = {"PREFECT_API_URL": api_url, "SWITCHYARD_HOME": str(folder)}
        self._child: ManagedProcess | None = None

    def start(self) -> None:
        """Return once it says that they are served; SwitchyardError with its last words when it does not come to it."""
        from flows.orchestrator.server import workplace

        self.stop()  # what it has left behind, where it died: the flows that it ran
        log = self._folder / "logs" / "deployments.log"
        env = {**without_proxies(os.environ), **self._env}
        cwd = workplace(self._folder)
        child = self._child = start("deployments", self._argv, state_dir=self._folder, log_path=log, env=env, cwd=cwd)
        deadline = time.monotonic() + SERVE_S
        while not any(SERVED in line for line in child.log_tail()):
            if child.poll() is not None or time.monotonic() > deadline:
                words = "\n  ".join(child.log_tail()[-5:])
                child.stop()
                raise SwitchyardError(f"the deployments could not be served (log: {child.log.path}):\n  {words}")
            time.sleep(0.1)

    def died(self) -> str | None:
        """How it ended; None while it runs."""
        return exit_reason(self._child) if self._child is not None and self._child.poll() is not None else None

    def forgotten(self) -> bool:
        """Whether Prefect does not know them any more: its database was removed."""
        import httpx

        url = f"{self._env['PREFECT_API_URL']}/deployments/name/{ALWAYS_THERE}/{ALWAYS_THERE}"
        try:
            return httpx.get(url, timeout=60, trust_env=False, verify=False).status_code == httpx.codes.NOT_FOUND
        except httpx.HTTPError:  # it has died once more, and is looked at again
            return False

    def stop(self) -> None:
        """End it, and the flows that it runs; safe twice."""
        if self._child is not None:
            self._child.stop(grace_s=STOP_S)


@dataclass
class _Kept:
    """Something that is started again when it dies, unless it has died too often lately."""

    name: str
    died: Callable[[], str | None]
    start: Callable[[], None]
    meanwhile: str = "the yard goes on serving"
    began: list[float] = field(default_factory=list)

    def look(self, out: Console) -> None:
        """Start it again if it died. Raises GaveUp."""
        if (how := self.died()) is None:
            return
        now = time.monotonic()
        self.began = [at for at in self.began if now - at < RESTART_WINDOW_S]
        if len(self.began) >= RESTARTS:
            raise GaveUp(
                f"{self.name} ended {RESTARTS + 1} times within {RESTART_WINDOW_S / 60:.0f} minutes (now: {how}): "
                f"given up; {self.meanwhile}. `switchyard up` tries again, `switchyard stop` stops the yard"
            )
        self.began.append(now)
        out.print(f"{self.name} ended by itself ({how}): it is started again; {self.meanwhile}", highlight=False)
        try:
            self.start()
        except SwitchyardError as error:  # it is looked at again, and counts
            out.print(str(error), highlight=False, markup=False, soft_wrap=True)
        else:
            out.print(f"{self.name} runs again", highlight=False)


def _keep_up(yard: Yard, server: PrefectServer, deployments: Deployments, out: Console) -> None:
    """Return never, but for an interrupt; the models first, then what the deployments need. Raises GaveUp."""

    def server_again() -> None:
        server.start_again()
        if deployments.forgotten():
            deployments.start()

    kept = [
        _Kept("the yard", yard.died, yard.start, "nobody serves the models meanwhile"),
        _Kept("Prefect's server", server.died, server_again),
        _Kept("the process of the deployments", deployments.died, deployments.start),
    ]
    waiting = threading.Event()
    while not waiting.wait(WATCH_S):
        for one in kept:
            one.look(out)


def _stop_yard(folder: Path, out: Console) -> None:
    yard = YardClient(folder)
    if not yard.runs():
        return
    out.print("stopping the yard; requests in flight are finished first", highlight=False)
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


def _print_schedules(out: Console, schedules: bool) -> None:
    """What will run by itself, and when."""
    from flows.schedules import schedule_lines

    if not schedules:
        out.print("nothing runs by itself (--no-schedules)", highlight=False)
        return
    out.print("runs by itself (`switchyard up --no-schedules` leaves all of it out):", highlight=False)
    for line in schedule_lines(last_evaluation_s=_last_evaluation_s()):
        out.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    out.print("one of them alone is paused on its page under Deployments in Prefect", style="dim", highlight=False)


def _last_evaluation_s() -> float | None:
    """Seconds that the last evaluation on record took from its start to its end; None without one."""
    from engines.home import host
    from tasks.records.store import open_records

    with contextlib.suppress(SwitchyardError), open_records() as records:
        for run in records.history(20, kind="evaluate", host=host()):
            if run.status == "done" and run.ended_at is not None:
                return (run.ended_at - run.started_at).total_seconds()
    return None


def _ui(api_url: str) -> str:
    return api_url.removesuffix("/api")
