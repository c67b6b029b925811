"""Engines that die, hang or are merely busy; a yard that is killed: what the client sees, and what is left."""

import json
import os
import random
import signal
import threading
import time

import httpx
import psutil
import pytest
from waiting import until

from engines.yard.engine.incident import evidence, incidents

KILLS = int(os.environ.get("SWITCHYARD_TEST_KILLS", "4"))  # 100 for the whole proof
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 40}


class Asked:
    """One request in a thread of its own: its status and its text, as far as it has come."""

    def __init__(self, yard, **body):
        self.status, self.text = None, ""
        self._yard, self._body = yard, {**BODY, **body}
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self):
        with self._yard.http() as http:
            try:
                with http.stream("POST", "/v1/chat/completions", json=self._body) as answer:
                    self.status = answer.status_code
                    for piece in answer.iter_text():
                        self.text += piece
            except httpx.HTTPError as error:
                self.text = repr(error)

    def done(self):
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self


def kill(yard, engine, number=signal.SIGKILL):
    os.kill(yard.engine(engine)["pid"], number)


def test_a_killed_engine_comes_back_and_loses_no_request_that_had_not_begun(start_yard):
    yard = start_yard(old="--itl-ms 20 --load-s 0.5", parallel=1).ready()
    begun = Asked(yard, stream=True, max_tokens=200)
    until(lambda: begun.text, "a stream to begin")
    waiting = [Asked(yard, stream=stream) for stream in (True, False)]
    until(lambda: yard.route()["waiting"] == 2, "two requests to wait")
    first = yard.engine("old")["pid"]
    kill(yard, "old")
    until(lambda: yard.health() == 503, "health to say so", deadline_s=5)
    begun.done()
    assert begun.status == 200
    end = [json.loads(line[6:]) for line in begun.text.splitlines() if line.startswith('data: {"error"')]
    assert "went away" in end[0]["error"]["message"]
    assert begun.text.rstrip().endswith("data: [DONE]")
    for asked in waiting:
        assert asked.done().status == 200
        assert "error" not in asked.text
    assert (yard.engine("old")["restarts"], yard.health()) == (1, 200)
    assert yard.engine("old")["pid"] != first
    assert any("SIGKILL" in incident["what"] for incident in yard.orders.status()["incidents"])


def test_a_plain_request_that_was_under_way_is_asked_again(start_yard):
    yard = start_yard(old="--ttft-ms 1500", parallel=1).ready()
    asked = Asked(yard)
    until(lambda: yard.engine("old")["in_flight"] == 1, "the request on the engine")
    kill(yard, "old")
    assert asked.done().status == 200


def test_a_request_that_kills_every_engine_is_given_up(start_yard):
    """A poisoned request is not handed on for ever."""
    yard = start_yard(parallel=1).ready()
    asked = Asked(yard, fake_ttft_ms=60_000)
    for restarts in (0, 1):
        until(lambda restarts=restarts: _busy(yard, restarts), "the request on the engine")
        kill(yard, "old")
    asked.done()
    assert (asked.status, json.loads(asked.text)["error"]["code"]) == (502, "engine_died")
    until(lambda: yard.health() == 200, "the engine to be back")


def _busy(yard, restarts):
    engine = yard.engine("old")
    return engine["in_flight"] == 1 and engine["restarts"] == restarts


def test_a_hang_with_a_green_health_is_wedged_and_replaced(start_yard):
    yard = start_yard(old="--itl-ms 20", parallel=1, settings={"wedged_after_s": 1}).ready()
    asked = Asked(yard, stream=True, max_tokens=500, fake_hangs_at=20)
    assert asked.done().status == 200
    assert "went away" in asked.text
    until(lambda: yard.health() == 200, "the engine to be replaced")
    (wedged,) = [i for i in yard.orders.status()["incidents"] if "no token, no prompt progress" in i["what"]]
    assert wedged["engine"] == "old"
    assert Asked(yard).done().status == 200
    (kept,) = incidents(yard.home)
    assert f"`switchyard incident {kept['id']}`" in wedged["what"]
    assert [(0 < one["chunks"] <= 20, one["silent_s"] > 1) for one in kept["requests"]] == [(True, True)]
    folder, files = evidence(yard.home, kept["id"])
    assert {"incident.json", "log.txt", "progress.txt", "threads.txt", "stacks.txt"} <= files.keys()
    assert f"{kept['pid']} {kept['pid']} " in files["threads.txt"]
    assert {oct(path.stat().st_mode)[-3:] for path in folder.iterdir()} == {"600"}


