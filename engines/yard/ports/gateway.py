"""The public port: each request goes to the engine of its model, its answer comes back chunk by chunk.

A request is handed to an engine only when that has room, so it waits here, where the end of an engine cannot lose it. A
request of which nothing has reached the client is retried once, on the engine that serves then; a stream that has begun
ends with an error event. A client that leaves ends its request on the engine at once. One that stays but takes nothing
delays nobody: the engine's answer is read on into a bounded buffer, and after `client_stall_s` the client is cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from engines.openai.call import GENERATING, Call, Refusal, parse, reported_prefill_rate
from engines.openai.dialect import Dialect
from engines.openai.sse import DONE, write_event
from engines.process.readiness import NOT_SUPPORTED
from engines.yard.engine.connection import EngineAnswer, Gone
from engines.yard.engine.in_flight import InFlight
from engines.yard.engine.liveness import failure_words
from engines.yard.engine.unit import Unit
from engines.yard.memory_budget import MemoryBudget
from engines.yard.ports.page import page
from engines.yard.ports.props import props
from engines.yard.ports.status import Status
from engines.yard.ports.unread import SOME_BYTES, Comments, StalledClients, Unread, address_of
from engines.yard.route import Route, Waiting
from engines.yard.shadow import RecordedAnswer, Shadow
from engines.yard.yard import Yard

# answered beside the requests in flight: they take no slot
LIGHT = frozenset({"/v1/chat/completions/input_tokens", "/tokenize", "/detokenize"})
TRIES = 2
SSE = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
CONTENT = re.compile(rb'"(?:content|reasoning_content|text|name|arguments)"\s*:\s*"[^"]')
SHOWN_REPORTS = 5
NEVER_FULL = 2**30
UNREAD_POLL_S = 0.05
OUR_FAULTS = frozenset({401, 403, 404})  # the key, the path and the model's name are the yard's own
END_BYTES = 2048  # of an answer, where its usage and timings stand


class Unanswered(Exception):
    """The engine went away before anything of its answer was passed on."""


class ClientLeft(Exception):
    """Nobody reads the answer any more."""


class Gateway:
    def __init__(self, yard: Yard, shadow: Shadow, memory_budget: MemoryBudget, status: Status) -> None:
        self._yard = yard
        self._shadow = shadow
        self._memory_budget = memory_budget
        self._status = status
        self._unread = Unread()

    def application(self) -> web.Application:
        """Its routes. Every error, the router's own too, is an OpenAI error object."""
        app = web.Application(
            middlewares=[self._guarded], client_max_size=self._yard.settings.max_body_mib * 2**20, logger=self._yard.log
        )
        for path in sorted(GENERATING | LIGHT | {"/v1/embeddings", "/chat/completions", "/completions", "/embeddings"}):
            app.router.add_post(path, self._served)
        for path, handler in {
            "/props": self._props,
            "/v1/models": self._models,
            "/models": self._models,
            "/v1/models/{model:.+}": self._model,
            "/health": self._health,
            "/v1/health": self._health,
            "/metrics": self._metrics,
            "/yard": self._page,
            r"/yard/reports/{name:[0-9a-z-]+\.html}": self._report,
        }.items():
            app.router.add_get(path, handler)
        return app

    # --- what guards every request

    @web.middleware
    async def _guarded(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            self._authorize(request)
            return await handler(request)
        except Refusal as refusal:
            self._yard.metrics.refused.labels(str(refusal.status)).inc()
            return _error(refusal)
        except web.HTTPRequestEntityTooLarge:
            limit = self._yard.settings.max_body_mib
            return _error(Refusal(413, f"the request body is larger than {limit} MiB", code="body_too_large"))
        except web.HTTPNotFound:
            return _error(Refusal(404, f"there is no {request.path} here", code="not_found"))
        except web.HTTPMethodNotAllowed as error:
            allowed = ", ".join(sorted(error.allowed_methods))
            return _error(Refusal(405, f"{request.path} takes {allowed}, not {request.method}"))

    def _authorize(self, request: web.Request) -> None:
        key = self._yard.api_key
        if key is None or request.path in ("/health", "/v1/health"):
            return
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        offered = token.strip() if scheme.lower() == "bearer" else request.headers.get("X-Api-Key", "")
        if not hmac.compare_digest(offered.encode("utf-8", "surrogateescape"), key.get_secret_value().encode()):
            raise Refusal(401, "Invalid API key", kind="authentication_error", code="invalid_api_key")

    # --- requests that an engine answers

    async def _served(self, request: web.Request) -> web.StreamResponse:
        began = time.monotonic()
        path = request.path if request.path.startswith(("/v1/", "/tokenize", "/detokenize")) else f"/v1{request.path}"
        call = parse(path, await request.read())
        route = self._yard.route_for(call.model)
        reply = ClientReply(request, call, self._unread)
        self._shadow.make_way(route)
        self._memory_budget.wake(route)
        reply.recorded = self._shadow.recorder(route, call)
        try:
            for attempt in range(1, TRIES + 1):
                conversation = call.conversation() if route.state.canary else ""
                place = route.enter(conversation, call.prompt_tokens, light=call.path in LIGHT)
                unit, running = await self._turn(route, place, reply, began)
                try:
                    await self._exchange(route, unit, running, call, reply)
                except Unanswered as gone:
                    self._yard.note_loss(route, unit, str(gone), retried=attempt < TRIES)
                    continue
                finally:
                    unit.give_back(running)
                self._yard.served(route, unit, call, running, reply.error)
                if reply.error is None:
                    self._yard.capture.take(call.path, call.body, len(call.raw))
                    if reply.recorded is not None:
                        self._shadow.offer(route, unit, call, reply.recorded)
                return await reply.delivered()
            raise Refusal(502, "the engine went away twice while it had this request", code="engine_died")
        except Refusal as refusal:
            self._yard.metrics.refused.labels(str(refusal.status)).inc()
            return await reply.refuse(refusal)
        except ClientLeft:
            return reply.response
        finally:
            self._unread.forget(reply)

    async def _turn(self, route: Route, place: Waiting, reply: ClientReply, began: float) -> tuple[Unit, InFlight]:
        """The engine and the place on it; a stream that waits long is kept alive with comments."""
        try:
            while not place.turn.done():
                left = began + self._yard.settings.wait_s - time.monotonic()
                if left <= 0:
                    why = self._status.explain(route)
                    waited = f"waited {self._yard.settings.wait_s:.0f} s for {route.model_id}: {why}"
                    raise Refusal(503, waited, code="wait_timeout", retry_after_s=10)
                await asyncio.wait([place.turn], timeout=min(left, self._yard.settings.keepalive_s))
                if not place.turn.done():
                    await reply.keep_alive()
            return place.turn.result()
        except BaseException:  # the client left, or waited too long: its turn goes to the next one
            route.leave(place)
            raise

    async def _exchange(self, route: Route, unit: Unit, running: InFlight, call: Call, reply: ClientReply) -> None:
        """Pass the request to the engine and its answer on, until the engine is done with it."""
        dialect, running.generates = unit.dialect(call), call.path in GENERATING
        try:
            async with unit.connection.ask("POST", call.path, dialect.request()) as answer:
                if call.stream and answer.status == 200:
                    await self._stream(route, answer, running, dialect, reply)
                    return
                data = await answer.read()
                running.chunk(content=True)
                running.prefill_rate = reported_prefill_rate(data[-END_BYTES:])
                status, data = dialect.whole(answer.status, data)
                running.failure = _failure(call, status, data)
                await reply.whole(status, data)
        except Gone as gone:
            ended = await unit.end_of(running)
            if not ended:
                running.failure = str(gone)
            if not reply.begun_with_content:
                await reply.close_comment()
                raise Unanswered(ended or str(gone)) from gone
            await reply.cut(Refusal(502, f"{unit.engine} went away: {ended or gone}", code="engine_died"))

    async def _stream(
        self, route: Route, answer: EngineAnswer, running: InFlight, dialect: Dialect, reply: ClientReply
    ) -> None:
        last: deque[bytes] = deque(maxlen=3)  # the finish, the usage with the engine's timings, [DONE]
        comments = Comments()
        async for chunk in answer.pieces():
            last.append(chunk)
            if not comments.only(chunk):  # an engine's own keep-alive is no progress
                running.chunk(content=running.first is None and CONTENT.search(chunk) is not None)
            if not dialect.changes_streams and chunk.startswith(b'data: {"error"'):
                dialect.error = "the engine reported an error in its stream"
                running.failure = _failure_in_stream(chunk)
            data = dialect.event(chunk) if dialect.changes_streams else chunk
            if dialect.early_error is not None:
                running.failure = _failure(reply.call, *dialect.early_error)
                await reply.whole(*dialect.early_error)
                return
            if data:
                await reply.pass_on(data)
                if reply.is_full:
                    await self._hold_back(route, running, reply)
        end = b"".join(last)
        running.prefill_rate = reported_prefill_rate(end)
        if b"[DONE]" not in end:
            raise Gone("the stream ended without its end")
        if rest := dialect.rest():
            await reply.pass_on(rest)
        reply.error = dialect.error
        if dialect.changes_streams and dialect.error:
            running.failure = dialect.error
        elif running.first is None and not running.failure:
            running.failure = "an answer without content"

    async def _hold_back(self, route: Route, running: InFlight, reply: ClientReply) -> None:
        """Stop reading the engine until the client takes some; for `client_stall_s` at most while others wait."""
        began = time.monotonic()
        running.hold()
        while reply.is_full:
            limit_s = self._yard.settings.client_stall_s
            if route.waiting and time.monotonic() - began > limit_s:
                self._note_cut(reply.hang_up(), f"held {route.model_id} up for {limit_s:g} s while others waited")
                raise ClientLeft
            await asyncio.sleep(UNREAD_POLL_S)
            reply.count()
        running.release()

    async def deliver(self, within_s: float) -> None:
        """Return when clients have taken their answers, or after `within_s`."""
        until = time.monotonic() + within_s
        while self._unread.any and (left := until - time.monotonic()) > 0:  # noqa: ASYNC110  a transport has no event for it
            await asyncio.sleep(min(left, UNREAD_POLL_S))

    async def watch_clients(self, server: Callable[[], web.Server | None]) -> None:
        """Cut each client that takes nothing of its answer for `client_stall_s`; until cancelled."""
        watch = StalledClients()
        while True:
            limit_s = self._yard.settings.client_stall_s
            await asyncio.sleep(min(limit_s / 8, 1.0))
            for peer in watch.cut(list(running.connections) if (running := server()) else [], limit_s):
                self._note_cut(peer, f"took nothing of its answer for {limit_s:g} s")

    def _note_cut(self, peer: str, why: str) -> None:
        self._yard.metrics.clients_cut.inc()
        self._yard.events.note("yard", "-", f"cut the client at {peer}: it {why}")

    # --- what the yard answers itself

    async def _health(self, request: web.Request) -> web.Response:
        """200 only when a request would be served now."""
        route = self._yard.route_for(request.query.get("model"))
        detail = self._status.health_of(route)
        served = route.serving.state.serves and not route.holding and route.unservable is None
        if served or route.unloaded:  # the next request would load it
            return web.json_response({"status": "ok", **detail})
        return _error(self._not_served(route), **detail)

    def _not_served(self, route: Route) -> Refusal:
        return Refusal(503, self._status.explain(route), kind="unavailable_error", code="503", retry_after_s=2)

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": self._status.models()})

    async def _model(self, request: web.Request) -> web.Response:
        name = request.match_info["model"]
        for entry in self._status.models():
            if entry["id"] == name:
                return web.json_response(entry)
        raise Refusal(404, f"the model '{name}' does not exist", code="model_not_found")

    async def _props(self, request: web.Request) -> web.Response:
        route = self._yard.route_for(request.query.get("model"))
        if not (route.serving.state.serves or route.unloaded):
            raise self._not_served(route)
        return web.json_response(await props(route.serving))

    async def _metrics(self, _: web.Request) -> web.Response:
        text = self._yard.metrics.text(self._yard.routes.values(), len(self._yard.events.incidents))
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _page(self, _: web.Request) -> web.Response:
        reports = self._yard.home / "reports"
        newest = sorted((path.name for path in reports.glob("*.html")), reverse=True)  # their names are times
        text = page(self._status.status(), newest[:SHOWN_REPORTS])
        return web.Response(text=text, content_type="text/html", charset="utf-8")

    async def _report(self, request: web.Request) -> web.StreamResponse:
        path = self._yard.home / "reports" / request.match_info["name"]
        if not path.is_file():
            raise web.HTTPNotFound
        return web.FileResponse(path)


class ClientReply:
    """What goes back to the client: a whole answer, or a stream that may begin before an engine has it."""

    def __init__(self, request: web.Request, call: Call, unread: Unread) -> None:
        self.call = call
        self._request = request
        self._unread = unread
        self._response: web.StreamResponse | None = None
        self._whole: web.Response | None = None
        self._comments = Comments()
        self.begun_with_content = False
        self.error: str | None = None
        self.recorded: RecordedAnswer | None = None

    @property
    def response(self) -> web.StreamResponse:
        """What was sent so far, to a client that left."""
        return self._response or web.Response(status=499)

    @property
    def is_full(self) -> bool:
        """True when the client is so far behind that no more of its answer may be kept for it."""
        return self._unread.is_full(self)

    def count(self) -> None:
        """Note how much the client has not taken yet."""
        self._unread.count(self, self._transport().get_write_buffer_size())

    def hang_up(self) -> str:
        """End the connection, whatever the client has not taken; the client's address."""
        transport = self._transport()
        transport.abort()
        return address_of(transport)

    def _transport(self) -> asyncio.Transport:
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise ClientLeft
        return transport

    async def keep_alive(self) -> None:
        """Send a comment in a stream; nothing in a plain answer, whose client has no way to see it."""
        if self.call.stream:
            await self._write(b": waiting for the model\n\n")

    async def close_comment(self) -> None:
        """End a comment of which only the beginning came: what follows would be part of it."""
        if self._comments.open:
            self._comments = Comments()
            await self._write(b"\n\n")

    async def pass_on(self, chunk: bytes) -> None:
        if not self.begun_with_content:
            self.begun_with_content = not self._comments.only(chunk)
        if self.recorded is not None:
            self.recorded.add(chunk)
        await self._write(chunk)

    async def cut(self, refusal: Refusal) -> None:
        """End a stream that had begun: an error event, and a proper end."""
        self.error = str(refusal)
        await self._write(b"\n\n" + write_event(refusal.body()) + DONE)  # clients raise it as an error

    async def whole(self, status: int, data: bytes) -> None:
        """Send an answer in one piece; in a stream that was kept alive meanwhile it becomes an event."""
        if status >= 400:
            self.error = f"HTTP {status}"
        if self.recorded is not None:
            self.recorded.add(data)
        if self._response is None:
            self._whole = web.Response(status=status, body=data, headers={"Content-Type": "application/json"})
            return
        await self._write(b"data: " + data.replace(b"\n", b" ") + b"\n\n" + DONE)

    async def delivered(self) -> web.StreamResponse:
        """Complete the answer; of a stream the client has taken nearly all then."""
        if self._whole is not None:
            return self._whole
        response = await self._begun()
        with contextlib.suppress(ConnectionError):
            await response.write_eof()
        while self._unread.holds(self):
            await asyncio.sleep(UNREAD_POLL_S)
            self.count()
        if self._request.transport is not None:
            self._request.transport.set_write_buffer_limits()  # a later answer on this connection is drained as usual
        return response

    async def refuse(self, refusal: Refusal) -> web.StreamResponse:
        """Answer with an error of the yard's own."""
        self.error = str(refusal)
        if self._response is None:
            return _error(refusal)
        try:
            await self.cut(refusal)
            return await self.delivered()
        except ClientLeft:
            return self.response

    async def _write(self, data: bytes) -> None:
        try:
            await (self._response or await self._begun()).write(data)
        except ConnectionError as error:
            raise ClientLeft from error
        transport = self._request.transport
        if transport is not None and (size := transport.get_write_buffer_size()) > SOME_BYTES:
            self._unread.count(self, size)

    async def _begun(self) -> web.StreamResponse:
        if self._response is None:
            self._response = web.StreamResponse(headers=SSE)
            await self._response.prepare(self._request)
            if self._request.transport is not None:
                self._request.transport.set_write_buffer_limits(high=NEVER_FULL)  # `is_full` decides, not the transport
        return self._response


def _error(refusal: Refusal, **detail: Any) -> web.Response:
    headers = {} if refusal.retry_after_s is None else {"Retry-After": str(refusal.retry_after_s)}
    return web.json_response({**refusal.body(), **detail}, status=refusal.status, headers=headers)


def _failure(call: Call, status: int, data: bytes) -> str:
    """How the engine failed the request; '' when it did not, or the request was at fault."""
    if status in OUR_FAULTS or (status >= 500 and status != NOT_SUPPORTED):
        return failure_words(status, data)
    if status == 200 and call.path in GENERATING and CONTENT.search(data) is None:
        return "an answer without content"
    return ""


def _failure_in_stream(chunk: bytes) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        error = json.loads(chunk.partition(b"\n")[0].removeprefix(b"data: "))["error"]
        code = error.get("code")
        if isinstance(code, int) and 400 <= code < 500:
            return ""
        return f"an error in its stream: {error['message']}".replace("\n", " ")[:300]
    return "an error in its stream"
