"""Copies of live requests: what is compared, and that no user ever waits for one."""

import contextlib
import json
from typing import Any

import httpx
import pytest
from waiting import until

from engines.errors import BadInput
from engines.yard.answer import compare, first_difference, is_sampled, no_answer, read_answer

QUICK = {"settings": {"shadow_waiting": 4}}


def an_answer(text: str = "It is Paris.", **fields: Any) -> dict[str, Any]:
    return {**no_answer(""), "error": None, "text": text, "finish_reason": "stop"} | fields


def stream_of(*bodies: dict[str, Any]) -> bytes:
    return b"".join(b"data: " + json.dumps(body).encode() + b"\n\n" for body in bodies) + b"data: [DONE]\n\n"


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


def test_stream_and_whole_read_alike():
    """The same answer in pieces and in one, its tool call spelled in two ways."""
    usage = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 2}}
    pieces = [{"index": 0, "function": {"name": "read", "arguments": '{"b":1,'}}]
    more = [{"index": 0, "function": {"arguments": ' "a": 2}'}}]
    streamed = stream_of(
        delta(role="assistant", content=None),
        delta(reasoning_content="Hm."),
        delta(content="It is "),
        delta(content="Paris.", tool_calls=pieces),
        delta(tool_calls=more),
        delta("tool_calls"),
        {"choices": [], "usage": usage},
    )
    call = {"function": {"name": "read", "arguments": '{"a": 2, "b": 1}'}}
    message = {"role": "assistant", "content": "It is Paris.", "reasoning_content": "Hm.", "tool_calls": [call]}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    whole = json.dumps({"choices": [choice], "usage": usage}).encode()
    read = read_answer(b": waiting for the model\n\n" + streamed, stream=True)
    assert read == read_answer(whole, stream=False)
    assert (read["text"], read["reasoning"], read["cached_tokens"]) == ("It is Paris.", "Hm.", 2)


@pytest.mark.parametrize(
    ("data", "stream", "status", "error"),
    [
        (b'{"error": {"message": "too long"}}', False, 400, "too long"),
        (b"Bad Gateway", False, 502, "HTTP 502"),
        (stream_of(delta(content="It"), {"error": {"message": "died"}}), True, 200, "died"),
        (b"", True, 200, "no answer could be read"),
        (b"[1, 2]", False, 200, "no answer could be read"),
        (b'{"choices": "none"}', False, 200, "no answer could be read"),
    ],
)
def test_what_is_no_answer(data, stream, status, error):
    assert read_answer(data, stream=stream, status=status)["error"] == error


def test_compare_names_what_differs():
    ours = an_answer()
    assert compare(ours, an_answer(), sampled=False) == {"outcomes": ["copied", "exact"], "diverged_at": None}
    other = compare(ours, an_answer("It is Rome.", finish_reason="length"), sampled=False)
    assert other == {"outcomes": ["copied", "different", "finish_differs"], "diverged_at": 6}
    called = compare(ours, an_answer(tool_calls=[{"name": "f", "arguments": "{}"}]), sampled=False)
    assert called["outcomes"] == ["copied", "different", "tools_differ"]
    assert compare(ours, an_answer(""), sampled=True)["outcomes"] == ["copied", "empty", "sampled"]
    assert compare(an_answer(""), an_answer(""), sampled=False)["outcomes"] == ["copied", "exact"]
    assert compare(ours, no_answer("HTTP 500"), sampled=False)["outcomes"] == ["failed"]


def test_first_difference_is_where_they_part():
    assert first_difference("abc", "abc") is None
    assert first_difference("abc", "abd") == 2
    assert first_difference("abc", "abcd") == 3
    assert first_difference("", "a") == 0


def test_only_the_likeliest_tokens_are_not_drawn():
    assert not is_sampled({"temperature": 0})
    assert not is_sampled({"temperature": 0.7, "top_k": 1})
    assert is_sampled({"temperature": 0.7})
    assert is_sampled({})


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
