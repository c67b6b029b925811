"""Answers of two engines: read out of what they sent, and compared."""

import json
from typing import Any

import pytest

from engines.yard.answer import compare, first_difference, is_sampled, no_answer, read_answer


def an_answer(text: str = "It is Paris.", **fields: Any) -> dict[str, Any]:
    return {**no_answer(""), "error": None, "text": text, "finish_reason": "stop"} | fields


def stream_of(*bodies: dict[str, Any]) -> bytes:
    return b"".join(b"data: " + json.dumps(body).encode() + b"\n\n" for body in bodies) + b"data: [DONE]\n\n"


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


def test_stream_and_whole_read_alike():
    """The same answer in pieces and in one, its tool call spelled in two ways."""
    usage = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 2}}
    pieces = [{"index": 0, "function": {"name": "read", "arguments": '{"b":1,'}}]
    more = [{"index": 0, "function": {"arguments": ' "a": 2}'}}]
    streamed = stream_of(
        delta(role="assistant", content=None),
        delta(reasoning_content="Hm."),
        delta(content="It is "),
        delta(content="Paris.", tool_calls=pieces),
        delta(tool_calls=more),
        delta("tool_calls"),
        {"choices": [], "usage": usage},
    )
    call = {"function": {"name": "read", "arguments": '{"a": 2, "b": 1}'}}
    message = {"role": "assistant", "content": "It is Paris.", "reasoning_content": "Hm.", "tool_calls": [call]}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    whole = json.dumps({"choices": [choice], "usage": usage}).encode()
    read = read_answer(b": waiting for the model\n\n" + streamed, stream=True)
    assert read == read_answer(whole, stream=False)
    assert (read["text"], read["reasoning"], read["cached_tokens"]) == ("It is Paris.", "Hm.", 2)


@pytest.mark.parametrize(
    ("data", "stream", "status", "error"),
    [
        (b'{"error": {"message": "too long"}}', False, 400, "too long"),
        (b"Bad Gateway", False, 502, "HTTP 502"),
        (stream_of(delta(content="It"), {"error": {"message": "died"}}), True, 200, "died"),
        (b"", True, 200, "no answer could be read"),
        (b"[1, 2]", False, 200, "no answer could be read"),
        (b'{"choices": "none"}', False, 200, "no answer could be read"),
        (b'{"choices": []}', False, 200, "no answer could be read"),
        (stream_of({}), True, 200, "no answer could be read"),
        (stream_of({"choices": [], "usage": {"prompt_tokens": 9}}), True, 200, "no answer could be read"),
        (b'{"choices": [{"message": {"content": "It"}}]}', False, 500, "HTTP 500"),
    ],
)
def test_what_is_no_answer(data, stream, status, error):
    assert read_answer(data, stream=stream, status=status)["error"] == error


def test_compare_names_what_differs():
    ours = an_answer()
    assert compare(ours, an_answer(), sampled=False) == {"outcomes": ["copied", "exact"], "diverged_at": None}
    other = compare(ours, an_answer("It is Rome.", finish_reason="length"), sampled=False)
    assert other == {"outcomes": ["copied", "different", "finish_differs"], "diverged_at": 6}
    called = compare(ours, an_answer(tool_calls=[{"name": "f", "arguments": "{}"}]), sampled=False)
    assert called["outcomes"] == ["copied", "different", "tools_differ"]
    assert compare(ours, an_answer(""), sampled=True)["outcomes"] == ["copied", "empty", "sampled"]
    assert compare(an_answer(""), an_answer(""), sampled=False)["outcomes"] == ["copied", "exact"]
    assert compare(ours, no_answer("HTTP 500"), sampled=False)["outcomes"] == ["failed"]


def test_first_difference_is_where_they_part():
    assert first_difference("abc", "abc") is None
    assert first_difference("abc", "abd") == 2
    assert first_difference("abc", "abcd") == 3
    assert first_difference("", "a") == 0


def test_only_the_likeliest_tokens_are_not_drawn():
    assert not is_sampled({"temperature": 0})
    assert not is_sampled({"temperature": 0.7, "top_k": 1})
    assert is_sampled({"temperature": 0.7})
    assert is_sampled({})
