"""Moves under load: no request fails, none is cut, and a move that fails leaves the engine that served."""

import asyncio
import json
import threading

import openai
import pytest
from waiting import until

from engines.errors import BadInput, SwitchyardError

WORDS = 12


class Load:
    """Streams from the OpenAI client, one after the other in each of `clients` tasks, until stopped."""

    def __init__(self, yard, clients=16, model="m"):
        self.complete, self.broken = 0, []
        self._yard, self._clients, self._model = yard, clients, model
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self):
        self._thread.start()
        until(lambda: self.complete >= self._clients or self.broken, "the load to run")
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()

    async def _run(self):
        async with openai.AsyncOpenAI(base_url=f"{self._yard.url}/v1", api_key="none", max_retries=0) as client:
            await asyncio.gather(*(self._one(client, number) for number in range(self._clients)))

    async def _one(self, client, number):
        while not self._stop.is_set():
            try:
                text = ""
                finish = None
                stream = await client.chat.completions.create(
                    model=self._model,
                    messages=[{"role": "user", "content": f"conversation {number}"}],
                    max_tokens=WORDS,
                    stream=True,
                )
                async for chunk in stream:
                    for choice in chunk.choices:
                        text += choice.delta.content or ""
                        finish = choice.finish_reason or finish
                if text != " word" * WORDS or finish != "length":
                    self.broken.append((text, finish))
                self.complete += 1
            except Exception as error:
                self.broken.append(repr(error))
                return

    def goes_on(self):
        """More answers than now, without a broken one."""
        before = self.complete
        until(lambda: self.complete > before + 2 * self._clients or self.broken, "the load to go on")


@pytest.mark.parametrize("form", ["side-by-side", "one-at-a-time"])
def test_no_request_fails_or_is_cut(start_yard, form):
    yard = start_yard(old="--itl-ms 10", new="--itl-ms 10 --load-s 0.5", parallel=8).ready()
    steps = []
    with Load(yard) as load:
        yard.orders.order("promote", steps.append, form=form)
        load.goes_on()
        assert (yard.route()["serving"], yard.route()["undo"]) == ("new", "old")
        assert yard.engine("old")["state"] == "stopped"
        yard.orders.order("rollback", form=form)
        load.goes_on()
    assert load.broken == []
    assert (yard.route()["serving"], yard.route()["undo"]) == ("old", None)
    assert steps[0].startswith("way back saved")


def test_a_canary_answers_its_share_and_keeps_its_conversations(start_yard):
    yard = start_yard(parallel=8).ready()
    yard.orders.order("canary", weight=0.5)
    with yard.http() as http:

        def engine_of(conversation):
            before = {name: _requests(http, name) for name in ("old", "new")}
            body = {"model": "m", "messages": [{"role": "user", "content": conversation}], "max_tokens": 1}
            assert http.post("/v1/chat/completions", json=body).status_code == 200
            (name,) = [name for name in before if _requests(http, name) > before[name]]
            return name

        first = {f"conversation {number}": engine_of(f"conversation {number}") for number in range(20)}
        assert set(first.values()) == {"old", "new"}
        assert {conversation: engine_of(conversation) for conversation in first} == first
        yard.orders.order("rollback")
        assert {engine_of(conversation) for conversation in first} == {"old"}
    assert yard.engine("new")["state"] == "stopped"


def _requests(http, engine):
    prefix = f'switchyard_requests_total{{engine="{engine}",model="m",outcome="ok"}}'
    lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith(prefix)]
    return float(lines[0].split()[-1]) if lines else 0


