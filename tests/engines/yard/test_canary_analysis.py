"""The yard's own eye on a canary: a bad one rolls itself back, a good one says that it is ready."""

import asyncio
import collections
import contextlib
import json
import threading
import time
import types

import aiohttp
import pytest
from waiting import until

from engines.yard.canary_analysis import CanaryAnalysis
from engines.yard.metrics import LiveSample
from engines.yard.state import Canary

# a fake engine on a busy machine is not steady: wide margins, few blocks
LIMITS = {
    "failure_rate_margin": 0.05,
    "ttft_p50_ratio": 3.0,
    "tpot_p50_ratio": 3.0,
    "looks": [4, 12, 36],
    "block_requests": 6,
}
QUICK = {"canary_judge_s": 0.2}


class Talk:
    """Streamed chats of ever new conversations, some at a time, until stopped; `broken` holds what went wrong."""

    def __init__(self, yard, clients=4, words=4):
        self.done, self.broken = 0, []
        self._yard, self._clients, self._words = yard, clients, words
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join(60)

    async def _run(self):
        async with aiohttp.ClientSession() as http:
            await asyncio.gather(*(self._client(http, number) for number in range(self._clients)))

    async def _client(self, http, number):
        while not self._stop.is_set():
            body = {
                "model": "m",
                "messages": [{"role": "user", "content": f"{number} {self.done}"}],
                "max_tokens": self._words,
                "stream": True,
            }
            async with http.post(f"{self._yard.url}/v1/chat/completions", json=body) as answer:
                text = await answer.text()
            if answer.status != 200 or "[DONE]" not in text:
                self.broken.append((answer.status, text[-200:]))
            self.done += 1


def begin(start_yard, weight=0.5, **options):
    yard = start_yard(
        **{"canary-limits": json.dumps(LIMITS), "settings": QUICK, "old": "--ttft-ms 10 --itl-ms 2"} | options
    ).ready()
    until(lambda: yard.engine("old")["memory_bytes"], "the memory of the engine, to know what fits beside it")
    yard.orders.order("canary", model="m", weight=weight)
    return yard


def events(yard, kind):
    return [event["what"] for event in yard.orders.status()["events"] if event["kind"] == kind]


def out(yard):
    return yard.route()["canary"] is None and yard.route()["moving"] is None


def test_a_good_canary_is_ready_to_promote(start_yard):
    """It says so once, shows it in the status, and moves nothing by itself."""
    yard = begin(start_yard, new="--ttft-ms 10 --itl-ms 2")
    with Talk(yard) as talk:
        until(lambda: (yard.route()["canary"] or {}).get("verdict") == "PASS", "a verdict", 90)
        so_far = talk.done
        until(lambda: talk.done > so_far + 100, "more traffic under the same canary")
    assert talk.broken == []
    canary = yard.route()["canary"]
    assert (canary["engine"], canary["weight"], canary["verdict"]) == ("new", 0.5, "PASS")
    assert {check["check"] for check in canary["checks"]} >= {"canary.error_rate", "canary.ttft_p50_ratio"}
    assert min(canary["requests"]["old"], canary["requests"]["new"]) > 24
    assert events(yard, "canary") == ["canary is ready to promote at 50%: `switchyard promote m`"]
    assert yard.route()["serving"] == "old"


@pytest.mark.parametrize(
    ("habits", "why"),
    [
        ("--ttft-ms 10 --itl-ms 2 --silent-empty", "canary.silent_empty"),
        ("--ttft-ms 200 --itl-ms 2", "canary.ttft_p50_ratio"),
        ("--ttft-ms 10 --itl-ms 40", "canary.tpot_p50_ratio"),
    ],
    ids=["silent", "late", "slow"],
)
def test_a_bad_canary_rolls_itself_back(start_yard, habits, why):
    """The user's requests all end well, and the status still says what was wrong with it."""
    yard = begin(start_yard, new=habits)
    with Talk(yard) as talk:
        until(lambda: out(yard), "the canary to be taken out", 90)
    assert talk.broken == []
    last = yard.route()["last_canary"]
    assert (last["engine"], last["verdict"]) == ("new", "FAIL")
    assert why in last["why"]
    assert any("the canary failed and is taken out" in what and why in what for what in events(yard, "incident"))
    assert yard.engine("new")["state"] == "stopped"
    assert yard.route()["serving"] == "old"


def test_a_canary_without_restarts_left_is_taken_out(start_yard):
    """No judge is needed for an engine that cannot be kept up, and no user sees it die."""
    quick = {"canary_judge_s": 600, "restarts": 1, "restart_window_s": 600}
    yard = begin(start_yard, settings=quick, new="--die-after-s 3")
    until(lambda: out(yard), "the canary to be taken out", 60)
    assert "cannot be kept up" in yard.route()["last_canary"]["why"]
    assert yard.route()["serving"] == "old"


