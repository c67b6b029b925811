"""The demo's client: streamed conversations one after the other on the public port, as an agent has; it counts."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx

from engines.errors import SwitchyardError
from engines.redaction import redacted_text
from engines.yard.client import YardClient, public_address

PAUSE_S = 5.0  # it must not disturb what is measured
CANARY_PAUSE_S = 0.2  # a canary is judged on its requests
TIMEOUT_S = 180.0
LEAVE_S = 20.0


class Traffic:
    """Requests sent and failed so far."""

    def __init__(self, home: Path) -> None:
        self._yard = YardClient(home)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._go, name="the demo's client", daemon=True)
        self.sent, self.failed = 0, list[str]()

    def told(self) -> str:
        """One line."""
        failed = f"{len(self.failed)} failed ({self.failed[-1]})" if self.failed else "none failed"
        return f"{self.sent} requests, {failed}"

    def start(self) -> None:
        """Begin; it waits for a yard."""
        self._thread.start()

    def stop(self) -> None:
        """No further request; the one under way is waited for."""
        self._stop.set()
        self._thread.join(LEAVE_S)

    def _go(self) -> None:
        pause_s = PAUSE_S
        while not self._stop.wait(pause_s):
            with contextlib.suppress(SwitchyardError):
                status = self._yard.status()
                pause_s = CANARY_PAUSE_S if any(route["canary"] for route in status["models"]) else PAUSE_S
                for route in status["models"]:
                    if not self._stop.is_set():
                        self._ask(public_address(status["address"]), route["id"])

    def _ask(self, address: str, model: str) -> None:
        number = self.sent
        body = {
            "model": model,
            "messages": [{"role": "user", "content": f"Count from {number}."}],
            "max_tokens": 6,
            "stream": True,  # a canary is judged on the times of streams
        }
        try:
            answer = httpx.post(
                f"{address}/v1/chat/completions", json=body, timeout=TIMEOUT_S, trust_env=False, verify=False
            )
            if answer.status_code != 200:
                self.failed.append(f"{answer.status_code}: {redacted_text(answer.text)[:120]}")
        except httpx.HTTPError as error:
            self.failed.append(f"{type(error).__name__}: {error}")
        self.sent += 1


@contextlib.contextmanager
def traffic(home: Path) -> Iterator[Traffic]:
    """A client on the port of this home's yard while the block runs."""
    client = Traffic(home)
    client.start()
    try:
        yield client
    finally:
        client.stop()
