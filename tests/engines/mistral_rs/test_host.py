"""The OpenAI host around the mistralrs wheel: its shapes as functions, its behaviour against a real model."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import installed
import pytest

from engines.errors import BadInput
from engines.mistral_rs.host import listen
from engines.mistral_rs.native import requests, responses, stop_text
from engines.mistral_rs.native.chat_template import ChatTemplate, TemplateRefused, Vocabulary
from engines.mistral_rs.native.generation import (
    KEEP_ALIVE,
    Admitted,
    Counters,
    count_endings,
    count_tokens,
    cut_usage,
    keep_alive,
    until_stop,
)
from engines.mistral_rs.native.requests import ApiError
from engines.mistral_rs.native.responses import Head, Piece, Usage
from engines.model.gguf import read_metadata, shard_paths
from engines.process.serving import free_port

KEY = "secret-of-the-test"
CONTEXT = 128
REPOSITORY = Path(__file__).parents[3]
SYSTEM = {"role": "system", "content": "x"}
HI = [SYSTEM, {"role": "user", "content": "hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


# --- requests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"temperature": "warm"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"stop": [1]}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0]"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    ],
)
def test_a_wrong_chat_body_is_refused_by_the_name_of_its_parameter(change: dict[str, Any], param: str) -> None:
    """Every refusal is a 400 whose `param` says where to look."""
    with pytest.raises(ApiError) as refused:
        requests.parse_chat({"messages": HI} | change)
    assert (refused.value.status, refused.value.error["param"]) == (400, param)


def test_missing_parameters_are_not_invented() -> None:
    """Only temperature has a default of its own: OpenAI's 1."""
    assert requests.parse_chat({"messages": HI}).sampling == requests.SamplingParameters(temperature=1.0)


def test_max_completion_tokens_wins_over_max_tokens() -> None:
    """The newer name counts when both are given."""
    body = {"messages": HI, "max_tokens": 9, "max_completion_tokens": 3}
    assert requests.parse_chat(body).sampling.max_tokens == 3


def test_a_tool_round_trip_keeps_its_calls() -> None:
    """Null content becomes an empty string; arguments become the mapping that templates expect."""
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}
    past = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "rain"}]},
    ]
    assistant, tool = requests.parse_messages({"messages": past})
    assert assistant["content"] == ""
    assert assistant["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    assert tool == {"role": "tool", "tool_call_id": "call_1", "content": "rain"}


def test_past_arguments_that_nest_without_an_end_are_sent_on_as_they_are() -> None:
    """A small model writes such ones, and its client sends them back."""
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "[" * 5000}}
    (assistant,) = requests.parse_messages({"messages": [{"role": "assistant", "tool_calls": [call]}]})
    assert assistant["tool_calls"][0]["function"]["arguments"] == "[" * 5000


def test_required_tools_become_a_schema_of_one_call_to_any_of_them() -> None:
    """A named function is forced alone, "required" offers all."""
    other = {"type": "function", "function": {"name": "other"}}
    required = requests.parse_chat({"messages": HI, "tools": [WEATHER, other], "tool_choice": "required"})
    named = {"type": "function", "function": {"name": "weather"}}
    forced = requests.parse_chat({"messages": HI, "tools": [WEATHER, other], "tool_choice": named})
    assert required.sampling.grammar is not None
    assert forced.sampling.grammar is not None
    assert len(json.loads(required.sampling.grammar.text)["anyOf"]) == 2
    assert json.loads(forced.sampling.grammar.text)["properties"]["name"] == {"const": "weather"}


def test_an_unknown_model_is_not_found() -> None:
    """The served id, "default" and nothing at all are accepted; any other name is 404 model_not_found."""
    for model in ("smol", "default", None):
        requests.check_model({"model": model}, "smol")
    with pytest.raises(ApiError) as refused:
        requests.check_model({"model": "gpt-4"}, "smol")
    assert (refused.value.status, refused.value.error["code"]) == (404, "model_not_found")


# --- shapes ---------------------------------------------------------------------------------------------------------


def test_timings_leave_out_what_is_no_number() -> None:
    """inf and NaN, as the wheel tells them after one token, are absent rather than zero."""
    usage = Usage(prompt_tokens=5, completion_tokens=1, prompt_ms=100.0, predicted_ms=float("inf"))
    assert responses.timings_body([usage]) == {
        "cache_n": 0,
        "prompt_n": 5,
        "predicted_n": 1,
        "prompt_ms": 100.0,
        "prompt_per_second": 50.0,
    }


def test_a_prompt_with_two_choices_is_counted_once() -> None:
    """OpenAI bills the prompt once for n choices."""
    usages = [Usage(prompt_tokens=5, completion_tokens=2), Usage(prompt_tokens=5, completion_tokens=3)]
    assert responses.usage_body(usages, n=2) == {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}


