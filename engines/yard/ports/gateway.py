"""The public port: each request goes to the engine of its model, its answer comes back chunk by chunk.

A request is handed to an engine only when that has room, so it waits here, where the end of an engine cannot lose it. A
request of which nothing has reached the client is retried once, on the engine that serves then; a stream that has begun
ends with an error event. A client that leaves ends its request on the engine at once. One that stays but takes nothing
delays nobody: the engine's answer is read on into a bounded buffer, and after `client_stall_s` the client is cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping

from multidict import CIMultiDict

from engines.openai.call import Call, Refusal, parse
from engines.openai.paths import Kind
from engines.yard.engine.connection import Gone
from engines.yard.engine.in_flight import InFlight
from engines.yard.engine.unit import Unit
from engines.yard.memory_budget import MemoryBudget
from engines.yard.ports.guard import CHALLENGE, Guard, is_for_people
from engines.yard.ports.http_request import (
    BodyTooLarge,
    ClientLeft,
    Request,
    Response,
    UnreadableBody,
    error_response,
    json_response,
)
from engines.yard.ports.http_server import Server
from engines.yard.ports.page import page
from engines.yard.ports.passing import Polled, body_of, pass_through, refuse_upgrade, sent_on, wire_path
from engines.yard.ports.props import props
from engines.yard.ports.reply import JSON_TYPE, UNREAD_POLL_S, ClientReply
from engines.yard.ports.status import Status
from engines.yard.ports.stream import CONTENT, PassedStream, failure
from engines.yard.ports.unread import StalledClients, Unread
from engines.yard.route import Route, Waiting
from engines.yard.shadow import Shadow
from engines.yard.yard import Yard

TRIES = 2
SHOWN_REPORTS = 5
REPORT = re.compile(r"/yard/reports/[0-9a-z-]+\.html")
END_BYTES = 2048  # of an answer, where its usage and timings stand


class Unanswered(Exception):
    """The engine went away before anything of its answer was passed on."""


class Gateway:
    def __init__(self, yard: Yard, shadow: Shadow, memory_budget: MemoryBudget, status: Status) -> None:
        self._yard = yard
        self._shadow = shadow
        self._memory_budget = memory_budget
        self._status = status
        self._unread = Unread()
        self._guard = Guard(yard)
        self._polled = Polled()
        self._followed: set[asyncio.Task[None]] = set()

    def server(self, log: logging.Logger) -> Server:
        """What listens on the port."""
        limit = self._yard.settings.max_header_kib * 1024
        return Server(self._guarded, extra_headers=self._guard.cors, field_limit=limit, log=log)

    # --- what guards every request

    async def _guarded(self, request: Request) -> Response | None:
        """Every error, one of a path that nobody has too, is an OpenAI error object."""
        try:
            self._guard.check_host(request)
            if (preflight := self._guard.preflight(request)) is not None:
                return preflight
            handler = self._own(request.path) if request.method in ("GET", "HEAD") else None
            if handler is None:
                return await self._passed(request)
            if not self._guard.may_pass(request):
                raise _no_key()
            return await handler(request)
        except Refusal as refusal:
            self._yard.metrics.refused.labels(str(refusal.status)).inc()
            challenge = refusal.status == 401 and is_for_people(request.path)
            return error_response(refusal, CHALLENGE if challenge else None)
        except UnreadableBody as error:
            return error_response(Refusal(400, f"the request body cannot be read: {error}"))
        except BodyTooLarge:
            limit = self._yard.settings.max_body_mib
            return error_response(Refusal(413, f"the request body is larger than {limit} MiB", code="body_too_large"))

    def _own(self, path: str) -> Callable[[Request], Awaitable[Response | None]] | None:
        """What answers a GET that is not for an engine."""
        if path.startswith("/v1/models/"):
            return self._model
        if REPORT.fullmatch(path):
            return self._report
        return {
            "/props": self._props,
            "/v1/models": self._models,
            "/models": self._models,
            "/health": self._health,
            "/v1/health": self._health,
            "/metrics": self._metrics,
            "/yard": self._page,
        }.get(path)

    # --- requests that an engine answers

    async def _passed(self, request: Request) -> Response | None:
        """Every path that is not the yard's own: what the engine answers there is the client's."""
        has_key, looks = self._guard.has_key(request), self._yard.only_looks(request.method, request.path)
        kind, path = self._yard.kind_of(request.path)
        if is_for_people(request.path):
            if not has_key:
                raise _no_key()
            raise _nothing_at(request)
        if not has_key and not (looks and kind == "unlisted"):
            raise _no_key()
        refuse_upgrade(request)
        if looks:
            return await self._looked_up(request, keyless=not has_key)
        if kind in ("generates", "reads"):
            if request.method != "POST":
                raise Refusal(405, f"{request.path} takes POST, not {request.method}")
            return await self._served(request, path, kind)
        self._yard.metrics.not_passed.labels(kind).inc()
        what = f"{request.method} {request.path[:200]} is not passed on"
        if why := self._yard.change_of(path):
            raise Refusal(403, f"{what}: {why}", kind="permission_error", code="not_passed_on")
        raise Refusal(501, f"{what}: no engine here lists it", kind="not_supported_error", code="not_supported")

    async def _served(self, request: Request, path: str, kind: Kind) -> Response | None:
        began = time.monotonic()
        body = await body_of(request, self._yard.settings.max_body_mib * 2**20) or b"{}" * (kind == "reads")
        call = parse(path, body, request.headers.get("Content-Type", ""))
        route = self._yard.route_for(call.model or request.query.get("model"))
        reply = ClientReply(request, call, self._unread)
        self._shadow.make_way(route)
        self._memory_budget.wake(route)
        reply.recorded = self._shadow.recorder(route, call)
        to = wire_path(request, path), sent_on(request, read_here=True, content_type=call.content_type)
        try:
            for attempt in range(1, TRIES + 1):
                # one that an engine has lost is retried on the engine that serves
                conversation = call.conversation() if route.splits and attempt == 1 else ""
                place = route.enter(conversation, path, call.prompt_tokens, light=kind == "reads")
                unit, running = await self._turn(route, place, reply, began)
                running.generates, kept_at = kind == "generates", ""
                try:
                    if unit.paths.kind(path) in ("unlisted", "changes"):
                        raise _lacks(unit, path)
                    await self._exchange(route, unit, running, reply, *to)
                except Unanswered as gone:
                    self._yard.note_loss(route, unit, str(gone), retried=attempt < TRIES)
                    continue
                except Refusal:
                    if not place.over or attempt == TRIES:
                        raise  # what only the overflow engine refuses, the one that serves may take
                    continue
                except (ClientLeft, asyncio.CancelledError):
                    if reply.ended:  # it has all of the answer, and does not wait for the end of the connection
                        self._yard.served(route, unit, call, running, reply.error, arrived=began)
                    elif call.stream:
                        kept_at = unit.paths.kept_at(to[1])
                    raise
                finally:
                    self._give_back(unit, running, kept_at)
                self._yard.served(
                    route, unit, call, running, reply.error, arrived=began, client_error=reply.client_error
                )
                if reply.error is None:
                    self._yard.usage.note(path, call.body)
                    self._yard.capture.take(call.path, call.body, len(call.raw))
                    if reply.recorded is not None:
                        self._shadow.offer(route, unit, call, reply.recorded)
                return await reply.delivered()
            raise Refusal(502, "the engine went away twice while it had this request", code="engine_died")
        except Refusal as refusal:
            self._yard.metrics.refused.labels(str(refusal.status)).inc()
            return await reply.refuse(refusal)
        except (ClientLeft, asyncio.CancelledError):
            if not reply.ended:
                self._yard.metrics.left.labels(route.model_id).inc()
            raise
        finally:
            self._unread.forget(reply)

    def _give_back(self, unit: Unit, running: InFlight, kept_at: str) -> None:
        """Count a request out, one that the engine finishes without its client only when that is done."""
        if not kept_at:
            unit.give_back(running)
            return

        async def follow() -> None:
            with contextlib.suppress(Gone):
                async with unit.connection.ask("GET", kept_at, headers={}) as answer:
                    async for piece in answer.pieces():
                        running.chunk(content=CONTENT.search(piece) is not None)
            unit.give_back(running)

        task = asyncio.create_task(follow())
        self._followed.add(task)
        task.add_done_callback(self._followed.discard)

    async def _looked_up(self, request: Request, *, keyless: bool) -> Response | None:
        """A GET that an engine answers; it takes no slot, loads no model but for a page, and judges no engine."""
        began, route = time.monotonic(), self._yard.route_for(request.query.get("model"))
        if route.unloaded:
            if request.path not in route.serving.paths.pages:
                raise self._not_served(route)
            self._memory_budget.wake(route)
        target = wire_path(request, request.path)
        reply = ClientReply(request, Call(request.path, b"", {}), self._unread)
        unit, running = await self._turn(route, route.enter("", request.path, 0, light=True), reply, began)
        try:
            if keyless and (request.path in unit.paths.polled or not unit.paths.keyless):
                raise _no_key()
            if request.path in unit.paths.polled:
                shown = await self._polled.ask(unit, request.path, target)
                status = shown.status
            else:
                headers, shown = sent_on(request, read_here=False), None
                async with unit.connection.ask(request.method, target, headers=headers, keyless=keyless) as answer:
                    status = answer.status
                    await pass_through(request, answer)
            if status < 400:
                self._yard.usage.note(request.path)
            return shown
        except Gone as gone:
            raise Refusal(
                502, f"{unit.engine} went away: {await unit.end_of(running) or gone}", code="engine_died"
            ) from gone
        finally:
            unit.give_back(running)

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
                    reply.keep_alive()
            return place.turn.result()
        except BaseException:  # the client left, or waited too long: its turn goes to the next one
            route.leave(place)
            raise

    async def _exchange(
        self,
        route: Route,
        unit: Unit,
        running: InFlight,
        reply: ClientReply,
        target: str,
        headers: Mapping[str, str],
    ) -> None:
        """Pass the request to the engine and its answer on, until the engine is done with it."""
        call = reply.call
        dialect = unit.dialect(call)
        try:
            async with unit.connection.ask("POST", target, dialect.request(), headers=headers) as answer:
                if call.stream and answer.status == 200:
                    stream = PassedStream(running, dialect, reply)
                    while not await stream.pass_on(answer):
                        await self._hold_back(route, running, reply)
                    return
                data = await answer.read()
                running.chunk(content=True)
                running.reported(data[-END_BYTES:])
                status, data = dialect.whole(answer.status, data)
                running.failure = failure(call, status, data)
                reply.whole(status, data, answer.headers.get("Content-Type", JSON_TYPE))
        except Gone as gone:
            ended = await unit.end_of(running)
            if not ended:
                running.failure, running.lost = str(gone), True
            if not reply.begun_with_content:
                reply.close_comment()
                raise Unanswered(ended or str(gone)) from gone
            reply.cut(Refusal(502, f"{unit.engine} went away: {ended or gone}", code="engine_died"))

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

    async def watch_clients(self, server: Server) -> None:
        """Cut each client that takes nothing of its answer for `client_stall_s`, or sends nothing; until cancelled."""
        watch = StalledClients()
        while True:
            limit_s = self._yard.settings.client_stall_s
            await asyncio.sleep(min(limit_s / 8, 1.0))
            server.close_late()
            for peer in watch.cut(list(server.connections), limit_s):
                self._note_cut(peer, f"took nothing of its answer for {limit_s:g} s")

    def _note_cut(self, peer: str, why: str) -> None:
        self._yard.metrics.clients_cut.inc()
        self._yard.events.note("yard", "-", f"cut the client at {peer}: it {why}")

    # --- what the yard answers itself

    async def _health(self, request: Request) -> Response:
        """200 only when a request would be served now."""
        route = self._yard.route_for(request.query.get("model"))
        detail = self._status.health_of(route)
        served = route.serving.state.serves and not route.holding and route.unservable is None
        if served or route.unloaded:  # the next request would load it
            return json_response({"status": "ok", **detail})
        return error_response(self._not_served(route), **detail)

    def _not_served(self, route: Route) -> Refusal:
        return Refusal(503, self._status.explain(route), kind="unavailable_error", code="503", retry_after_s=2)

    async def _models(self, _: Request) -> Response:
        found = self._status.models()
        like_ollama = [{"name": one["id"], "model": one["id"], "type": "model"} for one in found]  # llama.cpp has both
        return json_response({"models": like_ollama, "object": "list", "data": found})

    async def _model(self, request: Request) -> Response:
        name = request.path.removeprefix("/v1/models/")
        for entry in self._status.models():
            if entry["id"] == name:
                return json_response(entry)
        raise Refusal(404, f"the model '{name}' does not exist", code="model_not_found")

    async def _props(self, request: Request) -> Response:
        route = self._yard.route_for(request.query.get("model"))
        if not (route.serving.state.serves or route.unloaded):
            raise self._not_served(route)
        return json_response(await props(route.serving))

    async def _metrics(self, _: Request) -> Response:
        text = self._yard.metrics.text(self._yard.routes.values())
        return Response(body=text, headers=CIMultiDict({"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}))

    async def _page(self, _: Request) -> Response:
        reports = self._yard.home / "reports"
        newest = sorted((path.name for path in reports.glob("*.html")), reverse=True)  # their names are times
        text = page(self._status.status(), newest[:SHOWN_REPORTS])
        return _html(text.encode())

    async def _report(self, request: Request) -> Response:
        path = self._yard.home / "reports" / request.path.rpartition("/")[2]
        if not path.is_file():
            raise _nothing_at(request)
        return _html(await asyncio.to_thread(path.read_bytes))


def _html(text: bytes) -> Response:
    return Response(body=text, headers=CIMultiDict({"Content-Type": "text/html; charset=utf-8"}))


def _nothing_at(request: Request) -> Refusal:
    return Refusal(404, f"there is no {request.path} here", code="not_found")


def _no_key() -> Refusal:
    return Refusal(401, "Invalid API key", kind="authentication_error", code="invalid_api_key")


def _lacks(unit: Unit, path: str) -> Refusal:
    why = f"{unit.engine}, which serves {unit.spec.model_id}, has no {path}"
    return Refusal(501, why, kind="not_supported_error", code="not_supported")
