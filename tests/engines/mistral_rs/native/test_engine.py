"""mistral.rs inside this process, asked without HTTP: grammars, tools, and a stream that nobody reads to its end."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import installed
import pytest

from engines.mistral_rs.native import requests
from engines.mistral_rs.native.arguments import add_model_arguments, check, prepare
from engines.mistral_rs.native.engine import EngineResponse, Native, json_body
from engines.mistral_rs.native.model import GRAMMAR_AT_FAULT, LoadedModel, compact
from engines.mistral_rs.native.requests import ApiError, Grammar, Json
from engines.mistral_rs.native.tool_loop import Tool, chat_of, run_tools

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
CONTEXT = 512
# short, for reading a prompt takes longest here; unlike SmolLM2's own it shows tools
TEMPLATE = (
    "{{ tools | map(attribute='function.name') | join(' ') if tools }}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}{% endfor %}\n{% endfor %}assistant: "
)


def tool(name: str, *cities: str) -> Json:
    """A tool that knows these cities."""
    city = {"type": "object", "properties": {"city": {"enum": list(cities)}}, "required": ["city"]}
    return {"type": "function", "function": {"name": name, "parameters": city | {"additionalProperties": False}}}


WEATHER, NEWS = tool("weather", "Oslo", "Rome"), tool("news", "Oslo")


# --- what a request asks for


@pytest.mark.parametrize(
    ("change", "grammar"),
    [
        ({"grammar": {"type": "regex", "value": "a+"}}, Grammar("regex", "a+")),
        ({"grammar": {"type": "lark", "value": 'start: "a"'}}, Grammar("lark", 'start: "a"')),
        ({"grammar": {"type": "json_schema", "value": {}}}, Grammar("json_schema", "{}")),
        ({"grammar": {"type": "regex", "value": "a"}, "response_format": {"type": "text"}}, Grammar("regex", "a")),
        ({"grammar": None}, None),
        ({"grammar": 'root ::= "x"'}, None),
        ({"json_schema": {"type": "array"}}, Grammar("json_schema", '{"type": "array"}', "json_schema")),
        (
            {"response_format": {"type": "json_object"}},
            Grammar("json_schema", '{"type": "object"}', "response_format"),
        ),
    ],
)
async def test_a_grammar_is_read_alike_in_chats_and_completions(change: Json, grammar: Grammar | None) -> None:
    """mistral.rs's own words, OpenAI's and llama.cpp's; a GBNF text is not looked at."""
    assert requests.parse_chat({"messages": HI, **change}).sampling.grammar == grammar
    assert requests.parse_completion({"prompt": "hi", **change}).sampling.grammar == grammar


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"grammar": ["a"]}, "grammar"),
        ({"grammar": {}}, "grammar.type"),
        ({"grammar": {"type": "gbnf", "value": "a"}}, "grammar.type"),
        ({"grammar": {"type": ["regex"], "value": "a"}}, "grammar.type"),
        ({"grammar": {"type": "regex"}}, "grammar.value"),
        ({"grammar": {"type": "regex", "value": ""}}, "grammar.value"),
        ({"grammar": {"type": "lark", "value": {}}}, "grammar.value"),
        ({"grammar": {"type": "json_schema", "value": "{}"}}, "grammar.value"),
        ({"grammar": {"type": "regex", "value": "a"}, "response_format": {"type": "json_object"}}, "grammar"),
        ({"grammar": {"type": "regex", "value": "a"}, "json_schema": {}}, "grammar"),
    ],
)
async def test_a_wrong_grammar_is_refused_by_name(change: Json, param: str) -> None:
    """400 with the parameter, in chats and completions."""
    for parse, body in ((requests.parse_chat, {"messages": HI}), (requests.parse_completion, {"prompt": "hi"})):
        with pytest.raises(ApiError) as refused:
            parse(body | change)
        assert (refused.value.status, refused.value.error["param"]) == (400, param)


async def test_a_grammar_and_a_forced_call_exclude_each_other() -> None:
    """Neither could be kept; with "auto" and "none" there is only the grammar."""
    body = {"messages": HI, "tools": [WEATHER], "grammar": {"type": "regex", "value": "a"}}
    for choice in ("auto", "none"):
        assert requests.parse_chat(body | {"tool_choice": choice}).sampling.grammar == Grammar("regex", "a")
    with pytest.raises(ApiError) as refused:
        requests.parse_chat(body | {"tool_choice": "required"})
    assert (refused.value.status, refused.value.error["param"]) == (400, "grammar")


async def test_a_schema_may_bring_its_own_word_on_white_space() -> None:
    """Without one, the JSON is compact."""
    assert json.loads(compact('{"type": "object"}'))["x-guidance"] == {"whitespace_flexible": False}
    assert json.loads(compact('{"x-guidance": {"item_separator": ", "}}'))["x-guidance"] == {"item_separator": ", "}


