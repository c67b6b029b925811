"""Engines that answer everything but completions, and what is known of those that ended."""

import json
import os
import signal

import pytest
from waiting import until

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
QUICK = {"restarts": 1, "failed_probes": 2}


def ask(yard, **body):
    with yard.http() as http:
        return http.post("/v1/chat/completions", json={**CHAT, **body})


def incidents(yard):
    return [incident["what"] for incident in yard.orders.status()["incidents"]]


@pytest.mark.parametrize("habit", ["fails-while", "empty-while"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_run_of_failures_is_no_health(start_yard, tmp_path, habit, stream):
    """`/health` and `/slots` of the engine stay fine: what it answers to completions is what counts."""
    cause = tmp_path / "cause"
    yard = start_yard(old=f"--{habit} {cause}", settings={**QUICK, "restarts": 3}).ready()
    assert ask(yard).status_code == 200
    cause.touch()
    for _ in range(3):
        with yard.http() as http:  # that it still counts tokens says nothing of completions
            http.post("/tokenize", json={"content": "hi"})
        ask(yard, stream=stream)
    until(lambda: yard.engine("old")["restarts"] == 1, "a restart")
    assert any("3 consecutive requests failed, and 2 one-token probes" in what for what in incidents(yard))
    cause.unlink()
    until(lambda: yard.health() == 200, "the engine to be back")
    assert ask(yard, stream=stream).status_code == 200


def test_an_engine_that_stays_so_is_replaced_by_the_other(start_yard, tmp_path):
    cause = tmp_path / "cause"
    yard = start_yard(old=f"--fails-while {cause}", settings={**QUICK, "restarts": 0}).ready()
    cause.touch()
    seen = [ask(yard).status_code for _ in range(3)]
    assert seen == [500, 500, 500]
    until(lambda: yard.route()["fallback"] == "new", "the fallback")
    assert ask(yard).status_code == 200
    assert any("Compute error" in what for what in incidents(yard)), "in the engine's own words"


def test_health_is_503_with_the_reason_while_it_fails(start_yard, tmp_path):
    cause = tmp_path / "cause"
    yard = start_yard(old=f"--fails-while {cause}", missing="new", settings={**QUICK, "restarts": 0}).ready()
    cause.touch()
    for _ in range(3):
        ask(yard)
    until(lambda: yard.health() == 503, "health to say so")
    with yard.http() as http:
        assert "Compute error" in http.get("/health").json()["error"]["message"]


def test_the_requests_of_one_client_that_always_fail_restart_nothing(start_yard):
    yard = start_yard(settings=QUICK).ready()
    for _ in range(4):
        assert [ask(yard, fake_status=500).status_code for _ in range(4)] == [500] * 4
        assert ask(yard).status_code == 200
    assert yard.engine("old")["restarts"] == 0
    assert incidents(yard) == []


def test_a_model_without_a_chat_template_is_probed_as_it_became_ready(start_yard):
    settings = {"probe_every_s": 0.2, "failed_probes": 1, "failed_requests": 1}
    yard = start_yard(old="--no-chat", settings=settings).ready()
    for _ in range(3):
        assert ask(yard).status_code == 400
        with yard.http() as http:
            text = {"model": "m", "prompt": "hi", "max_tokens": 2}
            assert http.post("/v1/completions", json={**text, "fake_status": 500}).status_code == 500
            assert http.post("/v1/completions", json=text).status_code == 200
    assert (yard.engine("old")["restarts"], incidents(yard)) == (0, [])


@pytest.mark.parametrize("status", [400, 404, 413, 422, 429, 501])
def test_what_is_the_clients_fault_is_no_failure(start_yard, status):
    yard = start_yard(settings={**QUICK, "failed_requests": 1}).ready()
    asked_before = ask(yard).status_code
    assert asked_before == 200
    for _ in range(4):
        assert ask(yard, fake_status=status).status_code == status
    assert yard.engine("old")["restarts"] == 0
    until(lambda: yard.engine("old")["state"] == "ready", "the engine to be ready")


def test_comments_of_the_engine_are_nothing_that_reached_the_client(start_yard):
    """Killed in a long prefill during which it sent comments: the request is sent again, and answered."""
    yard = start_yard(old="--pings --ttft-ms 1500", parallel=1).ready()
    with yard.http() as http, http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as stream:
        lines = stream.iter_lines()
        assert next(lines) == ": still reading"
        os.kill(yard.engine("old")["pid"], signal.SIGKILL)
        said = list(lines)
    assert sum('" word"' in line for line in said) == 4
    assert not [line for line in said if '"error"' in line]
    assert said[-2:] == ["data: [DONE]", ""] or "data: [DONE]" in said[-2:]


def test_a_cut_stream_and_the_incident_say_why_the_process_ended(start_yard):
    yard = start_yard(old="--itl-ms 20 --aborts-on poison", parallel=2).ready()
    with (
        yard.http() as http,
        http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True, "max_tokens": 400}) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        until(lambda: yard.engine("old")["in_flight"] == 1, "the stream on the engine")
        ask(yard, messages=[{"role": "user", "content": "poison"}])
        said = [line for line in lines if '"error"' in line]
    assert "signal SIGABRT" in json.loads(said[0].removeprefix("data: "))["error"]["message"]
    assert any("out of memory" in what and "SIGABRT" in what for what in incidents(yard))


def test_logs_of_earlier_processes_are_kept(start_yard):
    """The request is sent to two processes, and ends both."""
    yard = start_yard(old="--aborts-on poison").ready()
    assert ask(yard, messages=[{"role": "user", "content": "poison"}]).status_code == 502
    until(lambda: yard.health() == 200, "the engine to be back")
    for number in (1, 2):
        assert "out of memory" in (yard.home / "logs" / f"yard-old-m.log.ended-{number}").read_text()
    assert "out of memory" not in (yard.home / "logs" / "yard-old-m.log").read_text()


def test_an_embedding_server_is_served_and_probed_by_an_embedding(start_yard):
    yard = start_yard(old="--embeds", new="--embeds", settings={"probe_every_s": 0.2, "failed_probes": 1}).ready()
    assert "one embedding after" in yard.engine("old")["why"]
    with yard.http() as http:
        assert http.post("/v1/embeddings", json={"input": "a"}).json()["data"][0]["embedding"] == [0.5, 0.25]
        assert http.post("/v1/chat/completions", json={"messages": []}).status_code == 501
        asked = http.get("/seen").json()["embedded"]
        until(lambda: http.get("/seen").json()["embedded"] >= asked + 3, "probes while it is idle")
    yard.orders.order("promote", to="new")
    assert yard.engine("new")["state"] == "ready"
    assert incidents(yard) == []


def test_one_that_supports_nothing_is_refused_at_once(start_yard):
    """HTTP 501 will not turn into a token: no restarts are spent on it, and the other engine serves."""
    yard = start_yard(old="--refuses 501", settings={"restarts": 3}).ready()
    assert yard.route()["fallback"] == "new"
    assert yard.engine("old")["restarts"] == 0
    assert any("HTTP 501: refused with 501" in what for what in incidents(yard))


def test_one_that_refuses_every_completion_from_the_start_is_given_up(start_yard):
    yard = start_yard(old="--refuses 500", settings={"restarts": 3}).ready()
    assert yard.route()["fallback"] == "new"
    assert any("HTTP 500: refused with 500" in what for what in incidents(yard))
