"""The measuring client: parsing of awkward streams, errors as the wire shows them, and load."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from engines.client.client import client_session, stream_chat
from engines.client.load import measure
from engines.client.read_stream import parse_stream
from engines.client.record import StreamRecord, reconcile
from engines.client.self_test import lateness_ms, reference_server, self_test
from engines.errors import BadInput, EngineExited, NoMeasurement
from engines.settings import Endpoint

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
DONE = b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
MS = 1_000_000


def event(delta: dict[str, Any] | None = None, **fields: Any) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": fields.pop("finish", None)}]
    return b"data: " + json.dumps({"choices": choices, **fields}, ensure_ascii=False).encode() + b"\n\n"


def usage(completion: int, prompt: int = 7, cached: int | None = None) -> dict[str, Any]:
    details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
    return {"prompt_tokens": prompt, "completion_tokens": completion, **details}


def parsed(*chunks: tuple[int, bytes]) -> StreamRecord:
    """The record of a stream sent at 0 whose chunks arrived at the given ms."""
    return parse_stream([(t_ms * MS, data) for t_ms, data in chunks], StreamRecord(sent_ns=0, status=200))


LLAMA_CPP = [
    (10, event({"role": "assistant", "content": None})),
    (20, event({"content": "Hel"})),
    (30, event({"content": "lo"})),
    (50, event({"content": "!"})),
    (51, event({}, finish="stop")),
    (
        52,
        event(
            usage=usage(3, cached=2), timings={"prompt_ms": 19.0, "predicted_ms": 30.0, "predicted_n": 3, "cache_n": 2}
        ),
    ),
    (52, DONE),
]


def test_role_empty_and_usage_chunks_count_for_no_latency() -> None:
    """llama.cpp's role-only, empty and usage chunks lie outside TTFT, ICL and E2E."""
    record = parsed(*LLAMA_CPP)
    assert [e.kind for e in record.events] == ["role", "content", "content", "content", "empty", "usage"]
    assert (record.ttft_ms, record.icl_ms, record.e2e_ms) == (20, [10, 20], 50)
    assert record.tpot_ms == 15
    assert record.decode_tok_s == pytest.approx(1000 / 15)
    assert record.prefill_tok_s == pytest.approx(5 / 0.020)
    assert (record.text, record.finish_reason, record.error_type) == ("Hello!", "stop", None)
    assert record.engine_timings == {"prompt_ms": 19.0, "predicted_ms": 30.0, "predicted_n": 3, "cache_n": 2}
    assert reconcile(record) == []


def test_mistral_rs_puts_everything_into_the_last_content_chunk() -> None:
    """Role with content is content; the final chunk's usage and seconds are read, an infinite one is left out."""
    final = usage(2) | {"total_prompt_time_sec": 0.25, "total_completion_time_sec": float("inf")}
    record = parsed(
        (5, event({"role": "assistant", "content": "a"})),
        (9, event({"role": "assistant", "content": "b"}, finish="length", usage=final)),
        (9, DONE),
    )
    assert [e.kind for e in record.events] == ["content", "content"]
    assert (record.tpot_ms, record.completion_tokens) == (4, 2)
    assert record.engine_timings == {"prompt_ms": 250.0}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_split_anywhere_the_stream_reads_the_same(size: int, newline: bytes) -> None:
    """Cuts inside UTF-8 characters, JSON and line ends lose nothing, whatever the line ending."""
    whole = (event({"content": "grün 🚀"}) + b": ping\n\n" + event({"content": "é"}) + DONE).replace(b"\n", newline)
    pieces = [whole[start : start + size] for start in range(0, len(whole), size)]
    record = parsed(*enumerate(pieces))
    assert (record.text, record.error_type, record.keepalives) == ("grün 🚀é", None, 1)
    assert [e.n_content_chars for e in record.events] == [6, 1]