def test_a_token_that_is_part_of_a_code_point_keeps_its_bytes() -> None:
    """Its text is empty, as llama.cpp has it; its bytes are exact."""
    assert responses.token_entry(b"\xf0\x9f", -0.5) == {"token": "", "logprob": -0.5, "bytes": [0xF0, 0x9F]}


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"name": "weather", "arguments": {"city": "Oslo"}}', '{"city":"Oslo"}'),
        ('{"name": "weather", "arguments": {"city": "Os', '{"city": "Os'),
        ('{"name": "weather", "arguments": ' + "[" * 5000, "[" * 5000),
    ],
)
def test_a_forced_call_has_string_arguments_even_when_cut(text: str, arguments: str) -> None:
    """Whole text gives compact JSON, cut text what there is."""
    call = stop_text.forced_call(text, "call_1")
    assert call is not None
    assert call["function"] == {"name": "weather", "arguments": arguments}


def test_a_forced_call_cut_before_its_arguments_is_none() -> None:
    """Without a name and arguments there is no call to tell of."""
    assert stop_text.forced_call('{"name": "wea', "call_1") is None


@pytest.mark.parametrize(
    ("chunks", "passed", "rest"),
    [
        (["Hello", " there"], "Hello there", ""),
        (["<tool", "_call>", "{}"], "", "<tool_call>{}"),
        (["Sure. <", "tool_call>"], "Sure. ", "<tool_call>"),
        (["a <", "b"], "a <b", ""),
        ([" ", '{"name"'], "", ' {"name"'),
    ],
)
def test_tool_markup_is_held_back(chunks: list[str], passed: str, rest: str) -> None:
    """Text passes at once, except what may be the beginning of a call."""
    gate = stop_text.ToolTextGate()
    assert "".join(gate.pass_on(chunk) for chunk in chunks) == passed
    assert gate.rest() == rest


def test_a_whole_choice_with_a_call_has_null_content() -> None:
    """Content is null beside tool calls, and a call of a message has no index."""
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    head = Head(id="x", created=1, model="m", chat=True)
    choice = responses.whole_choice(head, 0, [Piece(tool_calls=(call,), finish="tool_calls")])
    assert choice["message"]["content"] is None
    assert "index" not in choice["message"]["tool_calls"][0]


async def test_a_silent_stream_gets_keep_alive_comments_after_its_first_frame_only() -> None:
    """Nothing is sent before the first frame, so that an early error keeps its HTTP status."""
    release = asyncio.Event()

    async def frames() -> AsyncGenerator[bytes, None]:
        yield b"first"
        await release.wait()
        yield b"last"

    seen = []
    async for frame in keep_alive(frames(), 0.001):
        seen.append(frame)
        if frame == KEEP_ALIVE:
            release.set()
    assert seen[:2] == [b"first", KEEP_ALIVE]
    assert seen[-1] == b"last"


# --- stop strings ---------------------------------------------------------------------------------------------------


def splits(text: str) -> Iterator[list[str]]:
    """Every way to cut *text* into chunks."""
    for size in range(len(text)):
        for cuts in itertools.combinations(range(1, len(text)), size):
            yield [text[start:end] for start, end in itertools.pairwise((0, *cuts, len(text)))]


def through(stops: tuple[str, ...], chunks: list[str]) -> tuple[str, bool]:
    """The text that a StopCutter passes on of *chunks*, and whether it found a stop string."""
    cutter, told = stop_text.StopCutter(stops), ""
    for chunk in chunks:
        piece = cutter.pass_on(Piece(content=chunk))
        told += piece.content
        if piece.finish:
            return told, True
    return told + cutter.pass_on(Piece(finish="length")).content, False


@pytest.mark.parametrize(
    ("stops", "text", "told", "found"),
    [
        (("ab",), "aaab", "aa", True),
        (("aab",), "aaab🎉", "a", True),
        (("🎉é",), "x🎉🎉éy", "x🎉", True),
        (("cd", "bc"), "abcd", "a", True),
        (("bcd", "abcde"), "abcdef", "a", True),
        (("c", "abc"), "xabcx", "x", True),
        (("abac",), "abababac", "abab", True),
        (("abx", "bcx"), "ababcab", "ababcab", False),
        (("young",), "the you", "the you", False),
        ((), "text", "text", False),
    ],
)
def test_a_stop_string_is_found_however_the_text_is_split(
    stops: tuple[str, ...], text: str, told: str, found: bool
) -> None:
    """The first to be complete counts, of two at once the longer; text held back in vain is told at the end."""
    for chunks in splits(text):
        assert through(stops, chunks) == (told, found), chunks


def test_short_texts_end_as_if_read_character_by_character() -> None:
    """All texts of up to six letters of two kinds, in all splits, against a plain search."""
    stops = ("aba", "bb", "abab")
    for letters in itertools.chain.from_iterable(itertools.product("ab", repeat=size) for size in range(1, 7)):
        text = "".join(letters)
        ends = [
            (end, min(end - len(s) for s in stops if text[:end].endswith(s)))
            for end in range(1, len(text) + 1)
            if text[:end].endswith(stops)
        ]
        expected = (text[: ends[0][1]], True) if ends else (text, False)
        for chunks in splits(text):
            assert through(stops, chunks) == expected, chunks


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    """Text is told at once as far as it is safe."""
    cutter = stop_text.StopCutter(("young",))
    pieces = [cutter.pass_on(Piece(content=text)) for text in ("a yo", "u", "r y", "oung!")]
    assert [(piece.content, piece.finish) for piece in pieces] == [
        ("a ", None),
        ("", None),
        ("your ", None),
        ("", "stop"),
    ]


