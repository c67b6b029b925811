"""How the yard asks an engine: over HTTP, or in frames where the engine is native.

Whatever breaks on the way, the engine going away included, is one error here: Gone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import aiohttp
from pydantic import SecretStr

from engines.mistral_rs.native import frames
from engines.openai.call import GENERATING

CONNECT_S = 10.0
BROKEN = (aiohttp.ClientError, ConnectionError, TimeoutError)


class Gone(ConnectionError):
    """The engine, or the connection to it, went away."""


class EngineAnswer(Protocol):
    """An answer that has begun."""

    status: int

    async def read(self) -> bytes:
        """All of it."""
        ...

    def pieces(self) -> AsyncIterator[bytes]:
        """Each piece as the engine sent it."""
        ...


class EngineConnection(Protocol):
    """One engine's way in."""

    def ask(
        self, method: str, path: str, body: bytes = b"", *, timeout_s: float | None = None
    ) -> AbstractAsyncContextManager[EngineAnswer]:
        """The answer, as soon as it begins; leaving the block early leaves the engine. Raises Gone."""
        ...

    def close(self) -> None:
        """Break off what is asked, and let its connections go: the engine has ended, or is being ended."""
        ...


class _Asking:
    """The questions under way, each of which can be broken off: a process that the kernel holds hangs up on nobody."""

    def __init__(self) -> None:
        self._limits: set[asyncio.Timeout] = set()

    @contextlib.asynccontextmanager
    async def one(self, timeout_s: float | None) -> AsyncIterator[None]:
        """Raises TimeoutError when it takes longer, or is broken off."""
        async with asyncio.timeout(timeout_s) as limit:
            self._limits.add(limit)
            try:
                yield
            finally:
                self._limits.discard(limit)

    def break_off(self) -> None:
        """End all of them."""
        for limit in self._limits:
            if not limit.expired():
                limit.reschedule(asyncio.get_running_loop().time())


class HttpConnection:
    """An engine that is a server.

    A kept connection saves 0.8 ms before the first token. An engine may close one just as it is used again: what
    breaks there before a byte came is asked once more on a fresh one, which a dead engine does not take.
    """

    def __init__(
        self, base_url: str, key: SecretStr | None, fresh: aiohttp.ClientSession, kept: aiohttp.ClientSession
    ) -> None:
        self._base_url = base_url
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key.get_secret_value()}"
        self._fresh, self._kept = fresh, kept
        self._asking = _Asking()

    @contextlib.asynccontextmanager
    async def ask(
        self, method: str, path: str, body: bytes = b"", *, timeout_s: float | None = None
    ) -> AsyncIterator[EngineAnswer]:
        try:
            async with self._asking.one(timeout_s), await self._asked(method, path, body) as answer:
                yield HttpAnswer(answer)
        except BROKEN as error:
            raise Gone(_words(error)) from error

    def close(self) -> None:
        """Break off what is asked; the sessions are the yard's."""
        self._asking.break_off()

    async def _asked(self, method: str, path: str, body: bytes) -> aiohttp.ClientResponse:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
        sessions = (self._kept, self._fresh) if path in GENERATING else (self._fresh,)
        for session in sessions:
            try:
                return await session.request(
                    method, self._base_url + path, data=body or None, headers=self._headers, timeout=timeout
                )
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as broken:
                if session is sessions[-1] or isinstance(broken, aiohttp.ClientConnectorError):
                    raise
        raise AssertionError("there is a session")


class HttpAnswer:
    """An answer over HTTP."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self.status = answer.status
        self._answer = answer

    async def read(self) -> bytes:
        """All of it."""
        return await self._answer.read()

    async def pieces(self) -> AsyncIterator[bytes]:
        """Each chunk as it was sent."""
        async for chunk, _ in self._answer.content.iter_chunks():
            if chunk:
                yield chunk


class FrameConnection:
    """A native worker."""

    def __init__(self, host: str, port: int, key: SecretStr | None) -> None:
        self._client = frames.FrameClient(host, port, key.get_secret_value() if key else "")
        self._asking = _Asking()

    @contextlib.asynccontextmanager
    async def ask(
        self, method: str, path: str, body: bytes = b"", *, timeout_s: float | None = None
    ) -> AsyncIterator[EngineAnswer]:
        try:
            async with self._asking.one(timeout_s), self._client.ask(method, path, body) as answer:
                yield answer
        except BROKEN as error:
            raise Gone(_words(error)) from error

    def close(self) -> None:
        """Break off what is asked, and let its connections go."""
        self._asking.break_off()
        self._client.close()


def _words(error: BaseException) -> str:
    return f"{type(error).__name__} {str(error).partition(chr(10))[0]}".rstrip()
