"""Connection of the yard to an engine: over HTTP, or in frames where the engine is native.

Whatever breaks on the way, the engine going away included, is one error here: Gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ssl
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Container, Mapping
from contextlib import AbstractAsyncContextManager

from multidict import CIMultiDict, CIMultiDictProxy
from pydantic import SecretStr
from yarl import URL

from engines.mistral_rs.native import frames
from engines.openai.paths import ENDS
from engines.yard.engine.http_answer import Broken, EngineAnswer, HttpAnswer, Wire

CONNECT_S = 10.0
KEPT_S = 2.0  # llama-server closes a kept connection after 5
JSON = CIMultiDictProxy(CIMultiDict({"Content-Type": "application/json"}))
BROKEN = (ConnectionError, TimeoutError)


class Gone(ConnectionError):
    """The engine, or the connection to it, went away."""


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
            raise Gone(str(error).partition("\n")[0] or type(error).__name__) from error

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
    breaks there before an answer began is retried on a fresh one, which a dead engine does not take. `kept` are the
    paths whose connections are kept, never more than an engine's slots, and given up soon: each one holds a thread of
    llama-server.
    """

    def __init__(self, base_url: str, key: SecretStr | None, kept: Container[str] = ENDS) -> None:
        super().__init__()
        url = URL(base_url)
        self._host, self._port, self._path = url.raw_host or "", url.port or 80, url.raw_path.rstrip("/")
        self._host_header = url.host_port_subcomponent
        self._tls = _tls() if url.scheme == "https" else None
        self._key = {} if key is None else {"Authorization": f"Bearer {key.get_secret_value()}"}
        self._kept = kept
        self._unused: list[Wire] = []  # the one that has waited longest first
        self._timer: asyncio.TimerHandle | None = None  # one for all: to set and cancel one takes 15 us under uvloop

    def close(self) -> None:
        super().close()
        while self._unused:
            self._unused.pop().release()

    @contextlib.asynccontextmanager
    async def _send(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], keyless: bool
    ) -> AsyncIterator[EngineAnswer]:
        sent = dict(headers) if keyless else {**headers, **self._key}
        wire, keeps = None, path in self._kept
        if keeps and (wire := self._take()) is not None:
            try:
                answer = await self._begun(wire, method, path, body, sent, keeps=True)
            except Broken:
                wire, keeps = None, False
        if wire is None:
            wire = await self._opened()
            answer = await self._begun(wire, method, path, body, sent, keeps=keeps)
        try:
            yield answer
        finally:
            if wire.release():
                wire.unused_since = time.monotonic()
                self._unused.append(wire)
                if self._timer is None:
                    self._timer = asyncio.get_running_loop().call_later(KEPT_S, self._give_up)

    def _head(self, method: str, path: str, length: int, headers: Mapping[str, str], *, keeps: bool) -> bytes:
        lines = [f"{method} {self._path}{path} HTTP/1.1", f"Host: {self._host_header}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if length or method not in ("GET", "HEAD", "OPTIONS"):
            lines.append(f"Content-Length: {length}")
        if not keeps:
            lines.append("Connection: close")
        if any("\r" in line or "\n" in line for line in lines):
            raise ValueError("a line end within a header")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8", "surrogateescape")

    async def _begun(
        self, wire: Wire, method: str, path: str, body: bytes, headers: Mapping[str, str], *, keeps: bool
    ) -> HttpAnswer:
        try:
            head = self._head(method, path, len(body), headers, keeps=keeps)
            return await wire.ask(head, body, without_body=method == "HEAD")
        except BaseException:  # cancelled: the engine is left
            wire.release()
            raise

    async def _opened(self) -> Wire:
        loop, where = asyncio.get_running_loop(), f"{self._host}:{self._port}"
        try:
            async with asyncio.timeout(CONNECT_S):
                _, wire = await loop.create_connection(Wire, self._host, self._port, ssl=self._tls)
        except OSError as error:  # TimeoutError is one
            raise Broken(f"no connection to {where}: {error or 'it does not answer'}") from error
        return wire

    def _take(self) -> Wire | None:
        """A connection that was kept; None where there is none of use."""
        while self._unused:
            wire = self._unused.pop()
            if not wire.is_closing:
                return wire
        return None

    def _give_up(self) -> None:
        """Close the connections that nobody has used for KEPT_S."""
        self._timer, left_s = None, 0.0
        while self._unused and (left_s := self._unused[0].unused_since + KEPT_S - time.monotonic()) <= 0:
            self._unused.pop(0).release()
        if self._unused:
            self._timer = asyncio.get_running_loop().call_later(max(left_s, 0.001), self._give_up)


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


class FrameAnswer(EngineAnswer):
    headers = JSON

    def __init__(self, answer: frames.FrameResponse) -> None:
        self.status = answer.status
        self._answer = answer

    def pieces(self) -> AsyncIterator[bytes]:
        return self._answer.pieces()


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
