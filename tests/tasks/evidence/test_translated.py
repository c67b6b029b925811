"""What is measured of an engine is what clients of the yard meet: its dialect translates both ways."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from gguf_files import LLAMA, write_gguf
from openai_stub import CONTEXT_TOKENS, KEY, MODEL, stub

from engines.driver import Installation
from engines.mistral_rs.driver import MistralRs
from engines.process.serving import free_port, serving
from engines.registry import driver
from engines.settings import Endpoint, Serve
from tasks.evidence.behaviours.caller import Caller
from tasks.evidence.compatibility import measure_compatibility

STUB = Path(__file__).parents[2] / "rig" / "mistralrs_stub.py"
LONG = "word " * 100


@pytest.fixture(scope="module")
def mistralrs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    """A caller of the stand-in for `mistralrs`, as an evaluation launches it."""
    folder = tmp_path_factory.mktemp("mistralrs")
    program, gguf = folder / "mistralrs", write_gguf(folder / "m.gguf", keys=LLAMA)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STUB}" --stub-version 0.8.1 "$@"\n')
    program.chmod(0o755)
    one, serve = MistralRs(), Serve(model_id="m", gguf=gguf, port=free_port())
    with (
        serving(one, one.find("binary", program), serve, state_dir=folder, log_path=folder / "log") as served,
        Caller(served.endpoint) as caller,
    ):
        yield caller


def test_a_stream_has_llama_cpps_shape(mistralrs: Caller) -> None:
    """The program has no chunk for the role, and its usage where nobody asked for it."""
    stream = mistralrs.stream("hi").served()
    assert (stream.deltas[0], stream.text, stream.done) == (
        {"role": "assistant", "content": None},
        "Hello there, friend.",
        True,
    )
    assert (stream.finishes, stream.usages, stream.undecodable) == (["stop"], [], [])
    assert mistralrs.stream("hi", leave_after=2).text == "Hello there"


def test_an_error_before_all_else_is_an_answer(mistralrs: Caller) -> None:
    """It comes in a stream there; a client of llama.cpp gets 400 and an error object, streamed or not."""
    refusal = mistralrs.stream(LONG).refusal
    assert refusal is not None
    for reply in (refusal, mistralrs.chat(LONG)):
        assert (reply.status, reply.error["type"]) == (400, "exceed_context_size_error")


def test_what_the_dialect_refuses_is_refused(mistralrs: Caller) -> None:
    """And a model that is not there stays one: which there are is the yard's to say."""
    assert mistralrs.chat("hi", grammar='root ::= "a"').status == 400
    assert mistralrs.post("/tokenize", {"content": "a"}).status == 501
    assert "is not available" in mistralrs.chat("hi", model="another").error_text
    assert mistralrs.chat("hi", n_predict=1, max_tokens=None).text == "Hello"
    assert mistralrs.get("/health").status == 200


def test_a_limit_beyond_the_context_is_vllms_whole_context() -> None:
    """It refuses one with 400 that llama.cpp clamps; clients of llama.cpp send such limits."""
    name = "max_tokens_beyond_context"
    vllm = driver("vllm").dialect(Installation("vllm", "binary", ("python",), "0.32.0"))
    with stub("refuses a large max_tokens") as url:
        endpoint = Endpoint(base_url=url, model_id=MODEL, engine="vllm", context_tokens=CONTEXT_TOKENS, api_key=KEY)
        speaks = partial(vllm, context_tokens=CONTEXT_TOKENS)
        seen = [
            measure_compatibility(one, names=[name])
            for one in (endpoint, endpoint.model_copy(update={"speaks": speaks}))
        ]
    assert [one["behaviours"][name]["outcome"] for one in seen] == ["failed", "passed"]
