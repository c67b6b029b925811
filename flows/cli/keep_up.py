"""What `switchyard up` keeps running: the yard, Prefect's server and the process that runs the flows.

yard          outlives `up` when that is killed: an agent must not lose its model
Prefect       its server and the process that runs the flows end with `up`, however it ends

What dies of them is restarted; a yard that somebody stopped stays stopped.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from engines.environment import without_proxies
from engines.errors import SwitchyardError
from engines.process import process
from engines.process.process import Identity
from engines.yard.client import YardClient, socket_path
from flows.cli.output import errors
from flows.orchestrator.server import PrefectServer, ServerProcess, workplace
from flows.rollout.yards import Yards, start_detached
from migrations.plan import Plan
from migrations.plan_file import remember_plan

LOOK_S = 1.0
SERVE_S = 120.0
ALWAYS_THERE = "reconcile"  # a deployment
SERVED, WARNING = "deployments are served", "warning: "  # as flows.deployments.serve prints them
STOP_S = 12.0  # an interrupted command has 20 s in all, and the yard is told to stop after the deployments
RESTARTS = 3
RESTART_WINDOW_S = 600.0


class GaveUp(SwitchyardError):
    """Something died once too often; a yard that still serves is left alone."""


class YardProcess:
    """The yard of this home; one that runs already is kept, whoever started it."""

    def __init__(self, plan: Plan, path: Path, folder: Path) -> None:
        self._plan, self._path, self._folder = plan, path, folder
        self._client = YardClient(folder)
        self._running: Identity | None = None

    def start(self) -> None:
        """Return once it serves. Raises SwitchyardError with the yard's own message when it does not come up."""
        if self._client.runs():
            errors.print("a yard runs already and is kept")
        else:
            names = [model.id for model in self._plan.models if model.load == "start"]
            yards = Yards(self._plan, self._folder, self._path)
            try:
                with errors.status("the yard starts") as status:
                    start_detached(yards, names, lambda step: status.update(f"the yard starts [dim]{step}[/dim]"))
            except BaseException:
                # the yard that is coming up takes no orders yet, but it is a child of this process
                for child in psutil.Process().children():
                    with contextlib.suppress(psutil.Error):
                        if "serve" in child.cmdline():
                            child.terminate()
                            child.wait(STOP_S)
                raise
            remember_plan(self._path, self._folder)
        self._look()

    def died(self) -> str | None:
        """How it was killed: it is gone but its socket is not, which a yard that is stopped removes."""
        if self._running is not None and self._running.process() is not None:
            return None
        self._look()
        gone = self._running is None and socket_path(self._folder).exists()
        return f"killed, or out of memory; log: {self._folder / 'logs' / 'yard.log'}" if gone else None

    def _look(self) -> None:
        self._running = None
        with contextlib.suppress(SwitchyardError, psutil.Error):
            self._running = Identity.of(self._client.status()["pid"])


class DeploymentsProcess(ServerProcess):
    """The process that registers the deployments and runs their flows."""

    def __init__(self, folder: Path, plan: Path, api_url: str, schedules: bool) -> None:
        self._folder = folder
        serve = "from flows.deployments import main; main()"
        self._argv = [sys.executable, "-c", serve, str(plan), "--schedules" if schedules else "--no-schedules"]
        self._env = {"PREFECT_API_URL": api_url, "SWITCHYARD_HOME": str(folder)}

    def start(self) -> None:
        """Return once they are served. Raises SwitchyardError with the process's last lines when they are not."""
        self.stop(STOP_S)  # what it has left behind, where it died: the flows that it ran
        log = self._folder / "logs" / "deployments.log"
        env = {**without_proxies(os.environ), **self._env}
        cwd = workplace(self._folder)
        self._child = process.start("deployments", self._argv, state_dir=self._folder, log_path=log, env=env, cwd=cwd)
        self.wait_until(
            lambda child: any(SERVED in line for line in child.log_tail()),
            SERVE_S,
            "the deployments could not be served",
        )
        for line in self._child.log_tail():
            if line.startswith(WARNING):
                errors.print(line, markup=False)

    def forgotten(self) -> bool:
        """Whether Prefect does not know them any more: its database was removed."""
        url = f"{self._env['PREFECT_API_URL']}/deployments/name/{ALWAYS_THERE}/{ALWAYS_THERE}"
        try:
            return httpx.get(url, timeout=60, trust_env=False, verify=False).status_code == httpx.codes.NOT_FOUND
        except httpx.HTTPError:  # the server died again; the next look finds that
            return False


@dataclass
class Kept:
    """A process that is restarted when it dies, unless it died too often lately."""

    name: str
    died: Callable[[], str | None]
    start: Callable[[], None]
    meanwhile: str = "the yard keeps serving"
    began: list[float] = field(default_factory=list)

    def look(self) -> None:
        """Restart it if it died. Raises GaveUp."""
        if (how := self.died()) is None:
            return
        now = time.monotonic()
        self.began = [at for at in self.began if now - at < RESTART_WINDOW_S]
        if len(self.began) >= RESTARTS:
            raise GaveUp(
                f"{self.name} exited {RESTARTS + 1} times within {RESTART_WINDOW_S / 60:.0f} minutes (now: {how}); "
                f"giving up, {self.meanwhile}. `switchyard up` tries again, `switchyard stop` stops the yard"
            )
        self.began.append(now)
        errors.print(f"{self.name} exited unexpectedly ({how}); restarting, {self.meanwhile}")
        try:
            self.start()
        except SwitchyardError as error:  # counts as a start; the next look tries again
            errors.print(str(error), markup=False)
        else:
            errors.print(f"{self.name} runs again")


def keep_up(yard: YardProcess, server: PrefectServer, deployments: DeploymentsProcess) -> None:
    """Restart what dies until an interrupt; the models first, then what the deployments need. Raises GaveUp."""

    def restart_server() -> None:
        server.stop()  # what it has left behind
        server.start()
        server.ready()
        if deployments.forgotten():
            deployments.start()

    kept = [
        Kept("the yard", yard.died, yard.start, "models are unavailable until then"),
        Kept("Prefect's server", server.died, restart_server),
        Kept("the process of the deployments", deployments.died, deployments.start),
    ]
    waiting = threading.Event()
    while not waiting.wait(LOOK_S):
        for one in kept:
            one.look()
