"""Copies of live requests: no user ever waits for one."""

import contextlib
import json

import httpx
import pytest
from waiting import until

from engines.errors import BadInput

QUICK = {"settings": {"shadow_waiting": 4}}


def ask(yard, text="Hello", *, words=4, stream=False, **more):
    body = {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": words, "stream": stream}
    with yard.http() as http:
        answer = http.post("/v1/chat/completions", json=body | more)
    assert answer.status_code == 200, answer.text
    return answer


def counts(yard):
    return (yard.route()["shadow"] or {}).get("counts", {})


def shadowed(start_yard, **options):
    yard = start_yard(**QUICK | options).ready()
    until(lambda: yard.engine("old")["memory_bytes"], "the memory of the engine, to know what fits beside it")
    assert "copies of 100%" in yard.orders.order("shadow", model="m", share=1.0)
    return yard


def test_copies_are_compared_and_never_shown(start_yard):
    """Streamed and whole, greedy and drawn; counted in status and metrics, judged, kept redacted."""
    settings = {**QUICK["settings"], "shadow_pairs": "pairs.jsonl"}
    yard = shadowed(start_yard, settings=settings)
    for number, more in enumerate(({"temperature": 0}, {"temperature": 0, "stream": True}, {"temperature": 0.7})):
        ask(yard, "my mail is ann@example.org", **more)
        until(lambda number=number: counts(yard).get("copied") == number + 1, "the copy to be compared")
    assert counts(yard) == {"copied": 3, "exact": 2, "sampled": 1}
    until(lambda: yard.route()["shadow"].get("verdict"), "what the parity checks say")
    says = yard.route()["shadow"]
    assert (says["engine"], says["up"], says["waiting"], says["median_divergence"]) == ("new", True, 0, None)
    assert {check["check"]: check["verdict"] for check in says["checks"]}["shadow.degenerate"] == "PASS"
    assert yard.route()["serving"] == "old"
    assert all(sample["engine"] == "old" for sample in yard.orders.samples("m"))
    assert (
        'switchyard_shadow_total{engine="new",model="m",outcome="exact"} 2.0' in httpx.get(f"{yard.url}/metrics").text
    )
    path = yard.home / "yard" / "pairs.jsonl"
    until(lambda: path.exists() and len(path.read_text().splitlines()) == 3, "the pairs to be kept")
    pair = json.loads(path.read_text().splitlines()[0])
    assert pair["incumbent"]["text"] == pair["candidate"]["text"] == " word" * 4
    assert "ann@" not in path.read_text()


def test_a_silent_candidate_is_seen(start_yard):
    yard = shadowed(start_yard, new="--silent-empty")
    ask(yard, temperature=0, stream=True)
    until(lambda: counts(yard).get("empty") == 1, "the empty answer")
    assert counts(yard) == {"copied": 1, "empty": 1, "different": 1}
    assert yard.route()["shadow"]["median_divergence"] == 0
    until(lambda: yard.route()["shadow"].get("verdict") == "FAIL", "the verdict")


def test_a_user_ends_a_copy_at_once(start_yard):
    """A copy of an endless answer gives way to the next request, is tried again, and is dropped in the end."""
    yard = shadowed(start_yard, new="--itl-ms 1000")
    ask(yard, "long", words=100, temperature=0)
    for tried in (1, 2, 3):
        until(lambda: yard.engine("new")["in_flight"] == 1, "the copy on its way")
        ask(yard, "short", temperature=0)
        until(lambda tried=tried: counts(yard).get("aborted") == tried, "the copy to give way")
        assert yard.engine("new")["in_flight"] == 0
    until(lambda: counts(yard).get("dropped") == 1, "the copy to be given up")


@contextlib.contextmanager
def long_answer(yard):
    """The chunks of a stream that a user reads; left in the middle at the end of the block."""
    body = {"model": "m", "messages": [{"role": "user", "content": "long"}], "max_tokens": 2000, "stream": True}
    with yard.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
        chunks = answer.iter_raw()
        next(chunks)
        yield chunks


def test_no_copy_while_a_user_is_answered(start_yard):
    """Whoever is served has the machine, though the other engine has nothing to do."""
    yard = shadowed(start_yard, old="--itl-ms 100")
    with long_answer(yard) as chunks:
        ask(yard, "short", words=1, temperature=0)
        until(lambda: yard.route()["shadow"]["waiting"] == 1, "the copy to wait")
        for _ in range(15):
            next(chunks)
        assert counts(yard) == {}
    until(lambda: counts(yard).get("copied") == 1, "the copy in the quiet behind it")


def test_beside_a_user_where_the_plan_says_so(start_yard):
    """`slot`: engines that do not slow each other; only the candidate's own requests go first."""
    yard = shadowed(start_yard, settings={"shadow_when": "slot"}, old="--itl-ms 100")
    with long_answer(yard):
        ask(yard, "short", words=1, temperature=0)
        until(lambda: counts(yard).get("copied") == 1, "the copy beside it")
        assert yard.engine("old")["in_flight"] == 1


def test_copies_that_cannot_wait_are_dropped(start_yard):
    yard = shadowed(start_yard, settings={"shadow_waiting": 1}, new="--itl-ms 500")
    for _ in range(6):
        ask(yard, temperature=0, words=2)
    until(lambda: counts(yard).get("dropped", 0) >= 3, "copies beyond the queue to be dropped")


def test_a_move_does_not_wait_for_a_copy(start_yard):
    """Taking the candidate out ends its copy."""
    yard = shadowed(start_yard, new="--itl-ms 2000")
    ask(yard, "long", words=100, temperature=0)
    until(lambda: yard.engine("new")["in_flight"] == 1, "the copy on its way")
    assert "nothing is copied any more" in yard.orders.order("shadow", model="m", share=0)
    assert yard.engine("new")["state"] == "stopped"
    assert yard.route()["shadow"]["share"] == 0
    until(lambda: yard.route()["shadow"]["waiting"] == 0, "the copy to be dropped")


def test_a_promoted_candidate_gets_no_copies(start_yard):
    yard = shadowed(start_yard)
    yard.orders.order("promote", model="m")
    assert yard.route()["shadow"]["up"] is False
    ask(yard, temperature=0)
    assert counts(yard) == {}


def test_orders_that_make_no_sense_are_refused(start_yard):
    yard = start_yard(**QUICK).ready()
    for order, words in (({"to": "old", "share": 0.5}, "serves m"), ({"share": 1.5}, "between 0 and 1")):
        with pytest.raises(BadInput, match=words):
            yard.orders.order("shadow", model="m", **order)
