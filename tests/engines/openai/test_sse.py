"""Server-sent events: cut, read and written."""

from __future__ import annotations

import pytest

from engines.openai.sse import DONE, DONE_DATA, SseSplitter, payloads, read_event, write_event

STREAM = ': ping\n\ndata: {"a": "日本\u2028"}\n\nevent: error\ndata: 1\ndata:2\n\ndata: [DONE]'.encode()


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_payloads_are_the_same_however_the_stream_is_cut(newline: bytes, size: int) -> None:
    """Every line ending, every size of chunk; comments are left out and the last event needs no blank line."""
    whole = STREAM.replace(b"\n", newline)
    chunks = [whole[start : start + size] for start in range(0, len(whole), size)]
    assert list(payloads(chunks)) == ['{"a": "日本\u2028"}'.encode(), b"1\n2", DONE_DATA]


def test_an_event_is_read_with_its_name() -> None:
    """The name, and the data lines joined."""
    assert read_event(b"event: error\ndata: 1\ndata:2") == (b"error", b"1\n2")
    assert read_event(b": ping") == (b"", b"")


def test_a_written_event_is_read_back() -> None:
    """What `write_event` wrote is one event, with UTF-8 as it is."""
    splitter = SseSplitter()
    assert [read_event(event)[1] for event in splitter.feed(write_event({"a": "é"}) + DONE)] == [
        '{"a":"é"}'.encode(),
        DONE_DATA,
    ]
    assert splitter.rest == b""