def token_pieces(*tokens: tuple[bytes, str], finish: str | None = None) -> list[Piece]:
    """Pieces of one token each, with their places: (bytes of the token, text shown with it)."""
    places = stop_text.TokenPlaces()
    pieces = [Piece(content=text, logprobs=(responses.token_entry(data, -1.0),)) for data, text in tokens]
    return [places.place(piece) for piece in [*pieces, *([Piece(finish=finish)] if finish else [])]]


def logprob_bytes(pieces: list[Piece]) -> list[bytes]:
    """The tokens that the pieces tell of."""
    return [bytes(entry["bytes"]) for piece in pieces for entry in piece.logprobs]


PARTY = [(b"go", "go"), (b" \xf0\x9f", ""), (b"\x8e", ""), (b"\x89", " 🎉"), (b"!", "!")]


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        ("🎉", "go ", [b"go", b" \xf0\x9f"]),
        (" 🎉", "go", [b"go"]),
        ("o", "g", [b"go"]),
        ("!", "go 🎉", [b"go", b" \xf0\x9f", b"\x8e", b"\x89"]),
    ],
)
def test_log_probabilities_are_cut_with_the_text(stop: str, text: str, tokens: list[bytes]) -> None:
    """Tokens that lie at least partly before the cut are told of, also those that hold a part of one code point."""
    cutter = stop_text.StopCutter((stop,))
    told = [cutter.pass_on(piece) for piece in token_pieces(*PARTY)]
    last = next(at for at, piece in enumerate(told) if piece.finish)
    assert "".join(piece.content for piece in told[: last + 1]) == text
    assert logprob_bytes(told[: last + 1]) == tokens
    assert told[last].finish == "stop"


def test_text_and_log_probabilities_held_in_vain_come_with_the_end() -> None:
    """A generation that ends by itself within the beginning of a stop string loses nothing."""
    cutter = stop_text.StopCutter(("🎉!?",))
    told = [cutter.pass_on(piece) for piece in token_pieces(*PARTY, finish="length")]
    assert "".join(piece.content for piece in told) == "go 🎉!"
    assert logprob_bytes(told) == [data for data, _ in PARTY]
    assert told[-1].finish == "length"


def test_a_control_token_does_not_shift_the_tokens_after_it() -> None:
    """It has bytes but shows no text."""
    first, second = token_pieces((b"<|im_end|>", ""), (b"a", "a"))
    assert (first.starts, second.starts) == ((0,), (0,))


async def test_a_stop_string_leaves_the_engine_and_counts_the_tokens_until_then() -> None:
    """Usage has the tokens so far; the source is closed before it is read to its end."""
    closed = asyncio.Event()

    async def source() -> AsyncGenerator[Admitted | Piece, None]:
        try:
            yield Admitted(7)
            for text in ("a", "b", "c", "d"):
                yield Piece(content=text)
        finally:
            closed.set()

    pieces = [piece async for piece in until_stop(source(), ("bc",)) if isinstance(piece, Piece)]
    usage = pieces[-1].usage
    assert closed.is_set()
    assert "".join(piece.content for piece in pieces) == "a"
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (7, 3)


def test_times_that_one_token_does_not_have_are_left_out() -> None:
    """Generation time begins with the first token; a single one has none."""
    assert cut_usage(7, [1.0, 1.5]) == Usage(prompt_tokens=7, completion_tokens=1, prompt_ms=500.0)
    assert cut_usage(7, [1.0, 1.5, 1.75]).predicted_ms == 250.0


def test_a_forced_call_is_not_searched_for_stop_strings() -> None:
    """Its JSON is no text; other calls keep their stop strings."""
    body = {"messages": HI, "tools": [WEATHER], "stop": '"'}
    assert requests.parse_chat(body | {"tool_choice": "required"}).sampling.stop == ()
    assert requests.parse_chat(body).sampling.stop == ('"',)


# --- counters -------------------------------------------------------------------------------------------------------


async def test_the_counters_follow_a_generation() -> None:
    """Tokens as they are made, corrected by the engine's own count at the end; one that is refused does not count."""
    usage = Usage(prompt_tokens=7, completion_tokens=5)

    async def source() -> AsyncGenerator[Admitted | Piece, None]:
        yield Admitted(7)
        yield Piece(content="a")
        yield Piece(content="b", finish="stop", usage=usage)

    async def refused() -> AsyncGenerator[Admitted | Piece, None]:
        raise requests.context_exceeded(9, 8)
        yield Admitted(9)

    counters = Counters()
    seen = []
    async for _ in count_endings(count_tokens(source(), counters), counters):
        seen.append(counters.tokens)
    with pytest.raises(ApiError):
        _ = [piece async for piece in count_endings(count_tokens(refused(), counters), counters)]
    assert seen == [0, 8, 12]
    assert (counters.first_tokens, dict(counters.completed)) == (1, {"stop": 1})