def test_a_canary_that_has_become_the_fallback_stays_up(start_yard):
    """With the incumbent out of order the canary serves all: taking it out as a canary must not end it."""
    yard = begin(start_yard, settings={**QUICK, "restarts": 0}, old="--die-after-s 4")
    until(lambda: yard.route()["fallback"] == "new", "the fallback")
    yard.orders.order("rollback", model="m")
    assert yard.route()["canary"] is None
    with yard.http() as http:
        body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        assert http.post("/v1/chat/completions", json=body).status_code == 200


def test_another_order_is_another_canary(start_yard):
    """Only requests since the order count: a new weight begins without a verdict."""
    yard = begin(start_yard, new="--ttft-ms 10 --itl-ms 2")
    with Talk(yard):
        until(lambda: (yard.route()["canary"] or {}).get("requests", {}).get("new", 0) > 30, "a judgement", 60)
    before = yard.route()["canary"]["since"]
    yard.orders.order("canary", model="m", weight=0.25)
    canary = yard.route()["canary"]
    assert canary["since"] > before
    assert "verdict" not in canary


class Bench:
    """The watch over a route without engines, and a judge of the test's own; `moves` holds what was ordered."""

    def __init__(self, judge):
        self.notes, self.moves = [], []
        unit = types.SimpleNamespace(engine="new", budget=types.SimpleNamespace(exhausted=False), why="")
        canary = Canary(engine="new", weight=0.5, since=time.time())
        self.route = types.SimpleNamespace(
            model_id="m",
            moving=None,
            fallback=None,
            units={"new": unit},
            state=types.SimpleNamespace(serving="old", canary=canary),
        )
        self.yard = types.SimpleNamespace(
            routes={"m": self.route},
            samples={"m": collections.deque(maxlen=10)},
            settings=types.SimpleNamespace(canary_judge_s=0.01),
            events=types.SimpleNamespace(note=lambda kind, *what, **_: self.notes.append((kind, what[-1]))),
            judge_canary=judge,
            canary_verdicts={},
            look_at_canaries=asyncio.Event(),
            stopping=False,
        )

    async def canary(self, order, say):
        self.moves.append((order.model, order.to, order.weight))
        self.route.state.canary = None

    def answered(self, number, since=0.0):
        """Live requests that ended now, or `since` seconds from now."""
        for _ in range(number):
            sample = LiveSample(time.time() + since, "new", "c", 10, True, None, False, 5.0, 1.0)
            self.yard.samples["m"].append(sample)

    @contextlib.asynccontextmanager
    async def watched(self):
        task = asyncio.create_task(CanaryAnalysis(self.yard, self).run())
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until_true(condition):
    await asyncio.to_thread(until, condition, "the watch")


async def test_a_judge_that_breaks_is_an_incident():
    """Told once, shown as ERROR, and the canary goes on: its next judgement may well succeed."""
    broken = [True]

    def judge(samples, incumbent, candidate):
        if broken:
            raise ZeroDivisionError("by nothing")
        return {"verdict": "FAIL", "why": "too slow"}

    bench = Bench(judge)
    async with bench.watched():
        for _ in range(3):
            bench.answered(1)
            await until_true(lambda: bench.yard.canary_verdicts.get("m", {}).get("verdict") == "ERROR")
            bench.yard.canary_verdicts.clear()
        assert [kind for kind, _ in bench.notes] == ["incident"]
        assert "ZeroDivisionError: by nothing" in bench.notes[0][1]
        assert bench.moves == []
        broken.clear()
        bench.answered(1)
        await until_true(lambda: bench.moves)
    assert bench.moves == [("m", "new", 0.0)]
    assert bench.notes[-1] == ("incident", "the canary failed and is taken out: too slow")


async def test_the_judge_sees_each_request_since_the_order_once():
    """Also those that the yard has forgotten meanwhile, and none from before the order."""
    seen = []

    def judge(samples, incumbent, candidate):
        seen.append([sample["at"] for sample in samples])
        return {"verdict": "INCONCLUSIVE", "why": "more"}

    bench = Bench(judge)
    bench.answered(4, since=-60)
    async with bench.watched():
        for number in range(1, 6):
            bench.answered(7)
            await until_true(lambda number=number: seen and len(seen[-1]) == 7 * number)
    assert all(one == sorted(one) for one in seen)
    assert bench.moves == []


async def test_a_move_under_way_is_not_disturbed():
    bench = Bench(lambda *_: {"verdict": "FAIL", "why": "too slow"})
    bench.route.moving = "promote to new"
    bench.answered(1)
    async with bench.watched():
        for _ in range(2):  # the second turn begins when the first is through
            bench.yard.look_at_canaries.set()
            await until_true(lambda: not bench.yard.look_at_canaries.is_set())
        assert bench.moves == []
        bench.route.moving = None
        await until_true(lambda: bench.moves)
