"""What an engine calls when tools are offered: greedy, streamed as agents ask, each call checked against its schema."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import httpx
from jsonschema.exceptions import SchemaError, best_match
from jsonschema.validators import Draft202012Validator, validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from engines.openai.call import why_no_json
from engines.settings import Endpoint
from tasks.evidence.behaviours.base import Asker, leaks_call
from tasks.evidence.behaviours.caller import UNREADABLE, Caller, Json, Malformed, Refused, unreadable
from tasks.evidence.behaviours.tools import joined_calls
from tasks.evidence.parity.asking import TIMEOUT_S, Evidence, Progress, origin
from tasks.evidence.prompts import Prompt

MAX_TOKENS = 512  # of an answer: room to think, and for a nested call
TEXT_CHUNKS = 48  # a model that has written so much text does not call a tool
TEXT_CHARS = 200  # kept of a text
FAULT_CHARS = 160


def tools_hidden(endpoint: Endpoint) -> str | None:
    """Why no tool reaches the model of this engine; None where they do."""
    with Asker(endpoint, read_timeout_s=TIMEOUT_S) as ask:
        try:
            grown = ask.tool_growth
        except (Refused, Malformed) as error:
            return f"a request with tools is refused ({error})"
    return None if grown > 0 else "the chat template shows no tools to the model"


def measure_tool_calls(
    endpoint: Endpoint,
    prompts: Sequence[Prompt],
    *,
    required: bool = False,
    repeat: bool = False,
    progress: Progress = lambda _: None,
) -> Evidence:
    """The calls in the answer to each prompt; with `required` the API demands one, with `repeat` all are asked twice.

    An answer: id, group, `calls` (name, arguments, and `fault`: "" when valid, None where the schema cannot be read),
    the beginning of its text, whether a call was left in the text, `cut` (its token limit came first) and error.
    """
    started = time.monotonic()
    rounds: list[list[Evidence]] = []
    with Caller(endpoint, read_timeout_s=TIMEOUT_S) as caller:
        for _ in range(1 + repeat):
            rounds.append([])
            for number, prompt in enumerate(prompts, 1):
                rounds[-1].append(_answer(caller, prompt, required))
                progress(f"{endpoint.engine}: tool prompt {number}/{len(prompts)} ({prompt.id})")
    first, *again = rounds
    return origin(endpoint) | {
        "answers": first,
        "again": [one for answers in again for one in answers],
        "seconds": time.monotonic() - started,
    }


def _answer(caller: Caller, prompt: Prompt, required: bool) -> Evidence:
    answer: Evidence = {"id": prompt.id, "group": prompt.group, "prompt": prompt.text[-TEXT_CHARS:], "error": None}
    asked: Json = {**prompt.body, "max_tokens": MAX_TOKENS} | ({"tool_choice": "required"} if required else {})
    messages = asked.pop("messages")
    nothing: Evidence = {"calls": [], "text": "", "leaked": False, "cut": False}
    try:
        stream = caller.stream(messages, leave_after=TEXT_CHUNKS, **asked).served()
        calls = [call["function"] for call in joined_calls(stream.tool_pieces)]
    except (httpx.HTTPError, Refused, Malformed) as error:
        return answer | nothing | {"error": str(error) or repr(error)}
    except UNREADABLE as error:
        return answer | nothing | {"error": unreadable(error)}
    return answer | {
        "calls": [call | {"fault": call_fault(call, prompt.tools or [])} for call in calls],
        "text": stream.text[:TEXT_CHARS],
        "leaked": not calls and leaks_call(stream.text),
        "cut": "length" in stream.finishes and (bool(calls) or not stream.text),
    }


def call_fault(call: Json, tools: Sequence[Json]) -> str | None:
    """What is wrong with a call of one of `tools`: "" when it is valid, None where the tool's schema cannot be read."""
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools if "function" in tool}
    if call["name"] not in schemas:
        return f"no such tool: {call['name']!r}"[:FAULT_CHARS]
    try:
        arguments = json.loads(call["arguments"], parse_constant=_no_number)
    except (TypeError, ValueError, RecursionError) as error:
        return f"arguments are not JSON text: {why_no_json(error)}"[:FAULT_CHARS]
    if not isinstance(arguments, dict):
        return f"arguments are no object: {arguments!r}"[:FAULT_CHARS]
    return schema_fault(arguments, schemas[call["name"]])


def schema_fault(arguments: Any, schema: Any) -> str | None:
    """The first way in which `arguments` break `schema`: "" for none, None where the schema cannot be read.

    Nothing is fetched: a schema that refers to another document cannot be read.
    """
    if not schema:
        return ""
    try:
        kind = validator_for(schema, default=Draft202012Validator)
        kind.check_schema(schema)
        error = best_match(kind(schema, registry=Registry()).iter_errors(arguments))
    except (SchemaError, Unresolvable, RecursionError, re.error, AttributeError, TypeError):
        return None
    return "" if error is None else f"{error.json_path}: {error.message}"[:FAULT_CHARS]


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")