# --- text of a GGUF -------------------------------------------------------------------------------------------------


def test_byte_level_tokens_become_bytes() -> None:
    """GPT-2's stand-ins are undone; control tokens are plain text; outside the vocabulary there is nothing."""
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["<|end|>", "Ġhi", "ðŁ"],
        "tokenizer.ggml.token_type": [3, 1, 1],
    }
    vocabulary = Vocabulary(metadata)
    assert [vocabulary.token_bytes(token) for token in range(4)] == [b"<|end|>", b" hi", b"\xf0\x9f", None]


def test_sentencepiece_tokens_become_bytes() -> None:
    """Its block character is a space, its byte tokens are bytes."""
    vocabulary = Vocabulary({"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["▁hi", "<0xF0>"]})
    assert [vocabulary.token_bytes(token) for token in range(2)] == [b" hi", b"\xf0"]


def test_a_model_without_a_template_says_how_to_give_it_one() -> None:
    """The cause and the option that mends it."""
    with pytest.raises(TemplateRefused, match=r"has no chat template.*--chat-template"):
        ChatTemplate("", Vocabulary({})).render([], None, {})


def test_a_template_that_refuses_says_why() -> None:
    """The template's own raise_exception reaches the client."""
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", Vocabulary({}))
    with pytest.raises(TemplateRefused, match="roles must alternate"):
        template.render([], None, {})


def test_metadata_of_a_small_gguf_is_read(tmp_path: Path) -> None:
    """Scalars, strings and arrays of strings come back as Python values; other files are refused."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    pairs = [
        text("a.number") + struct.pack("<II", 4, 7),
        text("a.text") + struct.pack("<I", 8) + text("é"),
        text("a.list") + struct.pack("<IIQ", 9, 8, 2) + text("x") + text("y"),
    ]
    good = tmp_path / "good.gguf"
    good.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(pairs))
    assert read_metadata(good) == {"a.number": 7, "a.text": "é", "a.list": ("x", "y")}
    good.write_bytes(b"no GGUF at all")
    with pytest.raises(BadInput, match=r"good\.gguf"):
        read_metadata(good)


def test_all_parts_of_a_split_model_are_loaded() -> None:
    """The first part names the others."""
    first, second = Path("m-00001-of-00002.gguf"), Path("m-00002-of-00002.gguf")
    assert shard_paths(first) == [first, second]
    assert shard_paths(Path("m.gguf")) == [Path("m.gguf")]


# --- the real host --------------------------------------------------------------------------------------------------


def start(gguf: Path, port: int, log: Path, *more: str, key: str = KEY) -> subprocess.Popen[bytes]:
    """The host as a process of its own."""
    command = [sys.executable, "-m", "engines.mistral_rs.host", "--gguf", str(gguf), "--model-id", "smol"]
    command += ["--port", str(port), "--threads", "1", "--context", str(CONTEXT), *more]
    with log.open("wb") as output:
        environment = os.environ | {"SWITCHYARD_ENGINE_API_KEY": key}
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT)


def wait_for(what: str, condition: Callable[[], bool], timeout_s: float = 120) -> None:
    """Return when *condition* holds; fails the test when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout_s:g} s: {what}"
        time.sleep(0.05)


def health(port: int) -> int | None:
    """Status of /health; None while nobody listens."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=10, verify=False).status_code
    except httpx.TransportError:
        return None


def end(process: subprocess.Popen[bytes]) -> int:
    """Ask it to stop; its exit code."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(30)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base address of a loaded host; its model is a link of another name, as in the Hugging Face cache."""
    folder = tmp_path_factory.mktemp("host")
    port, log, link = free_port(), folder / "log", folder / "model.gguf"
    link.symlink_to(installed.smollm2("mistralrs"))
    process = start(link, port, log)
    try:
        wait_for("ready", lambda: process.poll() is not None or health(port) == 200)
        assert process.poll() is None, log.read_text(errors="replace")
        yield f"http://127.0.0.1:{port}"
    finally:
        end(process)


@pytest.fixture(scope="module")
def http(base: str) -> Iterator[httpx.Client]:
    """A client that carries the key."""
    with httpx.Client(base_url=base, headers={"Authorization": f"Bearer {KEY}"}, timeout=180) as client:
        yield client


def ask(http: httpx.Client, **body: Any) -> dict[str, Any]:
    """The answer to a short greedy chat."""
    reply = http.post("/v1/chat/completions", json={"messages": HI, "max_tokens": 3, "temperature": 0} | body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def stream(http: httpx.Client, path: str = "/v1/chat/completions", **body: Any) -> list[dict[str, Any] | str]:
    """The events of a short greedy stream, parsed; "[DONE]" as it is."""
    plain = {"max_tokens": 3, "temperature": 0, "stream": True} | body
    if path.endswith("chat/completions"):
        plain = {"messages": HI} | plain
    with http.stream("POST", path, json=plain) as reply:
        lines = [line[6:] for line in reply.iter_lines() if line.startswith("data: ")]
        assert reply.status_code == 200, lines
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def chunks_of(events: list[dict[str, Any] | str]) -> list[dict[str, Any]]:
    """The chunks among the events."""
    return [event for event in events if isinstance(event, dict)]


@pytest.mark.engine
def test_a_stream_is_role_then_content_then_finish_then_usage(http: httpx.Client) -> None:
    """The order of OpenAI's stream, one id over all chunks, usage only in a chunk without choices."""
    events = stream(http, stream_options={"include_usage": True})
    chunks = chunks_of(events)
    first, *content, last, usage = chunks
    assert events[-1] == "[DONE]"
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(list(chunk["choices"][0]["delta"]) == ["content"] for chunk in content)
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "length")
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 3
    assert usage["timings"]["prompt_ms"] > 0
    assert not any("usage" in chunk for chunk in chunks[:-1])


@pytest.mark.engine
def test_whole_and_streamed_answers_say_the_same(http: httpx.Client) -> None:
    """Temperature 0 is greedy, and usage is told only where it belongs."""
    whole = ask(http)
    events = chunks_of(stream(http))
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": text}
    usage = whole["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + 3
    assert not any("usage" in event for event in events)


@pytest.mark.engine
def test_the_openai_client_reads_it(base: str) -> None:
    """The public client parses models, a chat with log-probabilities, and errors."""
    openai = pytest.importorskip("openai", reason="pip install -e '.[test]'")
    client = openai.OpenAI(base_url=f"{base}/v1", api_key=KEY, max_retries=0)
    assert [model.id for model in client.models.list()] == ["smol"]
    reply = client.chat.completions.create(
        model="smol", messages=HI, max_tokens=2, temperature=0, logprobs=True, top_logprobs=2
    )
    entry = reply.choices[0].logprobs.content[0]
    assert entry.token == entry.top_logprobs[0].token == bytes(entry.top_logprobs[0].bytes).decode()
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=HI)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{base}/v1", api_key="wrong", max_retries=0).models.list()


@pytest.mark.engine
def test_more_log_probabilities_than_openai_allows_are_given(http: httpx.Client) -> None:
    """Thirty alternatives for each streamed token, each with its id and exact bytes."""
    chunks = chunks_of(stream(http, max_tokens=1, logprobs=True, top_logprobs=30))
    (entry,) = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {}).get("content", [])]
    assert len(entry["top_logprobs"]) == 30
    assert {"id", "token", "logprob", "bytes"} <= set(entry["top_logprobs"][29])


