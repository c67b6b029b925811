"""Prompts that an engine has cached outlive a planned stop, and only that; what is of no use is not tried again."""

import contextlib
import os
import signal
import threading

import httpx
import pytest
from waiting import until

LONG = "What was said before, at length. " * 20
KEEPS = "--keeps-slots"


class Talk:
    """A conversation whose requests begin with all that was said before."""

    def __init__(self, yard):
        self.yard, self.messages = yard, [{"role": "user", "content": LONG}]

    def turn(self):
        """Tokens of the prompt that the engine had in its cache, and tokens that it read."""
        with self.yard.http() as http:
            answer = http.post("/v1/chat/completions", json={"messages": self.messages, "max_tokens": 4}).json()
        said = [{"role": "assistant", "content": "word"}, {"role": "user", "content": "And then?"}]
        self.messages = [*self.messages, *said]
        return answer["timings"]["cache_n"], answer["timings"]["prompt_n"]


def slots(yard):
    with contextlib.suppress(FileNotFoundError):
        return sorted(name for name in os.listdir(yard.home / "yard" / "slots") if name.endswith(".slot"))
    return []


def said(yard, what):
    return [event["what"] for event in yard.orders.status()["events"] if what in event["what"]]


def restart(yard):
    yard.orders.order("unload")
    yard.orders.order("load")


def test_a_conversation_survives_a_restart_by_order(start_yard):
    """Proved by the next request, and the file is gone once it is restored."""
    yard = start_yard(old=KEEPS, parallel=1).ready()
    talk = Talk(yard)
    talk.turn()
    yard.orders.order("unload")
    (file,) = slots(yard)
    folder = yard.home / "yard" / "slots"
    assert [folder.stat().st_mode & 0o777, (folder / file).stat().st_mode & 0o777] == [0o700, 0o600]
    yard.orders.order("load")
    assert slots(yard) == []
    assert yard.engine("old")["prompts"].startswith("not proved yet")
    cached, computed = talk.turn()
    assert cached > 500 > computed
    assert yard.engine("old")["prompts"].startswith(f"proved: {cached:,} of {cached + computed:,} prompt tokens")


def test_it_survives_the_end_of_the_yard_and_a_rollback(start_yard):
    """SIGTERM, another yard on the same home; then to another engine and back."""
    yard = start_yard(old=KEEPS, new="", parallel=1).ready()
    talk = Talk(yard)
    talk.turn()
    yard.end()
    assert len(slots(yard)) == 1
    yard.again().ready()
    cached, computed = talk.turn()
    assert cached > 500 > computed
    yard.orders.order("promote")
    yard.orders.order("rollback")
    cached, computed = talk.turn()
    assert cached > 500 > computed


def test_a_killed_engine_starts_cold(start_yard):
    """Nothing was saved, and nothing delays it."""
    yard = start_yard(old=KEEPS, parallel=1).ready()
    talk = Talk(yard)
    talk.turn()
    restart(yard)
    os.kill(yard.engine("old")["pid"], signal.SIGKILL)
    until(lambda: yard.engine("old")["restarts"] == 1 and yard.health() == 200, "the engine to be back")
    assert talk.turn()[0] < 50
    assert said(yard, "prompts restored")[1:] == []


def test_a_restore_that_does_nothing_is_a_finding_and_not_repeated(start_yard):
    """After a conversation whose turns were cached before."""
    yard = start_yard(old=f"{KEEPS} --forgets", parallel=1).ready()
    talk = Talk(yard)
    talk.turn()
    assert talk.turn()[0] > 500
    restart(yard)
    assert talk.turn()[0] == 0
    (found,) = [one["what"] for one in yard.orders.status()["incidents"]]
    assert found.startswith("prompts do not survive a restart of this build, which is not tried again: a restore did")
    yard.orders.order("unload")
    assert slots(yard) == []
    yard.end()
    yard.again().ready()
    assert talk.turn()[0] < 50
    assert yard.engine("old")["prompts"].startswith("does not work with this build")


