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
from engines.yard.client import Say, short_name
from engines.yard.memory_budget import MemoryBudget
from engines.yard.moves import Moves
from engines.yard.orders import FIRST, VERSION, order_of, too_old
from engines.yard.overflow import Overflow
from engines.yard.ports.status import Status
from engines.yard.yard import Yard


class Control:
    """The service. `stop` begins the end of the yard, `reload` takes over the plan anew."""

    def __init__(
        self,
        yard: Yard,
        moves: Moves,
        memory_budget: MemoryBudget,
        overflow: Overflow,
        status: Status,
        *,
        stop: Callable[[], None],
        reload: Callable[[str | None], Awaitable[str]],
    ) -> None:
        self._yard = yard
        self._status = status
        self._running: set[asyncio.Task[None]] = set()

        async def stop_yard(_: Any, say: Say) -> str:
            say("stopping")
            stop()
            return "the yard stops; requests in flight are finished first"

        self._carry_out: dict[str, Callable[[Any, Say], Awaitable[str]]] = {
            "promote": moves.promote,
            "rollback": moves.rollback,
            "canary": moves.canary,
            "shadow": moves.shadow,
            "use": moves.use,
            "drain": moves.drain,
            "overflow": overflow.order,
            "retire": moves.retire,
            "restore": moves.restore,
            "load": memory_budget.load,
            "unload": memory_budget.unload,
            "stop": stop_yard,
            "reload": lambda order, _: reload(order.plan),
        }

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/status", self._get_status)
        app.router.add_get("/samples", self._get_samples)
        app.router.add_post(f"/{{name:{'|'.join(self._carry_out)}}}", self._post_order)
        return app

    async def _post_order(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        body = await request.json() if request.can_read_body else {}
        lines: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

        async def carry_out() -> None:
            # a move continues when the person who ordered it closes the terminal
            try:
                if body.pop("version", FIRST) > VERSION:
                    raise SwitchyardError(too_old(name))
                order = order_of(name, body)
                done = await self._carry_out[name](order, lambda step: lines.put_nowait({"step": step}))
                lines.put_nowait({"done": done})
            except SwitchyardError as error:
                bad_input = {"bad_input": True} if isinstance(error, BadInput) else {}
                lines.put_nowait({"error": str(error), **bad_input})
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

    async def _get_status(self, _: web.Request) -> web.Response:
        return web.json_response({**self._status.status(), "orders": VERSION})

    async def _get_samples(self, request: web.Request) -> web.Response:
        route = self._yard.route_of(request.query.get("model"))
        return web.json_response({"samples": [vars(sample) for sample in self._yard.samples[route.model_id]]})


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
