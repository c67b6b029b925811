"""The public port: what it passes on, what it refuses, and how it says so."""

import json
import socket
import time

import httpx
import pytest
from waiting import until

from engines.settings import Endpoint
from tasks.evidence.compatibility import ANSWERED_BY_THE_YARD, measure_compatibility

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


def events(text):
    return [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]


def test_a_chat_and_a_stream_pass_through(yard):
    with yard.http() as http:
        whole = http.post("/v1/chat/completions", json=CHAT)
        assert whole.json()["choices"][0]["message"]["content"] == " word" * 4
        stream = http.post("/v1/chat/completions", json={**CHAT, "stream": True})
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert events(stream.text)[-1] == "[DONE]"
        assert sum('"content": " word"' in event for event in events(stream.text)) == 4


def test_every_name_that_was_used_keeps_working(yard):
    with yard.http() as http:
        assert {entry["id"] for entry in http.get("/v1/models").json()["data"]} == {"m", "m-alias"}
        for name in ("m", "m-alias", "gpt-4o", None):
            assert http.post("/v1/chat/completions", json={**CHAT, "model": name}).status_code == 200, name


def test_a_name_with_a_slash_is_shown_as_it_was(start_yard):
    yard = start_yard(models="org-m", alias="org/m").ready()
    with yard.http() as http:
        assert [entry["id"] for entry in http.get("/v1/models").json()["data"]] == ["org-m-alias", "org/m"]
        assert http.get("/v1/models/org/m").json()["id"] == "org/m"
        for name in ("org/m", "org-m"):
            assert http.post("/v1/chat/completions", json={**CHAT, "model": name}).status_code == 200


def test_an_unknown_name_is_refused_where_the_plan_says_so(start_yard):
    yard = start_yard(settings={"unknown_model": "refuse"}).ready()
    with yard.http() as http:
        answer = http.post("/v1/chat/completions", json={**CHAT, "model": "gpt-4o"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert "gpt-4o" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"", 400),
        ("POST", "/v1/chat/completions", b"[]", 400),
        ("POST", "/v1/chat/completions", b"[" * 100_000, 400),
        ("POST", "/v1/chat/completions", b'{"model": 3}', 400),
        ("POST", "/v1/chat/completions", b'{"stream": "yes"}', 400),
        ("POST", "/v1/chat/completions", b"\xff\xfe", 400),
        ("PUT", "/v1/chat/completions", b"", 405),
        ("POST", "/nothing/here", b"", 501),
        ("GET", "/v1/models/unknown", b"", 404),
    ],
)
def test_what_is_wrong_is_said_as_openai_says_it(yard, method, path, body, status):
    with yard.http() as http:
        answer = http.request(method, path, content=body)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_too_large_is_413(start_yard):
    yard = start_yard(settings={"max_body_mib": 1}).ready()
    with yard.http() as http:
        answer = http.post("/v1/chat/completions", content=b" " * (2 << 20))
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_a_queue_that_is_full_is_429_and_says_when_to_come_back(start_yard):
    yard = start_yard(old="--ttft-ms 3000", parallel=1, settings={"max_waiting": 1}).ready()
    with yard.http() as http, socket_post(yard), socket_post(yard):
        until(lambda: yard.route()["waiting"] == 1, "one request to wait")
        answer = http.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 429
        assert int(answer.headers["Retry-After"]) >= 1


