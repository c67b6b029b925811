"""A stream on its way from an engine to its client, piece by piece: what is noted of it, and where it has to wait."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections import deque

from engines.openai.call import GENERATING, Call
from engines.openai.dialect import Dialect
from engines.openai.paths import CHAT, ENDS
from engines.process.readiness import NOT_SUPPORTED
from engines.yard.engine.connection import Gone
from engines.yard.engine.http_answer import EngineAnswer
from engines.yard.engine.in_flight import InFlight
from engines.yard.engine.liveness import failure_words
from engines.yard.ports.reply import ClientReply
from engines.yard.ports.unread import SOME_BYTES, Comments

CONTENT = re.compile(rb'"(?:content|reasoning_content|text|name|arguments|delta|thinking|partial_json)"\s*:\s*"[^"]')
EVENT = b'data: {"'
ERRORS = (b'data: {"error"', b"event: error", b"error:")  # how an event that is an error begins
OUR_FAULTS = frozenset({401, 403, 404})  # the key, the path and the model's name are the yard's own
LONGEST_END = 64  # bytes that end a stream; they may come in pieces


class PassedStream:
    """One engine's stream for one client. `take` is called as each piece arrives, and never waits."""

    def __init__(self, running: InFlight, dialect: Dialect, reply: ClientReply) -> None:
        self._running, self._dialect, self._reply = running, dialect, reply
        self._last: deque[bytes] = deque(maxlen=3)  # the finish, the usage with the engine's timings, the end
        self._comments = Comments()
        self._is_end, self._tail = ENDS[reply.call.path].search, b""
        # chunks may pass as they are: the end of the stream is an event of its own, and nothing is to be changed
        self._splices = ENDS[reply.call.path] is ENDS[CHAT] and not dialect.changes_streams
        self._client: asyncio.Transport | None = None  # where they pass to, once the answer has begun

    async def pass_on(self, answer: EngineAnswer) -> bool:
        """Pass the answer on until it ends (True), or until the client is so far behind that it must be held back.

        Raises Gone where it ends without its end, and ClientLeft.
        """
        reply, dialect = self._reply, self._dialect
        while not await answer.pass_to(self.take, self._splice if self._splices else None):
            if dialect.early_error is not None:
                self._running.failure = failure(reply.call, *dialect.early_error)
                reply.whole(*dialect.early_error)
                return True
            if reply.is_full:
                return False
        self._end()
        return True

    def take(self, chunk: bytes) -> bool:
        """Note and pass on one piece; True where `pass_on` must act before the next one."""
        self._last.append(chunk)
        running, dialect = self._running, self._dialect
        if not self._comments.only(chunk):  # an engine's own keep-alive is no progress
            running.chunk(content=running.first is None and CONTENT.search(chunk) is not None)
        if dialect.changes_streams:
            data = dialect.event(chunk)
            if dialect.early_error is not None:
                return True
            if not data:
                return False
        else:
            data = chunk
            if chunk.startswith(ERRORS):
                dialect.error = "the engine reported an error in its stream"
                running.failure = _failure_in_stream(chunk)
        is_full = self._reply.pass_on(data)
        self._note_end(data)
        if self._splices and self._client is None and running.first is not None:
            self._client = self._reply.direct()
        return is_full

    def _splice(self, chunk: bytes, at: int) -> bool:
        """Pass one chunk on as it came where that is all there is to do: an event, no error, a client that keeps up."""
        client = self._client
        if (
            client is None
            or self._tail
            or not chunk.startswith(EVENT, at)
            or chunk.startswith(ERRORS, at)
            or not chunk.endswith(b"\n\n\r\n")
            or client.is_closing()
            or client.get_write_buffer_size() > SOME_BYTES
        ):
            return False
        client.write(chunk)
        self._last.append(chunk[at:-2])
        self._running.chunk(content=False)
        return True

    def _note_end(self, data: bytes) -> None:
        seen = self._tail + data if self._tail else data
        if self._is_end(seen) is not None:
            self._reply.ended = True
        self._tail = b"" if seen.endswith(b"\n\n") else seen[-LONGEST_END:]  # an end is within one event

    def _end(self) -> None:
        running, dialect, reply = self._running, self._dialect, self._reply
        end = b"".join(self._last)
        running.reported(end)
        unfinished = not reply.ended and self._is_end(end) is None
        if unfinished and not (dialect.error and reply.call.path not in GENERATING):
            raise Gone("the stream ended without its end")
        if rest := dialect.rest():
            reply.pass_on(rest)
        reply.ended, reply.error = True, dialect.error
        if dialect.changes_streams and dialect.error:
            running.failure = dialect.error
        elif running.first is None and not running.failure:
            running.failure = "an answer without content"


def failure(call: Call, status: int, data: bytes) -> str:
    """How the engine failed the request; '' when it did not, or the request was at fault."""
    if (status in OUR_FAULTS and call.path in GENERATING) or (status >= 500 and status != NOT_SUPPORTED):
        return failure_words(status, data)
    if status == 200 and call.generates_text and CONTENT.search(data) is None:
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
