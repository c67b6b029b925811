"""Streams on their way to a client: what passes as it came must be what the parser would have made of it."""

import asyncio
from types import SimpleNamespace

import httptools
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.openai.call import Call
from engines.openai.dialect import Dialect
from engines.openai.paths import CHAT
from engines.yard.engine.connection import Gone
from engines.yard.engine.http_answer import HttpAnswer
from engines.yard.engine.in_flight import InFlight
from engines.yard.ports.http_request import Request
from engines.yard.ports.reply import ClientReply
from engines.yard.ports.stream import PassedStream
from engines.yard.ports.unread import SOME_BYTES, Unread

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
TOKEN = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"prompt_tokens_details":{"cached_tokens":3}}}\n\n'
DONE = b"data: [DONE]\n\n"
EVENTS = (
    TOKEN,
    b'data: {"choices":[{"delta":{"role":"assistant","content":null}}]}\n\n',
    b'data: {"choices":[{"delta":{"content":"\\r\\n0\\r\\n\\r\\n"}}]}\n\n',
    b'data: {"error":{"message":"no room","code":500}}\n\n',
    b'error: {"message":"no room"}\n\n',
    b": keep-alive\n\n",
    b"event: ping\n" + TOKEN,
    b'data: {"long":"' + b"x" * 5000 + b'"}\n\n',
    USAGE,
)
WRITTEN = ("%x\r\n", "%X\r\n", "00%x\r\n", "%x;name=value\r\n")  # the line before a chunk


class Client:
    """What is written to a client, which is behind each second time that it is asked where it `lags`."""

    def __init__(self, *, lags):
        self.written, self.lags, self.asked = b"", lags, 0

    def write(self, data):
        self.written += data

    def is_closing(self):
        return False

    def get_write_buffer_size(self):
        self.asked += 1
        return SOME_BYTES + 1 if self.lags and self.asked % 2 else 0

    def resume_reading(self):
        pass


class Body:
    def __init__(self):
        self.data = b""

    def on_body(self, data):
        self.data += data


async def passed(reads, *, spliced, lags=False):
    """All that is known of a stream when it is over, and the number of its chunks that passed as they came."""
    client, gaps, ended, count = Client(lags=lags), [], [], 0
    request = Request(client, None, lambda _: {})
    request.describe("POST", CHAT, "1.1", keeps=True)
    reply = ClientReply(request, Call(CHAT, b"{}", {"stream": True}), Unread())
    running = InFlight(1, None, gaps.append)
    stream = PassedStream(running, Dialect(reply.call, "m"), reply)
    splice = stream._splice

    def counted(chunk, at):
        nonlocal count
        took = spliced and splice(chunk, at)
        count += took
        return took

    stream._splice = counted
    answer = HttpAnswer(SimpleNamespace(pause_reading=lambda: None, resume_reading=lambda: None), without_body=False)
    answer.feed(HEAD)
    passing = asyncio.ensure_future(stream.pass_on(answer))
    await asyncio.sleep(0)
    outcome = ""
    try:
        for read in reads:
            answer.feed(read)
            ended.append(reply.ended)
    except httptools.HttpParserError as error:
        answer.lose(error)
    answer.lose(None)
    try:
        outcome = str(await passing)
    except Gone as gone:
        outcome = f"gone: {gone}"
    except ConnectionError as error:
        outcome = f"broken: {error}"
    parser = httptools.HttpResponseParser(body := Body())
    parser.feed_data(client.written)
    known = (outcome, body.data, ended, reply.error, running.failure, running.chunks, len(gaps), running.cached)
    return known, count


@st.composite
def streams(draw):
    """Reads of a stream: events cut into chunks, some of them lost, chunks cut where they could be taken for others."""
    reads = []
    for event in [*draw(st.lists(st.sampled_from(EVENTS), max_size=12)), *[DONE] * draw(st.booleans())]:
        parts, how = [event], draw(st.sampled_from(["whole", "whole", "cut", "short", "nested", "late", "anywhere"]))
        at = draw(st.integers(1, len(event) - 1))
        if how == "cut":
            parts = [event[:at], event[at:]]
        elif how == "short":
            parts = [event[:at]]
        chunks = [(draw(st.sampled_from(WRITTEN)) % len(part)).encode() + part + b"\r\n" for part in parts]
        whole = b"".join(chunks)
        if how == "nested":  # a chunk in the content of another
            chunks = [b"%x\r\n" % (2 * len(whole)), whole, whole, b"\r\n"]
        elif how == "late":  # the line before it began in the read before
            inner = b"%x\r\n%b\r\n" % (len(event), event)
            size = int(f"1{len(event):x}", 16)
            chunks = [b"1", inner, bytes(size - len(event) - 2) + b"\r\n"]
        elif how == "anywhere":
            at = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=4)))
            chunks = [whole[one:other] for one, other in zip([0, *at], [*at, len(whole)], strict=True)]
        reads += filter(None, chunks)
    return reads + [b"0\r\n\r\n"] * draw(st.booleans())


@settings(max_examples=400, deadline=None)
@given(streams(), st.booleans())
def test_what_passes_as_it_came_is_what_the_parser_makes_of_it(reads, lags):
    async def both():
        return [(await passed(reads, spliced=spliced, lags=lags))[0] for spliced in (False, True)]

    parsed, spliced = asyncio.run(both())
    assert spliced == parsed


def test_tokens_pass_as_they_came():
    """All but the first, whose content tells that the answer has begun, and the end."""
    reads = [b"%x\r\n%b\r\n" % (len(event), event) for event in [TOKEN] * 10 + [DONE]] + [b"0\r\n\r\n"]
    known, count = asyncio.run(passed(reads, spliced=True))
    assert known[:3] == ("True", TOKEN * 10 + DONE, [False] * 10 + [True] * 2)
    assert count == 9
