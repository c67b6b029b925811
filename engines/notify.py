"""Notifications: what happened to a model, sent to a webhook, a command or Prefect. Nothing waits for them.

Events of one kind about one model are sent `every_s` at most: of those between, the latest is sent, with their number.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

from engines.errors import BadInput
from engines.home import home, host
from engines.process.process import LAUNCHER
from engines.redaction import redacted
from engines.up import running_up

Event = Literal["incident", "fallback", "rollback", "soak breach", "approval waiting", "candidate ready", "drift"]
NOTIFICATION = "switchyard.notification"  # the event in Prefect
VARIABLE = r"^[A-Z_][A-Z0-9_]*$"
LIMIT_S = 10.0  # of one webhook, or one command
POLL_S = 0.05
HELD = 200  # kinds and models that wait at a time
WHAT_CHARS = 2000
BARE = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}


class NotifySettings(BaseModel):
    """The `[notify]` table of a plan: where to, and of what."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    url_env: str | None = Field(
        None, pattern=VARIABLE, description="environment variable that holds the URL of a webhook: it is a secret"
    )
    command: tuple[str, ...] = Field(
        (), description="a program by its absolute path, and its arguments; it gets the event as JSON on standard input"
    )
    prefect_block: str | None = Field(
        None,
        pattern=r"^[a-z0-9-]+/[a-z0-9-]+$",
        description="TYPE/NAME of a notification block in the Prefect of `switchyard up`, whose automation sends to it",
    )
    events: tuple[Event, ...] = Field(get_args(Event), description="what is sent")
    every_s: float = Field(60, ge=0, description="seconds between two of one kind about one model, the latest of them")

    @field_validator("command")
    @classmethod
    def _by_path(cls, command: tuple[str, ...]) -> tuple[str, ...]:
        if command and not Path(command[0]).is_absolute():
            raise ValueError(f"'{command[0]}' is no absolute path; write /usr/local/bin/notify")
        return command

    @property
    def is_used(self) -> bool:
        return bool(self.url_env or self.command or self.prefect_block)

    def url(self, environment: Mapping[str, str] = os.environ) -> str:
        """The webhook's URL; "" where the plan names none. Raises BadInput, without the URL."""
        if self.url_env is None:
            return ""
        url = environment.get(self.url_env, "").strip()
        if not url:
            raise BadInput(f"notify.url_env: the environment variable {self.url_env} is not set; export it first")
        if not url.startswith(("https://", "http://")):
            raise BadInput(f"notify.url_env: {self.url_env} holds no URL that begins with https:// or http://")
        return url