def test_another_conversation_is_no_evidence(start_yard):
    yard = start_yard(old=f"{KEEPS} --forgets", parallel=1).ready()
    talk = Talk(yard)
    talk.turn()
    talk.turn()
    restart(yard)
    other = Talk(yard)
    other.messages[0]["content"] = "Quite another thing. " * 40
    other.turn()
    talk.turn()
    assert yard.orders.status()["incidents"] == []
    assert yard.engine("old")["prompts"].startswith("not proved yet")


def test_an_engine_that_a_restore_ends_serves_without(start_yard):
    """Its restart budget is untouched, the order that loads it succeeds, and it is not tried again."""
    yard = start_yard(old=f"{KEEPS} --dies-restoring", parallel=1, settings={"restarts": 0}).ready()
    talk = Talk(yard)
    talk.turn()
    restart(yard)
    assert talk.turn()[0] < 50
    assert (yard.engine("old")["restarts"], slots(yard)) == (0, [])
    assert yard.engine("old")["prompts"].startswith("does not work with this build: a restore failed")


def test_a_disk_that_is_full_costs_nothing_else(start_yard):
    yard = start_yard(old=f"{KEEPS} --full-disk", parallel=1).ready()
    talk = Talk(yard)
    talk.turn()
    restart(yard)
    assert talk.turn()[0] < 50
    assert said(yard, "prompts could not be saved: HTTP 500: Unable to save slot")
    assert slots(yard) == []


def test_the_plan_can_leave_it_out(start_yard):
    yard = start_yard(old=KEEPS, parallel=1, settings={"prompt_cache_mib": 0}).ready()
    talk = Talk(yard)
    talk.turn()
    assert "--slot-save-path" not in yard.engine("old")["argv"]
    restart(yard)
    assert (talk.turn()[0] < 50, yard.engine("old")["prompts"]) == (True, "")


def test_a_retired_engine_leaves_none(start_yard):
    yard = start_yard(old=KEEPS, new="", parallel=1).ready()
    Talk(yard).turn()
    yard.orders.order("promote")
    assert len(slots(yard)) == 1
    yard.orders.order("retire", engine="old", who="ann", why="done")
    assert slots(yard) == []


def test_a_fallback_is_not_delayed_by_what_was_saved(start_yard):
    """The engine that takes over starts with an empty cache."""
    yard = start_yard(old=KEEPS, new="--load-s 0", parallel=1, settings={"restarts": 0}).ready()
    Talk(yard).turn()
    yard.orders.order("promote")
    os.kill(yard.engine("new")["pid"], signal.SIGKILL)
    until(lambda: yard.route()["fallback"] == "old" and yard.health() == 200, "the fallback")
    assert said(yard, "prompts restored") == []


@pytest.mark.parametrize("streams", [False, True], ids=["idle", "a request in flight"])
def test_another_process_of_the_same_build_takes_them_over(start_yard, streams):
    """As after a reload with other threads: up beside the old one, which finishes what it has."""
    yard = start_yard(old=KEEPS, new=KEEPS, parallel=1).ready()
    talk = Talk(yard)
    talk.turn()
    answers: list[httpx.Response] = []
    asking = yard.ask(answers, messages=talk.messages, fake_ttft_ms=1500) if streams else threading.Thread()
    if streams:
        until(lambda: yard.engine("old")["in_flight"], "the request to be in flight")
    yard.orders.order("promote", form="side-by-side")
    if streams:
        asking.join()
        assert answers[0].status_code == 200
    cached, computed = talk.turn()
    assert cached > 500 > computed
    assert yard.route()["serving"] == "new"


def test_slot_actions_of_clients_are_refused(start_yard):
    """A client's restore would put another prompt under the next request of someone else."""
    yard = start_yard(old=KEEPS, parallel=1).ready()
    with yard.http() as http:
        answer = http.post("/slots/0?action=erase", json={})
    assert answer.status_code == 403
    assert "the yard saves and restores the slots itself" in answer.json()["error"]["message"]


def test_an_engine_that_keeps_no_slots_is_left_alone(start_yard):
    yard = start_yard(parallel=1).ready()
    restart(yard)
    assert (said(yard, "prompts"), slots(yard), yard.engine("old")["prompts"]) == ([], [], "")
