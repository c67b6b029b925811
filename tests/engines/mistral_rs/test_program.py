"""`mistralrs` 0.8.1 and the stand-in that plays it, asked the same: where they differ, the stand-in is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import installed
import pytest
from gguf_files import write_gguf

from engines.errors import EngineExited, PortTaken
from engines.home import engines_folder
from engines.mistral_rs.driver import MistralRs
from engines.process.serving import free_port, serving
from engines.settings import Serve, Settings

STUB = Path(__file__).parents[2] / "rig" / "mistralrs_stub.py"
VERSION = "0.8.1"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "hi"}], "max_tokens": 3}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
NAMED = {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "weather"}}}
HEAD = {"id", "created", "model", "system_fingerprint", "object", "choices"}


@dataclass
class Program:
    path: Path
    gguf: Path
    url: str = ""

    def serve(self, gguf: Path, port: int = 0) -> Serve:
        return Serve(model_id="m", gguf=gguf, port=port or free_port(), settings=Settings(gpu_layers=0, threads=1))

    def up(self, home: Path, gguf: Path | None = None, port: int = 0) -> Any:
        driver, serve = MistralRs(), self.serve(gguf or self.gguf, port)
        found = driver.find("binary", self.path)
        return serving(driver, found, serve, state_dir=home, log_path=home / "logs" / "engine.log")

    def ask(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=120, trust_env=False)


@pytest.fixture(scope="module", params=["stand-in", pytest.param("real", marks=pytest.mark.engine)])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    folder = tmp_path_factory.mktemp("program")
    if request.param == "real":
        path, gguf = engines_folder() / f"mistralrs-{VERSION}" / "bin" / "mistralrs", installed.smollm2()
        if not path.exists():
            pytest.skip(f"no {path}: make engines builds it, in an hour")
    else:
        path, gguf = folder / "mistralrs", write_gguf(folder / "m.gguf")
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STUB}" --stub-version {VERSION} "$@"\n')
        path.chmod(0o755)
    made = Program(path, gguf)
    with made.up(folder) as served:
        made.url = served.endpoint.base_url
        yield made


def test_it_is_found_with_its_version_and_flags(program: Program) -> None:
    found = MistralRs().find("binary", program.path)
    assert (found.form, found.version) == ("binary", VERSION)
    for flag in ("--max-seqs", "--cpu", "--token-source", "--pa-context-len"):
        assert found.knows(flag)
    for flag in ("--no-ui", "--max-num-batched-tokens"):
        assert not found.knows(flag)


def test_health_is_a_constant_and_there_are_no_metrics(program: Program) -> None:
    """Nothing but the tokens that pass shows progress."""
    with httpx.Client(base_url=program.url, trust_env=False) as http:
        assert (http.get("/health").status_code, http.get("/health").text) == (200, "OK")
        assert [(answer.status_code, answer.text) for answer in map(http.get, ("/metrics", "/props"))] == [
            (404, "")
        ] * 2
        models = http.get("/v1/models").json()["data"]
    assert [one["id"] for one in models] == ["default", str(program.gguf.parent)]
    assert models[1]["status"] == "loaded"


@pytest.mark.parametrize(
    ("path", "change", "status", "said"),
    [
        (CHAT, {"model": "other"}, 500, "is not available. Available models: "),
        (CHAT, {"messages": [{"role": "user"}]}, 500, "No content was provided, expected tool calls to be provided."),
        (CHAT, {"n": 0}, 422, "Number of choices must be greater than 0."),
        (CHAT, {"messages": [{"role": "user", "content": "word " * 9000}]}, 422, r"Prompt sequence .* than (64|8192),"),
        (CHAT, {"grammar": {"type": "regex", "value": "a"}, "response_format": {"type": "text"}}, 500, "exclusive"),
        (CHAT, NAMED, 500, "Tool choice was required but no tools were called."),
        (TEXT, {"prompt": ""}, 422, "Received an empty prompt."),
    ],
)
def test_an_error_has_no_error_key(program: Program, path: str, change: Any, status: int, said: str) -> None:
    body = {**(HI if path == CHAT else {"max_tokens": 3}), **change}
    answer = program.ask(path, **body)
    assert answer.status_code == status
    assert set(answer.json()) <= {"message", "partial_response"}
    assert re.search(said, answer.json()["message"])


@pytest.mark.parametrize(
    ("path", "change"),
    [
        (CHAT, {"messages": 5}),
        (CHAT, {"temperature": "hot"}),
        (CHAT, {"model": None}),
        (CHAT, {"n": None}),
        (CHAT, {"logprobs": None}),
        (CHAT, {"max_tokens": -1}),
        (CHAT, {"tool_choice": "required", "tools": [TOOL]}),
        (CHAT, {"response_format": {"type": "json_object"}}),
        (TEXT, {"prompt": ["a"]}),
        (TEXT, {"prompt": "a", "logprobs": True}),
    ],
)
def test_a_wrong_type_is_422_in_plain_text(program: Program, path: str, change: Any) -> None:
    answer = program.ask(path, **{**(HI if path == CHAT else {}), **change})
    assert (answer.status_code, answer.headers["content-type"]) == (422, "text/plain; charset=utf-8")
    assert answer.text.startswith("Failed to deserialize the JSON body into the target type: ")


def test_what_is_no_json_is_refused_in_plain_text(program: Program) -> None:
    post = {"url": program.url + CHAT, "trust_env": False}
    broken = httpx.post(**post, content=b"{", headers={"content-type": "application/json"})
    assert (broken.status_code, broken.text[:42]) == (400, "Failed to parse the request body as JSON: ")
    untyped = httpx.post(**post, content=b"{}")
    assert (untyped.status_code, untyped.text) == (415, "Expected request with `Content-Type: application/json`")


@pytest.mark.parametrize("parts", [False, True])
def test_a_whole_answer(program: Program, parts: bool) -> None:
    """Parts of text are taken from a system message too."""
    content: Any = [{"type": "text", "text": "x"}] if parts else "x"
    messages = [{"role": "system", "content": content}, {"role": "user", "content": "hi"}]
    body = program.ask(CHAT, model=str(program.gguf.parent), messages=messages, max_tokens=2).raise_for_status().json()
    assert set(body) == HEAD | {"usage"}
    assert body["model"] == str(program.gguf.parent)
    (choice,) = body["choices"]
    assert set(choice) == {"finish_reason", "index", "message", "logprobs"}
    assert choice["message"] | {"content": ""} == {"content": "", "role": "assistant", "tool_calls": None}
    assert (choice["finish_reason"], body["usage"]["completion_tokens"]) == ("length", 2)
    assert {"total_prompt_time_sec", "avg_compl_tok_per_sec"} <= set(body["usage"])


def test_no_token_at_all_cannot_be_asked_for(program: Program) -> None:
    assert program.ask(CHAT, **{**HI, "max_tokens": 0}).json()["usage"]["completion_tokens"] == 1


def events(answer: httpx.Response) -> list[Any]:
    """Data of a stream's events; what is no JSON as it stands."""
    assert answer.status_code == 200
    data = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [json.loads(one) if one.startswith("{") else one for one in data]