@pytest.mark.parametrize(
    ("reason", "at_fault"),
    [
        ("Invalid grammar. no start rule found", True),
        ("lexer error: too many expressions constructed", True),
        ("CUDA_ERROR_OUT_OF_MEMORY", False),
    ],
)
async def test_only_what_the_wheel_says_of_a_grammar_is_the_clients_fault(reason: str, at_fault: bool) -> None:
    """Any other failure stays one of the engine, grammar or not."""
    assert bool(GRAMMAR_AT_FAULT.match(reason)) is at_fault


# --- the engine


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Native]:
    """SmolLM2 in this process, with a template that shows tools."""
    gguf = installed.smollm2("mistralrs")
    template = tmp_path_factory.mktemp("native") / "template.jinja"
    template.write_text(TEMPLATE)
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    plain = ["--gguf", gguf, "--model-id", "smol", "--port", "1", "--context", CONTEXT, "--threads", "1", "--cpu"]
    arguments = parser.parse_args([str(word) for word in [*plain, "--chat-template", template]])
    environment = os.environ.copy()
    try:
        check(arguments, None)
        prepare(arguments)
        yield Native(LoadedModel(arguments), arguments.model_id, arguments.slots)
    finally:
        os.environ.clear()
        os.environ.update(environment)


async def ask(native: Native, path: str = CHAT, **body: Any) -> Json:
    """The answer to a short greedy request."""
    plain = {"messages": HI} if path == CHAT else {"prompt": "hi"}
    reply = await native.ask("POST", path, plain | {"max_tokens": 48, "temperature": 0} | body)
    assert reply.status == 200
    assert isinstance(reply.content, dict)
    return reply.content


async def stream(native: Native, path: str = CHAT, **body: Any) -> AsyncGenerator[bytes, None]:
    """The frames of the same, streamed."""
    plain = {"messages": HI} if path == CHAT else {"prompt": "hi"}
    reply = await native.ask("POST", path, plain | {"max_tokens": 48, "temperature": 0, "stream": True} | body)
    assert isinstance(reply.content, AsyncGenerator)
    return reply.content


async def choice(native: Native, path: str = CHAT, **body: Any) -> Json:
    """The only choice of a short greedy answer."""
    (only,) = (await ask(native, path, **body))["choices"]
    return only


def constrained(kind: str, value: Any) -> Json:
    """The parameter that asks for a grammar."""
    return {"grammar": {"type": kind, "value": value}}


def writes(text: str) -> Json:
    """The parameter that lets the model write nothing but *text*."""
    return constrained("lark", f"start: {json.dumps(text)}")


def called(message: Json) -> list[tuple[str, Json]]:
    """Names and arguments of the calls in a message."""
    functions = [call["function"] for call in message.get("tool_calls", [])]
    return [(function["name"], json.loads(function["arguments"])) for function in functions]


@pytest.mark.engine
async def test_a_stream_says_what_a_whole_answer_does(native: Native) -> None:
    """Frames are bytes of events; joined, their text is that of the answer in one piece."""
    whole = await ask(native, max_tokens=4)
    frames = b"".join([frame async for frame in await stream(native, max_tokens=4)]).decode()
    *events, done = [line[6:] for line in frames.splitlines() if line.startswith("data: ")]
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
    assert done == "[DONE]"
    assert whole["usage"]["completion_tokens"] == 4


@pytest.mark.engine
async def test_tokens_go_there_and_back(native: Native) -> None:
    """Text to tokens to text; the context is the one that was asked for."""
    tokens = await native.ask("POST", "/tokenize", {"content": "hello é 🎉"})
    assert isinstance(tokens.content, dict)
    assert (await native.ask("POST", "/detokenize", tokens.content)).content == {"content": "hello é 🎉"}
    props = (await native.ask("GET", "/props", {})).content
    assert isinstance(props, dict)
    assert props["default_generation_settings"] == {"n_ctx": CONTEXT}


@pytest.mark.engine
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize(
    ("kind", "value", "pattern"),
    [
        ("regex", "[a-z]{3}-[0-9]{2}", "[a-z]{3}-[0-9]{2}"),
        ("regex", "(yes|no)", "(yes|no)"),
        (
            "lark",
            'start: GREETING ", " NAME\nGREETING: "hello" | "good day"\nNAME: /[A-Z][a-z]{2}/',
            r"\w[a-z ]+, \w{3}",
        ),
        ("json_schema", {"type": "array", "items": {"enum": [7]}, "minItems": 2, "maxItems": 2}, r"\[7,7\]"),
    ],
)
async def test_a_grammar_is_obeyed_and_ends_the_text(
    native: Native, path: str, kind: str, value: Any, pattern: str
) -> None:
    """The whole text matches, and a fulfilled grammar is the end: no token is spent behind it."""
    only = await choice(native, path, **constrained(kind, value))
    text = only["message"]["content"] if path == CHAT else only["text"]
    assert re.fullmatch(pattern, text)
    assert only["finish_reason"] == "stop"


