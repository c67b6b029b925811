"""Two engines' answers to one chat request: read out of what they sent, and compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from engines.client.read_stream import error_text, parse_stream
from engines.client.record import OUTPUT_KINDS, StreamRecord
from engines.openai.sse import write_event

ChatAnswer = dict[str, Any]
SHOWN_CHARACTERS = 32_768


def is_sampled(body: Mapping[str, Any]) -> bool:
    """True unless the request asks for the likeliest token each time."""
    return body.get("temperature") != 0 and body.get("top_k") != 1


def compare(incumbent: ChatAnswer, candidate: ChatAnswer, *, sampled: bool) -> dict[str, Any]:
    """The `outcomes` to count for a pair, and the character at which the texts part (None where equal or not compared).

    `failed` or `copied`; of the copied `empty` where only the candidate's has no content; then `sampled`, or `exact` or
    `different`, with `finish_differs` and `tools_differ` beside it.
    """
    if candidate["error"]:
        return {"outcomes": ["failed"], "diverged_at": None}
    outcomes = ["copied"]
    if _is_empty(candidate) and not _is_empty(incumbent):
        outcomes.append("empty")
    if sampled:
        return {"outcomes": [*outcomes, "sampled"], "diverged_at": None}
    at = first_difference(_shown(incumbent), _shown(candidate))
    tools_differ = incumbent["tool_calls"] != candidate["tool_calls"]
    outcomes.append("exact" if at is None and not tools_differ else "different")
    outcomes += ["tools_differ"] if tools_differ else []
    outcomes += ["finish_differs"] if incumbent["finish_reason"] != candidate["finish_reason"] else []
    return {"outcomes": outcomes, "diverged_at": at}


def first_difference(one: str, other: str) -> int | None:
    """The index of the first character that differs, or at which one of them ends; None where they are equal."""
    if one == other:
        return None
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def read_answer(data: bytes, *, stream: bool, status: int = 200) -> ChatAnswer:
    """A chat answer as the parity check keeps it (without logprobs), out of what an engine sent.

    Arguments of tool calls are brought to one spelling, where they are JSON.
    """
    if status >= 400:
        return no_answer(_error_of(data) or f"HTTP {status}")
    try:
        events = data
        if not stream:  # an answer in one piece as the stream that would bring it
            body = json.loads(data)
            first = body["choices"][0]
            events = write_event({**body, "choices": [{**first, "delta": first["message"]}]})
        record = parse_stream([(0, events)], StreamRecord(0))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return no_answer(_error_of(data) or "no answer could be read")
    if record.error_type == "error_event":
        return no_answer(str(record.error))
    if record.finish_reason is None and not any(event.kind in ("role", *OUTPUT_KINDS) for event in record.events):
        return no_answer("no answer could be read")
    usage = record.usage or {}
    return no_answer(None) | {
        "text": (record.text or "")[:SHOWN_CHARACTERS],
        "reasoning": (record.reasoning or "")[:SHOWN_CHARACTERS],
        "tool_calls": [
            {"name": call["name"], "arguments": _one_spelling(call["arguments"])} for call in record.tool_calls
        ],
        "finish_reason": record.finish_reason,
        **{name: usage.get(name) for name in ("prompt_tokens", "completion_tokens", "cached_tokens")},
    }


def no_answer(error: str | None) -> ChatAnswer:
    nothing = dict.fromkeys(("finish_reason", "prompt_tokens", "completion_tokens", "cached_tokens"))
    texts = {"id": "", "prompt": "", "text": "", "reasoning": ""}
    return {**texts, "tool_calls": [], **nothing, "positions": [], "error": error}


def size_of(answer: ChatAnswer) -> int:
    return len(answer["text"]) + len(answer["reasoning"]) + 1024


def _error_of(data: bytes) -> str:
    try:
        body = json.loads(data)
        return error_text(body) if "error" in body else ""
    except (ValueError, TypeError, RecursionError):
        return ""


def _one_spelling(arguments: str) -> str:
    """JSON with sorted keys; as it came where it is none."""
    try:
        return json.dumps(json.loads(arguments), sort_keys=True)
    except (ValueError, RecursionError):
        return arguments


def _shown(answer: ChatAnswer) -> str:
    return f"{answer['reasoning']}\0{answer['text']}" if answer["reasoning"] else str(answer["text"])


def _is_empty(answer: ChatAnswer) -> bool:
    return not (answer["text"] or answer["reasoning"] or answer["tool_calls"])
