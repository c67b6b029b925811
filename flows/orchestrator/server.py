"""Prefect's API for one command: the user's own server where one is set, else one that lives as long as the command.

Prefect's own temporary server shares our process group (Ctrl-C would end it before the run can report its state) and
survives our SIGKILL. So ours is started like an engine: in its own session, registered, and it dies with us.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pkgutil
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from rich.console import Console

from engines.environment import is_loopback, without_proxies
from engines.errors import BadInput, SwitchyardError
from engines.home import database_url
from engines.process import process
from engines.process.readiness import exit_reason
from engines.process.serving import free_port
from engines.up import running_up
from flows.progress import ConsoleProgress, progress

LoadedFlow = Callable[..., dict[str, Any]]

START_S = 120.0
OFFLINE = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_CLI_PROMPT": "false",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "switchyard",
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    # an error is one line of ours; Prefect would print its traceback above it
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
}


def prepare_environment(home: Path, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The settings Prefect reads at its import, those the user has not set himself: offline, quiet, own home."""
    wanted = {**OFFLINE, "PREFECT_HOME": str(home / "prefect")}
    return {name: value for name, value in wanted.items() if name not in environ}


def prepare_process(home: Path) -> None:
    """Keep the working directory's Prefect settings out of this process; call it before Prefect is imported.

    Prefect reads `.env`, `prefect.toml` and `pyproject.toml` of the working directory at any time and puts that
    directory in front of the module path. So this process changes to a folder of its own: relative paths have to be
    made absolute before. Raises BadInput when the folder cannot be made.
    """
    os.environ.update(prepare_environment(home))
    os.environ["SWITCHYARD_HOME"] = str(home)
    if database_url() is not None:
        from tasks.records.schema.upgrade import absolute, database  # SQLAlchemy: half a second of `up --help`

        os.environ["SWITCHYARD_DATABASE_URL"] = absolute(database(None))
    os.chdir(workplace(home))


def workplace(home: Path) -> Path:
    """The working directory of every process that imports Prefect; made now. BadInput when it cannot be."""
    folder = home / "prefect"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as problem:
        raise BadInput(f"{folder} cannot be created ({problem.strerror}): set SWITCHYARD_HOME to another") from problem
    return folder


def with_prefect(home: Path, flow: str) -> LoadedFlow:
    """The flow at `flow` (module:name), imported once a Prefect API answers: the user's own, or one that ends with us.

    Progress goes to standard error from here on.
    """
    shown = ConsoleProgress(Console(stderr=True))
    progress.set(shown)
    with shown.step("Prefect starts"):
        server = prefect_api(home)
        loaded = pkgutil.resolve_name(flow)  # takes seconds, in which the server starts
        by_command = pkgutil.resolve_name("flows.orchestrator.ending:by_command")
        if server is not None:
            server.ready()
    command: LoadedFlow = by_command(loaded)
    return command


class ServerProcess:
    """A child of this process that serves something, until it is stopped or dies."""

    _child: process.ManagedProcess | None = None

    def died(self) -> str | None:
        """How it ended; None while it runs."""
        return exit_reason(self._child) if self._child is not None and self._child.poll() is not None else None

    def stop(self, grace_s: float = 4) -> None:
        """End it; safe twice."""
        if self._child is not None:
            self._child.stop(grace_s=grace_s)

    def wait_until(self, serves: Callable[[process.ManagedProcess], bool], within_s: float, failed: str) -> None:
        """Return once `serves`. Stops it and raises SwitchyardError(`failed` ...) when it died or took too long."""
        child = self._child
        assert child is not None
        deadline = time.monotonic() + within_s
        while not serves(child):
            if child.poll() is not None or time.monotonic() > deadline:
                words = "\n  ".join(child.log_tail()[-5:]) or "it printed nothing; is the disk full?"
                state = exit_reason(child)
                self.stop()
                raise SwitchyardError(f"{failed} ({state}, log: {child.log.path}):\n  {words}")
            time.sleep(0.1)


class PrefectServer(ServerProcess):
    """A Prefect API server of our own; `start` returns at once, `ready` waits for it.

    `services` also runs its background services (the scheduler), `ui` its pages; a single command has no use for them.
    """

    def __init__(self, home: Path, *, port: int | None = None, services: bool = False, ui: bool = False) -> None:
        self._home = home
        self._services = services
        self._ui = ui
        self._port = port or free_port()
        self.api_url = f"http://127.0.0.1:{self._port}/api"

    def start(self) -> None:
        """Begin starting it; about 10 s with a fresh home, half of it later on. BadInput when its port is taken."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what is merely closing down is no listener
            try:
                probe.bind(("127.0.0.1", self._port))
            except OSError as error:
                raise BadInput(
                    f"port {self._port} is taken: name another with --prefect-port, or end what listens there"
                ) from error
        argv = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
        argv += ["--host", "127.0.0.1", "--port", str(self._port), "--log-level", "error"]
        env = {**os.environ, "PREFECT_UI_ENABLED": "1" if self._ui else "0", "PREFECT_API_URL": ""}
        env["PREFECT_UI_API_URL"] = self.api_url
        if not self._services:
            env["PREFECT__SERVER_EPHEMERAL"] = "1"
        self._child = process.start(
            "prefect server",
            argv,
            state_dir=self._home,
            log_path=self._home / "logs" / "prefect-server.log",
            env=env,
            cwd=workplace(self._home),
        )

    def ready(self) -> None:
        """Return when it answers. Raises SwitchyardError with its last lines when it died or took too long."""
        with httpx.Client(timeout=2, trust_env=False, verify=False) as http:

            def answers(_: object) -> bool:
                with contextlib.suppress(httpx.HTTPError):
                    return http.get(f"{self.api_url}/health").status_code == 200
                return False

            self.wait_until(answers, START_S, "Prefect's API server did not start")


def prefect_api(home: Path) -> PrefectServer | None:
    """None where PREFECT_API_URL names a server, else a temporary one that is starting and ends with this process.

    Call it before Prefect is imported, for its settings and its exit handler: handlers run last in, first out, so
    Prefect still sends its last events to a server that answers; without one it tries for more than a minute.
    """
    prepare_process(home)
    if (running := running_up(home)) is not None:
        os.environ.setdefault("PREFECT_API_URL", running.api_url)
    server = None
    if not os.environ.get("PREFECT_API_URL"):
        server = PrefectServer(home)
        atexit.register(server.stop)
        server.start()
        os.environ["PREFECT_API_URL"] = server.api_url
    local = is_loopback(urlsplit(os.environ["PREFECT_API_URL"]).hostname or "")
    if local:  # Prefect's clients use every proxy variable, and cannot even parse a SOCKS proxy
        for name in os.environ.keys() - without_proxies(os.environ).keys():
            del os.environ[name]
    if server is None:
        _require_reachable(os.environ["PREFECT_API_URL"], through_proxy=not local)
    return server


def _require_reachable(api_url: str, *, through_proxy: bool) -> None:
    try:
        httpx.get(f"{api_url.rstrip('/')}/health", timeout=5, trust_env=through_proxy).raise_for_status()
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise BadInput(
            f"PREFECT_API_URL is {api_url}, and the proxy variables (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY) name a proxy "
            f"that cannot be used: {error}"
        ) from error
    except httpx.HTTPError as error:
        why = str(error).partition("\n")[0] or type(error).__name__
        raise SwitchyardError(
            f"PREFECT_API_URL is {api_url}, but no Prefect server answers there: start it or unset it ({why})"
        ) from error
