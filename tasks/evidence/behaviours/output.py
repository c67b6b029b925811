"""The form of an answer: JSON by schema, and Unicode."""

from __future__ import annotations

import json
import re

from engines.units import number_of
from tasks.evidence.behaviours.base import Asker, NotApplicable, Observation, behaviour, failed, holds, refusal
from tasks.evidence.behaviours.caller import Json, user

CODES = ["zebra-7", "zebra-8"]
CODE_SCHEMA = {
    "type": "object", "properties": {"code": {"type": "string", "enum": CODES}},
    "required": ["code"], "additionalProperties": False,
}  # fmt: skip


def schema_format(schema: Json) -> Json:
    """`response_format` for answers that follow `schema`."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


def follows(text: str, allowed: list[str]) -> bool:
    """Whether `text` is {"code": one of `allowed`} and nothing else."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict) and list(value) == ["code"] and value["code"] in allowed


@behaviour("json", "json_schema yields JSON that follows the schema, which no model would write unasked", required=True)
def json_schema(ask: Asker) -> Observation:
    reply = ask.chat("Hi", response_format=schema_format(CODE_SCHEMA), max_tokens=32)
    return holds(follows(reply.text, CODES), f"{reply.text!r}, finish {reply.finish}")


@behaviour("json", "a stream under json_schema joins to JSON that follows the schema", required=True)
def json_schema_stream(ask: Asker) -> Observation:
    stream = ask.stream("Hi", response_format=schema_format(CODE_SCHEMA), max_tokens=32).served()
    return holds(follows(stream.text, CODES), f"{stream.text!r}, finish {stream.finishes}")


@behaviour("json", "json_object yields a JSON object")
def json_object(ask: Asker) -> Observation:
    reply = ask.chat("Name a colour as JSON.", response_format={"type": "json_object"}, max_tokens=24)
    try:
        good = isinstance(json.loads(reply.text), dict)
    except ValueError:
        # cut at the limit: then all there is to see is that it set out as an object
        good = reply.finish == "length" and re.match(r'\s*\{\s*("|$)', reply.text) is not None
    return holds(good, f"{reply.text!r}, finish {reply.finish}")


@behaviour("json", "a schema that is none is refused")
def bad_schema(ask: Asker) -> Observation:
    reply = ask.chat("Hi", response_format=schema_format({"type": "no-such-type"}), max_tokens=4)
    return holds(400 <= reply.status < 500, refusal(reply))


WIDE = "日本語🙂é"


@behaviour("unicode", "characters of several bytes survive the pieces of a stream", required=True)
def unicode_stream(ask: Asker) -> Observation:
    schema = CODE_SCHEMA | {"properties": {"code": {"type": "string", "enum": [WIDE]}}}
    stream = ask.stream("Hi", response_format=schema_format(schema), max_tokens=48).served()
    if stream.undecodable:
        return failed(f"not UTF-8: {stream.undecodable[0]!r}")
    if not re.match(r'\s*\{\s*"code"', stream.text):
        raise NotApplicable(f"the engine could not be made to write them: {stream.text!r}")
    return holds(follows(stream.text, [WIDE]), f"{stream.text!r} in {number_of(len(stream.arrivals_s), 'piece')}")


ECHO: list[Json] = [
    user("Repeat: 日🙂"), {"role": "assistant", "content": "日🙂"},
    user("Repeat: 日本🙂"),
]  # fmt: skip


@behaviour("unicode", "a greedy answer in CJK and emoji is the same streamed and complete", required=True)
def unicode_equals_plain(ask: Asker) -> Observation:
    plain, stream = ask.chat(ECHO), ask.stream(ECHO).served()
    # the token limit may fall inside a character: engines then show U+FFFD or nothing
    texts = [text.rstrip("�") for text in (stream.text, plain.text)]
    if texts[1].isascii() and texts[0].isascii():
        raise NotApplicable(f"the model answered in ASCII: {plain.text!r}")
    good = texts[0] == texts[1] and "�" not in texts[0]
    return holds(good, f"streamed {stream.text!r}, complete {plain.text!r}")


@behaviour("unicode", "escaped and plain Unicode in a request are the same prompt", required=True)
def unicode_request(ask: Asker) -> Observation:
    body = ask.body("Translate: naïve 日本 🙂", max_tokens=4)
    replies = [
        ask.post("/v1/chat/completions", json.dumps(body, ensure_ascii=escaped).encode()) for escaped in (True, False)
    ]
    sizes = [reply.used("prompt_tokens") for reply in replies]
    good = sizes[0] == sizes[1] and replies[0].text == replies[1].text
    return holds(good, f"prompt tokens {sizes[0]} and {sizes[1]}, texts {[reply.text for reply in replies]}")
