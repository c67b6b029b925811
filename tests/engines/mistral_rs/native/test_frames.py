"""The yard and a native worker talk in frames: what arrives, what breaks, and who is let in."""

import asyncio
import contextlib
import json

import pytest

from engines.mistral_rs.native import frames
from engines.mistral_rs.native.engine import EngineResponse
from engines.mistral_rs.native.requests import ApiError
from engines.mistral_rs.native.worker import FrameServer

KEY = "secret-of-the-test"


class Scripted:
    """Stands where the engine stands: each path has its way to answer."""

    def __init__(self):
        self.left = asyncio.Event()

    async def ask(self, method, path, body):
        if path == "/whole":
            return EngineResponse({"method": method, "body": body})
        if path == "/bug":
            raise ZeroDivisionError("a bug")
        if path == "/refused":
            raise ApiError(400, "no")
        return EngineResponse(getattr(self, path[1:])())

    async def stream(self):
        for number in range(3):
            yield f"data: {number}\n\n".encode()

    async def early(self):
        yield b""
        raise ApiError(429, "too many")

    async def late(self):
        yield b"data: 0\n\n"
        raise ApiError(500, "broke")

    async def endless(self):
        try:
            while True:
                yield b"data: x\n\n"
                await asyncio.sleep(0.001)
        finally:
            self.left.set()

    async def large(self):
        yield b"x" * 5_000_000


@pytest.fixture
async def worker():
    native = Scripted()
    server = await asyncio.start_server(FrameServer(native, KEY).answer, "127.0.0.1", 0, limit=frames.LINE_LIMIT)
    async with server:
        yield native, server.sockets[0].getsockname()[1]


def asked(port, path, method="POST", body=b"{}", key=KEY):
    return frames.FrameClient("127.0.0.1", port, key).ask(method, path, body)


async def read(port, path, **how):
    async with asked(port, path, **how) as answer:
        return answer.status, await answer.read()


async def test_whole_answers_and_errors_have_their_status(worker):
    _, port = worker
    status, data = await read(port, "/whole", body=b'{"a": 1}')
    assert (status, json.loads(data)) == (200, {"method": "POST", "body": {"a": 1}})
    assert (await read(port, "/refused"))[0] == 400
    assert (await read(port, "/bug"))[0] == 500
    assert (await read(port, "/whole", body=b"no json"))[0] == 400
    assert (await read(port, "/whole", body=b"", method="GET"))[0] == 200


async def test_pieces_arrive_as_they_were_sent(worker):
    _, port = worker
    async with asked(port, "/stream") as answer:
        assert [piece async for piece in answer.pieces()] == [b"data: 0\n\n", b"data: 1\n\n", b"data: 2\n\n"]
    assert len((await read(port, "/large"))[1]) == 5_000_000


async def test_an_early_error_keeps_its_status_and_a_late_one_is_an_event(worker):
    _, port = worker
    assert (await read(port, "/early"))[0] == 429
    status, data = await read(port, "/late")
    assert status == 200
    assert b'"message":"broke"' in data.replace(b" ", b"")


async def test_who_leaves_leaves_the_engine(worker):
    native, port = worker
    async with asked(port, "/endless") as answer:
        assert await anext(answer.pieces())
    async with asyncio.timeout(10):
        await native.left.wait()


async def test_connections_are_kept_and_one_that_broke_costs_nothing(worker):
    _, port = worker
    opened = []

    async def forward(reader, writer):
        opened.append(writer)
        inward, outward = await asyncio.open_connection("127.0.0.1", port)

        async def pipe(source, sink):
            with contextlib.suppress(ConnectionError):
                while data := await source.read(65536):
                    sink.write(data)
            sink.close()

        await asyncio.gather(pipe(reader, outward), pipe(inward, writer))

    async with await asyncio.start_server(forward, "127.0.0.1", 0) as between:
        client = frames.FrameClient("127.0.0.1", between.sockets[0].getsockname()[1], KEY)

        async def whole(path="/whole"):
            async with client.ask("POST", path, b"{}") as answer:
                return answer.status, await answer.read()

        assert [(await whole())[0] for _ in range(5)] == [200] * 5
        assert (await whole("/early"))[0] == 429
        assert len(opened) == 1
        opened[0].transport.abort()
        assert (await whole())[0] == 200
        assert len(opened) == 2
        async with client.ask("POST", "/endless", b"{}") as answer:
            await anext(answer.pieces())
        assert (await whole())[0] == 200, "one that was left in mid-answer is not used again"
        assert len(opened) == 3
        client.close()


@pytest.mark.parametrize("key", ["", "another"])
async def test_without_the_key_nothing_is_answered(worker, key):
    _, port = worker
    with pytest.raises(frames.Broken):
        await read(port, "/whole", key=key)


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 70_000, b'{"key": 1}\n', b"[]\n", b""])
async def test_what_is_no_request_is_hung_up_on(worker, sent):
    _, port = worker
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    with contextlib.suppress(ConnectionError):
        writer.write_eof()
        async with asyncio.timeout(10):
            assert await reader.read() == b""
    writer.close()
    assert (await read(port, "/whole"))[0] == 200


async def test_nobody_there_and_an_end_amid_an_answer_are_broken():
    async def hang_up(reader, writer):
        await reader.readline()
        writer.write(b'{"status": 200}\n' + frames.LENGTH.pack(100) + b"half")
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        with pytest.raises(frames.Broken):
            await read(port, "/whole")
        with pytest.raises(OSError, match="amid"):
            await asyncio.to_thread(frames.ask, port, KEY, "GET", "/health", b"", 10)
    with pytest.raises(frames.Broken):
        await read(port, "/whole")


async def test_code_without_an_event_loop_asks_too(worker):
    _, port = worker
    status, body = await asyncio.to_thread(frames.ask, port, KEY, "POST", "/whole", b"{}", 10)
    assert (status, body["method"]) == (200, "POST")
