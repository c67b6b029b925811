"""The OpenAI client, and llama.cpp's own requests, through a yard whose engine speaks another dialect."""

import json
import math
import sys
from pathlib import Path

import httpx
import installed
import openai
import pytest

from engines.errors import EngineNotFound
from engines.registry import DRIVERS

STUB = Path(__file__).parents[2] / "rig" / "mistralrs_stub.py"
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def stub_yard(start_yard, tmp_path):
    """A yard whose engine is the stub, started by the real driver."""

    def start(version="0.9.2"):
        program = tmp_path / "mistralrs"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STUB}" --stub-version {version} "$@"\n')
        program.chmod(0o755)
        return start_yard(old_driver="mistral.rs", old_binary=program, models="m").ready()

    return start


def client(yard):
    return openai.OpenAI(base_url=f"{yard.url}/v1", api_key="none", max_retries=0)


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
LONG = [{"role": "user", "content": "word " * 100}]


def test_the_openai_client_sees_llama_cpp(stub_yard):
    with client(stub_yard()) as ai:
        stream = list(ai.chat.completions.create(model="m-alias", messages=MESSAGES, stream=True))
        assert stream[0].choices[0].delta.role == "assistant"
        assert "".join(one.choices[0].delta.content or "" for one in stream) == "Hello there, friend."
        assert [one.choices[0].finish_reason for one in stream if one.choices[0].finish_reason] == ["stop"]
        assert {one.model for one in stream} == {"m"}
        assert all(one.usage is None for one in stream)
        assert stream[-1].timings["predicted_n"] == 5

        with_usage = list(
            ai.chat.completions.create(
                model="m", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, max_tokens=2
            )
        )
        assert (with_usage[-1].choices, with_usage[-1].usage.completion_tokens) == ([], 2)

        whole = ai.chat.completions.create(
            model="x", messages=MESSAGES, max_tokens=0, logprobs=True, top_logprobs=2, extra_body={"n": None}
        )
        assert (whole.model, whole.choices[0].message.content, whole.choices[0].finish_reason) == (
            "m",
            "Hello",
            "length",
        )
        assert whole.choices[0].logprobs.content[0].top_logprobs[1].token == "Hi"

        asked_for = [{"role": "user", "content": "call"}]
        calls = [
            call.function
            for one in ai.chat.completions.create(model="m", messages=asked_for, stream=True, tools=[TOOL])
            for call in one.choices[0].delta.tool_calls or []
        ]
        assert [(call.name, call.arguments) for call in calls] == [("weather", '{"city":"Paris"}')]

        text = ai.completions.create(model="m", prompt="hi", max_tokens=2, stream=True)
        assert [one.choices[0].text for one in text] == ["Hello", " there", ""]


@pytest.mark.parametrize("version", ["0.9.2", "0.9.5"])
def test_errors_of_the_binary_are_errors_to_the_openai_client(stub_yard, version):
    """Version 0.9.2 tells them as raw text in a stream, later ones as JSON."""
    with client(stub_yard(version)) as ai:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="greater than 64") as refused:
                ai.chat.completions.create(model="m", messages=LONG, stream=stream)
            assert (refused.value.status_code, refused.value.type) == (400, "exceed_context_size_error")
            assert refused.value.body["n_ctx"] == 64
        with pytest.raises(openai.BadRequestError, match="invalid type"):
            ai.chat.completions.create(model="m", messages=MESSAGES, temperature="hot")
        failing = ai.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "fail midway"}], stream=True
        )
        with pytest.raises(openai.APIError, match="shape mismatch"):
            list(failing)


def test_a_comment_before_an_error_does_not_hide_it(stub_yard):
    """The program comments every ten seconds while it has no token."""
    with client(stub_yard()) as ai, pytest.raises(openai.BadRequestError, match="greater than 64"):
        ai.chat.completions.create(model="m", messages=[*LONG, {"role": "user", "content": "slow"}], stream=True)


@pytest.mark.parametrize("version", ["0.8.1", "0.9.2"])
def test_log_probabilities_are_natural_ones(stub_yard, version):
    """Before 0.9.1 the program's have base 10, and are raw logits where it is asked greedily; null is nobody's."""
    with client(stub_yard(version)) as ai:
        for temperature in (0, 1):
            answer = ai.chat.completions.create(
                model="m", messages=MESSAGES, logprobs=True, top_logprobs=3, temperature=temperature
            )
            logprobs = answer.choices[0].logprobs
            told = [one.logprob for one in logprobs.content[0].top_logprobs]
            alone = version == "0.8.1" and temperature == 0
            assert told == pytest.approx([math.log(0.5)] if alone else [math.log(0.5), math.log(0.1)])
            assert logprobs.content[0].logprob == told[0]


