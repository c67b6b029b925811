"""A retired engine is started by nothing, and comes back whole."""

import httpx
import pytest
from waiting import until

from engines.errors import BadInput

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
DECIDED = {"who": "Ada", "why": "a test", "archive": ""}


def retired(start_yard, **options):
    yard = start_yard(settings={"restarts": 0, "try_again_s": 3600}, **options).ready()
    yard.orders.order("promote", model="m", to="new")
    assert "nothing starts it" in yard.orders.order("retire", engine="old", **DECIDED)
    return yard


def names(yard):
    return {engine["engine"] for engine in yard.route()["engines"]}


def test_who_needs_it_is_said_and_nothing_changes(start_yard):
    yard = start_yard().ready()
    with pytest.raises(BadInput, match="m is served by it"):
        yard.orders.order("retire", engine="old", **DECIDED)
    yard.orders.order("promote", model="m", to="new")
    yard.orders.order("canary", model="m", to="old", weight=0.5)
    with pytest.raises(BadInput, match="canary"):
        yard.orders.order("retire", engine="old", **DECIDED)
    assert names(yard) == {"old", "new"}


def test_no_order_no_fallback_and_no_plan_starts_it(start_yard):
    yard = retired(start_yard)
    for order, more in (
        ("promote", {"to": "old"}),
        ("use", {"engine": "old"}),
        ("canary", {"to": "old", "weight": 0.1}),
    ):
        with pytest.raises(BadInput, match=r"retired on .* by Ada .*switchyard restore old"):
            yard.orders.order(order, model="m", **more)
    with pytest.raises(BadInput, match="nothing to roll back"):
        yard.orders.order("rollback", model="m")
    yard.orders.order("reload")
    assert names(yard) == {"new"}
    (child,) = yard.engines_left()
    child.kill()
    until(lambda: yard.route()["unservable"], "no engine to be left")
    assert yard.engines_left() == []
    with yard.http() as http:
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 503


def test_it_stays_retired_over_a_restart_of_the_yard(start_yard):
    yard = retired(start_yard)
    yard.process.kill()
    yard.process.wait()
    yard.again().ready()
    assert names(yard) == {"new"}
    assert "Ada" in yard.orders.status()["retired"]["old"]


def test_restored_it_serves_again_and_is_the_way_back(start_yard):
    yard = retired(start_yard)
    with pytest.raises(BadInput, match="nothing left to retire"):
        yard.orders.order("retire", engine="old", **DECIDED)
    assert "is back" in yard.orders.order("restore", engine="old")
    assert yard.route()["undo"] == "old"
    yard.orders.order("rollback", model="m")
    assert yard.route()["serving"] == "old"
    assert httpx.post(f"{yard.url}/v1/chat/completions", json=CHAT).status_code == 200
    with pytest.raises(BadInput, match="not retired"):
        yard.orders.order("restore", engine="old")
