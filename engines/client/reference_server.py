"""A server whose timing is known exactly, against which `self_test` measures the client.

    python -m engines.client.reference_server --port 0 --ttft-ms 50 --itl-ms 10 --tokens 32

prints `listening PORT` and streams chunks shaped like llama.cpp's. The content of every chunk is the monotonic time,
in ns, at which it was handed to the kernel; client and server share that clock on one host, so receive minus send is
the client's lateness, with nothing estimated. A request that asks for no stream is answered at once: what a call takes
then is all overhead. It ends when its stdin closes, so it dies with its parent even when that one is killed; with
`--forever` it runs until it is stopped. It imports nothing of ours, so that it starts fast.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import threading
import time

CHUNK_BYTES = 278  # of a llama.cpp content chunk
STAMP_DIGITS = 20
MODEL = "reference-server"
_COMMON = {"id": "chatcmpl-1", "created": 0, "model": MODEL}


class _Connection(asyncio.Protocol):
    """One HTTP/1.1 connection; a timer per chunk on an absolute schedule, no task."""

    def __init__(self, ttft_s: float, itl_s: float, tokens: int) -> None:
        self._ttft_s, self._itl_s, self._default_tokens = ttft_s, itl_s, tokens
        self._received = b""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        if not blank or (length and len(body) < int(length[1])):
            return
        self._arrived_ns, self._received = time.monotonic_ns(), b""
        if head.startswith(b"GET /health "):
            return self._answer({"status": "ok"})
        if head.startswith(b"GET /v1/models "):
            return self._answer({"object": "list", "data": [{"id": MODEL, "object": "model"}]})
        if not head.startswith(b"POST /v1/chat/completions "):
            return self._refuse(404, "only POST /v1/chat/completions is served")
        try:
            request = json.loads(body)
            self._tokens = int(request.get("max_tokens") or self._default_tokens)
        except (ValueError, AttributeError):
            return self._refuse(400, "the body is no JSON object")
        if request.get("stream"):
            loop = asyncio.get_running_loop()
            self._loop, self._first_at, self._sent, self._sent_ns = loop, loop.time() + self._ttft_s, 0, [0, 0]
            self._timer = loop.call_at(self._first_at, self._send_next)
        else:
            message = {"role": "assistant", "content": f"{time.monotonic_ns():0{STAMP_DIGITS}d}"}
            choice = {"index": 0, "message": message, "finish_reason": "length"}
            self._answer({**_COMMON, "object": "chat.completion", "choices": [choice], "usage": _usage(self._tokens)})

    def _answer(self, fields: dict[str, object], status: str = "200 OK", more: str = "") -> None:
        body = json.dumps(fields).encode()
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{more}\r\n"
        self._transport.write(head.encode() + body)

    def _refuse(self, status: int, message: str) -> None:
        error = {"code": status, "message": message, "type": "invalid_request_error"}
        self._answer({"error": error}, f"{status} Refused", "Connection: close\r\n")
        self._transport.close()

    def _send_next(self) -> None:
        if self._sent == 0:
            # headers and role travel with the first token, as llama.cpp holds them back until prefill is over
            self._transport.write(_HEAD + _framed(_ROLE))
        now = time.monotonic_ns()
        self._transport.write(_BEFORE + b"%0*d" % (STAMP_DIGITS, now) + _AFTER)
        self._sent_ns[self._sent > 0] = now
        self._sent += 1
        if self._sent < self._tokens:
            self._timer = self._loop.call_at(self._first_at + self._sent * self._itl_s, self._send_next)
            return
        first_ns, last_ns = self._sent_ns[0], max(self._sent_ns)
        timings = {
            "prompt_n": 1,
            "prompt_ms": (first_ns - self._arrived_ns) / 1e6,
            "predicted_n": self._tokens,
            "predicted_ms": (last_ns - first_ns) / 1e6,
        }
        usage = _usage(self._tokens)
        end = _framed(_event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}))
        end += _framed(_event({"choices": [], "usage": usage, "timings": timings})) + _framed(b"data: [DONE]\n\n")
        self._transport.write(end + b"0\r\n\r\n")  # the connection stays open, as an engine's does


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": 1 + tokens}


def _event(fields: dict[str, object]) -> bytes:
    return b"data: " + json.dumps({**_COMMON, "object": "chat.completion.chunk", **fields}).encode() + b"\n\n"


def _framed(event: bytes) -> bytes:
    return b"%x\r\n" % len(event) + event + b"\r\n"


_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_ROLE = _event({"choices": [{"index": 0, "finish_reason": None, "delta": {"role": "assistant", "content": None}}]})
_CHOICES = [{"index": 0, "finish_reason": None, "delta": {"content": "0" * STAMP_DIGITS}}]
_PADDING = "x" * (CHUNK_BYTES - len(_event({"choices": _CHOICES, "system_fingerprint": ""})))
_CONTENT = _event({"choices": _CHOICES, "system_fingerprint": _PADDING})
_BEFORE, _AFTER = _framed(_CONTENT).split(b"0" * STAMP_DIGITS)


async def _serve(port: int, ttft_ms: float, itl_ms: float, tokens: int, *, forever: bool = False) -> None:
    # The plain loop on purpose: its transport writes at once, uvloop's waits for the end of the turn, after the stamp.
    loop, parent_gone = asyncio.get_running_loop(), asyncio.Event()
    server = await loop.create_server(lambda: _Connection(ttft_ms / 1e3, itl_ms / 1e3, tokens), "127.0.0.1", port)
    print(f"listening {server.sockets[0].getsockname()[1]}", flush=True)

    def wait_for_stdin() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        with contextlib.suppress(RuntimeError):  # the loop has already ended
            loop.call_soon_threadsafe(parent_gone.set)

    if not forever:
        threading.Thread(target=wait_for_stdin, daemon=True).start()
    await parent_gone.wait()
    server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="An OpenAI-like stream whose timing is known exactly.")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--ttft-ms", type=float, default=50)
    parser.add_argument("--itl-ms", type=float, default=10)
    parser.add_argument("--tokens", type=int, default=32, help="of a reply whose request names no max_tokens")
    parser.add_argument("--forever", action="store_true", help="stay when stdin closes")
    chosen = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(chosen.port, chosen.ttft_ms, chosen.itl_ms, chosen.tokens, forever=chosen.forever))


if __name__ == "__main__":
    main()