def test_a_stream_has_no_role_chunk_and_usage_in_its_last(program: Program) -> None:
    for options in ({}, {"stream_options": {"include_usage": True}}):
        chunks = events(program.ask(CHAT, stream=True, **HI, **options))
        assert len(chunks) == 3
        for chunk in chunks:
            assert set(chunk) == HEAD | {"usage"}
            assert chunk["choices"][0]["delta"].keys() == {"content", "role", "tool_calls"}
            assert chunk["choices"][0]["delta"]["content"]
        assert [chunk["usage"] is None for chunk in chunks] == [True, True, False]
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]


def test_a_stream_of_text_has_no_usage(program: Program) -> None:
    chunks = events(program.ask(TEXT, prompt="hello world", max_tokens=2, stream=True))
    assert [set(chunk) for chunk in chunks] == [HEAD] * 2
    assert set(chunks[0]["choices"][0]) == {"text", "index", "logprobs", "finish_reason"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, "Prompt sequence length is greater than"),
        (NAMED, "Tool choice was required but no tools were called."),
    ],
)
def test_an_error_in_a_stream_is_raw_text_behind_a_200(program: Program, change: Any, said: str) -> None:
    (event,) = events(program.ask(CHAT, **{**HI, **change, "stream": True}))
    assert event.startswith(said)


def test_log_probabilities_have_base_10(program: Program) -> None:
    """Those of all tokens that are left sum to 1 with it; what top_k left out has none."""
    body = {**HI, "temperature": 1.0, "top_k": 2, "logprobs": True, "top_logprobs": 3}
    (first, *_) = program.ask(CHAT, **body).json()["choices"][0]["logprobs"]["content"]
    told = [one["logprob"] for one in first["top_logprobs"]]
    assert [type(one["token"]) for one in first["top_logprobs"]] == [int] * 3
    assert {type(one["bytes"]) for one in first["top_logprobs"]} == {str}
    assert told[2] is None
    assert 0 < sum(10**one for one in told[:2]) <= 1.001


def test_greedy_log_probabilities_are_of_raw_logits(program: Program) -> None:
    """So greedy is asked for as temperature 1 and the best token alone: the same text, with its probability."""
    asked = {**HI, "logprobs": True, "top_logprobs": 3}
    raw, alone = (
        program.ask(CHAT, **asked, **how).json()["choices"][0]
        for how in ({"temperature": 0}, {"temperature": 1, "top_k": 1, "top_p": 1, "min_p": 0})
    )
    first = raw["logprobs"]["content"][0]
    assert first["logprob"] > 0
    assert first["logprob"] >= first["top_logprobs"][1]["logprob"] > 0
    assert raw["message"]["content"] == alone["message"]["content"]
    for one in alone["logprobs"]["content"]:
        assert one["logprob"] <= 0
        assert [top["logprob"] for top in one["top_logprobs"]] == [one["logprob"], None, None]


# --- as a process


def test_sigterm_ends_it(program: Program, tmp_path: Path) -> None:
    with program.up(tmp_path) as served:
        os.kill(served.process.pid, signal.SIGTERM)
        assert served.process.wait() == -signal.SIGTERM


def test_a_port_in_use_is_said(program: Program, tmp_path: Path) -> None:
    """After the model was loaded."""
    port = int(program.url.rpartition(":")[2])
    with pytest.raises((PortTaken, EngineExited)), program.up(tmp_path, port=port):
        pass


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("cut", "failed to fill whole buffer"),
        ("text", "unknown magic 0x68746f6e"),
        ("architecture", "Unknown GGUF architecture `mamba9`"),
    ],
)
def test_a_file_that_it_cannot_load_is_said(program: Program, tmp_path: Path, broken: str, said: str) -> None:
    gguf = tmp_path / "broken.gguf"
    if broken == "architecture":
        write_gguf(gguf, "mamba9")
    else:
        gguf.write_bytes(program.gguf.read_bytes()[:600] if broken == "cut" else b"nothing\n")
    with pytest.raises(EngineExited, match=re.escape(said)), program.up(tmp_path, gguf):
        pass
