"""Connection of the yard to an engine: over HTTP, or in frames where the engine is native.

Whatever breaks on the way, the engine going away included, is one error here: Gone.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import aiohttp
from multidict import CIMultiDict, CIMultiDictProxy
from pydantic import SecretStr
from yarl import URL

from engines.mistral_rs.native import frames
from engines.openai.paths import ENDS

CONNECT_S = 10.0
OURS = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")  # what the HTTP library would add by itself
JSON = CIMultiDictProxy(CIMultiDict({"Content-Type": "application/json"}))
BROKEN = (aiohttp.ClientError, ConnectionError, TimeoutError)


class Gone(ConnectionError):
    """The engine, or the connection to it, went away."""


class EngineAnswer(Protocol):
    """An answer that has begun."""

    status: int
    headers: CIMultiDictProxy[str]

    async def read(self) -> bytes:
        """All of it."""

    def pieces(self) -> AsyncIterator[bytes]:
        """Each piece as the engine sent it."""


class EngineConnection(ABC):
    """Asks one engine. Requests under way can be broken off: a process that the kernel holds hangs up on nobody."""

    def __init__(self) -> None:
        self._limits: set[asyncio.Timeout] = set()

    @contextlib.asynccontextmanager
    async def ask(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        headers: Mapping[str, str] = JSON,
        keyless: bool = False,
        timeout_s: float | None = None,
    ) -> AsyncIterator[EngineAnswer]:
        """The answer, as soon as it begins; leaving the block early leaves the engine. Raises Gone.

        `path` as it goes over the wire, with its query; `keyless` leaves the engine's key out.
        """
        try:
            async with asyncio.timeout(timeout_s) as limit:
                self._limits.add(limit)
                try:
                    async with self._send(method, path, body, headers, keyless) as answer:
                        yield answer
                finally:
                    self._limits.discard(limit)
        except BROKEN as error:
            raise Gone(f"{type(error).__name__} {str(error).partition(chr(10))[0]}".rstrip()) from error

    def close(self) -> None:
        """Break off all requests: the engine has ended, or is being ended."""
        for limit in self._limits:
            if not limit.expired():
                limit.reschedule(asyncio.get_running_loop().time())

    @abstractmethod
    def _send(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], keyless: bool
    ) -> AbstractAsyncContextManager[EngineAnswer]:
        """The answer, as soon as it begins; raises what is in BROKEN."""


class HttpConnection(EngineConnection):
    """To an engine that is a server.

    A kept connection saves 0.8 ms before the first token. An engine may close one just as it is used again: what
    breaks there before a byte came is retried on a fresh one, which a dead engine does not take.
    """

    def __init__(
        self, base_url: str, key: SecretStr | None, fresh: aiohttp.ClientSession, kept: aiohttp.ClientSession
    ) -> None:
        super().__init__()
        self._base_url = base_url
        self._key = {} if key is None else {"Authorization": f"Bearer {key.get_secret_value()}"}
        self._fresh, self._kept = fresh, kept

    @contextlib.asynccontextmanager
    async def _send(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], keyless: bool
    ) -> AsyncIterator[EngineAnswer]:
        sent = headers if keyless else {**headers, **self._key}
        async with await self._request(method, path, body, sent) as answer:
            yield HttpAnswer(answer)

    async def _request(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
        sessions = (self._kept, self._fresh) if path in ENDS else (self._fresh,)
        for session in sessions:
            try:
                return await session.request(
                    method,
                    URL(self._base_url + path, encoded=True),
                    data=body or None,
                    headers=headers,
                    timeout=timeout,
                    allow_redirects=False,
                    skip_auto_headers=OURS,
                )
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as broken:
                if session is sessions[-1] or isinstance(broken, aiohttp.ClientConnectorError):
                    raise
        raise AssertionError("there is a session")


class HttpAnswer:
    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self.status, self.headers = answer.status, answer.headers
        self.read = answer.read
        self._answer = answer

    async def pieces(self) -> AsyncIterator[bytes]:
        if self._answer.content.at_eof():  # HEAD, 304: the library's one stream without anything never ends twice
            return
        async for chunk, _ in self._answer.content.iter_chunks():
            if chunk:
                yield chunk


class FrameAnswer:
    headers = JSON

    def __init__(self, answer: frames.FrameResponse) -> None:
        self.status = answer.status
        self.read, self.pieces = answer.read, answer.pieces


class FrameConnection(EngineConnection):
    """To a native worker."""

    def __init__(self, host: str, port: int, key: SecretStr | None) -> None:
        super().__init__()
        self._client = frames.FrameClient(host, port, key.get_secret_value() if key else "")

    def close(self) -> None:
        super().close()
        self._client.close()

    @contextlib.asynccontextmanager
    async def _send(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], keyless: bool
    ) -> AsyncIterator[EngineAnswer]:
        async with self._client.ask(method, path, body) as answer:
            yield FrameAnswer(answer)