def test_an_engine_that_is_stopped_amid_an_answer_is_replaced(start_yard):
    yard = start_yard(old="--itl-ms 20", parallel=1).ready()
    asked = Asked(yard, stream=True, max_tokens=500)
    until(lambda: asked.text, "a stream to begin: before that it would be sent again")
    kill(yard, "old", signal.SIGSTOP)
    assert asked.done().status == 200
    assert "went away: its process is stopped" in asked.text
    until(lambda: yard.health() == 200, "the engine to be replaced")
    assert Asked(yard).done().status == 200


def test_a_long_prompt_is_busy_not_wedged(start_yard):
    """The watchdog's limit is 1 s, the prompt takes 3: its progress in /slots is what keeps the engine alive."""
    yard = start_yard(old="--ttft-ms 3000", parallel=1, settings={"wedged_after_s": 1}).ready()
    asked = [Asked(yard, stream=True), Asked(yard)]
    for one in asked:
        assert one.done().status == 200
        assert "error" not in one.text
    assert yard.engine("old")["restarts"] == 0
    assert yard.orders.status()["incidents"] == []


def test_a_prompt_without_any_progress_is_a_hang(start_yard):
    yard = start_yard(old="--silent-prefill", parallel=1, settings={"wedged_after_s": 1}).ready()
    asked = Asked(yard, fake_ttft_ms=600_000).done()
    assert asked.status == 502, "twice without a sign of progress, then given up"
    until(lambda: yard.health() == 200, "the engine to be replaced")
    assert yard.engine("old")["restarts"] == 2


def test_an_idle_engine_that_hangs_is_found_and_replaced(start_yard):
    yard = start_yard(settings={"probe_every_s": 0.5, "failed_probes": 2, "wedged_after_s": 1}).ready()
    kill(yard, "old", signal.SIGSTOP)
    until(lambda: yard.engine("old")["restarts"] == 1, "a restart", deadline_s=60)
    until(lambda: yard.health() == 200, "the engine to be back")


def test_out_of_restarts_falls_back_to_the_incumbent(start_yard):
    yard = start_yard(new="--die-after-s 1.5", settings={"restarts": 1}).ready()
    yard.orders.order("promote", form="side-by-side")
    until(lambda: yard.route()["fallback"] == "old", "the fallback", deadline_s=60)
    until(lambda: yard.health() == 200, "the incumbent to serve")
    assert (yard.route()["committed"], yard.route()["serving"]) == ("new", "old")
    with yard.http() as http:
        assert http.get("/health").json()["fallback"] is True
        assert 'switchyard_fallback{model="m"} 1.0' in http.get("/metrics").text
    assert any("fallback to old" in incident["what"] for incident in yard.orders.status()["incidents"])
    assert Asked(yard).done().status == 200


def test_native_falls_back_to_the_subprocess_and_that_to_the_incumbent(start_yard):
    yard = start_yard(native="", settings={"restarts": 0}).ready()
    yard.orders.order("promote", model="m", to="new-native")
    for engine, heir in (("new-native", "new"), ("new", "old")):
        until(lambda engine=engine: yard.engine(engine)["pid"] is not None, f"{engine} to serve")
        kill(yard, engine)
        until(lambda heir=heir: yard.route()["fallback"] == heir, f"the fallback to {heir}")
        assert Asked(yard).done().status == 200
    assert yard.route()["committed"] == "new-native"
    kill(yard, "old")
    until(lambda: yard.route()["unservable"], "an end of all fallbacks: never back to native by itself")


