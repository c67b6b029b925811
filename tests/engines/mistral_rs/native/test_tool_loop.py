"""The tool loop with a scripted chat: what the model is told, what runs, and how a loop ends."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from engines.mistral_rs.native.requests import ApiError, Json
from engines.mistral_rs.native.tool_loop import Tool, ToolLoopResult, run_tools, why_not

ASKED = [{"role": "user", "content": "hi"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def calls(*wanted: tuple[str, Any]) -> Json:
    """An answer that calls these tools with these arguments, as text or as JSON."""
    made = [
        {
            "id": f"call_{at}",
            "type": "function",
            "function": {"name": name, "arguments": given if isinstance(given, str) else json.dumps(given)},
        }
        for at, (name, given) in enumerate(wanted)
    ]
    message = {"role": "assistant", "content": None, "tool_calls": made}
    return {"choices": [{"message": message, "finish_reason": "tool_calls"}]}


def says(text: str, finish: str = "stop") -> Json:
    """An answer in text."""
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]}


def scripted(*answers: Json | Exception) -> tuple[Callable[[Json], Awaitable[Json]], list[Json]]:
    """A chat that gives these answers, then its last one for ever; and the bodies that it has seen."""
    seen: list[Json] = []

    async def chat(body: Json) -> Json:
        seen.append(body)
        answer = answers[min(len(seen), len(answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return chat, seen


def results(outcome: ToolLoopResult) -> list[str]:
    """What the model was told of its calls."""
    return [message["content"] for message in outcome.messages if message["role"] == "tool"]


async def test_a_call_runs_and_its_result_leads_to_an_answer() -> None:
    """Two rounds; the transcript has every message in order, and what the caller passed in stays as it was."""
    chat, seen = scripted(calls(("weather", {"city": "Oslo"})), says("It rains."))
    tools = {"weather": Tool(lambda city: {"in": city, "sky": "rain"}, CITY, "The weather.")}
    outcome = await run_tools(chat, ASKED, tools, request={"model": "m", "stream": True})
    assert (outcome.answer, outcome.rounds, outcome.ended) == ("It rains.", 2, "answer")
    assert [message["role"] for message in outcome.messages] == ["user", "assistant", "tool", "assistant"]
    result = {"role": "tool", "tool_call_id": "call_0", "content": '{"in": "Oslo", "sky": "rain"}'}
    assert seen[1]["messages"] == outcome.messages[:3] == [*ASKED, outcome.messages[1], result]
    function = {"name": "weather", "description": "The weather.", "parameters": CITY}
    assert seen[0] == {
        "model": "m",
        "stream": False,
        "messages": ASKED,
        "tools": [{"type": "function", "function": function}],
    }
    assert len(ASKED) == 1


async def test_all_calls_of_one_answer_run_at_the_same_time() -> None:
    """A sync one in a thread and an async one wait for each other; the results keep the order of the calls."""
    meeting = threading.Event()
    met = asyncio.Event()
    loop = asyncio.get_running_loop()

    def sync() -> str:
        loop.call_soon_threadsafe(met.set)
        assert meeting.wait(30)
        return "sync"

    async def is_async() -> str:
        await met.wait()
        meeting.set()
        return "async"

    chat, _ = scripted(calls(("sync", ""), ("is_async", {})), says("done"))
    outcome = await run_tools(chat, ASKED, {"sync": Tool(sync), "is_async": Tool(is_async)})
    assert results(outcome) == ["sync", "async"]


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("nosuch", {}, "error: there is no tool 'nosuch'; the tools are: weather"),
        ("weather", '{"city":', "error: the arguments of weather are no JSON"),
        ("weather", "[1]", "must be an object, not [1]"),
        ("weather", {}, "city is missing"),
        ("weather", {"city": 5}, "city must be of type string, not 5"),
        ("weather", {"city": "a", "other": 1}, "error: weather failed: TypeError"),
    ],
)
async def test_what_is_wrong_with_a_call_is_told_to_the_model(name: str, arguments: Any, told: str) -> None:
    """It counts as a round, and the model may try again."""
    chat, _ = scripted(calls((name, arguments)), calls(("weather", {"city": "Oslo"})), says("rain"))
    outcome = await run_tools(chat, ASKED, {"weather": Tool(lambda city: f"rain in {city}", CITY)})
    error, result = results(outcome)
    assert told in error
    assert result == "rain in Oslo"
    assert (outcome.answer, outcome.rounds) == ("rain", 3)


async def test_a_call_that_the_engine_dropped_is_told_of_without_an_id() -> None:
    """Finish "tool_calls" and no call: there is none to give a result to, so the user says it."""
    chat, _ = scripted(says("", "tool_calls"), says("sorry"))
    outcome = await run_tools(chat, ASKED, {"weather": Tool(str)})
    assert outcome.messages[2] == {"role": "user", "content": "error: there is no such tool; the tools are: weather"}
    assert outcome.answer == "sorry"


@pytest.mark.parametrize(
    ("value", "kind", "fits"),
    [
        (1, "integer", True),
        (True, "integer", False),
        (1.5, "integer", False),
        (1, "number", True),
        (True, ["boolean", "null"], True),
        (None, ["boolean", "null"], True),
        ("1", "number", False),
        ({}, "object", True),
        ([], "object", False),
        (1, None, True),
    ],
)
def test_a_value_is_of_its_json_type(value: Any, kind: Any, fits: bool) -> None:
    """True is no number, and a schema without a type takes everything."""
    wrong = why_not({"x": value}, {"properties": {"x": {"type": kind} if kind else {}}})
    assert (wrong is None) is fits


async def test_a_tool_that_raises_is_told_of_by_its_first_line() -> None:
    """Sync or async; the other calls are not touched."""

    async def is_async() -> str:
        raise KeyError("lost")

    def sync() -> str:
        raise ValueError("first line\nsecond line")

    tools = {"sync": Tool(sync), "is_async": Tool(is_async), "good": Tool(lambda: 1)}
    chat, _ = scripted(calls(("sync", {}), ("is_async", {}), ("good", {})), says("well"))
    assert results(await run_tools(chat, ASKED, tools)) == [
        "error: sync failed: ValueError: first line",
        "error: is_async failed: KeyError: 'lost'",
        "1",
    ]


async def test_a_late_call_is_left_and_told_of() -> None:
    """A thread that hangs, or a coroutine that waits, costs no more than its time; the loop goes on."""
    release = threading.Event()

    async def waits() -> None:
        await asyncio.Event().wait()

    chat, _ = scripted(calls(("hangs", {}), ("waits", {})), says("on"))
    outcome = await run_tools(chat, ASKED, {"hangs": Tool(release.wait), "waits": Tool(waits)}, call_s=0.05)
    release.set()
    assert results(outcome) == ["error: hangs did not end within 0.05 s", "error: waits did not end within 0.05 s"]
    assert outcome.answer == "on"


async def test_a_timeout_of_the_tools_own_is_an_error_like_others() -> None:
    """Only the loop's limit is told of as one."""

    async def slow() -> None:
        raise TimeoutError("the server is slow")

    chat, _ = scripted(calls(("slow", {})), says("on"))
    outcome = await run_tools(chat, ASKED, {"slow": Tool(slow)})
    assert results(outcome) == ["error: slow failed: TimeoutError: the server is slow"]


