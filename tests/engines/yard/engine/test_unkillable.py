"""Engines that SIGKILL does not end, as a driver or a dead file server leaves them: the yard serves without them."""

import json
import signal
import time

import psutil
import pytest
from cgroups import frozen
from processes import runs
from waiting import until

QUICK = {"wedged_after_s": 1, "restarts": 1}


def entries(yard):
    return [json.loads(path.read_text()) for path in (yard.home / "processes").glob("*.json")]


def test_the_fallback_serves_and_the_yard_can_be_stopped(start_yard):
    yard = start_yard(old="--itl-ms 20", parallel=1, settings=QUICK).ready()
    pid, answers = yard.engine("old")["pid"], []
    process = psutil.Process(pid)
    with frozen(pid):
        waiting = [yard.ask(answers), yard.ask(answers, stream=True)]
        for one in waiting:
            one.join(60)
        assert [answer.status_code for answer in answers] == [200, 200]
        assert (yard.route()["serving"], yard.route()["fallback"]) == ("new", "new")
        told = [i["what"] for i in yard.orders.status()["incidents"] if "SIGKILL does not end" in i["what"]]
        assert f"pid {pid}" in told[0]
        assert yard.engine("old")["state"] == "dead"
        (entry,) = [entry for entry in entries(yard) if entry["process"]["pid"] == pid]
        assert entry["given_up"] is True, "it is not forgotten"

        yard.process.send_signal(signal.SIGTERM)
        assert yard.process.wait(30) == 0, "the yard ends all the same"
        began = time.monotonic()
        yard.again()
        until(lambda: yard.health_or_none() == 200, "the next yard to serve")
        assert time.monotonic() - began < 30
        assert any(entry["process"]["pid"] == pid for entry in entries(yard)), "nor is it by the next yard"
        yard.process.send_signal(signal.SIGTERM)
        assert yard.process.wait(30) == 0
    until(lambda: not runs(process), "the kernel to let it go")


def test_without_another_engine_requests_are_refused_with_the_reason_until_it_is_gone(start_yard):
    yard = start_yard(parallel=1, missing="new", settings={**QUICK, "try_again_s": 1}).ready()
    answers = []
    with frozen(yard.engine("old")["pid"]):
        yard.ask(answers).join(60)
        assert answers[0].status_code == 503
        assert "SIGKILL does not end" in answers[0].json()["error"]["message"]
        assert yard.health() == 503
    until(lambda: yard.health() == 200, "a new process once the old one is gone")


@pytest.mark.parametrize("form", ["one-at-a-time", "side-by-side"])
def test_a_move_away_from_it_is_carried_out(start_yard, form):
    yard = start_yard(settings={**QUICK, "probe_every_s": 600, "memory_back_s": 60}).ready()
    with frozen(yard.engine("old")["pid"]):
        yard.orders.order("promote", form=form)
        assert (yard.route()["committed"], yard.route()["serving"]) == ("new", "new")
        assert any("SIGKILL does not end" in i["what"] for i in yard.orders.status()["incidents"])
        answers = []
        yard.ask(answers).join(60)
        assert answers[0].status_code == 200


def test_one_that_is_still_loading_does_not_keep_the_yard_from_ending(start_yard):
    yard = start_yard(old="--load-s 600")
    until(lambda: _loading(yard), "the engine to load")
    with frozen(yard.engine("old")["pid"]):
        yard.process.send_signal(signal.SIGTERM)
        assert yard.process.wait(40) == 0


def _loading(yard):
    try:
        return yard.engine("old")["pid"]
    except Exception:
        return None