def test_a_candidate_that_is_not_here_falls_back_at_once(start_yard):
    yard = start_yard().ready()
    yard.orders.order("promote")
    yard.end()
    yard.argv += ["--missing=new"]
    state = json.loads((yard.home / "yard" / "state.json").read_text())
    state["models"]["m"]["recipes"]["new"]["program"] = ["/nowhere/new"]
    (yard.home / "yard" / "state.json").write_text(json.dumps(state))
    yard.again().ready()
    assert (yard.route()["committed"], yard.route()["serving"]) == ("new", "old")


def test_when_nothing_comes_up_requests_are_told_why(start_yard):
    yard = start_yard(old="--exit-code 1", new="--exit-code 1", settings={"restarts": 0})
    until(lambda: _unservable(yard), "both to be given up")
    asked = Asked(yard).done()
    assert asked.status == 503
    assert "no engine can serve m" in json.loads(asked.text)["error"]["message"]
    assert yard.health() == 503


def test_what_did_not_come_up_is_tried_again(start_yard, tmp_path):
    """Two engines out of restarts are not the end: the cause may be gone a minute later."""
    cause = tmp_path / "cause"
    cause.touch()
    habit = f"--exit-while {cause}"
    yard = start_yard(old=habit, new=habit, settings={"restarts": 0, "try_again_s": 1})
    until(lambda: _unservable(yard), "both to be given up")
    cause.unlink()
    yard.ready()


def _unservable(yard):
    try:
        return yard.route()["unservable"]
    except Exception:
        return None


def test_a_second_yard_is_refused(start_yard):
    yard = start_yard().ready()
    second = start_yard(home=yard.home)
    assert second.process.wait(20) != 0
    assert "a yard runs here already" in second.said()
    assert yard.health() == 200


def test_sigterm_finishes_what_is_in_flight(start_yard):
    yard = start_yard(old="--itl-ms 50", parallel=1).ready()
    asked = Asked(yard, stream=True, max_tokens=20)
    until(lambda: asked.text, "a stream to begin")
    waiting = Asked(yard)
    until(lambda: yard.route()["waiting"] == 1, "a request to wait")
    yard.process.send_signal(signal.SIGTERM)
    assert asked.done().text.count('" word"') == 20
    assert (waiting.done().status, "stopping" in waiting.text) == (503, True)
    assert yard.process.wait(20) == 0
    assert yard.engines_left() == []


def test_a_yard_killed_during_any_step_of_a_move_comes_back(start_yard):
    """Killed at random moments of promotes and rollbacks: the port serves again each time, and no engine is left."""
    moments = random.Random(7)
    yard = start_yard(new="--load-s 0.2", old="--load-s 0.2", settings={"memory_back_s": 0.2}).ready()
    for _ in range(KILLS):
        engines = {process.pid for process in yard.engines_left()}
        order = "rollback" if yard.route()["undo"] else "promote"
        form = moments.choice(["side-by-side", "one-at-a-time"])
        move = threading.Thread(target=_moved, args=(yard, order, form))
        move.start()
        time.sleep(moments.uniform(0, 2.5))  # the moment is the point; nothing is waited for
        yard.process.kill()
        yard.process.wait()
        move.join(30)
        until(lambda: not yard.engines_left(), "the engines to die with the yard")
        yard.again().ready()
        assert Asked(yard).done().status == 200
        assert not engines & {process.pid for process in yard.engines_left()}
        serving = [e for e in yard.route()["engines"] if e["pid"]]
        assert [e["engine"] for e in serving] == [yard.route()["committed"]]


def _moved(yard, order, form):
    try:
        yard.orders.order(order, form=form)
    except Exception:  # the yard is killed under it
        return


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(start_yard, number):
    yard = start_yard(old="--itl-ms 1000", parallel=1).ready()
    asked = Asked(yard, stream=True, max_tokens=1000)
    until(lambda: yard.engine("old")["in_flight"] == 1, "a stream to begin")
    yard.process.send_signal(number)
    until(lambda: "stopping" in yard.said(), "the first signal to be understood")
    yard.process.send_signal(number)
    yard.process.wait(20)
    asked.done()
    until(lambda: not yard.engines_left(), "every engine to be gone")
    assert not psutil.pid_exists(yard.process.pid) or yard.process.poll() is not None