async def test_the_rounds_are_limited() -> None:
    """A model that never stops calling; its last calls ran and are in the transcript."""
    chat, seen = scripted(calls(("tick", {})))
    outcome = await run_tools(chat, ASKED, {"tick": Tool(lambda: "tock")}, max_rounds=3)
    assert (outcome.answer, outcome.ended, outcome.rounds, len(seen)) == (None, "rounds", 3, 3)
    assert results(outcome) == ["tock"] * 3


async def test_the_seconds_are_limited_while_a_tool_runs_and_while_the_chat_does() -> None:
    """Every call in the transcript has a result, so that it can be gone on from."""

    async def endless(*_: Any) -> Any:
        await asyncio.Event().wait()

    chat, _ = scripted(calls(("endless", {})))
    outcome = await run_tools(chat, ASKED, {"endless": Tool(endless)}, total_s=0.05)
    assert (outcome.ended, outcome.rounds, len(results(outcome))) == ("seconds", 1, 1)
    silent = await run_tools(endless, ASKED, {}, total_s=0.05)
    assert (silent.ended, silent.rounds, silent.messages) == ("seconds", 0, ASKED)


@pytest.mark.parametrize("failure", [ApiError(400, "too long"), {"error": {}}, TimeoutError("its own")])
async def test_a_chat_that_fails_leaves_the_transcript(failure: Any) -> None:
    """The exception is in the result, with what was said and done before."""
    chat, _ = scripted(calls(("tick", {})), failure)
    outcome = await run_tools(chat, ASKED, {"tick": Tool(lambda: "tock")})
    assert (outcome.ended, outcome.rounds, results(outcome)) == ("error", 1, ["tock"])
    assert outcome.error is failure if isinstance(failure, Exception) else isinstance(outcome.error, KeyError)


async def test_a_cut_answer_is_no_whole_one() -> None:
    """The text is there, and the end says that it is not all."""
    chat, _ = scripted(says("It ra", "length"))
    outcome = await run_tools(chat, ASKED, {})
    assert (outcome.answer, outcome.ended, outcome.rounds) == ("It ra", "length", 1)


async def test_a_forced_call_is_forced_once() -> None:
    """Else there would never be an answer."""
    chat, seen = scripted(calls(("tick", {})), says("done"))
    await run_tools(chat, ASKED, {"tick": Tool(lambda: "tock")}, request={"tool_choice": "required"})
    assert [body["tool_choice"] for body in seen] == ["required", "auto"]


async def test_a_loop_that_is_cancelled_ends_its_calls() -> None:
    """Cancelling is the caller's, and no result."""
    begun, ended = asyncio.Event(), asyncio.Event()

    async def waits() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    chat, _ = scripted(calls(("waits", {})))
    running = asyncio.ensure_future(run_tools(chat, ASKED, {"waits": Tool(waits)}))
    await begun.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert ended.is_set()