@pytest.mark.engine
@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("regex", "(unclosed"),
        ("regex", "(?=ahead)a"),
        ("lark", "start: missing"),
        ("lark", 'begin: "a"'),
        ("lark", 'start: "a" start'),
        ("json_schema", {"type": "banana"}),
    ],
)
async def test_a_grammar_that_is_none_is_a_400(native: Native, kind: str, value: Any) -> None:
    """It names the parameter, in one line, without the engine's inner state."""
    with pytest.raises(ApiError) as refused:
        await ask(native, **constrained(kind, value))
    assert (refused.value.status, refused.value.error["param"]) == (400, "grammar")
    assert "\n" not in str(refused.value)


@pytest.mark.engine
async def test_a_stream_with_a_grammar_that_is_none_is_refused_before_it_begins(native: Native) -> None:
    """No frame is told of before the error; of a schema in response_format that one is named."""
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "banana"}}}
    for body, param in ((constrained("regex", "("), "grammar"), ({"response_format": format_}, "response_format")):
        with pytest.raises(ApiError) as refused:
            assert not b"".join([frame async for frame in await stream(native, **body)])
        assert (refused.value.status, refused.value.error["param"]) == (400, param)


@pytest.mark.engine
async def test_log_probabilities_of_a_constrained_text_are_its_tokens(native: Native) -> None:
    """One entry for each token that is shown."""
    only = await choice(native, **writes("one two"), logprobs=True, top_logprobs=2)
    entries = only["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries) == b"one two"
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)


@pytest.mark.engine
async def test_a_stream_that_is_left_frees_the_engine(native: Native) -> None:
    """The next request has its turn, and the one before is counted as cancelled."""
    before = native.counters.completed["canceled"]
    frames = await stream(native, "/v1/completions", ignore_eos=True, max_tokens=CONTEXT - 8)
    async for frame in frames:
        if frame:
            break
    await frames.aclose()
    assert (await ask(native, max_tokens=1))["usage"]["completion_tokens"] == 1
    assert native.counters.completed["canceled"] == before + 1


@pytest.mark.engine
async def test_what_nobody_answers_is_an_error_with_a_status(native: Native) -> None:
    """Unknown paths and models are 404, what is no request is 400."""
    for method, path, body, status in (
        ("GET", "/nowhere", {}, 404),
        ("GET", CHAT, {}, 404),
        ("POST", CHAT, {"messages": HI, "model": "gpt-4"}, 404),
        ("POST", CHAT, {"messages": "hi"}, 400),
        ("POST", "/v1/completions", {}, 400),
        ("POST", "/tokenize", {}, 400),
    ):
        with pytest.raises(ApiError) as refused:
            await native.ask(method, path, body)
        assert refused.value.status == status
    with pytest.raises(ApiError, match="no JSON"):
        json_body(b"{")


# --- tools


@pytest.mark.engine
@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("required", {"weather", "news"}),
        ({"type": "function", "function": {"name": "news"}}, {"news"}),
        ({"type": "function", "function": {"name": "weather"}}, {"weather"}),
    ],
)
async def test_a_forced_call_is_to_one_of_the_tools(native: Native, wanted: Any, names: set[str]) -> None:
    """One call whose arguments obey the schema of its tool."""
    only = await choice(native, tools=[WEATHER, NEWS], tool_choice=wanted)
    ((name, arguments),) = called(only["message"])
    assert (only["finish_reason"], only["message"]["content"]) == ("tool_calls", None)
    assert name in names
    assert arguments["city"] in {"weather": ("Oslo", "Rome"), "news": ("Oslo",)}[name]


CALLS = '[{"name":"weather","arguments":{"city":"Rome"}},{"name":"news","arguments":{"city":"Oslo"}}]'


@pytest.mark.engine
async def test_calls_side_by_side_are_all_told_of(native: Native) -> None:
    """Two in one answer, written as a JSON list; each has an id of its own."""
    only = await choice(native, tools=[WEATHER, NEWS], **writes(CALLS))
    assert called(only["message"]) == [("weather", {"city": "Rome"}), ("news", {"city": "Oslo"})]
    assert len({call["id"] for call in only["message"]["tool_calls"]}) == 2
    assert only["finish_reason"] == "tool_calls"


