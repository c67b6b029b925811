"""Orders to the yard: a small HTTP service on a unix socket that only its owner can open.

A move answers with one JSON line for each step and a last one with the result, so that a person can watch it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from engines.errors import BadInput, SwitchyardError
from engines.yard.client import FIRST, VERSION, Say, short_name, too_old
from engines.yard.memory_budget import MemoryBudget
from engines.yard.moves import Moves
from engines.yard.ports.status import Status
from engines.yard.yard import Yard

Order = Callable[[Say], Awaitable[str]]


class Control:
    """The service."""

    def __init__(
        self,
        yard: Yard,
        moves: Moves,
        memory_budget: MemoryBudget,
        status: Status,
        *,
        stop: Callable[[], None],
        reload: Callable[[], Awaitable[str]],
    ) -> None:
        self._yard = yard
        self._moves = moves
        self._memory_budget = memory_budget
        self._shown = status
        self._stop = stop
        self._reload = reload
        self._running: set[asyncio.Task[None]] = set()

    def application(self) -> web.Application:
        """Its routes."""
        app = web.Application()
        app.router.add_get("/status", self._status)
        app.router.add_get("/samples", self._samples)
        for name, order in {
            "promote": self._promote,
            "rollback": self._rollback,
            "canary": self._canary,
            "shadow": self._shadow,
            "use": self._use,
            "drain": self._drain,
            "retire": self._retire,
            "restore": self._restore,
            "load": self._load,
            "unload": self._unload,
            "stop": self._stopped,
            "reload": self._reloaded,
        }.items():
            app.router.add_post(f"/{name}", self._ordered(order))
        return app

    def _ordered(
        self, order: Callable[[dict[str, Any]], Order]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            body = await request.json() if request.can_read_body else {}
            lines: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

            async def carry_out() -> None:
                # a move goes on when the person who ordered it closes the terminal
                try:
                    if body.pop("version", FIRST) > VERSION:
                        raise SwitchyardError(too_old(request.path.strip("/")))
                    lines.put_nowait({"done": await order(body)(lambda step: lines.put_nowait({"step": step}))})
                except BadInput as error:
                    lines.put_nowait({"error": str(error), "bad_input": True})
                except SwitchyardError as error:
                    lines.put_nowait({"error": str(error)})
                except Exception as error:
                    self._yard.log.exception("an order failed")
                    lines.put_nowait({"error": f"{type(error).__name__}: {error} (a bug; see the yard's log)"})
                finally:
                    lines.put_nowait(None)

            task = asyncio.create_task(carry_out())
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
            await response.prepare(request)
            with contextlib.suppress(ConnectionError):
                while (line := await lines.get()) is not None:
                    await response.write(json.dumps(line).encode() + b"\n")
                await response.write_eof()
            return response

        return handle

    async def _status(self, _: web.Request) -> web.Response:
        return web.json_response({**self._shown.status(), "orders": VERSION})

    async def _samples(self, request: web.Request) -> web.Response:
        route = self._yard.route_of(request.query.get("model"))
        return web.json_response({"samples": [vars(sample) for sample in self._yard.samples[route.model_id]]})

    def _promote(self, body: dict[str, Any]) -> Order:
        return lambda say: self._moves.promote(body.get("model"), body.get("to"), say, form=body.get("form", "auto"))

    def _rollback(self, body: dict[str, Any]) -> Order:
        return lambda say: self._moves.rollback(body.get("model"), say, form=body.get("form", "auto"))

    def _canary(self, body: dict[str, Any]) -> Order:
        return lambda say: self._moves.canary(body.get("model"), body.get("to"), float(body.get("weight", 0)), say)

    def _shadow(self, body: dict[str, Any]) -> Order:
        return lambda say: self._moves.shadow(body.get("model"), body.get("to"), float(body.get("share", 0)), say)

    def _use(self, body: dict[str, Any]) -> Order:
        return lambda say: self._moves.use(body.get("model"), str(body.get("engine")), say)

    def _drain(self, body: dict[str, Any]) -> Order:
        return lambda say: self._moves.drain(body.get("model"), say, on=bool(body.get("on", True)))

    def _retire(self, body: dict[str, Any]) -> Order:
        told = {name: str(body.get(name, "")) for name in ("who", "why", "archive")}
        return lambda _: self._moves.retire(str(body["engine"]), **told)

    def _restore(self, body: dict[str, Any]) -> Order:
        return lambda _: self._moves.restore(str(body["engine"]))

    def _load(self, body: dict[str, Any]) -> Order:
        return lambda _: self._memory_budget.load(self._yard.route_of(body.get("model")))

    def _unload(self, body: dict[str, Any]) -> Order:
        return lambda _: self._memory_budget.unload(self._yard.route_of(body.get("model")))

    def _stopped(self, _: dict[str, Any]) -> Order:
        async def order(say: Say) -> str:
            say("stopping")
            self._stop()
            return "the yard stops; requests in flight are finished first"

        return order

    def _reloaded(self, _: dict[str, Any]) -> Order:
        async def order(_: Say) -> str:
            return await self._reload()

        return order


def listening(path: Path) -> socket.socket:
    """The control socket, which only its owner can open from its first moment on."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()  # the yard's lock is held: a socket that is there is a dead yard's
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        with short_name(path) as name:
            listener.bind(name)
    finally:
        os.umask(before)
    listener.listen(16)
    listener.setblocking(False)
    return listener