@pytest.mark.engine
def test_emoji_arrive_whole(http: httpx.Client) -> None:
    """No delta holds half a code point, though most emoji are several tokens."""
    messages = [SYSTEM, {"role": "user", "content": "Repeat exactly: 🎉🎊🥳 日本語"}]
    chunks = chunks_of(stream(http, messages=messages, max_tokens=8))
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert "\ufffd" not in text
    assert any(ord(character) > 0xFFFF for character in text)


@pytest.mark.engine
def test_a_text_completion_is_continued_as_it_stands(http: httpx.Client) -> None:
    """No chat template: four prompt tokens; the stream has the same text as the whole answer."""
    body = {"prompt": "Once upon a time", "max_tokens": 3, "temperature": 0}
    whole = http.post("/v1/completions", json=body | {"logprobs": 2, "echo": True}).json()
    text = whole["choices"][0]["text"]
    streamed = "".join(chunk["choices"][0]["text"] for chunk in chunks_of(stream(http, "/v1/completions", **body)))
    assert text == "Once upon a time" + streamed
    assert whole["usage"]["prompt_tokens"] == 4
    assert whole["choices"][0]["logprobs"]["text_offset"][0] == len("Once upon a time")


@pytest.mark.engine
def test_a_stop_string_is_cut_off(http: httpx.Client) -> None:
    """The text ends before the stop string, with finish "stop"; in the stream nothing of it was sent."""
    full = ask(http, max_tokens=4)["choices"][0]["message"]["content"]
    stop = full[len(full) // 2 :]
    whole = ask(http, max_tokens=8, stop=stop)["choices"][0]
    chunks = chunks_of(stream(http, max_tokens=8, stop=[stop]))
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert whole["finish_reason"] == "stop"
    assert whole["message"]["content"] == text == full[: len(full) // 2]


STORM = {"prompt": "Once upon a time, in a", "max_tokens": 24, "temperature": 0}


@pytest.mark.engine
@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_string_of_one_token_also_stops_at_that_word_after_a_space(http: httpx.Client, streamed: bool) -> None:
    """One of five stop strings is a word of the continuation: usage and log-probabilities end with its token."""
    whole = http.post("/v1/completions", json=STORM | {"max_tokens": 8, "logprobs": 0}).json()["choices"][0]
    tokens = whole["logprobs"]["tokens"]
    at = next(at for at, token in enumerate(tokens) if at > 0 and re.fullmatch(r" \w{3,}", token))
    word = tokens[at].strip()
    before = whole["text"].partition(word)[0]  # the engine leaves out a space that a text begins with
    assert word not in "".join(tokens[:at])
    body = STORM | {"stop": ["\x00", "never said", word, "🎉🎉", "</s>"], "logprobs": 0}
    if streamed:
        *chunks, last = chunks_of(stream(http, "/v1/completions", **body, stream_options={"include_usage": True}))
        choices = [chunk["choices"][0] for chunk in chunks]
        usage = last["usage"]
    else:
        answer = http.post("/v1/completions", json=body).json()
        choices, usage = answer["choices"], answer["usage"]
    assert "".join(choice["text"] for choice in choices) == before
    assert choices[-1]["finish_reason"] == "stop"
    assert usage["completion_tokens"] == at + 1
    told = [token for choice in choices for token in (choice["logprobs"] or {}).get("tokens", [])]
    assert told == tokens[: at + 1]  # the last one's space lies before the cut


@pytest.mark.engine
def test_a_stop_string_ends_json_but_not_a_forced_call(http: httpx.Client) -> None:
    """JSON that was asked for is text; the JSON of a forced call is not."""
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["🎉 é"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    choice = ask(http, response_format=wanted, max_tokens=40, stop="é")["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ('{"a":"🎉 ', "stop")
    forced = ask(http, tools=[WEATHER], tool_choice="required", max_tokens=80, stop="Oslo")["choices"][0]
    assert json.loads(forced["message"]["tool_calls"][0]["function"]["arguments"]) == {"city": "Oslo"}


@pytest.mark.engine
@pytest.mark.parametrize("tools", [[], [WEATHER]])
def test_prompt_tokens_can_be_asked_for_without_generating(http: httpx.Client, tools: list[dict[str, Any]]) -> None:
    """The count is that of the usage of the same request."""
    body = {"messages": HI, "tools": tools}
    reply = http.post("/v1/chat/completions/input_tokens", json=body).json()
    assert reply == {"object": "response.input_tokens", "input_tokens": ask(http, **body)["usage"]["prompt_tokens"]}


def samples(text: str) -> dict[str, float]:
    """The samples of Prometheus' text format."""
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


@pytest.mark.engine
def test_metrics_tell_of_generations(http: httpx.Client) -> None:
    """One more ended by its limit, its tokens counted, nothing running afterwards."""
    before = samples(http.get("/metrics").text)
    usage = ask(http)["usage"]
    reply = http.get("/metrics")
    after = samples(reply.text)
    grown = {name: after[name] - before[name] for name in after}
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert grown['mistralrs_sequences_completed_total{reason="length"}'] == 1
    assert grown['mistralrs_sequences_completed_total{reason="stop"}'] == 0
    assert grown["mistralrs_tokens_processed_total"] == usage["total_tokens"]
    assert grown["mistralrs_time_to_first_token_seconds_count"] == 1
    assert grown["mistralrs_time_to_first_token_seconds_sum"] > 0
    assert after["mistralrs_sequences_waiting"] == 0


@pytest.mark.engine
def test_ignore_eos_runs_to_the_limit(http: httpx.Client) -> None:
    """With a bias that makes the end of turn certain, only ignore_eos goes on."""
    end_of_turn = http.post("/tokenize", json={"content": "<|im_end|>"}).json()["tokens"][0]
    bias = {str(end_of_turn): 100}
    assert ask(http, logit_bias=bias)["choices"][0]["finish_reason"] == "stop"
    assert ask(http, logit_bias=bias, ignore_eos=True)["choices"][0]["finish_reason"] == "length"


@pytest.mark.engine
def test_two_choices_are_two_choices(http: httpx.Client) -> None:
    """n is honoured, one generation after the other."""
    answer = ask(http, n=2, max_tokens=1)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == 2


@pytest.mark.engine
def test_a_named_tool_is_called(http: httpx.Client) -> None:
    """The grammar leaves the model no other way: arguments that obey the schema, finish "tool_calls"."""
    named = {"type": "function", "function": {"name": "weather"}}
    choice = ask(http, tools=[WEATHER], tool_choice=named, max_tokens=80)["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert call["id"].startswith("call_")
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("weather", {"city": "Oslo"})


@pytest.mark.engine
def test_a_required_tool_is_streamed_as_a_call(http: httpx.Client) -> None:
    """One delta with index, id, type and function; no content beside it."""
    chunks = chunks_of(stream(http, tools=[WEATHER], tool_choice="required", max_tokens=80))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    (call,) = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert set(call) == {"index", "id", "type", "function"}
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}
    assert "".join(delta.get("content", "") for delta in deltas) == ""
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.engine
@pytest.mark.parametrize("streamed", [False, True])
def test_a_call_that_the_model_writes_by_itself_leaks_no_text(http: httpx.Client, streamed: bool) -> None:
    """With tool_choice "auto" the engine reads the call at the end; its JSON does not show up as content before."""
    call = requests.forced_schema([WEATHER], ("weather",))
    wanted = {"type": "json_schema", "json_schema": {"name": "call", "schema": call}}
    body: dict[str, Any] = {"tools": [WEATHER], "response_format": wanted, "max_tokens": 80}
    if streamed:
        chunks = chunks_of(stream(http, **body))
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == ""
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    else:
        choice = ask(http, **body)["choices"][0]
        assert choice["message"]["content"] is None
        assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city":"Oslo"}'}


@pytest.mark.engine
def test_tools_that_the_template_cannot_show_are_warned_about(http: httpx.Client) -> None:
    """SmolLM2's template knows no tools; a header says so, and past calls are accepted all the same."""
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    past = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    body = {"messages": HI + past, "tools": [WEATHER], "max_tokens": 1}
    reply = http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200
    assert "tools" in reply.headers["x-switchyard-warning"]


@pytest.mark.engine
def test_a_json_schema_is_obeyed_and_a_bad_one_refused(http: httpx.Client) -> None:
    """The answer parses; a schema that is none is 400 before the stream begins."""
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1]}},
        "required": ["a"],
        "additionalProperties": False,
    }

    def wanted(schema: dict[str, Any]) -> dict[str, Any]:
        return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}

    answer = ask(http, response_format=wanted(schema), max_tokens=40)
    assert json.loads(answer["choices"][0]["message"]["content"]) == {"a": 1}
    body = {"messages": HI, "stream": True, "response_format": wanted({"type": "banana"})}
    assert http.post("/v1/chat/completions", json=body).status_code == 400


