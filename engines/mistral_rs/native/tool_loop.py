"""The tool loop: run the Python functions that a model calls, and ask again, until it answers in text."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import inspect
import json
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from engines.mistral_rs.native.engine import Native
from engines.mistral_rs.native.requests import Json
from engines.units import figure

Chat = Callable[[Json], Awaitable[Json]]  # the body of a chat completion in, OpenAI's response body out
Tools = Mapping[str, "Tool"]
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}


@dataclass(frozen=True)
class Tool:
    """A function that the model may call, with the JSON schema of its keyword arguments; sync ones run in a thread."""

    call: Callable[..., Any]
    parameters: Json = field(default_factory=lambda: {"type": "object", "properties": {}})
    description: str = ""


@dataclass(frozen=True, kw_only=True)
class ToolLoopResult:
    """How a loop ended, with all messages until then and the answers of the model in them as `rounds`.

    `ended`: "answer"; "length", an answer that was cut off; "rounds" or "seconds", the limit that was reached; "error",
    the chat itself failed with `error`. There is an `answer` in the first two cases only.
    """

    messages: list[Json]
    rounds: int
    ended: Literal["answer", "length", "rounds", "seconds", "error"]
    answer: str | None = None
    error: Exception | None = None


def chat_of(native: Native) -> Chat:
    async def chat(body: Json) -> Json:
        reply = await native.ask("POST", "/v1/chat/completions", body)
        assert isinstance(reply.content, dict)
        return reply.content

    return chat


async def run_tools(
    chat: Chat,
    messages: list[Json],
    tools: Tools,
    *,
    request: Mapping[str, Any] | None = None,
    max_rounds: int = 8,
    call_s: float = 30.0,
    total_s: float = 300.0,
) -> ToolLoopResult:
    """Continue *messages* with a model that may call *tools*; what a tool or the chat raises is part of the result.

    Each answer of the model is a round, and its calls run at the same time, each for at most *call_s*. What is wrong
    with a call becomes the call's result for the model. *request*: further parameters; a forcing `tool_choice` holds
    for the first round. A thread that is late is left alone, for nothing can end it.
    """
    history, deadline = [*messages], time.monotonic() + total_s
    functions = [{"name": name, "description": t.description, "parameters": t.parameters} for name, t in tools.items()]
    offered = [{"type": "function", "function": function} for function in functions]
    body: Json = {**(request or {}), "stream": False, "tools": offered}
    for rounds in range(max_rounds):
        limit = asyncio.timeout(deadline - time.monotonic())
        try:
            async with limit:
                choice = (await chat({**body, "messages": [*history]}))["choices"][0]
            message, finish = choice["message"], choice.get("finish_reason")
            asked = [(call.get("id") or "", call["function"]) for call in message.get("tool_calls") or []]
            calls = [(call_id, str(one.get("name")), one.get("arguments") or {}) for call_id, one in asked]
        except Exception as error:
            if limit.expired():
                return ToolLoopResult(messages=history, rounds=rounds, ended="seconds")
            return ToolLoopResult(messages=history, rounds=rounds, ended="error", error=error)
        history.append(message)
        if not calls and finish != "tool_calls":
            ended: Literal["length", "answer"] = "length" if finish == "length" else "answer"
            return ToolLoopResult(messages=history, rounds=rounds + 1, ended=ended, answer=message.get("content") or "")
        limit_s = max(0.0, min(call_s, deadline - time.monotonic()))
        results = await asyncio.gather(*(_result(name, given, tools, limit_s) for _, name, given in calls))
        for (call_id, *_), result in zip(calls, results, strict=True):
            history.append({"role": "tool", "tool_call_id": call_id, "content": result})
        if not calls:  # mistral.rs drops a call of a tool that there is not, and reports only that there was one
            history.append({"role": "user", "content": _unknown("such tool", tools)})
        if body.get("tool_choice") not in (None, "none"):
            body["tool_choice"] = "auto"
        if time.monotonic() >= deadline:
            return ToolLoopResult(messages=history, rounds=rounds + 1, ended="seconds")
    return ToolLoopResult(messages=history, rounds=max_rounds, ended="rounds")


def _unknown(name: str, tools: Tools) -> str:
    return f"error: there is no {name}; the tools are: {', '.join(tools) or 'none'}"


async def _result(name: str, arguments: Any, tools: Tools, limit_s: float) -> str:
    """The result of one call, as text: the value, as JSON unless it is a string, or an error."""
    if name not in tools:
        return _unknown(f"tool {name!r}", tools)
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError) as error:
        return f"error: the arguments of {name} are no JSON: {error}"
    wrong = why_not(arguments, tools[name].parameters)
    if wrong:
        return f"error: the arguments of {name}: {wrong}"
    limit = asyncio.timeout(limit_s)
    try:
        async with limit:
            value = await _called(tools[name].call, arguments)
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except Exception as error:
        if limit.expired():
            return f"error: {name} did not end within {figure(limit_s)} s"
        return f"error: {name} failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def why_not(arguments: Any, schema: Json) -> str | None:
    """Why *arguments* do not fit: no object, a required name missing, a value of another type; None if they fit."""
    if not isinstance(arguments, dict):
        return f"must be an object, not {json.dumps(arguments)}"
    missing = [f"{name} is missing" for name in schema.get("required", []) if name not in arguments]
    kinds = {name: part.get("type") for name, part in schema.get("properties", {}).items()}
    wrong = [
        f"{name} must be of type {kinds[name]}, not {json.dumps(value)}"
        for name, value in arguments.items()
        if kinds.get(name) and not _fits(value, kinds[name])
    ]
    return "; ".join(missing + wrong) or None


def _fits(value: Any, kinds: Any) -> bool:
    allowed = [kinds] if isinstance(kinds, str) else kinds
    if isinstance(value, bool):
        return "boolean" in allowed
    return any(isinstance(value, TYPES.get(kind, ())) for kind in allowed)


async def _called(function: Callable[..., Any], arguments: Json) -> Any:
    """What the function returns. A thread of its own, none of the loop's few: one that hangs holds up nobody."""
    if inspect.iscoroutinefunction(function):
        return await function(**arguments)
    context, done = contextvars.copy_context(), concurrent.futures.Future[Any]()
    done.set_running_or_notify_cancel()

    def work() -> None:
        try:
            done.set_result(context.run(function, **arguments))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, daemon=True, name="tool").start()
    value = await asyncio.wrap_future(done)
    return await value if inspect.isawaitable(value) else value
