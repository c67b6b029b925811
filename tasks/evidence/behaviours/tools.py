"""Tool calls: offered, chosen, forced, streamed and answered."""

from __future__ import annotations

import json

from engines.units import number_of
from tasks.evidence.behaviours.base import (
    CALL_TOKENS,
    CLOCK,
    WEATHER,
    WEATHER_QUESTION,
    Asker,
    NotApplicable,
    Observation,
    behaviour,
    call,
    failed,
    holds,
    leaks_call,
    passed,
    result,
)
from tasks.evidence.behaviours.caller import Json, user


def call_fault(calls: list[Json], name: str = "get_weather") -> str:
    """What is wrong with the first of `calls`: empty when it names `name` with the arguments of its schema."""
    if not calls:
        return "no tool call"
    function = calls[0].get("function") or {}
    if function.get("name") != name or not calls[0].get("id"):
        return f"name {function.get('name')!r}, id {calls[0].get('id')!r}"
    try:
        arguments = json.loads(function["arguments"])
    except (KeyError, TypeError, ValueError):
        return f"arguments are not JSON text: {function.get('arguments')!r}"
    if not isinstance(arguments, dict) or not isinstance(arguments.get("city"), str):
        return f"arguments lack the required city: {arguments!r}"
    return ""


@behaviour("tools", "tools that are offered are shown to the model", required=True)
def tools_shown(ask: Asker) -> Observation:
    ask.require_tools()
    return passed(f"one tool adds {number_of(ask.tool_growth, 'prompt token')}")


def no_call(text: str) -> Observation:
    """`failed` when `text` is a call that was not parsed; NotApplicable when the model made none."""
    if leaks_call(text):
        return failed(f"the call stayed text: {text!r}")
    raise NotApplicable(f"no call: {text!r}")


@behaviour("tools", "a call the model writes by itself comes as tool_calls, not as text", required=True)
def tool_choice_auto(ask: Asker) -> Observation:
    ask.require_tools()
    reply = ask.calling[1]
    if not reply.tool_calls:
        return no_call(reply.text)
    fault = call_fault(reply.tool_calls)
    return holds(
        not fault and reply.finish == "tool_calls",
        fault or f"{json.dumps(reply.tool_calls[0])[:160]}, finish {reply.finish}",
    )


@behaviour("tools", "a streamed call joins to one call with JSON arguments", required=True)
def tool_call_streamed(ask: Asker) -> Observation:
    ask.require_tools()
    stream = ask.stream(ask.calling[0], tools=[WEATHER, CLOCK], max_tokens=CALL_TOKENS).served()
    if not stream.tool_pieces:
        return no_call(stream.text)
    fault = call_fault(joined_calls(stream.tool_pieces))
    good = not fault and stream.finishes == ["tool_calls"] and not stream.text.strip()
    seen = f"{number_of(len(stream.tool_pieces), 'piece')}, finish {stream.finishes}, text beside it {stream.text!r}"
    return holds(good, f"{fault}; {seen}" if fault else seen)


def joined_calls(pieces: list[Json]) -> list[Json]:
    """The calls that streamed `pieces` add up to, as a client joins them: by index, arguments appended."""
    calls: dict[int, Json] = {}
    for piece in pieces:
        function = piece.get("function") or {}
        whole = calls.setdefault(piece.get("index", 0), {"id": None, "function": {"name": "", "arguments": ""}})
        whole["id"] = piece.get("id") or whole["id"]
        whole["function"]["name"] += function.get("name") or ""
        whole["function"]["arguments"] += function.get("arguments") or ""
    return [calls[index] for index in sorted(calls)]


@behaviour("tools", "tool_choice required yields a call with the arguments of the schema")
def tool_choice_required(ask: Asker) -> Observation:
    return forced_call(ask, "required", "get_weather", tools=[WEATHER])


@behaviour("tools", "a named tool is the one that is called")
def tool_choice_named(ask: Asker) -> Observation:
    named = {"type": "function", "function": {"name": "get_time"}}
    return forced_call(ask, named, "get_time", tools=[WEATHER, CLOCK])


def forced_call(ask: Asker, choice: str | Json, name: str, *, tools: list[Json]) -> Observation:
    """Whether `choice` yields a call of `name` although the question does not ask for it."""
    ask.require_tools()
    reply = ask.chat("Hello! Paris is nice.", tools=tools, tool_choice=choice, max_tokens=CALL_TOKENS)
    fault = call_fault(reply.tool_calls, name)
    return holds(not fault, f"{fault}; text {reply.text!r}" if fault else json.dumps(reply.tool_calls[0])[:160])


@behaviour("tools", "tool_choice none yields text and no call", required=True)
def tool_choice_none(ask: Asker) -> Observation:
    ask.require_tools()
    reply = ask.chat(ask.calling[0], tools=[WEATHER, CLOCK], tool_choice="none", max_tokens=16)
    return holds(
        not reply.tool_calls and bool(reply.text), f"{number_of(len(reply.tool_calls), 'call')}, text {reply.text!r}"
    )


@behaviour("tools", "parallel_tool_calls false yields one call at most")
def one_call_at_a_time(ask: Asker) -> Observation:
    ask.require_tools()
    tools = [WEATHER, CLOCK]
    reply = ask.chat(ask.calling[0], tools=tools, parallel_tool_calls=False, max_tokens=2 * CALL_TOKENS)
    if not reply.tool_calls:
        raise NotApplicable(f"no call: {reply.text!r}")
    return holds(len(reply.tool_calls) == 1, f"{number_of(len(reply.tool_calls), 'call')}")


@behaviour("tools", "a tool's result is accepted and reaches the model", required=True)
def tool_round_trip(ask: Asker) -> Observation:
    long = "rain with strong wind from the north and a cold night ahead"
    sizes = [
        ask.prompt_tokens([user(WEATHER_QUESTION), call("Paris", "call00001"), result(text, "call00001")])
        for text in ("rain", long)
    ]
    grown, more = sizes[1] - sizes[0], len(long.split()) - 1
    return holds(grown >= more, f"{number_of(more, 'more word')} in the result: {grown} more prompt tokens")


@behaviour("tools", "an assistant turn with tool calls and null content is accepted", required=True)
def null_content(ask: Asker) -> Observation:
    turns = [user(WEATHER_QUESTION), call("Paris", "call00001"), result("rain", "call00001"), user("Thanks")]
    reply = ask.chat(turns, max_tokens=4, tools=[WEATHER])
    return holds(bool(reply.served().message), f"answered {reply.text!r}")