@pytest.mark.engine
@pytest.mark.parametrize("streamed", [False, True])
def test_a_prompt_beyond_the_context_is_refused_with_its_numbers(http: httpx.Client, streamed: bool) -> None:
    """400 before any event, with the prompt's tokens and the context."""
    messages = [{"role": "user", "content": "a b " * CONTEXT}]
    reply = http.post("/v1/chat/completions", json={"messages": messages, "stream": streamed})
    error = reply.json()["error"]
    assert (reply.status_code, error["type"]) == (400, "exceed_context_size_error")
    assert error["code"] == "context_length_exceeded"
    assert error["n_prompt_tokens"] > error["n_ctx"] == CONTEXT


@pytest.mark.engine
def test_a_full_context_ends_with_length(http: httpx.Client) -> None:
    """Without a limit of its own a generation ends where the context does; the host counts as the engine does."""
    prompt = "a b " * (CONTEXT // 2 - 2)
    tokens = len(http.post("/tokenize", json={"content": prompt}).json()["tokens"])
    reply = http.post("/v1/completions", json={"prompt": prompt, "temperature": 0, "ignore_eos": True}).json()
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"] == {
        "prompt_tokens": tokens,
        "completion_tokens": CONTEXT - tokens,
        "total_tokens": CONTEXT,
    }


