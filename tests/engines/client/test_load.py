"""A batch of requests ends at once with Ctrl-C, wherever that comes."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from aiohttp.streams import StreamReader
from openai_stub import MODEL, stub

from engines.client.load import measure
from engines.settings import Endpoint


class Interrupted(KeyboardInterrupt):
    """What the command's own handler raises."""


@pytest.fixture
def _raises_on_sigint() -> Any:
    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGINT, interrupt)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_raises_on_sigint")
def test_an_interrupt_in_a_callback_of_the_loop_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """aiohttp closes the connection, uvloop drops what comes out of it then: the stream seemed cut by the engine."""
    feed, calls = StreamReader.feed_data, iter(range(1000))

    def interrupted(self: StreamReader, *given: Any) -> Any:
        if next(calls) == 0:
            signal.raise_signal(signal.SIGINT)
        return feed(self, *given)

    monkeypatch.setattr(StreamReader, "feed_data", interrupted)
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    with stub() as base_url, pytest.raises(Interrupted):
        measure(Endpoint(base_url=base_url, model_id=MODEL, engine="stub"), [body] * 4, concurrency=2)
    assert signal.getsignal(signal.SIGINT).__name__ == "interrupt"
