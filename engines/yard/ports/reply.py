"""What goes back to a client: a whole answer, or a stream that may begin before an engine has the request."""

from __future__ import annotations

import asyncio

from multidict import CIMultiDict

from engines.openai.call import GENERATING, Call, Refusal
from engines.openai.sse import DONE, write_event
from engines.yard.ports.http_request import Request, Response, error_response
from engines.yard.ports.unread import SOME_BYTES, Comments, Unread, address_of
from engines.yard.shadow import RecordedAnswer

# proxies like nginx gather a stream unless they are told not to
SSE = CIMultiDict({"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
JSON_TYPE = "application/json"
UNREAD_POLL_S = 0.05


class ClientReply:
    def __init__(self, request: Request, call: Call, unread: Unread) -> None:
        self.call = call
        self._request = request
        self._unread = unread
        self._whole: Response | None = None
        self._comments = Comments()
        self.begun_with_content = False
        self.ended = False  # all of its answer has been passed on
        self.error: str | None = None
        self.client_error = False  # and it is the request's own fault
        self.recorded: RecordedAnswer | None = None

    @property
    def is_full(self) -> bool:
        """True when the client is so far behind that no more of its answer may be kept for it."""
        return self._unread.is_full(self)

    def count(self) -> None:
        """Note how much the client has not taken yet."""
        self._unread.count(self, self._request.transport.get_write_buffer_size())

    def hang_up(self) -> str:
        """End the connection, whatever the client has not taken; the client's address."""
        transport = self._request.transport
        transport.abort()
        return address_of(transport)

    def keep_alive(self) -> None:
        """Send a comment in a stream; nothing in a plain answer, whose client has no way to see it."""
        if self.call.stream:
            self._write(b": waiting for the model\n\n")

    def close_comment(self) -> None:
        """End a comment of which only the beginning came: what follows would be part of it."""
        if self._comments.open:
            self._comments = Comments()
            self._write(b"\n\n")

    def pass_on(self, chunk: bytes) -> bool:
        """Send a piece of a stream; `is_full` of it then. Raises ClientLeft."""
        if not self.begun_with_content:
            self.begun_with_content = not self._comments.only(chunk)
        if self.recorded is not None:
            self.recorded.add(chunk)
        return self._write(chunk)

    def direct(self) -> asyncio.Transport | None:
        """Where the chunks of a stream may be written as they come; None while each must be looked at."""
        return self._request.chunked_to if self.begun_with_content and self.recorded is None else None

    def cut(self, refusal: Refusal) -> None:
        """End a stream that had begun: an error event, and a proper end."""
        self.error = str(refusal)
        self._write(b"\n\n" + self._error_event(refusal))

    def _error_event(self, refusal: Refusal) -> bytes:
        """An event that clients of this path raise as an error."""
        if self.call.path == "/v1/messages":
            error = {"type": "error", "error": {"type": "api_error", "message": str(refusal)}}
            return b"event: error\n" + write_event(error)
        return write_event(refusal.body()) + (DONE if self.call.path in GENERATING else b"")

    def whole(self, status: int, data: bytes, content_type: str = JSON_TYPE) -> None:
        """Send an answer in one piece; in a stream that was kept alive meanwhile it becomes an event."""
        if status >= 400:
            self.error, self.client_error = f"HTTP {status}", status < 500
        if self.recorded is not None:
            self.recorded.add(data)
        if not self._request.begun:
            self._whole = Response(status, data, CIMultiDict({"Content-Type": content_type}))
            return
        end = DONE if self.call.path in GENERATING else b""
        self._write(b"data: " + data.replace(b"\n", b" ") + b"\n\n" + end)

    async def delivered(self) -> Response | None:
        """What completes the answer; None of a stream, of which the client has taken nearly all then."""
        if self._whole is not None:
            return self._whole
        if not self._request.begun:
            self._request.begin(200, SSE)
        self._request.end()
        while self._unread.holds(self):
            await asyncio.sleep(UNREAD_POLL_S)
            self.count()
        return None

    async def refuse(self, refusal: Refusal) -> Response | None:
        """Answer with an error of the yard's own."""
        self.error = str(refusal)
        if not self._request.begun:
            return error_response(refusal)
        self.cut(refusal)
        return await self.delivered()

    def _write(self, data: bytes) -> bool:
        if not self._request.begun:
            self._request.begin(200, SSE)
        size = self._request.write(data)
        if size <= SOME_BYTES:
            return False
        self._unread.count(self, size)
        return self.is_full
