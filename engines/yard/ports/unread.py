"""What clients have not taken of their answers: how much may be kept for them, and how long.

An engine is read on while its client takes nothing, up to `EACH_BYTES` for one request and `ALL_BYTES` for all of them;
the bytes wait in the connection's own write buffer. Beyond that the engine is held back.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

EACH_BYTES = 4 * 2**20
ALL_BYTES = 64 * 2**20
SOME_BYTES = 64 * 1024  # less than that is on its way, not unread
TCP_INFO_BYTES = 128
BYTES_ACKED = struct.Struct("=Q")
BYTES_ACKED_AT = 120  # tcpi_bytes_acked of struct tcp_info (Linux include/uapi/linux/tcp.h, since 4.1)


class Unread:
    """Unread bytes of all requests, as far as they were counted."""

    def __init__(self) -> None:
        self._bytes: dict[object, int] = {}
        self._all = 0

    def count(self, request: object, size: int) -> None:
        self._all += size - self._bytes.get(request, 0)
        self._bytes[request] = size

    def forget(self, request: object) -> None:
        self._all -= self._bytes.pop(request, 0)

    @property
    def any(self) -> bool:
        return any(size > SOME_BYTES for size in self._bytes.values())

    def holds(self, request: object) -> bool:
        """True while its client is noticeably behind."""
        return self._bytes.get(request, 0) > SOME_BYTES

    def is_full(self, request: object) -> bool:
        """True when nothing more may be kept for it."""
        size = self._bytes.get(request, 0)
        return size > EACH_BYTES or (size > SOME_BYTES and self._all > ALL_BYTES)


class Comments:
    """Separates the comments of a stream of server-sent events (keep-alives) from its content, piece by piece."""

    def __init__(self) -> None:
        self.open = False  # the last piece ended within a comment

    def only(self, piece: bytes) -> bool:
        """True when the piece holds nothing but comments and blank lines."""
        at = 0
        while at < len(piece):
            if self.open:
                end = piece.find(b"\n", at)
                if end < 0:
                    return True
                self.open, at = False, end + 1
            elif piece[at] == 0x3A:  # a colon
                self.open = True
            elif piece[at] in b"\r\n":
                at += 1
            else:
                return False
        return True


class ClientConnection(Protocol):
    transport: asyncio.Transport | None


@dataclass
class _Seen:
    taken: int | None  # bytes that the other side has acknowledged; None where the system does not report it
    unread: int
    since: float


class StalledClients:
    """Finds the connections whose clients take nothing of what waits for them."""

    def __init__(self) -> None:
        self._seen: dict[ClientConnection, _Seen] = {}

    def cut(self, connections: Iterable[ClientConnection], limit_s: float) -> list[str]:
        """End the connections whose clients took nothing for `limit_s`; their addresses."""
        now, cut, before = time.monotonic(), [], self._seen
        self._seen = {}
        for connection in connections:
            transport = connection.transport
            if transport is None or transport.is_closing() or (unread := transport.get_write_buffer_size()) == 0:
                continue
            taken, seen = _taken(transport), before.get(connection)
            if seen is None or taken != seen.taken or (taken is None and unread < seen.unread):
                self._seen[connection] = _Seen(taken, unread, now)
            elif now - seen.since <= limit_s:
                self._seen[connection] = seen
            else:
                cut.append(address_of(transport))
                transport.abort()
        return cut


def address_of(transport: asyncio.Transport) -> str:
    return str((transport.get_extra_info("peername") or ("?",))[0])


def _taken(transport: asyncio.Transport) -> int | None:
    connection = transport.get_extra_info("socket")
    if not sys.platform.startswith("linux") or connection is None:
        return None
    with contextlib.suppress(OSError, struct.error):
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
        return int(BYTES_ACKED.unpack_from(info, BYTES_ACKED_AT)[0])
    return None
