"""Answers over HTTP as engines may send them: in any pieces, of known and unknown length, cut, and what is none."""

import asyncio
import contextlib
from types import SimpleNamespace

import pytest

from engines.yard.engine import connection
from engines.yard.engine.connection import Gone, HttpConnection
from engines.yard.engine.http_answer import READ_AHEAD_BYTES, HttpAnswer

CHAT = "/v1/chat/completions"
CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Odd: \xc3\xa4\r\nX-Odd: b\r\n\r\nhello"


class Engine:
    """Answers each request on a connection with the bytes that are next, then closes it where `closes`."""

    def __init__(self, *answers, closes=False, byte_by_byte=False):
        self.answers, self.closes, self.byte_by_byte = list(answers), closes, byte_by_byte
        self.heads, self.connections, self.left = [], 0, asyncio.Event()

    async def __aenter__(self):
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.connection = HttpConnection(f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/below/", None)
        return self

    async def __aexit__(self, *_):
        self.connection.close()
        self.server.close()

    async def _serve(self, reader, writer):
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                self.heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
                answer = self.answers.pop(0)
                for piece in [answer[at : at + 1] for at in range(len(answer))] if self.byte_by_byte else [answer]:
                    writer.write(piece)
                    await asyncio.sleep(0)
                if self.closes:
                    break
        self.left.set()
        writer.close()

    async def ask(self, method="POST", path=CHAT):
        async with self.connection.ask(method, path) as answer:
            return answer.status, answer.headers, await answer.read()


def run(asked):
    async def within():
        async with asyncio.timeout(30):
            await asked()

    asyncio.run(within())


@pytest.mark.parametrize("byte_by_byte", [False, True])
@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (CHUNKED + b"3\r\nabc\r\n5;odd=1\r\nhello\r\n0\r\nX-Trailer: 1\r\n\r\n", b"abchello"),
        (LENGTH, b"hello"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + LENGTH, b"hello"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", b"until the end"),
    ],
)
def test_each_form_of_an_answer_is_read(answer, body, byte_by_byte):
    async def asked():
        async with Engine(answer, closes=True, byte_by_byte=byte_by_byte) as engine:
            status, headers, data = await engine.ask()
            assert (status in (200, 204), data) == (True, body)
            assert "Link" not in headers
            assert "X-Trailer" not in headers
            assert engine.heads[0].startswith(f"POST /below{CHAT} HTTP/1.1\r\nHost: 127.0.0.1:")

    run(asked)


def test_a_long_body_right_behind_its_head_is_no_long_head():
    async def asked():
        answer = HttpAnswer(SimpleNamespace(pause_reading=lambda: None), without_body=False)
        answer.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 262144\r\n\r\n" + bytes(2**18))
        assert len(await answer.read()) == 2**18

    run(asked)


def test_headers_keep_their_order_and_their_letters():
    async def asked():
        async with Engine(LENGTH) as engine:
            _, headers, _ = await engine.ask()
            assert list(headers.items())[1:] == [("X-Odd", "ä"), ("X-Odd", "b")]

    run(asked)


def test_an_answer_to_head_has_no_body():
    async def asked():
        async with Engine(LENGTH.removesuffix(b"hello")) as engine:
            assert (await engine.ask("HEAD", "/x"))[2] == b""

    run(asked)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200",
        CHUNKED + b"3\r\nab",
        CHUNKED + b"3\r\nabc\r\n",
        LENGTH[:-1],
        b"\x00 no HTTP",
        CHUNKED + b"zz\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 50_000,
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n",
    ],
)
def test_what_is_cut_or_no_http_is_gone(answer):
    async def asked():
        async with Engine(answer, closes=True) as engine:
            with pytest.raises(Gone):
                await engine.ask()

    run(asked)


def test_what_came_before_the_cut_is_handed_on():
    async def asked():
        async with Engine(CHUNKED + b"3\r\nabc\r\n2\r\nd", closes=True) as engine:
            seen = []

            async def seen_until_the_cut():
                async with engine.connection.ask("POST", CHAT) as answer:
                    while not await answer.pass_to(lambda piece: seen.append(piece) or True):
                        await engine.left.wait()

            with pytest.raises(Gone):
                await seen_until_the_cut()
            assert b"".join(seen) == b"abcd"

    run(asked)


def test_a_connection_carries_the_next_request_and_only_that():
    """One that was answered, not one that was left in the middle, nor one that sent more than was asked."""

    async def asked():
        async with Engine(
            LENGTH, LENGTH, CHUNKED + b"3\r\nabc\r\n", LENGTH + b"HTTP/1.1 200 OK\r\n\r\n", LENGTH
        ) as engine:
            assert [(await engine.ask())[2] for _ in range(2)] == [b"hello"] * 2
            assert engine.connections == 1
            async with engine.connection.ask("POST", CHAT) as answer:
                assert not await answer.pass_to(lambda piece: True)
            await engine.left.wait()
            assert (await engine.ask())[2] == b"hello"
            assert (await engine.ask())[2] == b"hello"
            assert engine.connections == 3
            assert all("Connection: close" not in head for head in engine.heads)
            engine.answers.append(LENGTH)
            await engine.ask("GET", "/slots")
            assert "Connection: close\r\n" in engine.heads[-1]

    run(asked)


def test_an_engine_that_nobody_reads_is_held_back():
    """And read on from where it stopped, without a byte lost."""

    async def asked():
        piece = b"%x\r\n%b\r\n" % (2**16, bytes(2**16))
        async with Engine(CHUNKED + piece * 400 + b"0\r\n\r\n") as engine:
            sizes = []
            async with engine.connection.ask("POST", CHAT) as answer:
                assert not await answer.pass_to(lambda data: sizes.append(len(data)) or True)
                while not answer._paused:  # noqa: ASYNC110  a transport has no event for it
                    await asyncio.sleep(0.01)
                assert answer._kept_bytes < READ_AHEAD_BYTES + 2**19
                assert await answer.pass_to(lambda data: sizes.append(len(data)))
            assert sum(sizes) == 400 * 2**16

    run(asked)


def test_an_error_of_the_taker_is_its_own():
    async def asked():
        async with Engine(CHUNKED + b"3\r\nabc\r\n") as engine:

            async def divided():
                async with engine.connection.ask("POST", CHAT) as answer:
                    await answer.pass_to(lambda piece: 1 / 0)

            with pytest.raises(ZeroDivisionError):
                await divided()
            await engine.left.wait()

    run(asked)


def test_requests_under_way_are_broken_off():
    async def asked():
        async with Engine(CHUNKED + b"3\r\nabc\r\n") as engine:

            async def broken_off():
                async with engine.connection.ask("POST", CHAT) as answer:
                    asyncio.get_running_loop().call_soon(engine.connection.close)
                    await answer.read()

            with pytest.raises(Gone):
                await broken_off()
            await engine.left.wait()

    run(asked)


def test_a_kept_connection_is_given_up_when_it_was_not_used_for_long(monkeypatch):
    """Twice: the one timer of all of them is set anew."""
    monkeypatch.setattr(connection, "KEPT_S", 0.1)

    async def asked():
        async with Engine(*[LENGTH] * 6) as engine:
            for n in (1, 2):
                await asyncio.gather(engine.ask(), engine.ask())
                await engine.ask()
                assert engine.connections == 2 * n, "the third request uses one that is kept"
                while engine.connection._unused:  # noqa: ASYNC110  the engine sees the end, which has no event for both
                    await asyncio.sleep(0.01)
                await engine.left.wait()

    run(asked)