def test_an_event_has_the_time_of_the_chunk_that_completes_it() -> None:
    """Two events in one chunk share its time; one over three chunks has the last one's."""
    a, b, c = event({"content": "a"}), event({"content": "b"}), event({"content": "ü"})
    cut = c.index("ü".encode()) + 1
    record = parsed((10, a + b), (20, c[:cut]), (30, c[cut:-1]), (40, c[-1:]), (41, DONE))
    assert [e.t_ns // MS for e in record.events] == [10, 10, 40]
    assert sum(e.n_bytes for e in record.events) == len(a + b + c)


def test_reasoning_and_tool_deltas_start_the_clock() -> None:
    """TTFT is the first reasoning delta; streamed tool calls are put together by index."""
    first = {"index": 0, "id": "c1", "function": {"name": "get", "arguments": '{"a"'}}
    record = parsed(
        (1, event({"role": "assistant", "content": ""})),
        (2, event({"reasoning_content": "hm"})),
        (3, event({"tool_calls": [first]})),
        (4, event({"tool_calls": [{"index": 0, "function": {"arguments": ":1}"}}]}, finish="tool_calls")),
        (5, DONE),
    )
    assert record.ttft_ms == 2
    assert [e.kind for e in record.events] == ["role", "reasoning", "tool", "tool"]
    assert record.tool_calls == [{"id": "c1", "name": "get", "arguments": '{"a":1}'}]
    assert (record.reasoning, record.text) == ("hm", "")


def test_tokens_in_the_first_chunk_are_not_decoded() -> None:
    """Where the first chunk says how many tokens it holds, TPOT leaves them out."""
    record = parsed(
        (10, event({"content": "abc"}, usage=usage(3))), (20, event({"content": "d"}, usage=usage(4))), (20, DONE)
    )
    assert record.tpot_ms == 10
    assert reconcile(record) == []


@pytest.mark.parametrize("name", ["ttft_ms", "tpot_ms", "icl_ms", "e2e_ms", "prefill_tok_s", "decode_tok_s"])
def test_an_empty_reply_measures_nothing(name: str) -> None:
    """No output is no measurement, never 0 ms."""
    record = parsed((1, event({"role": "assistant"})), (2, event({}, finish="stop")), (2, DONE))
    with pytest.raises(NoMeasurement):
        getattr(record, name)
    assert record.measured(name) is None


def test_one_token_has_no_tpot() -> None:
    """Below two tokens there is no time per output token."""
    record = parsed((1, event({"content": "a"}, usage=usage(1))), (1, DONE))
    with pytest.raises(NoMeasurement):
        _ = record.tpot_ms
    assert record.ttft_ms == 1


@pytest.mark.parametrize(
    ("ending", "error_type", "says"),
    [
        (b"", "stream_truncated", "without [DONE]"),
        (b'data: {"choices": [{"del', "stream_truncated", "in the middle of"),
        (b"data: {nonsense\n\n" + DONE, "invalid_json", "nonsense"),
        (b"data: [1]\n\n" + DONE, "invalid_json", "an object was expected"),
        (b'data: {"error": {"message": "out of pages"}}\n\n' + DONE, "error_event", "out of pages"),
        (b'event: error\ndata: {"message": "gone"}\n\n', "error_event", "gone"),
        (b"data: [DONE]", None, ""),
    ],
)
def test_how_a_stream_ends_is_told_apart(ending: bytes, error_type: str | None, says: str) -> None:
    """Cut, garbled and reported errors have their own names; a [DONE] without its blank line is an end."""
    record = parsed((1, event({"content": "a"})), (2, ending))
    assert record.error_type == error_type
    assert says in (record.error or "")
    assert record.text == "a"


def test_disagreements_are_findings_with_numbers() -> None:
    """Chunks, usage and engine timing that contradict each other are named, each with both numbers."""
    record = parsed(
        (10, event({"content": "a"})),
        (20, event({"content": "b"}, usage=usage(9), timings={"predicted_n": 5, "predicted_ms": 400.0})),
        (20, DONE),
    )
    found = {f["finding"]: (f["client"], f["engine"]) for f in reconcile(record)}
    assert found == {
        "content_chunks_vs_usage": (2, 9),
        "usage_vs_engine_tokens": (9, 5),
        "client_vs_engine_decode": (10.0, 400.0),
    }


def test_missing_usage_is_a_finding() -> None:
    """A stream that ends well without usage says so."""
    assert [f["finding"] for f in reconcile(parsed((1, event({"content": "a"})), (1, DONE)))] == ["usage_missing"]


def test_a_record_survives_storage() -> None:
    """to_dict is JSON-able and holds every event in columns: gaps in ns, bytes, characters, kinds."""
    record = parsed(*LLAMA_CPP)
    plain = json.loads(json.dumps(record.to_dict()))
    columns = plain.pop("events")
    assert list(itertools.accumulate(columns["gap_ns"])) == [event.t_ns for event in record.events]
    assert columns["bytes"] == [event.n_bytes for event in record.events]
    assert columns["chars"] == [event.n_content_chars for event in record.events]
    assert columns["kinds"] == "rccceu"
    assert plain["usage"] == record.usage
    assert "error" not in plain


# --- on the wire --------------------------------------------------------------------------------------------------


@contextmanager
def server(talk: Callable[[socket.socket], None]) -> Iterator[Endpoint]:
    """An endpoint whose every connection is handed to `talk` once the request's head has come."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                if connection.recv(65536):
                    talk(connection)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        port = listener.getsockname()[1]
        yield Endpoint(base_url=f"http://127.0.0.1:{port}", model_id="m", engine="fake")
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def until_closed(connection: socket.socket) -> None:
    while connection.recv(4096):
        pass


async def ask(endpoint: Endpoint, **options: Any) -> StreamRecord:
    async with client_session() as session:
        return await stream_chat(session, endpoint, BODY, **options)


async def test_a_refused_connection_is_connect() -> None:
    """Nobody listens: an error in the record, no exception."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    record = await ask(Endpoint(base_url=f"http://127.0.0.1:{port}", model_id="m", engine="fake"))
    assert (record.error_type, record.status) == ("connect", None)


@pytest.mark.parametrize(
    ("status", "body", "error_type", "error"),
    [
        (500, b'{"error":{"code":500,"message":"slot lost","type":"server_error"}}', "http_5xx", "slot lost"),
        (422, b'{"message":"model not found"}', "http_4xx", "model not found"),
        (404, b'{"detail":"Not Found"}', "http_4xx", "Not Found"),
        (503, b"busy", "http_5xx", "busy"),
    ],
)
async def test_an_http_error_keeps_the_engines_words(status: int, body: bytes, error_type: str, error: str) -> None:
    """Each engine's error body is understood; plain text is kept."""
    reply = b"HTTP/1.1 %d X\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (status, len(body)) + body
    with server(lambda connection: connection.sendall(reply)) as endpoint:
        record = await ask(endpoint)
    assert (record.status, record.error_type, record.error) == (status, error_type, error)


async def test_silence_is_a_hang_even_with_keepalives() -> None:
    """One token, then nothing but comments: a hang, with the token kept."""

    def talk(connection: socket.socket) -> None:
        connection.sendall(HEAD + event({"content": "a"}))
        connection.settimeout(0.02)
        while True:
            try:
                if not connection.recv(4096):
                    return
            except TimeoutError:
                connection.sendall(b": keep-alive\n\n")

    with server(talk) as endpoint:
        record = await ask(endpoint, stall_s=0.3)
    assert (record.error_type, record.text) == ("hang", "a")
    assert record.keepalives > 0


async def test_silence_before_the_reply_is_a_hang() -> None:
    """A server that accepts and says nothing is not waited for without end."""
    with server(until_closed) as endpoint:
        record = await ask(endpoint, stall_s=0.2)
    assert (record.error_type, record.status) == ("hang", None)


async def test_no_patience_at_all_is_an_error_in_the_record() -> None:
    """Not one of the watch that was never set."""
    with server(until_closed) as endpoint:
        record = await ask(endpoint, stall_s=0.0)
    assert (record.error_type, record.status) == ("hang", None)


async def test_a_cut_connection_is_a_truncated_stream() -> None:
    """An engine that dies in the middle leaves what it had sent, and stream_truncated."""
    chunked = HEAD.replace(b"Connection", b"Transfer-Encoding: chunked\r\nConnection")
    piece = event({"content": "a"})
    with server(lambda c: c.sendall(chunked + b"%x\r\n" % len(piece) + piece + b"\r\n")) as endpoint:
        record = await ask(endpoint)
    assert (record.error_type, record.text) == ("stream_truncated", "a")


async def test_cancel_closes_the_connection_and_is_no_error() -> None:
    """After the asked number of events the server sees the connection closed."""
    closed = threading.Event()

    def talk(connection: socket.socket) -> None:
        connection.sendall(HEAD + event({"content": "a"}) + event({"content": "b"}))
        until_closed(connection)
        closed.set()

    with server(talk) as endpoint:
        record = await ask(endpoint, cancel_after_chunks=2)
        assert closed.wait(5)
    assert (record.cancelled, record.error_type, record.text) == (True, None, "ab")


def test_the_request_asks_for_usage_and_carries_model_and_key() -> None:
    """What the caller set stays; streaming, usage, model and key are added."""
    seen: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                seen.append(connection.recv(65536))
                connection.sendall(HEAD + event({"content": "a"}) + DONE)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        endpoint = Endpoint.model_validate({"base_url": url, "model_id": "m", "engine": "fake", "api_key": "s3cret"})
        [record] = measure(endpoint, [BODY | {"seed": 1}])
        thread.join(5)
    head, _, body = seen[0].partition(b"\r\n\r\n")
    assert b"Authorization: Bearer s3cret" in head
    sent = json.loads(body)
    assert (sent["model"], sent["seed"], sent["stream"]) == ("m", 1, True)
    assert sent["stream_options"] == {"include_usage": True}
    assert record.ok


# --- load and self-test -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference() -> Iterator[Endpoint]:
    with reference_server(ttft_ms=5, itl_ms=2, tokens=4) as endpoint:
        yield endpoint


def test_closed_loop_returns_records_in_the_order_of_bodies(reference: Endpoint) -> None:
    """Six bodies of different length, three at a time: each record is at its body's place, with its tokens."""
    lengths = [6, 2, 5, 3, 4, 2]
    records = measure(reference, [BODY | {"max_tokens": n} for n in lengths], concurrency=3)
    assert [record.completion_tokens for record in records] == lengths
    wrong = [finding for record in records for finding in reconcile(record) if finding["unit"] != "ms"]
    assert wrong == []  # how late a chunk is, a busy machine decides
    assert all(late > 0 for record in records for late in lateness_ms(record))


def test_impossible_load_is_refused(reference: Endpoint) -> None:
    """A bad number is named, not tried."""
    with pytest.raises(BadInput, match="concurrency"):
        measure(reference, [BODY], concurrency=0)


def test_no_bodies_are_no_records(reference: Endpoint) -> None:
    """Nothing to send is nothing sent."""
    assert measure(reference, []) == []


def test_the_self_test_gives_a_whole_budget() -> None:
    """Every field is measured, errors are positive, and the verdict has its reason."""
    budget = self_test(streams=2, rounds=2, ttft_ms=20, itl_ms=5, tokens=8)
    assert (budget["n_requests"], budget["n_failed"], budget["n_chunks"]) == (4, 0, 32)
    p50, p99 = budget["lateness_p50_ms"], budget["lateness_p99_ms"]
    assert p50 is not None
    assert p99 is not None
    assert 0 < p50 <= p99
    assert all(budget[name] is not None for name in budget)  # type: ignore[literal-required]
    assert budget["why"]


def test_the_self_test_fails_with_a_reason() -> None:
    """A limit that no machine meets is reported with both numbers."""
    budget = self_test(streams=1, rounds=1, ttft_ms=5, itl_ms=2, tokens=4, max_lateness_p99_ms=1e-6)
    assert not budget["passed"]
    assert "lateness p99 is" in budget["why"]


def test_a_server_that_cannot_start_says_why() -> None:
    """The child's last words are in the error."""
    with pytest.raises(EngineExited, match="invalid float value"), reference_server(ttft_ms="soon"):  # type: ignore[arg-type]
        pass


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_the_server_dies_with_a_killed_parent() -> None:
    """After SIGKILL of the process that started it, the server's output closes."""
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys, time\n"
            "server = [sys.executable, '-m', 'engines.client.reference_server']\n"
            "child = subprocess.Popen(server, stdin=subprocess.PIPE)\n"
            "time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert parent.stdout is not None
    assert parent.stdout.readline().startswith(b"listening ")
    parent.send_signal(signal.SIGKILL)
    parent.wait(10)
    assert parent.stdout.read() == b""  # the child held the other end: it returns only once that one is gone
    parent.stdout.close()


@pytest.mark.skipif(os.name != "posix", reason="needs SIGINT")
def test_ctrl_c_during_a_measurement_is_a_keyboard_interrupt() -> None:
    """SIGINT in the middle of a stream ends measure, with the connections closed, and the child with it."""
    script = (
        "import os, signal, sys, threading\n"
        "from engines.client.load import measure\n"
        "from engines.client.self_test import reference_server\n"
        "with reference_server(ttft_ms=30000) as endpoint:\n"
        "    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    try:\n"
        "        measure(endpoint, [{'messages': []}] * 2, concurrency=2)\n"
        "    except KeyboardInterrupt:\n"
        "        print('interrupted')\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.stdout.strip(), done.stderr) == ("interrupted", "")