@pytest.mark.engine
@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("GET", "/nowhere", b"", 404),
        ("GET", "/v1/chat/completions", b"", 405),
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"[]", 400),
        ("POST", "/v1/chat/completions", b'{"messages": "hi"}', 400),
        ("POST", "/v1/embeddings", b"{}", 501),
        ("POST", "/detokenize", b'{"tokens": [99999999]}', 400),
        ("POST", "/v1/completions", b" " * (50 * 1024 * 1024 + 1), 413),
    ],
)
def test_every_refusal_is_an_openai_error(
    http: httpx.Client, method: str, path: str, content: bytes, status: int
) -> None:
    """Whatever is wrong, the body is {"error": {"message": ...}}."""
    reply = http.request(method, path, content=content)
    assert (reply.status_code, bool(reply.json()["error"]["message"])) == (status, True)


@pytest.mark.engine
def test_only_health_is_open_without_the_key(base: str) -> None:
    """Everything else is 401."""
    assert httpx.get(f"{base}/health").json() == {"status": "ok"}
    for path in ("/v1/models", "/props", "/metrics", "/nowhere"):
        assert httpx.get(f"{base}{path}").status_code == 401


@pytest.mark.engine
def test_context_and_tokens_can_be_asked_for(http: httpx.Client) -> None:
    """The usable context is where clients of llama.cpp look; tokens go there and back."""
    assert http.get("/props").json()["default_generation_settings"]["n_ctx"] == CONTEXT
    assert http.get("/v1/models").json()["data"][0]["meta"]["n_ctx"] == CONTEXT
    tokens = http.post("/tokenize", json={"content": "hello é 🎉"}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": tokens}).json() == {"content": "hello é 🎉"}


@pytest.mark.engine
def test_simultaneous_requests_of_equal_length_are_all_served(http: httpx.Client) -> None:
    """In one batch the wheel would fail all of them; here they take turns."""
    statuses = []
    threads = [
        threading.Thread(
            target=lambda: statuses.append(
                http.post("/v1/completions", json={"prompt": "one two", "max_tokens": 2}).status_code
            )
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 4


@pytest.mark.engine
def test_a_client_that_leaves_frees_the_engine(base: str, http: httpx.Client) -> None:
    """Streaming, waiting for a whole answer, or queued: none of the three delays the next request to its own end."""
    endless = {"prompt": "one two", "max_tokens": CONTEXT - 8, "ignore_eos": True}
    path = f"{base}/v1/completions"
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.stream("POST", path, json=endless | {"stream": True}, headers=headers, timeout=60) as running:
        next(running.iter_lines())
        with pytest.raises(httpx.ReadTimeout):  # queued, gives up
            httpx.post(path, json=endless, headers=headers, timeout=0.3)
    with pytest.raises(httpx.ReadTimeout):  # running, gives up
        httpx.post(path, json=endless, headers=headers, timeout=0.3)
    started = time.monotonic()
    reply = http.post("/v1/completions", json={"prompt": "one", "max_tokens": 1})
    waited_s = time.monotonic() - started
    whole = http.post("/v1/completions", json=endless | {"max_tokens": 16}).json()
    per_token_s = (time.monotonic() - started - waited_s) / whole["usage"]["completion_tokens"]
    assert reply.status_code == 200
    assert waited_s < CONTEXT * per_token_s, "an abandoned generation ran to its end"


@pytest.mark.engine
def test_it_answers_503_while_loading_then_stops_at_once_during_a_request(tmp_path: Path) -> None:
    """The port is open from the start; SIGTERM ends a stream with an error, not with [DONE], and the exit code is 0."""
    port, log = free_port(), tmp_path / "log"
    process = start(installed.smollm2("mistralrs"), port, log)
    statuses: list[int | None] = []

    def ready() -> bool:
        statuses.append(health(port))
        return statuses[-1] == 200

    try:
        wait_for("ready", ready)
        body = {"prompt": "one", "ignore_eos": True, "stream": True}
        url, headers = f"http://127.0.0.1:{port}/v1/completions", {"Authorization": f"Bearer {KEY}"}
        with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert process.wait(30) == 0
    finally:
        process.kill()
    assert 503 in statuses
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == 503
    assert "listening on" in log.read_text(errors="replace")


@pytest.mark.engine
def test_sigterm_while_loading_ends_it(tmp_path: Path) -> None:
    """Loading holds Python's lock, so the kernel ends the process; the child that answers 503 goes with it."""
    port = free_port()
    process = start(installed.smollm2("mistralrs"), port, tmp_path / "log")
    try:
        wait_for("listening", lambda: health(port) is not None)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
    finally:
        process.kill()
    wait_for("port closed", lambda: health(port) is None, 30)


@pytest.mark.engine
def test_a_model_that_cannot_be_loaded_ends_it_with_one_line(tmp_path: Path) -> None:
    """Exit code 1 and the reason, without the wheel's backtrace."""
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(installed.smollm2("mistralrs").read_bytes()[: 4 * 1024 * 1024])
    process = start(cut, free_port(), tmp_path / "log")
    try:
        assert process.wait(120) == 1
    finally:
        process.kill()
    errors = [line for line in (tmp_path / "log").read_text(errors="replace").splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "cut.gguf" in errors[0]


@pytest.mark.engine
def test_a_busy_port_and_an_open_host_without_a_key_are_refused(tmp_path: Path) -> None:
    """Exit code 1 before loading for the port, 2 for an address that others can reach."""
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        process = start(installed.smollm2("mistralrs"), busy.getsockname()[1], tmp_path / "log")
        assert process.wait(60) == 1
    process = start(installed.smollm2("mistralrs"), free_port(), tmp_path / "log", "--host", "0.0.0.0", key="")
    assert process.wait(60) == 2
    assert "SWITCHYARD_ENGINE_API_KEY" in (tmp_path / "log").read_text()


async def test_small_answers_are_not_held_back_for_an_acknowledgement() -> None:
    """Connections that the server accepts have Nagle off, as asyncio has it for sockets that are named as TCP."""
    accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        accepted.set_result(held)
        writer.close()

    listener = listen("127.0.0.1", 0)
    async with await asyncio.start_server(connected, sock=listener):
        _, writer = await asyncio.open_connection(*listener.getsockname())
        async with asyncio.timeout(10):
            assert await accepted != 0
        writer.close()


def test_the_space_at_the_beginning_of_a_completion_is_kept(http: httpx.Client) -> None:
    """The wheel leaves it out: what a client appends to its prompt would run two words together."""
    body = {"prompt": "The capital of France is", "max_tokens": 3, "temperature": 0}
    whole = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    streamed = "".join(chunk["choices"][0]["text"] for chunk in chunks_of(stream(http, "/v1/completions", **body)))
    assert whole == streamed
    assert whole.startswith(" ")
