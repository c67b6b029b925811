"""What systemd is told: that the yard is ready, who serves what, and, from the event loop, that it is not hung.

Where no NOTIFY_SOCKET is set nothing is sent. See sd_notify(3).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterable, MutableMapping

from engines.yard.route import Route

STATUS_S = 5.0
STATUS_CHARS = 500


class Systemd:
    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        """Takes the variables out of the environment: they are for this process alone."""
        address, limit = environment.pop("NOTIFY_SOCKET", ""), environment.pop("WATCHDOG_USEC", "")
        is_ours = environment.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._every_s = int(limit) / 3e6 if limit.isdigit() and int(limit) and is_ours else STATUS_S

    def tell(self, *lines: str) -> None:
        """Send lines such as READY=1; what nobody takes is lost."""
        if self._address:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.setblocking(False)
                sender.sendto("\n".join(lines).encode(), self._address)

    async def run(self, routes: Iterable[Route]) -> None:
        """Report every third of the watchdog's time, until cancelled. A loop that hangs reports nothing."""
        while self._address:
            self.tell("WATCHDOG=1", f"STATUS={status_line(routes)}")
            await asyncio.sleep(min(self._every_s, STATUS_S))


def status_line(routes: Iterable[Route]) -> str:
    """Who serves what, in one line."""
    return "; ".join(map(_served, routes))[:STATUS_CHARS]


def _served(route: Route) -> str:
    if route.unloaded or not route.units:
        return f"{route.model_id}: not loaded"
    return f"{route.model_id}: {route.serving.engine} {route.serving.state}{', a fallback' if route.fallback else ''}"