def test_an_error_within_a_stream_counts_as_one(stub_yard):
    """A canary is judged by it, although its status was 200."""
    yard = stub_yard()
    with yard.http() as http:
        body = {"messages": [{"role": "user", "content": "fail midway"}], "stream": True}
        answer = http.post(CHAT, json=body)
        assert answer.status_code == 200
        assert http.post(CHAT, json={"messages": LONG, "stream": True}).status_code == 400
        counted = [line for line in http.get("/metrics").text.splitlines() if "requests_total{" in line]
        for outcome in ("error", "client_error"):  # the prompt that is too long is the client's
            assert any(f'outcome="{outcome}"' in line and line.endswith(" 1.0") for line in counted), counted


def test_props_and_tokenize_where_the_engine_has_none(stub_yard):
    yard = stub_yard()
    with yard.http() as http:
        props = http.get("/props").json()
        assert props["default_generation_settings"]["n_ctx"] > 0
        assert props["model_alias"] == "m"
        refused = http.post("/tokenize", json={"content": "hi"})
        assert (refused.status_code, refused.json()["error"]["type"]) == (501, "not_supported_error")


# --- real engines

SHORT = [{"role": "system", "content": "x"}, *MESSAGES]  # the system prompt of the template is long


def _kinds(url):
    """Each chunk of a streamed chat as its kind and its keys, repeats once; and what each error looked like."""
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as http:
        seen = []
        for options in ({}, {"stream_options": {"include_usage": True}}):
            body = {"messages": SHORT, "stream": True, "max_tokens": 3, "temperature": 0, **options}
            lines = http.post(CHAT, json=body).text.splitlines()
            kinds = [_kind(json.loads(line[6:])) for line in lines if line.startswith("data: {")]
            assert "data: [DONE]" in lines
            assert kinds
            seen.append([kind for at, kind in enumerate(kinds) if at == 0 or kind != kinds[at - 1]])
        errors = [http.post(CHAT, json=body) for body in ({"messages": 5}, {"messages": SHORT, "temperature": "hot"})]
        assert all("error" in error.json() for error in errors), [(error.status_code, error.text) for error in errors]
        shapes = [(error.status_code, error.json()["error"]["code"], error.json()["error"]["type"]) for error in errors]
        none = http.post(CHAT, json={"messages": SHORT, "max_tokens": 0, "top_k": -1, "n_predict": None}).json()
        assert none["usage"]["completion_tokens"] == 1
        return seen, shapes, http.get("/props").json()


def _kind(body):
    # the host says `logprobs: null` as OpenAI does, and has no build to give as system_fingerprint
    head = tuple(sorted(set(body) - {"system_fingerprint"}))
    if not body["choices"]:
        return head, tuple(sorted(set(body["usage"]) - {"prompt_tokens_details"}))
    (choice,) = body["choices"]
    assert choice.get("logprobs") is None
    return head, tuple(sorted(set(choice) - {"logprobs"})), tuple(sorted(choice["delta"])), choice["finish_reason"]


@pytest.mark.engine
@pytest.mark.parametrize("other", ["hosted", "binary"])
def test_a_streamed_chat_looks_the_same_from_both_real_engines(start_yard, other):
    model = installed.smollm2()
    seen = {}
    for name, form in (("llama.cpp", "auto"), ("mistral.rs", other)):
        try:
            DRIVERS[name].find(form)
        except EngineNotFound as error:
            pytest.skip(f"{error}; or pip install -e '.[demo]', or make engines")
        yard = start_yard(old_driver=name, old_form=form, gguf=model, parallel=1).ready()
        seen[name] = _kinds(yard.url)
        yard.end()
    (old_kinds, old_errors, old_props), (new_kinds, new_errors, new_props) = seen.values()
    assert new_kinds == old_kinds
    assert new_errors == old_errors
    context = [props["default_generation_settings"]["n_ctx"] for props in (old_props, new_props)]
    assert context[0] == context[1] > 0
    assert {"model_path", "modalities", "total_slots", "model_alias"} <= set(new_props) & set(old_props)