def socket_post(yard):
    """A request whose answer nobody has read yet; leaving the block hangs up."""
    connection = socket.create_connection(("127.0.0.1", yard.port))
    body = json.dumps({**CHAT, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def test_waiting_too_long_is_503(start_yard):
    yard = start_yard(old="--ttft-ms 5000", parallel=1, settings={"wait_s": 0.5}).ready()
    with socket_post(yard), yard.http() as http:
        until(lambda: yard.engine("old")["in_flight"] == 1, "the first request on the engine")
        answer = http.post("/v1/chat/completions", json=CHAT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "wait_timeout")


def test_a_stream_that_waits_is_kept_alive(start_yard):
    yard = start_yard(old="--ttft-ms 1500", parallel=1, settings={"keepalive_s": 0.3}).ready()
    with socket_post(yard), yard.http() as http:
        until(lambda: yard.engine("old")["in_flight"] == 1, "the first request on the engine")
        text = http.post("/v1/chat/completions", json={**CHAT, "stream": True}).text
        assert text.startswith(": waiting")
        assert events(text)[-1] == "[DONE]"


def test_a_client_that_leaves_frees_the_engine_at_once(start_yard):
    yard = start_yard(old="--itl-ms 50", parallel=1).ready()
    connection = socket_post(yard)
    until(lambda: yard.engine("old")["in_flight"] == 1, "the request on the engine")
    connection.close()
    until(lambda: yard.engine("old")["in_flight"] == 0, "the place to be free", deadline_s=5)
    with yard.http() as http:
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_a_kept_connection_that_the_engine_closes_loses_nothing(start_yard):
    """The engine hangs up just as its connection is used again: asked once more, and no death of it is told."""
    yard = start_yard(old="--closes-kept").ready()
    argv = yard.engine("old")["argv"]
    slots = f"http://127.0.0.1:{argv[argv.index('--port') + 1]}/slots"
    with yard.http() as http:

        def hung_up() -> int:
            assert http.post("/v1/chat/completions", json=CHAT).status_code == 200
            return httpx.get(slots).json()[1]

        # every second request, where the machine is not so busy that the connection is too old to be used again
        until(lambda: hung_up() >= 2, "a second hang-up on a kept connection")
    assert yard.engine("old")["restarts"] == 0
    assert "went away" not in yard.said()


def test_chunks_are_not_held_back(start_yard):
    """Each chunk arrives before the next one is sent: 100 ms lie between them."""
    yard = start_yard(old="--itl-ms 100").ready()
    arrivals = []
    with yard.http() as http, http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as stream:
        for chunk in stream.iter_raw():
            arrivals.append((time.monotonic(), chunk.count(b" word")))
    assert [words for _, words in arrivals if words] == [1, 1, 1, 1]


def test_the_key_is_asked_for_everywhere_but_on_health(start_yard):
    yard = start_yard(api_key="hunter2").ready()
    with yard.http() as http:
        for path in ("/props", "/metrics", "/yard", "/slots", "/yard/reports/x.html"):
            assert http.get(path).status_code == 401, path
        assert http.get("/health").status_code == 200
        refused = http.post("/v1/chat/completions", json=CHAT, headers={"Authorization": "Bearer hunter"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        for headers in ({"Authorization": "Bearer hunter2"}, {"X-Api-Key": "hunter2"}):
            assert http.post("/v1/chat/completions", json=CHAT, headers=headers).status_code == 200
    assert "hunter2" not in yard.said()
    assert "hunter2" not in json.dumps(yard.orders.status())


def test_another_machine_needs_a_key(start_yard):
    yard = start_yard(settings={"host": "0.0.0.0"})
    assert yard.process.wait(20) != 0
    assert "set api_key_env" in yard.said()


def test_a_taken_port_is_said_before_any_engine_starts(start_yard):
    first = start_yard().ready()
    second = start_yard(port=first.port)
    assert second.process.wait(20) != 0
    assert f"port {first.port} is taken by" in second.said()
    assert "loading" not in second.said()


def test_health_tells_the_truth_while_loading(start_yard):
    yard = start_yard(old="--load-s 2")
    until(lambda: _answer(yard) is not None, "the port")
    answer = _answer(yard)
    assert answer.status_code == 503
    assert "loading" in answer.json()["error"]["message"]
    yard.ready()


def _answer(yard):
    with yard.http() as http:
        try:
            return http.get("/health")
        except httpx.HTTPError:
            return None


def test_times_count_from_the_arrival_of_a_request(start_yard):
    yard = start_yard(old="--ttft-ms 700", parallel=1).ready()
    answers = []
    threads = [yard.ask(answers, stream=True) for _ in range(2)]
    for thread in threads:
        thread.join()
    parts = ("queue", "ttft", "engine_ttft")
    queue_s, ttft_s, engine_s = (yard.grown(f"switchyard_{part}_seconds_sum") for part in parts)
    assert engine_s >= 1.4  # one after the other
    assert ttft_s == pytest.approx(queue_s + engine_s)
    assert queue_s > 0
    assert yard.grown("switchyard_request_seconds_count") == 2
    assert sum(sample["ttft_ms"] for sample in yard.orders.samples()) / 1000 == pytest.approx(engine_s, abs=0.001)


def test_whose_fault_a_failure_is_and_who_left(start_yard):
    yard = start_yard(old="--itl-ms 50").ready()
    with yard.http() as http:
        http.post("/v1/chat/completions", json={**CHAT, "fake_status": 422})
        http.post("/v1/chat/completions", json={**CHAT, "fake_status": 500})
    with socket_post(yard):
        until(lambda: yard.engine("old")["in_flight"] == 1, "the request on the engine")
    until(lambda: yard.grown("switchyard_disconnects_total{") == 1, "the client to be seen leaving", deadline_s=5)
    for outcome in ("client_error", "error"):
        assert yard.grown(f'switchyard_requests_total{{engine="old",model="m",outcome="{outcome}"}}') == 1
    assert yard.grown("switchyard_engine_restarts_total{") == yard.grown("switchyard_incidents_total") == 0


def test_what_compatibility_takes_for_answered_by_the_yard_is(start_yard):
    """Whichever engine serves, and of itself."""
    yard = start_yard().ready()
    seen = measure_compatibility(Endpoint(base_url=yard.url, model_id="m", engine="yard"), names=ANSWERED_BY_THE_YARD)
    assert {name: one["outcome"] for name, one in seen["behaviours"].items()} == dict.fromkeys(
        ANSWERED_BY_THE_YARD, "passed"
    )


def test_props_and_metrics(start_yard):
    yard = start_yard().ready()
    with yard.http() as http:
        http.post("/v1/chat/completions", json=CHAT)
        assert http.get("/props").json()["default_generation_settings"]["n_ctx"] == 4096
        text = http.get("/metrics").text
        assert 'switchyard_requests_total{engine="old",model="m",outcome="ok"} 1.0' in text
        assert 'switchyard_engine_state{engine="old",model="m",state="ready"} 1.0' in text
        assert "switchyard_engine_vram_bytes{" not in text, "not measured is absent, not 0"
