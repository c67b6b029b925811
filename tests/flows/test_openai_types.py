"""Every answer, chunk and error of each real engine here, through the yard, is one that OpenAI's own types read."""

import json

import httpx
import installed
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import TypeAdapter
from real_yard import HOSTED, LOCAL, Yard
from switchyard_command import environment_of

from engines.errors import EngineNotFound
from engines.registry import driver
from engines.vllm.convert import convert
from tasks.evidence.soak.prompts import TOOL

pytestmark = pytest.mark.engine

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASKED = {"messages": [{"role": "user", "content": "Name a river."}], "max_tokens": 12, "temperature": 0}
CHATS = {
    "plain": {},
    "logprobs": {"logprobs": True, "top_logprobs": 3},
    "stop": {"stop": ["\n", "."]},
    "required tool": {"tools": [TOOL], "tool_choice": "required", "max_tokens": 40},
    "offered tool": {"tools": [TOOL]},
    "JSON": {"response_format": {"type": "json_object"}},
    "a token": {"max_tokens": 1},
}
# what an engine does not have at all with this model, and says with an error
WITHOUT = {"mistral.rs": {"required tool"}, "ollama": {"required tool", "offered tool"}}
# a call that max_tokens cuts short: whole answers have its text, streams nothing of it
WITHHELD = {("vllm", "required tool")}
CANDIDATES = {
    "mistral.rs": HOSTED,
    "ollama": 'engine = "ollama"',
    "vllm": 'engine = "vllm"\nargs = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]',
}


@pytest.fixture(scope="module", params=["llama.cpp", *CANDIDATES])
def http(request, tmp_path_factory):
    """A client of a yard in which this engine serves; one that is not here is skipped, with how it is got."""
    name = request.param
    gguf = installed.smollm2(*installed.BOTH)
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("plan")
    model = ""
    if name in ("ollama", "vllm"):
        try:
            found = driver(name).find()
        except EngineNotFound as error:
            pytest.skip(f"{error}; make engines gets it")
        if name == "vllm":
            convert(found, gguf, folder / "hf", home)
            model = f"[models.sources]\nvllm = {str(folder / 'hf')!r}"
    yard = Yard(environment_of(home), home, folder, candidate=CANDIDATES.get(name, HOSTED), model=model).ready()
    try:
        if name in CANDIDATES:
            yard.orders.order("promote", to=name)
        with httpx.Client(base_url=f"http://127.0.0.1:{yard.port}", timeout=120, **LOCAL) as client:
            client.engine = name
            yield client
    finally:
        yard.end()


def read_as(kind, value):
    """Validated strictly: a number as text, a missing id or a null where a list belongs is none of these types."""
    return TypeAdapter(kind).validate_json(json.dumps(value), strict=True)


def events(text):
    lines = [line for line in text.splitlines() if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines), lines
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


@pytest.mark.parametrize("name", CHATS)
def test_a_chat(http, name):
    if name in WITHOUT.get(http.engine, ()):
        pytest.skip(f"{http.engine} does not do this with this model")
    body = {**ASKED, **CHATS[name]}
    whole = http.post(CHAT, json=body)
    assert whole.status_code == 200, whole.text
    answer = read_as(ChatCompletion, whole.json())
    assert answer.usage is not None
    streamed = http.post(CHAT, json={**body, "stream": True, "stream_options": {"include_usage": True}})
    chunks = [read_as(ChatCompletionChunk, event) for event in events(streamed.text)]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    ends = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert ends == [answer.choices[0].finish_reason]
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage][-1] == answer.usage.completion_tokens
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == ("" if (http.engine, name) in WITHHELD else answer.choices[0].message.content or "")


def test_a_text(http):
    body = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    whole = http.post(TEXT, json=body)
    read_as(Completion, whole.json())
    found = events(http.post(TEXT, json={**body, "stream": True}).text)
    for choice in (choice for event in found for choice in event["choices"]):
        choice["finish_reason"] = choice["finish_reason"] or "length"  # OpenAI's own streams have null before the end
    streamed = [read_as(Completion, event) for event in found]
    assert "".join(choice.text for chunk in streamed for choice in chunk.choices) == whole.json()["choices"][0]["text"]


def test_the_list_of_models(http):
    listed = http.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [read_as(Model, one).id for one in listed["data"]] == ["smollm2"]


@pytest.mark.parametrize("body", [{}, {"messages": "hi"}, {**ASKED, "temperature": "warm"}])
def test_an_error(http, body):
    refused = http.post(CHAT, json=body)
    assert 400 <= refused.status_code < 500, refused.text
    error = refused.json()["error"]
    assert {"message", "type"} <= set(error)
    assert isinstance(error["message"], str)