@pytest.mark.engine
async def test_without_tools_to_choose_a_call_is_text(native: Native) -> None:
    """tool_choice "none" hides the tools from the model and from the engine."""
    only = await choice(native, tools=[WEATHER, NEWS], tool_choice="none", **writes(CALLS))
    assert (only["message"], only["finish_reason"]) == ({"role": "assistant", "content": CALLS}, "stop")


@pytest.mark.engine
@pytest.mark.parametrize(
    "text",
    [
        '{"name":"weather","arguments":"Oslo"}',
        '<tool_call>{"name":"weather","arguments":{Oslo}}</tool_call>',
        '{"name":"weather","arguments":{"city":',
    ],
)
async def test_what_is_no_call_stays_text(native: Native, text: str) -> None:
    """Nothing of it is lost, though it was held back as a call at first."""
    only = await choice(native, tools=[WEATHER], **writes(text))
    assert (only["message"], only["finish_reason"]) == ({"role": "assistant", "content": text}, "stop")


@pytest.mark.engine
async def test_arguments_against_the_schema_are_told_of_as_they_are(native: Native) -> None:
    """Unless a call is forced, nobody but its caller checks it."""
    only = await choice(native, tools=[WEATHER], **writes('{"name":"weather","arguments":{"city":5}}'))
    assert called(only["message"]) == [("weather", {"city": 5})]


@pytest.mark.engine
async def test_a_call_of_a_tool_that_there_is_not_is_dropped_by_the_engine(native: Native) -> None:
    """The wheel 0.9.5 keeps its text, too: what is left is a finish "tool_calls" without calls."""
    only = await choice(native, tools=[WEATHER], **writes('{"name":"nosuch","arguments":{}}'))
    assert (only["message"], only["finish_reason"]) == ({"role": "assistant", "content": ""}, "tool_calls")


@pytest.mark.engine
async def test_tools_calls_and_results_are_all_in_the_prompt(native: Native) -> None:
    """Each makes it longer, and a template that shows tools is not warned about."""

    async def n_tokens(messages: list[Json], **body: Any) -> int:
        reply = await native.ask("POST", f"{CHAT}/input_tokens", {"messages": messages, **body})
        assert isinstance(reply.content, dict)
        return reply.content["input_tokens"]

    message = (await choice(native, tools=[WEATHER], tool_choice="required"))["message"]
    (call,) = message["tool_calls"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "rain"}
    counts = [
        await n_tokens(HI),
        await n_tokens(HI, tools=[WEATHER]),
        await n_tokens([*HI, message], tools=[WEATHER]),
        await n_tokens([*HI, message, result], tools=[WEATHER]),
    ]
    assert counts == sorted(set(counts))
    body = {"messages": [*HI, message, result], "tools": [WEATHER], "max_tokens": 1}
    reply = await native.ask("POST", CHAT, body)
    assert isinstance(reply, EngineResponse)
    assert "x-switchyard-warning" not in reply.headers


@pytest.mark.engine
@pytest.mark.parametrize(
    ("path", "change"),
    [
        (CHAT, {"logit_bias": {"0": float("inf")}}),
        (CHAT, {"messages": [{"role": "user", "content": "\ud83d"}]}),
        (CHAT, {"grammar": {"type": "lark", "value": "start: start"}}),
        (CHAT, {"grammar": {"type": "regex", "value": "("}}),
        ("/v1/completions", {"prompt": ""}),
    ],
)
async def test_what_the_engine_cannot_take_is_the_clients_fault(native: Native, path: str, change: Json) -> None:
    """Each of these was seen to end in an error of the engine; none of them, nor any other tried, in a panic."""
    with pytest.raises(ApiError) as refused:
        await native.ask("POST", path, {"messages": HI, "max_tokens": 2, **change})
    assert refused.value.status == 400
    assert isinstance(await native.ask("POST", CHAT, {"messages": HI, "max_tokens": 1}), EngineResponse)


@pytest.mark.engine
async def test_the_loop_runs_a_forced_call_and_goes_on_to_a_text(native: Native) -> None:
    """The function gets arguments of its schema, once; the second round is free to answer."""
    cities: list[str] = []

    def weather(city: str) -> str:
        cities.append(city)
        return "rain"

    tools = {"weather": Tool(weather, WEATHER["function"]["parameters"], "The weather.")}
    request = {"tool_choice": "required", "max_tokens": 24, "temperature": 0}
    outcome = await run_tools(chat_of(native), HI, tools, request=request)
    assert cities in (["Oslo"], ["Rome"])
    assert [message["role"] for message in outcome.messages] == ["user", "assistant", "tool", "assistant"]
    assert outcome.answer
    assert (outcome.rounds, outcome.ended) in ((2, "answer"), (2, "length"))
