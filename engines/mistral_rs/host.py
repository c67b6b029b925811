"""mistral.rs behind the OpenAI HTTP API, from its Python wheel: `python -m engines.mistral_rs.host --gguf FILE ...`.

A thin shell around `native`, which lists what the engine cannot do. Loading holds Python's global lock:
until it is over, a forked child answers 503 on the same port.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hmac
import json
import os
import select
import signal
import socket
import sys
from collections.abc import AsyncGenerator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engines.mistral_rs.native import requests
from engines.mistral_rs.native.arguments import load, log, read_arguments
from engines.mistral_rs.native.engine import EngineResponse, Native, in_stream, json_body, refusal
from engines.mistral_rs.native.requests import ApiError
from engines.openai.sse import write_event

MAX_BODY_BYTES = 50 * 1024 * 1024
STOP_GRACE_S = 1.0
LOADING = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}
STOPPING = {"error": {"message": "The server is shutting down", "type": "unavailable_error", "code": 503}}


async def send_frames(frames: AsyncGenerator[bytes, None], send: Send, headers: dict[str, str]) -> None:
    """Send an event stream. Its headers wait for the first frame, so that an early error keeps its status.

    A later error becomes an error event, after which the stream ends without a finish reason or [DONE].
    """
    plain = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", **headers}
    raw = [(name.encode(), value.encode()) for name, value in plain.items()]
    begun = False
    async with contextlib.aclosing(in_stream(frames)) as events:
        async for frame in events:
            if not begun:
                begun = True
                await send({"type": "http.response.start", "status": 200, "headers": raw})
            await send({"type": "http.response.body", "body": frame, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


class CancellableResponse:
    """An ASGI response that ends with its client: one that leaves cancels the work, streamed or not."""

    def __init__(self, native: Native, request: Request, stopping: asyncio.Event) -> None:
        self._native = native
        self._request = request
        self._stopping = stopping
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def noting(message: Message) -> None:
            self._begun = True
            await send(message)

        try:
            body = json_body(await whole_body(self._request)) if self._request.method == "POST" else {}
        except ApiError as error:
            await to_response(refusal(error))(scope, receive, send)
            return
        answering = asyncio.ensure_future(self._send(body, scope, receive, noting))
        leaving = asyncio.ensure_future(client_left(receive))
        stopping = asyncio.ensure_future(self._stopping.wait())
        tasks = (answering, leaving, stopping)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done() and not (answering.done() or leaving.done()):
                answering.cancel()
                await asyncio.gather(answering, return_exceptions=True)
                if self._begun:
                    await send({"type": "http.response.body", "body": write_event(STOPPING)})
                else:
                    await JSONResponse(STOPPING, 503)(scope, receive, send)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        if isinstance(results[0], Exception):
            raise results[0]

    async def _send(self, body: requests.Json, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            reply = await self._native.ask(self._request.method, self._request.url.path, body)
            if isinstance(reply.content, AsyncGenerator):
                await send_frames(reply.content, send, reply.headers)
            else:
                await to_response(reply)(scope, receive, send)
        except Exception as error:
            if self._begun:
                raise
            await to_response(refusal(error))(scope, receive, send)


async def client_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def to_response(reply: EngineResponse) -> Response:
    return Response(reply.body, reply.status, {"Content-Type": "application/json", **reply.headers})


async def whole_body(request: Request) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise ApiError(413, f"the request body is larger than {MAX_BODY_BYTES} bytes")
        parts.append(part)
    return b"".join(parts)


async def on_http_error(request: Request, error: Exception) -> Response:
    """404 and 405 of the router, as OpenAI's error object."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    body = ApiError(error.status_code, message).body
    return JSONResponse(body, error.status_code, headers=error.headers)


class KeyRequired:
    """Lets through what carries the key, and /health; compares in constant time."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in ("/health", "/v1/health"):
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        offered = token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        if hmac.compare_digest(offered, self._key):
            return await self._app(scope, receive, send)
        error = ApiError(401, "Invalid API key", type="authentication_error", code="invalid_api_key")
        await to_response(refusal(error))(scope, receive, send)


# --- the process ----------------------------------------------------------------------------------------------------


class LoadingResponder:
    """A forked child that answers 503 on the listening socket until `close`; it ends with its parent.

    The wheel holds Python's global lock while it loads, so no thread of this process can answer then.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._alive, self._hold = os.pipe()
        self._child = os.fork()
        if self._child == 0:
            os.close(self._hold)
            with contextlib.suppress(BaseException):
                self._serve(listener)
            os._exit(0)
        os.close(self._alive)

    def close(self) -> None:
        """End the child; connections that it has not accepted wait for this process."""
        os.close(self._hold)
        os.waitpid(self._child, 0)

    def _serve(self, listener: socket.socket) -> None:
        body = json.dumps(LOADING).encode()
        head = (
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        while True:
            readable, _, _ = select.select([listener.fileno(), self._alive], [], [])
            if self._alive in readable:
                return
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(1.0)
                    connection.recv(65536)
                    connection.sendall(head.encode() + body)
                    connection.shutdown(socket.SHUT_WR)
                    # what the client still sends must be read, or a reset would eat the answer
                    connection.settimeout(0.2)
                    while connection.recv(65536):
                        pass


class HttpServer(uvicorn.Server):
    """Uvicorn that ends at once on SIGTERM: clients get an error, then the process exits, engine busy or not."""

    def __init__(self, config: uvicorn.Config, stopping: asyncio.Event) -> None:
        super().__init__(config)
        self._stopping = stopping

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        yield

    def _stop(self) -> None:
        if self._stopping.is_set():
            os._exit(0)
        self._stopping.set()
        log("stopping")
        self.should_exit = True
        asyncio.get_running_loop().call_later(STOP_GRACE_S, os._exit, 0)


def listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # named as TCP, asyncio switches Nagle off: or each answer on a kept connection waits 40 ms for an acknowledgement
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(1024)
    listener.setblocking(False)
    return listener


async def serve(arguments: argparse.Namespace, model: Any, key: str | None, listener: socket.socket) -> None:
    native, stopping = Native(model, arguments.model_id, arguments.slots), asyncio.Event()

    async def answer(request: Request) -> Any:
        return CancellableResponse(native, request, stopping)

    routes = [Route(path, answer, methods=[method]) for method, path in native.routes]
    app = Starlette(routes=routes, exception_handlers={HTTPException: on_http_error})
    config = uvicorn.Config(
        KeyRequired(app, key) if key else app, log_config=None, access_log=False, lifespan="off", timeout_keep_alive=75
    )
    log(f"listening on http://{arguments.host}:{arguments.port}")
    await HttpServer(config, stopping).serve(sockets=[listener])


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 ended by a signal once ready, 1 the port is taken or the model does not load, 2 bad arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m engines.mistral_rs.host", description=(__doc__ or "").split("\n")[0]
    )
    arguments, key = read_arguments(parser, argv, needs_key=False)
    try:
        listener = listen(arguments.host, arguments.port)
    except OSError as error:
        log(f"error: cannot listen on {arguments.host}:{arguments.port}: {error}")
        return 1
    responder = LoadingResponder(listener) if hasattr(os, "fork") else None
    model = load(arguments)
    if responder:
        responder.close()
    asyncio.run(serve(arguments, model, key, listener))
    sys.stderr.flush()
    os._exit(0)  # a worker thread may still sit in the engine


if __name__ == "__main__":
    sys.exit(main())
