"""HTTP/1.1 to an engine: an answer whose pieces are handed on as they arrive, and the connection that it comes on.

Nothing stands between the socket and whoever takes the pieces: no task, no queue, no timer. What nobody takes yet is
kept, up to `READ_AHEAD_BYTES`; then the engine is not read on.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import cast

import httptools
from multidict import CIMultiDict

READ_AHEAD_BYTES = 64 * 1024
JOINED_BYTES = 64 * 1024  # of a request's body
HEAD_BYTES = 128 * 1024  # of status and headers
LONGEST_SPLICED = 4096


def _sizes() -> list[bytes]:
    """The line before the content of a chunk (RFC 9112, 7.1), by the length of the whole chunk; b"" for no length."""
    lines = [b""] * LONGEST_SPLICED
    for size in range(1, LONGEST_SPLICED):
        line = b"%x\r\n" % size
        if (whole := len(line) + size + 2) < LONGEST_SPLICED:
            lines[whole] = line
    return lines


SIZES = _sizes()


class Broken(ConnectionError):
    """The connection ended amid an answer, or brought what is none."""


class EngineAnswer(ABC):
    """An answer that has begun. It is read in one of three ways, each to be used alone."""

    status: int
    headers: Mapping[str, str]
    _under_way: AsyncIterator[bytes] | None = None

    @abstractmethod
    def pieces(self) -> AsyncIterator[bytes]:
        """Each piece as the engine sent it."""

    async def read(self) -> bytes:
        """All of it."""
        return b"".join([piece async for piece in self.pieces()])

    async def pass_to(
        self, take: Callable[[bytes], object], splice: Callable[[bytes, int], bool] | None = None
    ) -> bool:
        """Call `take` with each piece: True at the end of the answer, False once `take` has returned what is true.

        Then the next call continues with the piece after that. Where an answer comes in chunks, a whole one may go to
        `splice` as it is on the wire, with the index at which its content begins: false where `take` must have it.
        """
        self._under_way = self._under_way or self.pieces()
        async for piece in self._under_way:
            if take(piece):
                return False
        return True


class HttpAnswer(EngineAnswer):
    """One answer on a connection; `keeps` once that may carry another one."""

    def __init__(self, transport: asyncio.Transport, *, without_body: bool) -> None:
        self.status = 0
        self.headers: CIMultiDict[str] = CIMultiDict()
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended = self.keeps = False
        self.parser = httptools.HttpResponseParser(self)
        self._transport = transport
        self._without_body = without_body
        self.feed = self._feed_head  # takes what has arrived; raises httptools' errors for what is no HTTP
        self._head_bytes, self._has_begun = 0, False
        self._kept: deque[bytes] = deque()  # what nobody has taken yet
        self._kept_bytes, self._paused = 0, False
        self._take: Callable[[bytes], object] | None = None
        self._splice: Callable[[bytes, int], bool] | None = None
        self._is_between = self._chunk_ended = False  # the parser is between two chunks
        self._taken: asyncio.Future[bool] | None = None
        self._broken: Exception | None = None

    # --- whoever reads it

    async def read(self) -> bytes:
        parts: list[bytes] = []
        await self.pass_to(parts.append)
        return b"".join(parts)

    async def pieces(self) -> AsyncIterator[bytes]:
        ended = False
        while not ended:
            piece: list[bytes] = []
            ended = await self.pass_to(lambda data, piece=piece: piece.append(data) or True)  # type: ignore[misc]
            if piece:
                yield piece[0]

    async def pass_to(
        self, take: Callable[[bytes], object], splice: Callable[[bytes, int], bool] | None = None
    ) -> bool:
        while self._kept:
            piece = self._kept.popleft()
            self._kept_bytes -= len(piece)
            if take(piece):
                return False
        if self.ended:
            return True
        if self._broken is not None:
            raise self._broken
        self._take, self._taken = take, asyncio.get_running_loop().create_future()
        if splice is not None:
            self._splice, self.feed = splice, self._feed_chunks
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        try:
            return await self._taken
        finally:
            self._take = self._taken = None

    # --- the connection

    def _feed_head(self, data: bytes) -> None:
        self.parser.feed_data(data)
        self._head_bytes += len(data)
        if not self._has_begun and self._head_bytes > HEAD_BYTES:
            raise httptools.HttpParserError("headers without end")

    def _feed_chunks(self, data: bytes) -> None:
        """One whole chunk, which is what an engine writes for a token, needs no parser to be told from others."""
        size = len(data)
        if self._is_between and self._take is not None and size < LONGEST_SPLICED:
            line = SIZES[size]
            if line and data.startswith(line) and data.endswith(b"\r\n") and self._splice(data, len(line)):  # type: ignore[misc]
                return
        self.parser.feed_data(data)
        self._is_between = self._chunk_ended and data.endswith(b"\r\n")

    def lose(self, why: Exception | None) -> None:
        """The connection has ended, cleanly where there is no `why`; an answer of unknown length ends with it."""
        if self.ended or self._broken is not None:
            return
        of_known_length = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        if why is None and self._has_begun and not of_known_length:
            self._end(keeps=False)
            return
        self._broken = Broken(str(why or "the engine closed the connection"))
        for waiting in (self.begun, self._taken):
            if waiting is not None and not waiting.done():
                waiting.set_exception(self._broken)

    def _end(self, *, keeps: bool) -> None:
        self.ended, self.keeps = True, keeps
        if self._taken is not None and not self._taken.done():
            self._taken.set_result(True)

    # --- httptools

    def on_message_begin(self) -> None:
        if self.ended:  # more than it was asked
            self.keeps = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._has_begun:  # else it is behind the body
            self.headers.add(name.decode("ascii"), value.decode("utf-8", "surrogateescape"))

    def on_headers_complete(self) -> None:
        self.status = self.parser.get_status_code()
        if self.status < 200:  # "continue", "early hints": the answer comes behind it
            self.headers.clear()
            return
        self._has_begun, self.feed = True, self.parser.feed_data
        if not self.begun.done():
            self.begun.set_result(None)
        if self._without_body:
            self._end(keeps=False)

    def on_chunk_header(self) -> None:
        self._chunk_ended = False

    def on_chunk_complete(self) -> None:
        self._chunk_ended = True

    def on_body(self, data: bytes) -> None:
        if self._take is None or self._taken is None or self._taken.done():
            self._keep(data)
            return
        try:
            if self._take(data):
                self._taken.set_result(False)
                self._take = None
        except Exception as error:
            self._take = None
            self._taken.set_exception(error)

    def on_message_complete(self) -> None:
        if self.status >= 200 and not self.ended:
            self._end(keeps=self.parser.should_keep_alive())

    def _keep(self, data: bytes) -> None:
        self._kept.append(data)
        self._kept_bytes += len(data)
        if self._kept_bytes > READ_AHEAD_BYTES and not self._paused:
            self._paused = True
            self._transport.pause_reading()


class Wire(asyncio.Protocol):
    """A connection, which carries one answer at a time."""

    def __init__(self) -> None:
        self.unused_since = 0.0  # monotonic seconds; while it is kept for another request
        self._answer: HttpAnswer | None = None

    async def ask(self, head: bytes, body: bytes, *, without_body: bool) -> HttpAnswer:
        """The answer, once it begins. Raises Broken."""
        self._answer = answer = HttpAnswer(self._transport, without_body=without_body)
        if len(body) <= JOINED_BYTES:  # in one write: the engine is woken once
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)
        await answer.begun
        return answer

    @property
    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def release(self) -> bool:
        """Give the answer up, read or not; True where the connection may carry another one, else it is closed."""
        answer, self._answer = self._answer, None
        if answer is not None and answer.keeps and not self._transport.is_closing():
            return True
        if answer is not None and answer.ended:
            self._transport.close()
        else:
            self._transport.abort()  # what of the request is not sent yet is not wanted any more
        return False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by name

    def data_received(self, data: bytes) -> None:
        if self._answer is None:  # nobody has asked
            self._transport.abort()
            return
        try:
            self._answer.feed(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._answer.lose(Broken(f"the engine sent what is no HTTP: {type(error).__name__} {error}"))
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None:
            self._answer.lose(exc)
