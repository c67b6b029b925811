"""What goes over the wire as it came: paths, queries and headers, and answers that the yard does not read."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import quote

from multidict import CIMultiDict

from engines.openai.call import Refusal
from engines.yard.engine.connection import Gone
from engines.yard.engine.http_answer import EngineAnswer
from engines.yard.engine.unit import Unit
from engines.yard.ports.http_request import BodyTooLarge, ClientLeft, Request, Response

# of one connection alone (RFC 9110, 7.6.1)
# fmt: off
HOP_BY_HOP = frozenset((
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade", "http2-settings",
))
# a secret of the client's, or about the yard's own address; bodies arrive here unpacked
NOT_SENT = HOP_BY_HOP | {
    "authorization", "cookie", "host", "origin", "x-api-key", "content-length", "content-encoding", "expect",
}
# fmt: on
NOT_RETURNED = HOP_BY_HOP | {"server", "date", "set-cookie"}
PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))
UNPACKED = {"gzip": 31, "x-gzip": 31, "deflate": zlib.MAX_WBITS}  # encodings, and zlib's word for each
POLLED_S = 1.5  # polled every second or faster, llama-server does not see that clients left


def wire_path(request: Request, path: str) -> str:
    """`path`, or what the client wrote for it, with its query as it was written."""
    written, mark, query = request.target.partition("?")
    return quote((written if path == request.path else path) + mark + query, safe=PRINTABLE, errors="surrogateescape")


def sent_on(request: Request, *, read_here: bool, content_type: str = "") -> dict[str, str]:
    """The headers for the engine. `read_here`: the yard reads the answer, so it must not be packed."""
    named = {name.strip().lower() for name in request.headers.get("Connection", "").split(",")}
    headers = {
        name: value
        for name, value in request.headers.items()
        if (lower := name.lower()) not in NOT_SENT and lower not in named and not lower.startswith("access-control-")
        if value.isascii() and value.isprintable()
    }
    if read_here:
        kept = {
            name: value for name, value in headers.items() if name.lower() not in ("accept-encoding", "content-type")
        }
        headers = {**kept, "Content-Type": content_type or "application/json"}
    return headers


async def body_of(request: Request, limit: int) -> bytes:
    """The request's body, unpacked; strictly, since a body that ends early could still be JSON.

    Raises Refusal 400 for one that is not what its Content-Encoding says, 415 for an encoding that is not unpacked
    here, and BodyTooLarge beyond `limit` bytes, packed or not.
    """
    data = await request.read(limit)
    encodings = [name.strip().lower() for name in request.headers.get("Content-Encoding", "").split(",")]
    for name in reversed(encodings):
        if name in ("", "identity"):
            continue
        if name not in UNPACKED:
            raise Refusal(415, f"Content-Encoding {name[:40]!r} is not known here; send gzip, deflate or none")
        try:
            data = _unpacked(data, name, limit)
        except zlib.error as error:
            raise Refusal(400, f"the request body is no valid {name}: {error}") from None
    return data


def _unpacked(data: bytes, name: str, limit: int) -> bytes:
    whole = b""
    is_raw = name == "deflate" and data[:1] and data[0] & 15 != zlib.DEFLATED  # without zlib's header, as some send it
    while data:  # gzip may have several members
        one = zlib.decompressobj(-zlib.MAX_WBITS if is_raw else UNPACKED[name])
        whole += one.decompress(data, limit + 1 - len(whole))
        if len(whole) > limit:
            raise BodyTooLarge
        if not one.eof:
            raise zlib.error("it ends early")
        data = one.unused_data
        if data and name == "deflate":
            raise zlib.error("something follows its end")
    return whole


def returned(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """The headers of an engine's answer that are for the client."""
    named = {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    return [
        (name, value)
        for name, value in headers.items()
        if (lower := name.lower()) not in NOT_RETURNED
        and lower not in named
        and not lower.startswith("access-control-")
    ]


async def pass_through(request: Request, answer: EngineAnswer) -> None:
    """Hand an engine's answer on as it is. Raises ClientLeft, and Gone while nothing was handed on."""
    request.begin(answer.status, CIMultiDict(returned(answer.headers)))
    try:
        async for piece in answer.pieces():
            request.write(piece)
            await request.drain()
    except Gone:
        request.transport.abort()  # the client must not take half of it for all
        raise ClientLeft from None
    request.end()


class _Seen(NamedTuple):
    status: int
    headers: list[tuple[str, str]]
    body: bytes


class Polled:
    """Answers of paths that an engine must not be asked for often: one is shown to all who ask within POLLED_S."""

    def __init__(self) -> None:
        self._asking: dict[tuple[int, str], asyncio.Lock] = {}
        self._seen: dict[tuple[int, str], tuple[float, str, _Seen]] = {}

    async def ask(self, unit: Unit, path: str, target: str) -> Response:
        key = id(unit), path
        async with self._asking.setdefault(key, asyncio.Lock()):
            at, seen_target, seen = self._seen.get(key, (0.0, "", None))
            left = at + POLLED_S - time.monotonic()
            if left > 0 and target != seen_target:
                await asyncio.sleep(left)  # another query: asked in its turn
            if seen is None or left <= 0 or target != seen_target:
                async with unit.connection.ask("GET", target, headers={}, timeout_s=10) as answer:
                    seen = _Seen(answer.status, returned(answer.headers), await answer.read())
                self._seen[key] = time.monotonic(), target, seen
        headers = ((name, value) for name, value in seen.headers if name.lower() != "content-length")
        return Response(seen.status, seen.body, CIMultiDict(headers))


def refuse_upgrade(request: Request) -> None:
    """Raise Refusal 501 for a request that asks for another protocol; HTTP/2 over plain text is just not taken up."""
    asked = request.headers.get("Upgrade", "").lower()
    if asked and not asked.startswith("h2c"):
        raise Refusal(501, f"the yard passes no upgrade on (to {asked[:40]})", kind="not_supported_error")
