"""A process that holds one mistral.rs model and answers frames: `python -m THIS_MODULE --gguf FILE ...`.

The engine without a server: what breaks in native code breaks here and not in the yard, and its end gives all memory
back. It dies with the process that started it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hmac
import json
import os
import signal
import sys
from collections.abc import AsyncGenerator

from engines.mistral_rs.native import frames
from engines.mistral_rs.native.arguments import load, log, read_arguments
from engines.mistral_rs.native.engine import EngineResponse, Native, in_stream, json_body, refusal

MAX_BODY_BYTES = 64 * 2**20


class FrameServer:
    """Answers requests in frames, one at a time on each connection."""

    def __init__(self, native: Native, key: str) -> None:
        self._native = native
        self._key = key.encode()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """From the first byte of a connection to its end; a client that leaves leaves the engine."""
        with contextlib.suppress(ConnectionError):
            try:
                first = await reader.read(1)
                while first and (request := await self._read(first, reader)) is not None:
                    answering = asyncio.ensure_future(self._reply(*request, writer))
                    # nothing more comes until the answer has ended, but the client's end
                    waiting = asyncio.ensure_future(reader.read(1))
                    try:
                        await asyncio.wait((answering, waiting), return_when=asyncio.FIRST_COMPLETED)
                        if not answering.done():
                            return
                        await answering
                        first = await waiting
                    finally:
                        for task in (answering, waiting):
                            task.cancel()
                        await asyncio.gather(answering, waiting, return_exceptions=True)
            finally:
                writer.close()

    async def _read(self, first: bytes, reader: asyncio.StreamReader) -> tuple[str, str, bytes] | None:
        """Method, path and body of a request that carries the key; anything else is hung up on."""
        try:
            words = json.loads(first + await reader.readline())
            carried = hmac.compare_digest(str(words["key"]).encode(), self._key)
            length = int(words["length"])
            if not carried or not 0 <= length <= MAX_BODY_BYTES:
                return None
            return str(words["method"]), str(words["path"]), await reader.readexactly(length)
        except (ValueError, KeyError, TypeError, asyncio.IncompleteReadError):
            return None

    async def _reply(self, method: str, path: str, data: bytes, writer: asyncio.StreamWriter) -> None:
        try:
            reply = await self._native.ask(method, path, json_body(data) if method == "POST" else {})
            if isinstance(reply.content, AsyncGenerator):
                await self._stream(reply.content, writer)
            else:
                await self._whole(reply, writer)
        except ConnectionError:
            raise
        except Exception as error:
            await self._whole(refusal(error), writer)

    async def _whole(self, reply: EngineResponse, writer: asyncio.StreamWriter) -> None:
        writer.write(_status(reply.status) + frames.piece(reply.body) + frames.piece(b""))
        await writer.drain()

    async def _stream(self, events: AsyncGenerator[bytes, None], writer: asyncio.StreamWriter) -> None:
        """The status waits for the first frame, so that an early error keeps its own."""
        begun = False
        async with contextlib.aclosing(in_stream(events)) as begun_frames:
            async for frame in begun_frames:
                writer.write((b"" if begun else _status(200)) + frames.piece(frame))
                begun = True
                await writer.drain()
        writer.write(frames.piece(b""))
        await writer.drain()


def _status(status: int) -> bytes:
    return json.dumps({"status": status}).encode() + b"\n"


async def serve(arguments: argparse.Namespace, native: Native, key: str) -> None:
    """Answer until a signal ends it; the process goes at once then, whatever the engine is doing."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, os._exit, 0)
    answers = FrameServer(native, key)
    server = await asyncio.start_server(answers.answer, arguments.host, arguments.port, limit=frames.LINE_LIMIT)
    log(f"ready for frames on {arguments.host}:{arguments.port}")
    await server.serve_forever()


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 ended by a signal, 1 the port is taken or the model does not load, 2 bad arguments."""
    program = "python -m engines.mistral_rs.native.worker"
    parser = argparse.ArgumentParser(prog=program, description="Hold one mistral.rs model and answer frames.")
    arguments, key = read_arguments(parser, argv, needs_key=True)
    native = Native(load(arguments), arguments.model_id, arguments.slots)
    try:
        asyncio.run(serve(arguments, native, key))
    except OSError as error:
        log(f"error: cannot listen on {arguments.host}:{arguments.port}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
