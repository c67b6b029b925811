"""Clients that take nothing of their answer, or little: they cost the engine nothing, and others nothing."""

import asyncio
import contextlib
import json
import os
import socket
import threading
import time

import psutil
import pytest
import uvloop
from waiting import until

from engines.yard.ports.http_request import ClientLeft, Request
from engines.yard.ports.reply import ClientReply
from engines.yard.ports.unread import StalledClients, Unread

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
PAD = 16 * 1024
LONG = {"stream": True, "max_tokens": 2000, "fake_pad": PAD}  # 32 MB: more than any buffer on the way


@contextlib.contextmanager
def unread(yard, **body):
    """A connection with a request on it, of whose answer nothing is read."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        connection.connect(("127.0.0.1", yard.port))
        data = json.dumps({**CHAT, **body}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        yield connection


def served(yard):
    with yard.http() as http:
        return http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 4}).status_code


def read_until_cut(connection):
    """Bytes that come before the other side cuts the connection."""
    n_bytes = 0
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(2**20):
            n_bytes += len(piece)
    return n_bytes


def rest_of(connection, pause_s=0.0):
    """All that is still to come of a chunked answer, read in small pieces."""
    connection.settimeout(60)
    said = bytearray()
    while not said.endswith(b"0\r\n\r\n"):
        piece = connection.recv(65536)
        assert piece, f"cut after {len(said)} bytes"
        said += piece
        time.sleep(pause_s)
    return bytes(said)


def dechunked(answer):
    """The body of a chunked answer."""
    rest, body = answer.partition(b"\r\n\r\n")[2], bytearray()
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return bytes(body)


def ended(connection):
    """True once the other side has cut the connection."""
    connection.settimeout(0)
    try:
        while connection.recv(2**20):
            pass
        return True
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


@pytest.mark.parametrize("habit", ["", " --no-slots"])
def test_a_client_that_reads_nothing_restarts_no_engine(start_yard, habit):
    """Whether the engine counts its progress or, as mistralrs 0.8.1, has nothing that does."""
    yard = start_yard(old="--itl-ms 0" + habit, parallel=2, settings={"wedged_after_s": 1, "probe_every_s": 1}).ready()
    with unread(yard, **LONG):
        until(lambda: yard.engine("old")["in_flight"] == 1, "the stream on the engine")
        held_until = time.monotonic() + 5  # five times as long as an engine may be silent
        while time.monotonic() < held_until:
            engine = yard.engine("old")
            assert (engine["restarts"], engine["in_flight"]) == (0, 1), "the engine is held back, not left"
            time.sleep(0.2)
        assert served(yard) == 200
        assert (yard.engine("old")["restarts"], yard.route()["fallback"]) == (0, None)
        assert yard.orders.status()["incidents"] == []


def test_it_is_cut_after_its_own_limit_and_its_place_is_free(start_yard):
    yard = start_yard(old="--itl-ms 0", parallel=1, settings={"wedged_after_s": 1, "client_stall_s": 2}).ready()
    with unread(yard, **LONG) as connection:
        until(lambda: yard.engine("old")["in_flight"] == 1, "the stream on the engine")
        assert served(yard) == 200, "after two seconds the only place is free"
        until(lambda: ended(connection), "the connection to be cut")
    assert yard.engine("old")["restarts"] == 0
    assert "cut the client at 127.0.0.1" in yard.said()
    with yard.http() as http:
        assert "switchyard_clients_cut_total 1.0" in http.get("/metrics").text


def test_a_client_that_is_being_cut_is_not_cut_once_more():
    """Two limits end at once: the one that comes second finds the connection on its way out, and counts nothing."""

    async def cut_twice():
        connections = []
        server = await asyncio.start_server(lambda _, writer: connections.append(writer), "127.0.0.1", 0)
        async with server:
            _, client = await asyncio.open_connection(*server.sockets[0].getsockname())
            while not connections:  # noqa: ASYNC110  its callback has no event
                await asyncio.sleep(0.01)
            transport = connections[0].transport
            reply = ClientReply(Request(transport, None, None), None, Unread())
            transport.write(bytes(20_000_000))
            watch = StalledClients()
            watch.cut([connections[0]], limit_s=0)
            assert reply.hang_up() == "127.0.0.1"
            with pytest.raises(ClientLeft):
                reply.hang_up()
            assert watch.cut([connections[0]], limit_s=0) == []
            client.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(cut_twice())


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_fits_into_the_buffer_needs_no_engine_any_more(start_yard, stream):
    """5 MB unread: the place is free at once, and the client gets every byte when it reads at last."""
    yard = start_yard(old="--itl-ms 0", parallel=1, settings={"wedged_after_s": 1}).ready()
    pad = 2_500_000 if stream else 5_000_000
    with unread(yard, stream=stream, max_tokens=2, fake_pad=pad) as connection:
        until(lambda: "ready" in yard.engine("old")["state"] and yard.engine("old")["in_flight"] == 0, "the place")
        assert served(yard) == 200
        connection.settimeout(20)
        said = rest_of(connection) if stream else _by_length(connection)
    assert said.count(b"x") >= 5_000_000
    assert (b"[DONE]" in said) is stream


def _by_length(connection):
    said = bytearray()
    while b"\r\n\r\n" not in said:
        said += connection.recv(65536)
    head, _, body = bytes(said).partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split()[0])
    while len(body) < length:
        body += connection.recv(2**20)
    return body


def test_a_whole_answer_that_nobody_reads_is_cut_too(start_yard):
    yard = start_yard(old="--itl-ms 0", settings={"client_stall_s": 1}).ready()
    with unread(yard, max_tokens=1, fake_pad=20_000_000) as connection:
        until(lambda: "took nothing of its answer" in yard.said(), "the client to be cut")
        connection.settimeout(20)
        assert read_until_cut(connection) < 20_000_000


def test_a_slow_client_that_reads_on_gets_all_of_it(start_yard):
    """Far behind all the time, and longer than a client may stall: nothing is cut, nothing is lost."""
    yard = start_yard(old="--itl-ms 0", parallel=1, settings={"wedged_after_s": 1, "client_stall_s": 1}).ready()
    with unread(yard, **{**LONG, "max_tokens": 1000}) as connection:
        said = rest_of(connection, pause_s=0.01)
    text = dechunked(said)
    assert text.count(b'"content": " word' + b"x" * PAD + b'"') == 1000
    assert text.endswith(b"data: [DONE]\n\n")
    assert b'"error"' not in text
    assert yard.engine("old")["restarts"] == 0
    assert yard.orders.status()["incidents"] == []


def test_one_that_reads_a_little_gives_way_to_those_who_wait(start_yard):
    yard = start_yard(old="--itl-ms 0", parallel=1, settings={"client_stall_s": 1.5, "wait_s": 60}).ready()
    with unread(yard, **LONG) as connection, yard.http() as http:
        until(lambda: yard.engine("old")["in_flight"] == 1, "the stream on the engine")
        answers = []
        connection.settimeout(1)
        other = threading.Thread(
            target=lambda: answers.append(http.post("/v1/chat/completions", json=CHAT).status_code)
        )
        other.start()
        with contextlib.suppress(OSError):
            while not answers and connection.recv(512):  # it takes something, again and again
                time.sleep(0.05)
        other.join(60)
    assert answers == [200]
    assert yard.engine("old")["restarts"] == 0


def test_a_stale_answer_neither_judges_nor_blocks_the_next_process(start_yard):
    """The engine dies while a client reads nothing: the one after it has all its places, and is judged by its own."""
    yard = start_yard(old="--itl-ms 0", parallel=1, settings={"wedged_after_s": 1}).ready()
    with unread(yard, **LONG) as connection:
        until(lambda: b"word" in connection.recv(2**16, socket.MSG_PEEK), "the answer to reach the client")
        os.kill(yard.engine("old")["pid"], 9)
        until(lambda: yard.engine("old")["restarts"] == 1 and yard.health() == 200, "the engine to be back")
        until_s = time.monotonic() + 4
        while time.monotonic() < until_s:
            assert served(yard) == 200
    assert yard.engine("old")["restarts"] == 1


def test_many_that_read_nothing_fill_a_bounded_buffer(start_yard):
    yard = start_yard(old="--itl-ms 0", parallel=48).ready()
    process = psutil.Process(yard.process.pid)
    before = process.memory_info().rss
    with contextlib.ExitStack() as clients:
        for _ in range(44):  # 44 x 4 MiB are 176; they may keep 64
            clients.enter_context(unread(yard, **LONG))
        until(lambda: yard.engine("old")["in_flight"] == 44, "all of them on the engine")
        sizes = []

        def settled():
            sizes.append(process.memory_info().rss)
            time.sleep(0.5)
            return len(sizes) > 4 and max(sizes[-4:]) - min(sizes[-4:]) < 2**20

        until(settled, "the buffers to be full", deadline_s=60)
        assert served(yard) == 200
        assert 32 < (sizes[-1] - before) / 2**20 < 140
    until(lambda: yard.engine("old")["in_flight"] == 0, "the places to be free")