@pytest.mark.parametrize("form", ["side-by-side", "one-at-a-time"])
@pytest.mark.parametrize("habit", ["--exit-code 1", "--never-listens", "--health-lies"])
def test_a_candidate_that_does_not_come_up_leaves_the_incumbent(start_yard, form, habit):
    yard = start_yard(new=habit, parallel=4, settings={"move_s": 2}).ready()
    with Load(yard, clients=4) as load:
        with pytest.raises(SwitchyardError, match="stays on old"):
            yard.orders.order("promote", form=form)
        load.goes_on()
    assert load.broken == []
    assert (yard.route()["serving"], yard.route()["committed"]) == ("old", "old")
    assert yard.engine("new")["state"] in ("stopped", "dead")
    assert yard.engine("new")["pid"] is None


def test_a_long_answer_is_finished_by_the_engine_that_began_it(start_yard):
    yard = start_yard(old="--itl-ms 100", parallel=2).ready()
    said = {}

    def ask():
        with yard.http() as http:
            body = {"model": "m", "messages": [], "max_tokens": 30, "stream": True}
            said["text"] = http.post("/v1/chat/completions", json=body).text

    asking = threading.Thread(target=ask)
    asking.start()
    until(lambda: yard.engine("old")["in_flight"] == 1, "the answer to begin")
    yard.orders.order("promote", form="side-by-side")
    asking.join(30)
    assert said["text"].count('" word"') == 30
    assert said["text"].rstrip().endswith("[DONE]")


def test_an_order_that_cannot_be_carried_out_is_one_line(start_yard):
    yard = start_yard().ready()
    for name, body, said in [
        ("promote", {"to": "vllm"}, "vllm cannot serve m here"),
        ("promote", {"model": "x"}, "no model 'x' here: there are m"),
        (
            "promote",
            {"form": "sideways"},
            "form: Input should be 'auto', 'side-by-side' or 'one-at-a-time', not 'sideways'",
        ),
        ("rollback", {}, "nothing to roll back"),
        ("canary", {"weight": 1.5}, "must be at least 0 and below 1"),
        ("canary", {"weight": 0.5, "to": "old"}, "serves m already"),
    ]:
        with pytest.raises(BadInput, match=said):
            yard.orders.order(name, **body)


def test_two_moves_at_once_are_refused(start_yard):
    yard = start_yard(new="--load-s 3").ready()
    moving = threading.Thread(target=lambda: yard.orders.order("promote", form="side-by-side"))
    moving.start()
    until(lambda: yard.route()["moving"], "the first move")
    with pytest.raises(BadInput, match="is being moved already"):
        yard.orders.order("promote", form="one-at-a-time")
    moving.join(30)
    assert yard.route()["serving"] == "new"


def test_promote_again_changes_nothing(start_yard):
    yard = start_yard().ready()
    yard.orders.order("promote")
    assert "already" in yard.orders.order("promote")
    assert yard.route()["undo"] == "old"


def test_the_way_back_outlives_the_yard(start_yard):
    yard = start_yard().ready()
    yard.orders.order("promote")
    yard.process.kill()
    yard.process.wait()
    until(lambda: not yard.engines_left(), "the engines to die with the yard")
    yard.again().ready()
    assert (yard.route()["serving"], yard.route()["undo"]) == ("new", "old")
    yard.orders.order("rollback")
    assert yard.route()["serving"] == "old"


def test_drain_holds_and_lets_go(start_yard):
    yard = start_yard().ready()
    yard.orders.order("drain", on=True)
    assert yard.health() == 503
    said = {}

    def ask():
        with yard.http() as http:
            said["status"] = http.post("/v1/chat/completions", json={"model": "m", "messages": []}).status_code

    asking = threading.Thread(target=ask)
    asking.start()
    until(lambda: yard.route()["waiting"] == 1, "the request to wait")
    yard.orders.order("drain", on=False)
    asking.join(20)
    assert said == {"status": 200}


def test_reload_takes_new_models_and_refuses_a_bad_plan(start_yard):
    yard = start_yard().ready()
    assert "limits and names only" in yard.orders.order("reload")
    state = json.loads((yard.home / "yard" / "events.jsonl").read_text().splitlines()[-1])
    assert state["kind"] in ("state", "move")
