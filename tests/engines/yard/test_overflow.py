"""A second engine takes new conversations while too many wait, and never stands in the way of the first."""

import concurrent.futures
import os
import signal

import pytest
from waiting import until

from engines.errors import BadInput

SLOW = "--itl-ms 30"


@pytest.fixture
def overflowing(start_yard, tmp_path):
    """Starts a yard where `new` takes conversations while more than one request waits for the one slot of `old`."""

    def start(new=SLOW, waiting=1, **options):
        plan = tmp_path / "waiting"
        plan.write_text(str(waiting))
        return start_yard(old=SLOW, new=new, parallel=1, new_parallel=4, overflow=plan, **options).ready()

    return start


def ask(yard, conversation, tokens=10, **more):
    """The answer; one that is no 200 fails."""
    body = {"model": "m", "messages": [{"role": "user", "content": conversation}], "max_tokens": tokens, **more}
    with yard.http() as http:
        answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def crowd(yard, conversations):
    with concurrent.futures.ThreadPoolExecutor(len(conversations)) as pool:
        return list(pool.map(lambda conversation: ask(yard, conversation), conversations))


def takes(yard):
    return yard.route()["overflow"]["takes"]


def answered(yard):
    """How many requests each engine has answered."""
    samples = [sample["engine"] for sample in yard.orders.samples("m")]
    return {engine: samples.count(engine) for engine in ("old", "new")}


def test_a_crowd_is_shared_and_is_seen_to_be(overflowing):
    yard = overflowing()
    until(lambda: takes(yard), "the second engine to be up")
    crowd(yard, [f"user {number}" for number in range(6)])
    shared = answered(yard)
    assert shared["new"] >= 3, "one in the slot and one that waits are the first one's"
    for number in range(6):  # one at a time nobody waits, and yet each is where its prompt is cached
        ask(yard, f"user {number}", tokens=1)
    assert answered(yard) == {engine: 2 * count for engine, count in shared.items()}
    assert yard.route()["overflow"]["conversations"] == shared["new"]
    with yard.http() as http:
        text = http.get("/metrics").text
    assert f'switchyard_overflow_conversations_total{{model="m"}} {shared["new"]}.0' in text
    assert 'switchyard_overflow{engine="new",model="m"} 1.0' in text


def test_it_is_ended_and_had_again_without_a_restart(overflowing):
    yard = overflowing(waiting=0)
    until(lambda: takes(yard), "the second engine to be up")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, yard, f"user {number}", 30) for number in range(4)]
        until(lambda: yard.engine("new")["in_flight"], "some of them on the second engine")
        assert "old serves all of it" in yard.orders.order("overflow", on=False)
        assert [len(one.result()["choices"]) for one in asking] == [1] * 4
    assert (yard.engine("new")["state"], yard.route()["overflow"]["why"]) == ("stopped", "it is ordered off")
    before = answered(yard)
    crowd(yard, [f"user {number}" for number in range(4)])
    assert answered(yard)["new"] == before["new"]
    assert "new takes new conversations" in yard.orders.order("overflow")
    assert takes(yard)


def test_what_is_ordered_off_stays_off_after_a_restart(overflowing):
    yard = overflowing()
    yard.orders.order("overflow", on=False)
    yard.end()
    yard.again().ready()
    assert yard.route()["overflow"]["on"] is False


@pytest.mark.parametrize("new", ["--exit-code 1", "--never-listens"])
def test_one_that_does_not_come_up_changes_nothing_for_the_first(overflowing, new):
    yard = overflowing(new=new, settings={"restarts": 0})
    crowd(yard, [f"user {number}" for number in range(6)])
    assert answered(yard) == {"old": 6, "new": 0}
    assert yard.engine("old")["restarts"] == 0


def test_one_that_is_not_on_this_machine_is_named(overflowing):
    yard = overflowing(missing="new")
    crowd(yard, [f"user {number}" for number in range(4)])
    assert "not on this machine" in yard.route()["overflow"]["why"]


def test_its_death_costs_no_request(overflowing):
    yard = overflowing(waiting=0)
    until(lambda: takes(yard), "the second engine to be up")
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(ask, yard, f"user {number}", 40) for number in range(6)]
        until(lambda: yard.engine("new")["in_flight"] >= 2, "some of them on the second engine")
        os.kill(yard.engine("new")["pid"], signal.SIGKILL)
        assert [len(one.result()["choices"]) for one in asking] == [1] * 6
    assert yard.engine("old")["restarts"] == 0
    until(lambda: takes(yard), "it to be up again")


def test_what_only_the_second_refuses_the_first_answers(overflowing):
    yard = overflowing(waiting=0, new=f"--few-paths {SLOW}")
    until(lambda: takes(yard), "the second engine to be up")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, yard, "user 0", 30)
        until(lambda: yard.engine("old")["in_flight"] == 1, "the slot of the first to be taken")
        ask(yard, "user 1", grammar='root ::= "yes"')
        first.result()
    assert answered(yard) == {"old": 2, "new": 0}


def test_a_move_to_it_and_back_keeps_it_running(overflowing):
    yard = overflowing()
    until(lambda: takes(yard), "the second engine to be up")
    pid = yard.engine("new")["pid"]
    yard.orders.order("promote", to="new")
    assert (yard.route()["overflow"]["why"], yard.engine("old")["state"]) == ("new serves", "stopped")
    yard.orders.order("rollback")
    assert takes(yard)
    assert yard.engine("new")["pid"] == pid


def test_the_plan_decides_at_a_reload(overflowing, tmp_path):
    yard = overflowing()
    until(lambda: takes(yard), "the second engine to be up")
    (tmp_path / "waiting").write_text("")
    yard.orders.order("reload")
    until(lambda: yard.engine("new")["state"] == "stopped", "the second engine to be gone")
    assert yard.route()["overflow"] is None
    with pytest.raises(BadInput, match="names no second engine"):
        yard.orders.order("overflow")


def test_past_the_memory_budget_it_goes_before_the_model_and_stays_away(overflowing):
    yard = overflowing(new=f"--hold-mib 128 {SLOW}", settings={"memory_budget_mib": 120})
    until(lambda: takes(yard), "the second engine to be up: what it takes is not known yet")
    until(lambda: "of yard.memory_budget_mib are taken" in yard.route()["overflow"]["why"], "it to be refused")
    assert (yard.engine("new")["pid"], yard.route()["dormant"]) == (None, False)
    ask(yard, "hi")
    assert "its memory was needed" in yard.said()
