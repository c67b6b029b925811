"""`switchyard demo`: two migrations end to end, with a client on the port that counts what fails."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from engines.errors import SwitchyardError
from engines.home import home
from engines.process.process import end_orphans
from engines.redaction import redacted_text
from engines.units import number_of
from engines.yard.client import YardClient, public_address
from flows.cli.migrate import show
from flows.cli.options import Json
from flows.cli.order import stop_yard
from flows.cli.output import finish, next_command, out, print_step
from flows.orchestrator.server import with_prefect
from flows.rollout.approval import asks, on_terminal
from migrations.demo import RETIRES, whole_demo_file, whole_demo_plans
from tasks.verdicts.verdict import Verdict, worst

SOAK_WINDOW_S = 60.0
PAUSE_S = 5.0  # it must not disturb what is measured
CANARY_PAUSE_S = 0.2  # a canary is judged on its requests
TIMEOUT_S = 180.0
LEAVE_S = 20.0


def demo(json_: Json = False) -> None:
    """Migrate two demo models end to end: to a new build, and to another engine (up to half an hour).

    A client on the port counts what fails. Both are evaluated, moved by rehearsal, canary and promotion, soaked for a
    moment and rolled back; the old build is retired and restored as well. It has a home of its own, `demo` in
    Switchyard's: your yard, plan and records stay out of it.
    """
    folder = home() / "demo"
    files = {name: whole_demo_file(folder, name, plan) for name, plan in whole_demo_plans().items()}
    end_orphans(folder)
    asks.set(on_terminal)
    parts = []
    try:
        with Traffic(folder).running() as client:
            run = with_prefect(folder, "flows.demo:whole_way")
            for name, path in files.items():
                print_step(f"\n{name}: {path}")
                parts.append({**run(path, SOAK_WINDOW_S, retire=name == RETIRES), "name": name})
                stop_yard(folder)
    finally:
        stop_yard(folder)
    verdict = worst(Verdict(part["verdict"]) for part in parts)
    finish({"verdict": verdict.value, "parts": parts, "client": client.summary()}, json_, _show)


def _show(outcome: Mapping[str, Any]) -> None:
    for part in outcome["parts"]:
        show({**part, "next": "\n".join(part["shown"])})
    out.print(f"\nthe client on the port, meanwhile: {outcome['client']}", markup=False)
    out.print(next_command("switchyard init --from-port 8080") + " to plan for your own server")


class Traffic:
    """A client that streams one conversation after the other on the public port, as an agent does, and counts."""

    def __init__(self, home: Path) -> None:
        self._yard = YardClient(home)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send, name="the demo's client", daemon=True)
        self.sent, self.failed = 0, list[str]()

    def summary(self) -> str:
        """Requests sent and failed so far."""
        failed = f"{len(self.failed)} failed ({self.failed[-1]})" if self.failed else "none failed"
        return f"{number_of(self.sent, 'request')}, {failed}"

    @contextlib.contextmanager
    def running(self) -> Iterator[Traffic]:
        """Send requests while the block runs, as soon as there is a yard; the last one is waited for."""
        self._thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            self._thread.join(LEAVE_S)

    def _send(self) -> None:
        pause_s = PAUSE_S
        while not self._stop.wait(pause_s):
            with contextlib.suppress(SwitchyardError):
                status = self._yard.status()
                pause_s = CANARY_PAUSE_S if any(route["canary"] for route in status["models"]) else PAUSE_S
                for route in status["models"]:
                    if not self._stop.is_set():
                        self._ask(public_address(status["address"]), route["id"])

    def _ask(self, address: str, model: str) -> None:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": f"Count from {self.sent}."}],
            "max_tokens": 6,
            "stream": True,  # a canary is judged on the times of streams
        }
        url = f"{address}/v1/chat/completions"
        try:
            reply = httpx.post(url, json=body, timeout=TIMEOUT_S, trust_env=False, verify=False)
            if reply.status_code != 200:
                self.failed.append(f"{reply.status_code}: {redacted_text(reply.text)[:120]}")
        except httpx.HTTPError as error:
            self.failed.append(f"{type(error).__name__}: {error}")
        self.sent += 1