class Notifier:
    """Sends in a thread of its own; what cannot be sent is one line in the log, without the URL."""

    def __init__(self, settings: NotifySettings, log: logging.Logger) -> None:
        """Raises BadInput where the plan names a variable that holds no URL."""
        self.settings = settings
        self._log = log
        self._ways: dict[str, Callable[[dict[str, Any]], None]] = {}
        if url := settings.url():
            self._ways["webhook"] = lambda message: _post(url, message)
        if settings.command:
            self._ways["command"] = lambda message: _give(settings.command, message)
        if settings.prefect_block:
            self._ways["Prefect server"] = _emit
        self._changed = threading.Condition()
        self._held: dict[tuple[str, str], dict[str, Any]] = {}
        self._sent: dict[tuple[str, str], float] = {}
        self._sending = False
        self._thread: threading.Thread | None = None

    def note(self, event: Event, model: str, what: str, engine: str = "") -> None:
        """Have an event sent; returns at once."""
        if not self.settings.is_used or event not in self.settings.events:
            return
        about = {"event": event, "host": host(), "model": model, "engine": engine, "what": what[:WHAT_CHARS]}
        text = f"{model}{f' ({engine})' if engine else ''}: {event}: {about['what']}"  # what chat programs show
        at = datetime.now(UTC).isoformat(timespec="seconds")
        message = redacted({**about, "at": at, "text": f"Switchyard on {host()}: {text}"})
        with self._changed:
            before = self._held.get((event, model))
            if before is None and len(self._held) >= HELD:
                return
            message["repeated"] = before["repeated"] + 1 if before else 0
            self._held[event, model] = message
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="notifications", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, within_s: float = 2 * LIMIT_S) -> None:
        """Return when everything is sent, or after `within_s`: for a program that ends."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._held or self._sending), within_s)

    # --- its thread

    def _run(self) -> None:
        while True:
            message = self._next()
            for way, send in self._ways.items():
                try:
                    send(message)
                except Exception as error:  # the text of an HTTP error would quote the URL
                    why = str(error) if isinstance(error, _NotTaken) else type(error).__name__
                    self._log.warning("a notification (%s) was not taken by the %s: %s", message["event"], way, why)
            with self._changed:
                self._sending = False
                self._changed.notify_all()

    def _next(self) -> dict[str, Any]:
        """The message that is due first, once it is."""
        with self._changed:
            while True:
                now = time.monotonic()
                due = {key: self._sent.get(key, -math.inf) + self.settings.every_s for key in self._held}
                first = min(due, key=due.__getitem__, default=None)
                if first is not None and due[first] <= now:
                    self._sent[first], self._sending = now, True
                    return self._held.pop(first)
                self._changed.wait(None if first is None else due[first] - now)


def _post(url: str, message: Any, *handlers: urllib.request.BaseHandler) -> None:
    headers = {"Content-Type": "application/json", "User-Agent": "switchyard"}
    asked = urllib.request.Request(url, _bytes(message), headers)  # httpx would log the URL
    try:
        urllib.request.build_opener(_NoRedirects, *handlers).open(asked, timeout=LIMIT_S).close()
    except urllib.error.HTTPError as error:
        error.close()
        raise _NotTaken(f"it answered HTTP {error.code}") from None


def _emit(message: dict[str, Any]) -> None:
    """Give it to Prefect as an event, which the automation of `up` answers."""
    if (up := running_up(home())) is None:
        raise _NotTaken("`switchyard up` does not run")
    resource = {"prefect.resource.id": f"switchyard.model.{message['model']}", "switchyard.host": message["host"]}
    event = {"id": str(uuid.uuid4()), "occurred": message["at"], "event": NOTIFICATION}
    event |= {"resource": resource, "payload": message}
    _post(f"{up.api_url}/events", [event], urllib.request.ProxyHandler({}))  # it is on loopback


def _give(command: Sequence[str], message: Any) -> None:
    """Run the command in a group of its own, with nothing of our environment; what is left of it then is killed."""
    argv = [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid()), *command]
    child = subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**BARE, "HOME": str(Path.home())},
        cwd="/",
    )
    deadline = time.monotonic() + LIMIT_S
    try:
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError), child.stdin:  # one that reads nothing
            child.stdin.write(_bytes(message))  # shorter than a pipe holds
        # as long as it is not waited for, no other process can have its number
        while not (ended := os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)):
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        code = child.wait()
    if not ended:
        raise _NotTaken(f"it did not end within {LIMIT_S:g} s and was killed")
    if code:
        raise _NotTaken(f"it ended with status {code}")


def _bytes(message: Any) -> bytes:
    return json.dumps(message, ensure_ascii=False).encode()


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """None: what an URL is given does not go to another one."""


class _NotTaken(Exception):
    """A webhook or a command that did not take a notification; the text has no secret."""


def notify(settings: NotifySettings, event: Event, model: str, what: str, engine: str = "") -> None:
    """Send one event from a program that may end next: returns when it is sent, or given up."""
    log = logging.getLogger("switchyard")
    try:
        notifier = Notifier(settings, log)
    except BadInput as error:
        log.warning("a notification (%s) was not sent: %s", event, error)
        return
    notifier.note(event, model, what, engine)
    notifier.flush()
