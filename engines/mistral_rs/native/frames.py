"""How the yard and a native worker talk: frames over loopback connections, one request at a time on each. No HTTP.

    request   one line of JSON {"key", "method", "path", "length"}, then `length` bytes of body
    answer    one line of JSON {"status"}, then pieces: 4 bytes of length (big-endian) and as many bytes; length 0 ends

A connection that ends before that was broken; a client that closes it leaves the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Mapping
from typing import Any

from engines.driver import Ask
from engines.settings import Serve

LENGTH = struct.Struct(">I")
MAX_PIECE = 256 * 2**20
LINE_LIMIT = 2**16
CONNECT_S = 10.0


class Broken(ConnectionError):
    """The other side went away, or sent what is no frame."""


def head(key: str, method: str, path: str, body: bytes) -> bytes:
    words = {"key": key, "method": method, "path": path, "length": len(body)}
    return json.dumps(words).encode() + b"\n" + body


def piece(data: bytes) -> bytes:
    """One piece of an answer; the empty one is its end."""
    return LENGTH.pack(len(data)) + data


class FrameResponse:
    """An answer that has begun: its status, and its pieces as they come."""

    def __init__(self, status: int, reader: asyncio.StreamReader) -> None:
        self.status = status
        self.ended = False  # read to its end
        self._reader = reader

    async def pieces(self) -> AsyncIterator[bytes]:
        """Each piece as it was sent. Raises Broken when they stop without their end."""
        try:
            while True:
                (size,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
                if size == 0:
                    self.ended = True
                    return
                if size > MAX_PIECE:
                    raise Broken(f"a piece of {size} bytes")
                yield await self._reader.readexactly(size)
        except (OSError, asyncio.IncompleteReadError) as error:
            raise Broken("the worker went away amid its answer") from error

    async def read(self) -> bytes:
        return b"".join([data async for data in self.pieces()])


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class FrameClient:
    """Asks one worker; connections are kept, for opening one costs more than all the rest of a request."""

    def __init__(self, host: str, port: int, key: str) -> None:
        self._where = host, port
        self._key = key
        self._idle: list[Connection] = []

    @contextlib.asynccontextmanager
    async def ask(self, method: str, path: str, body: bytes) -> AsyncIterator[FrameResponse]:
        """The answer to a request, once it begins; leaving the block early leaves the engine. Raises Broken."""
        request = head(self._key, method, path, body)
        kept = self._idle.pop() if self._idle else None
        try:
            (reader, writer), status = await self._begun(kept, request)
        except Broken:
            if kept is None:
                raise
            # the worker may have closed just this one; a dead worker takes no fresh one
            (reader, writer), status = await self._begun(None, request)
        answer = FrameResponse(status, reader)
        try:
            yield answer
        finally:
            if answer.ended:
                self._idle.append((reader, writer))
            else:
                writer.close()

    def close(self) -> None:
        while self._idle:
            self._idle.pop()[1].close()

    async def _begun(self, kept: Connection | None, request: bytes) -> tuple[Connection, int]:
        reader, writer = kept or await self._opened()
        try:
            writer.write(request)
            await writer.drain()
            return (reader, writer), int(json.loads(await reader.readline())["status"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            writer.close()
            raise Broken("the worker went away before it answered") from error
        except BaseException:  # cancelled: the engine is left
            writer.close()
            raise

    async def _opened(self) -> Connection:
        try:
            async with asyncio.timeout(CONNECT_S):
                return await asyncio.open_connection(*self._where, limit=LINE_LIMIT)
        except OSError as error:  # TimeoutError is one
            raise Broken(f"no worker on port {self._where[1]}") from error


def ask(
    port: int, key: str, method: str, path: str, body: bytes = b"", timeout_s: float | None = None
) -> tuple[int, Any]:
    """Status and JSON of an answer, for code without an event loop. Raises OSError, ValueError."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        connection.sendall(head(key, method, path, body))
        with connection.makefile("rb") as file:
            status = int(json.loads(file.readline(LINE_LIMIT) or b"{}").get("status", 0))
            parts = []
            while size := LENGTH.unpack(_exactly(file, LENGTH.size))[0]:
                parts.append(_exactly(file, min(size, MAX_PIECE)))
    return status, json.loads(b"".join(parts))


def in_frames(serve: Serve) -> Ask:
    key = serve.settings.api_key.get_secret_value() if serve.settings.api_key else ""

    def one(method: str, path: str, body: Mapping[str, object] | None, timeout_s: float | None) -> tuple[int, Any]:
        data = b"" if body is None else json.dumps(body).encode()
        return ask(serve.port, key, method, path, data, timeout_s)

    return one


def _exactly(file: Any, size: int) -> bytes:
    data: bytes = file.read(size)
    if len(data) < size:
        raise Broken("the worker went away amid its answer")
    return data
