"""What goes back to a client: a whole answer, or a stream that may begin before an engine has the request."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

from aiohttp import HttpVersion11, web

from engines.openai.call import GENERATING, Call, Refusal
from engines.openai.sse import DONE, write_event
from engines.yard.ports.unread import SOME_BYTES, Comments, Unread, address_of
from engines.yard.shadow import RecordedAnswer

# proxies like nginx gather a stream unless they are told not to
SSE = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
JSON_TYPE = "application/json"
NEVER_FULL = 2**30
UNREAD_POLL_S = 0.05


class ClientLeft(Exception):
    """Nobody reads the answer any more."""


class ClientReply:
    def __init__(self, request: web.Request, call: Call, unread: Unread) -> None:
        self.call = call
        self._request = request
        self._unread = unread
        self._response: web.StreamResponse | None = None
        self._whole: web.Response | None = None
        self._is_chunked = False
        self._comments = Comments()
        self.begun_with_content = False
        self.ended = False  # all of its answer has been passed on
        self.error: str | None = None
        self.client_error = False  # and it is the request's own fault
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
        self._note(chunk)
        await self._write(chunk)

    @property
    def begun(self) -> bool:
        """True once something of a stream has been sent."""
        return self._response is not None

    def pass_on_now(self, chunk: bytes) -> bool:
        """As `pass_on`, in a stream that has begun, without the HTTP library: `is_full` of it then."""
        self._note(chunk)
        transport = self._transport()
        transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk) if self._is_chunked else chunk)
        size = transport.get_write_buffer_size()
        if size <= SOME_BYTES:
            return False
        self._unread.count(self, size)
        return self.is_full

    def _note(self, chunk: bytes) -> None:
        if not self.begun_with_content:
            self.begun_with_content = not self._comments.only(chunk)
        if self.recorded is not None:
            self.recorded.add(chunk)

    async def cut(self, refusal: Refusal) -> None:
        """End a stream that had begun: an error event, and a proper end."""
        self.error = str(refusal)
        await self._write(b"\n\n" + self._error_event(refusal))

    def _error_event(self, refusal: Refusal) -> bytes:
        """An event that clients of this path raise as an error."""
        if self.call.path == "/v1/messages":
            error = {"type": "error", "error": {"type": "api_error", "message": str(refusal)}}
            return b"event: error\n" + write_event(error)
        return write_event(refusal.body()) + (DONE if self.call.path in GENERATING else b"")

    async def whole(self, status: int, data: bytes, content_type: str = JSON_TYPE) -> None:
        """Send an answer in one piece; in a stream that was kept alive meanwhile it becomes an event."""
        if status >= 400:
            self.error, self.client_error = f"HTTP {status}", status < 500
        if self.recorded is not None:
            self.recorded.add(data)
        if self._response is None:
            self._whole = web.Response(status=status, body=data, headers={"Content-Type": content_type})
            return
        end = DONE if self.call.path in GENERATING else b""
        await self._write(b"data: " + data.replace(b"\n", b" ") + b"\n\n" + end)

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
            return error_response(refusal)
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
            self._is_chunked = self._request.version >= HttpVersion11
            if self._request.transport is not None:
                self._request.transport.set_write_buffer_limits(high=NEVER_FULL)  # `is_full` decides, not the transport
        return self._response


async def answer_expect(request: web.Request) -> None:
    """Have the client send its body where it waits for that; any other expectation is ignored, as engines do."""
    if request.headers.get("Expect", "").lower() == "100-continue" and request.version >= HttpVersion11:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # nothing of the answer has been sent


class JsonErrors(web.RequestHandler):
    """Answers what is no HTTP, and what went wrong in a handler, with an error object as well."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        super().handle_error(request, status, exc, message)  # logs it, and raises where an answer has begun
        why = "an error of the yard's own; its log has more" if status >= 500 else f"not HTTP: {exc.__class__.__name__}"
        response = error_response(Refusal(status, why))
        response.force_close()
        return response


class Server(web.Server):
    """Serves with `JsonErrors`."""

    def __call__(self) -> web.RequestHandler:
        return JsonErrors(self, loop=self._loop, **self._kwargs)


class Runner(web.AppRunner):
    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return Server(
            made.request_handler,
            request_factory=made.request_factory,
            handler_cancellation=made.handler_cancellation,
            loop=made._loop,
            **made._kwargs,
        )


def error_response(refusal: Refusal, headers: Mapping[str, str] | None = None, **detail: Any) -> web.Response:
    later = {} if refusal.retry_after_s is None else {"Retry-After": str(refusal.retry_after_s)}
    return web.json_response({**refusal.body(), **detail}, status=refusal.status, headers={**later, **(headers or {})})
