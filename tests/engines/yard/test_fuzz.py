"""Whatever is sent to the public port: no 500, no hang, no crash, and the next request is served."""

import json
import os
import socket

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("SWITCHYARD_TEST_EXAMPLES", "100"))
PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/chat/completions/input_tokens",
    "/tokenize",
    "/detokenize",
    "/v1/models",
    "/v1/models/m",
    "/props",
    "/health",
    "/metrics",
    "/yard",
    "/",
    "/v1/%2e%2e/health",
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = ("model", "messages", "prompt", "stream", "max_tokens", "n", "stop", "tools", "user", "stream_options", "input")
bodies = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), values, max_size=6).map(
    lambda body: json.dumps(body).encode()
) | st.binary(max_size=200)
headers = st.dictionaries(
    st.sampled_from(("authorization", "x-api-key", "content-type", "accept-encoding", "expect", "range", "x-odd")),
    st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=40),
    max_size=3,
)
quietly = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def yard(start_yard):
    yard = start_yard(settings={"wait_s": 10, "max_body_mib": 1}).ready()
    yield yard
    assert yard.health() == 200
    assert yard.process.poll() is None
    assert "Traceback" not in yard.said()
    assert yard.orders.status()["incidents"] == []


@quietly
@given(
    method=st.sampled_from(("POST", "POST", "POST", "GET", "PUT", "DELETE", "OPTIONS", "HEAD")),
    path=st.sampled_from(PATHS),
    body=bodies,
    headers=headers,
)
def test_no_request_is_answered_with_500(yard, method, path, body, headers):
    with yard.http() as http:
        answer = http.request(method, path, content=body, headers=headers)
    assert answer.status_code < 500 or answer.status_code == 501, (answer.status_code, answer.text)
    if answer.status_code >= 400 and method != "HEAD" and "expect" not in headers:
        assert set(answer.json()["error"]) >= {"message", "type"}


@quietly
@given(
    raw=st.binary(max_size=400) | st.binary(max_size=200).map(lambda tail: b"POST /v1/completions HTTP/1.1\r\n" + tail)
)
def test_bytes_that_are_no_http_end_the_connection(yard, raw):
    with socket.create_connection(("127.0.0.1", yard.port), timeout=10) as connection:
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while chunk := connection.recv(4096):
            answer += chunk
    assert b" 500 " not in answer.split(b"\r\n")[0]


def test_headers_that_are_too_long_are_refused(yard):
    with yard.http() as http:
        answer = http.get("/health", headers={"x-long": "x" * 100_000})
        assert answer.status_code in (400, 431)
        assert http.get("/health").status_code == 200


def test_a_client_that_sends_half_a_body_and_leaves_is_forgotten(yard):
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", yard.port)) as connection:
            connection.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"half')
    with yard.http() as http:
        assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_slow_clients_do_not_hold_the_others_up(yard):
    slow = [socket.create_connection(("127.0.0.1", yard.port)) for _ in range(50)]
    for connection in slow:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Le")
    try:
        assert httpx.get(f"{yard.url}/health", timeout=5, trust_env=False, verify=False).status_code == 200
    finally:
        for connection in slow:
            connection.close()
