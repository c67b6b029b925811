"""Paths beyond chat: what the serving engine answers passes through as it is, and nothing of the client's secrets."""

import gzip
import json
import socket
import time
import zlib

import pytest
from waiting import until

from engines.errors import BadInput

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
STREAMS = {
    "/completion": {"prompt": "hi"},
    "/infill": {"input_prefix": "a", "input_suffix": "b"},
    "/v1/messages": {"messages": CHAT["messages"]},
    "/v1/responses": {"input": "hi"},
}


@pytest.mark.parametrize("path", STREAMS)
def test_each_stream_ends_as_its_api_ends_it(yard, path):
    with yard.http() as http:
        stream = http.post(path, json={**STREAMS[path], "stream": True, "max_tokens": 4})
        assert stream.text.count(" word") == 4
        assert "engine_died" not in stream.text
        assert stream.headers["x-accel-buffering"] == "no"
        assert http.post(path, json={**STREAMS[path], "max_tokens": 4}).status_code == 200
    assert yard.grown('switchyard_requests_total{engine="old",model="m",outcome="ok"}') == 2


@pytest.mark.parametrize("path", STREAMS)
def test_a_stream_without_its_end_is_said(start_yard, path):
    yard = start_yard(old="--itl-ms 30 --die-after-s 2.5").ready()
    with yard.http() as http:
        text = http.post(path, json={**STREAMS[path], "stream": True, "max_tokens": 500}).text
    assert "went away" in text
    assert ("[DONE]" in text) == (path not in STREAMS)


@pytest.mark.parametrize("path", [*STREAMS, "/v1/chat/completions"])
def test_an_end_in_single_bytes_is_the_end(yard, path):
    with yard.http() as http:
        body = {**CHAT, **STREAMS.get(path, {}), "stream": True, "fake_in_bytes": 1}
        assert "went away" not in http.post(path, json=body).text


def test_a_text_like_the_end_does_not_hide_that_the_stream_was_cut(start_yard):
    yard = start_yard().ready()
    body = {**CHAT, "stream": True, "fake_word": "data: [DONE]", "fake_cut": True}
    with yard.http() as http:
        assert "went away" in http.post("/v1/chat/completions", json=body).text


def test_a_get_passes_with_its_query_and_without_secrets(yard):
    headers = {"Cookie": "a=b", "Authorization": "Bearer mine", "X-Api-Key": "mine", "TE": "trailers", "X-Odd": "1"}
    headers |= {"Connection": "keep-alive, X-Hop", "X-Hop": "1", "Accept-Encoding": "br;q=0.5"}
    with yard.http() as http:
        seen = http.get("/seen/a%2Fb?x=%20y&z&u=%C3%A4", headers=headers).json()
        assert http.head("/seen").status_code == 200
    assert seen["path"] == "/seen/a%2Fb?x=%20y&z&u=%C3%A4"
    sent = {name.lower(): value for name, value in seen["headers"].items()}
    assert (sent["accept-encoding"], sent["x-odd"]) == ("br;q=0.5", "1")
    assert not {"cookie", "te", "x-hop", "x-api-key"} & set(sent)
    assert "mine" not in json.dumps(seen)
    assert sent["host"] != f"127.0.0.1:{yard.port}"


def test_what_reads_passes_beside_a_full_engine(start_yard):
    yard = start_yard(old="--ttft-ms 4000", parallel=1).ready()
    answers = []
    thread = yard.ask(answers)
    until(lambda: yard.engine("old")["in_flight"] == 1, "the request on the engine")
    with yard.http() as http:
        answer = http.post("/apply-template?a=%41", json={"messages": []}, headers={"Anthropic-Version": "1"}).json()
        assert http.get("/seen").status_code == 200
    assert not answers
    assert answer["path"] == "/apply-template?a=%41"
    assert answer["headers"]["Anthropic-Version"] == "1"
    thread.join()


def test_answers_without_a_body_are_answers_each_time(yard):
    with yard.http() as http:
        for _ in range(3):
            assert http.head("/seen", timeout=5).status_code == 200
            assert http.get("/seen", headers={"If-None-Match": "same"}, timeout=5).status_code == 304
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("POST", "/slots/0?action=erase", 403, "around a move"),
        ("POST", "/lora-adapters", 403, "in the plan"),
        ("POST", "/props", 403, "in the plan"),
        ("POST", "/tools", 403, "act on this machine"),
        ("PUT", "/anything", 501, "no engine here"),
        ("DELETE", "/v1/models/m", 501, "no engine here"),
        ("PATCH", "/health", 501, "no engine here"),
    ],
)
def test_what_changes_an_engine_or_is_unknown_is_refused(yard, method, path, status, words):
    with yard.http() as http:
        answer = http.request(method, path, json={})
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]
    assert yard.grown("switchyard_not_passed_total") == 1


def test_a_path_that_the_serving_engine_lacks_is_501_with_its_name(start_yard):
    yard = start_yard(new="--few-paths").ready()
    yard.orders.order("promote", to="new")
    with yard.http() as http:
        answer = http.post("/infill", json=STREAMS["/infill"])
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 200
    assert answer.status_code == 501
    assert "new, which serves m, has no /infill" in answer.json()["error"]["message"]


def test_a_path_in_use_that_the_candidate_lacks_is_named_before_the_move(start_yard):
    yard = start_yard(new="--few-paths").ready()
    with yard.http() as http:
        http.post("/infill", json={**STREAMS["/infill"], "grammar": "secret text"})
        http.get("/slots")
        http.post("/not/there", json={})
    with pytest.raises(BadInput, match=r"new has no /infill \(1 request\), /slots .*accepted_unsupported"):
        yard.orders.order("promote", to="new")
    yard.end()
    yard.again().ready()
    assert yard.orders.status()["usage"]["paths"] == {"/infill": 1, "/slots": 1}
    assert yard.orders.status()["usage"]["fields"]["grammar"] == 1
    assert "secret text" not in (yard.home / "yard" / "usage.json").read_text()
    with pytest.raises(BadInput, match="new has no /infill"):
        yard.orders.order("promote", to="new")


def test_a_gap_that_the_plan_accepts_is_no_obstacle(start_yard):
    yard = start_yard(new="--few-paths", accepted="path /infill").ready()
    with yard.http() as http:
        http.post("/infill", json=STREAMS["/infill"])
        yard.orders.order("promote", to="new")
        assert http.post("/infill", json=STREAMS["/infill"]).status_code == 501


def test_slots_reach_the_engine_once_a_second_at_most(start_yard):
    yard = start_yard().ready()
    began = time.monotonic()
    with yard.http() as http:
        for _ in range(30):
            assert http.get("/slots").status_code == 200
        asked = http.get("/seen").json()["slots"]
    assert len(asked) <= 1 + (time.monotonic() - began)


def test_an_upgrade_is_refused(yard):
    with yard.http() as http:
        answer = http.get("/seen", headers={"Connection": "Upgrade", "Upgrade": "websocket"})
        assert answer.status_code == 501
        assert http.get("/seen", headers={"Connection": "Upgrade", "Upgrade": "h2c"}).status_code == 200


def test_a_form_passes_as_it_is_and_a_reranker_is_no_text(yard):
    with yard.http() as http:
        assert http.post("/v1/rerank", json={"query": "a", "documents": ["b"]}).json()["body"]["query"] == "a"
    assert yard.grown('switchyard_requests_total{engine="old",model="m",outcome="ok"}') == 1


@pytest.mark.parametrize(
    ("body", "headers", "words"),
    [
        (b'{"a": NaN}', {}, "NaN"),
        (b'{"a": -Infinity}', {}, "Infinity"),
        (b'{"a": 1e999}', {}, "beyond"),
        (b'{"a": "\\ud800"}', {}, "surrogate"),
        (b'{"a": "\\udc00\\ud800"}', {}, "surrogate"),
        ('{"a": 1}'.encode("utf-16"), {}, "UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), {}, "JSON"),
        (b'{"a": "\xe4"}', {}, "UTF-8"),
        (b"not gzip", {"Content-Encoding": "gzip"}, ""),
        (gzip.compress(b'{"a": 1}', mtime=0)[:-14], {"Content-Encoding": "gzip"}, "ends early"),
        (gzip.compress(b'{"a": 1}', mtime=0)[:-3], {"Content-Encoding": "gzip"}, "ends early"),
        (gzip.compress(b'{"a": 1}', mtime=0) + b"more", {"Content-Encoding": "gzip"}, "no valid gzip"),
        (zlib.compress(b'{"a": 1}') + b"more", {"Content-Encoding": "deflate"}, "follows its end"),
        (b'{"a": 1}', {"Content-Encoding": "deflate"}, "no valid deflate"),
        (b"[" * 100_000, {}, "nested too deeply"),
        (b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", {}, "deeper than 200 levels"),
        (b'{"a": ' + b'{"b": [' * 100 + b"]}" * 100 + b"}", {}, "deeper than 200 levels"),
    ],
)
def test_a_body_that_is_no_json_in_utf8_is_400(yard, body, headers, words):
    with yard.http() as http:
        answer = http.post("/v1/chat/completions", content=body, headers=headers)
        assert answer.status_code == 400
        assert http.get("/v1/models").status_code == 200, "the connection stays of use"
    assert words in answer.json()["error"]["message"]
    assert "Traceback" not in yard.said()


def test_a_body_that_is_just_not_too_deep_is_served(start_yard):
    """Whatever walks through it afterwards, the capture too, gets to its ends."""
    yard = start_yard(settings={"capture": "seen.jsonl", "shadow_share": 1}).ready()
    deep = b"[" * 198 + b"1" + b"]" * 198
    with yard.http() as http:
        for field in (b"messages", b"prompt", b"tools", b"x"):
            text = (
                b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "' + field + b'": ' + deep + b"}"
            )
            for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/v1/messages"):
                assert http.post(path, content=text).status_code in (200, 400), (field, path)
    assert "Traceback" not in yard.said()


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n", 400),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nA: " + b"b" * 20_000 + b"\r\n\r\n", 400),
        (b"POST /tokenize HTTP/9.9\r\n\r\n", 400),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nExpect: a lot\r\nContent-Length: 2\r\n\r\n{}", 200),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{}", 100),
        (b"GET /props HTTP/1.1\r\nHost: localhost\r\nExpect: 42\r\n\r\n", 200),
    ],
)
def test_what_is_hardly_http_is_answered_in_json(yard, head, status):
    """An expectation that nobody knows is ignored, as llama-server does."""
    with socket.create_connection(("127.0.0.1", yard.port), 20) as connection:
        connection.sendall(head)
        answer = b""
        while b"\r\n\r\n" not in answer or (status == 400 and not answer.endswith(b"}")):
            piece = connection.recv(65536)
            assert piece, answer
            answer += piece
    first, _, body = answer.partition(b"\r\n\r\n")
    assert first.split()[1] == str(status).encode(), answer
    if status == 400:
        assert b"application/json" in first
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in yard.said()


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, br", "made-up"])
def test_an_encoding_that_is_not_unpacked_is_415(yard, encoding):
    with yard.http() as http:
        answer = http.post("/v1/chat/completions", content=b"packed", headers={"Content-Encoding": encoding})
        assert (answer.status_code, answer.headers["content-type"]) == (415, "application/json; charset=utf-8")
        assert http.get("/v1/models").status_code == 200
    assert "Traceback" not in yard.said()


def test_a_body_that_unpacks_to_too_much_is_413(start_yard):
    """A megabyte of zeros takes a kilobyte."""
    yard = start_yard(settings={"max_body_mib": 1}).ready()
    packed = gzip.compress(b" " * (2**20 + 1))
    with yard.http() as http:
        answer = http.post("/v1/chat/completions", content=packed, headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 413


def test_json_that_is_fine_passes(yard):
    with yard.http() as http:
        text = '{"model":"m","messages":[{"role":"user","content":"\\ud83d\\ude00 \\\\ud800"}],"max_tokens":1}'
        assert http.post("/v1/chat/completions", content=text).status_code == 200
        raw = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        for encoding, packed in (
            ("gzip", gzip.compress(text.encode())),
            ("gzip", gzip.compress(text[:20].encode()) + gzip.compress(text[20:].encode())),
            ("deflate", zlib.compress(text.encode())),
            ("deflate", raw.compress(text.encode()) + raw.flush()),
            ("deflate, gzip", gzip.compress(zlib.compress(text.encode()))),
            ("identity", text.encode()),
        ):
            answer = http.post("/v1/chat/completions", content=packed, headers={"Content-Encoding": encoding})
            assert answer.status_code == 200, (encoding, answer.text)


# --- who may ask


def test_each_of_several_keys_is_valid(start_yard):
    yard = start_yard(api_key="one, two,").ready()
    with yard.http() as http:
        for key, status in (("one", 200), ("two", 200), ("one, two", 401), ("", 401), (",", 401), ("three", 401)):
            answer = http.get("/props", headers={"X-Api-Key": key})
            assert answer.status_code == status, key


def test_a_page_opens_in_a_browser_with_the_key_as_password(start_yard):
    yard = start_yard(api_key="one,two").ready()
    with yard.http() as http:
        refused = http.get("/yard")
        assert (refused.status_code, refused.headers["www-authenticate"].split()[0]) == (401, "Basic")
        assert http.get("/yard", auth=("anybody", "two")).status_code == 200
        assert http.get("/yard/reports/none.html", auth=("", "one")).status_code == 404
        assert http.get("/yard", auth=("one", "three")).status_code == 401
        for path in ("/props", "/metrics"):
            other = http.get(path, auth=("anybody", "two"))
            assert (other.status_code, other.headers.get("www-authenticate")) == (401, None)
        assert http.get("/yard", headers={"Authorization": "Basic ä".encode()}).status_code == 401


def test_the_list_of_models_is_open_where_it_was(start_yard):
    yard = start_yard(api_key="one").ready()
    strict = start_yard(api_key="one", old="--few-paths").ready()
    with yard.http() as http, strict.http() as other:
        assert http.get("/v1/models").status_code == http.get("/models").status_code == 200
        assert other.get("/v1/models").status_code == 401
        assert http.get("/lora-adapters").status_code == 401
        assert other.get("/seen").status_code == http.get("/slots").status_code == 401


def test_a_page_of_another_origin_is_answered_as_llama_cpp_does(yard):
    origin = {"Origin": "http://page.example"}
    with yard.http() as http:
        asked = http.options("/v1/chat/completions", headers={**origin, "Access-Control-Request-Method": "POST"})
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == "http://page.example"
        assert asked.headers["access-control-allow-credentials"] == "true"
        assert "POST" in asked.headers["access-control-allow-methods"]
        assert asked.headers["access-control-allow-headers"] == "*"
        stream = http.post("/v1/chat/completions", json={**CHAT, "stream": True}, headers=origin)
        failed = http.post("/v1/chat/completions", content=b"{", headers=origin)
        for answer in (stream, failed, http.get("/seen", headers=origin), http.get("/v1/models", headers=origin)):
            assert answer.headers["access-control-allow-origin"] == "http://page.example"
        for path in ("/yard", "/metrics", "/yard/x"):
            for answer in (http.get(path, headers=origin), http.options(path, headers=origin)):
                assert not [name for name in answer.headers if name.startswith("access-control")]


def test_an_incumbent_without_cors_gets_none(start_yard):
    yard = start_yard(old="--few-paths").ready()
    with yard.http() as http:
        answer = http.get("/v1/models", headers={"Origin": "http://page.example"})
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert http.options("/v1/chat/completions").status_code == 405


def asked_by(yard, *lines):
    """Status of a request with these header lines."""
    with socket.create_connection(("127.0.0.1", yard.port), timeout=10) as connection:
        head = "".join(f"{line}\r\n" for line in ("GET /health HTTP/1.1", *lines, "Connection: close"))
        connection.sendall(head.encode() + b"\r\n")
        answer = b""
        while chunk := connection.recv(4096):
            answer += chunk
    return int(answer.split()[1]), answer


def test_a_name_that_is_not_ours_is_403(start_yard):
    yard = start_yard(settings={"allowed_hosts": ["LLM.lan.", "[0::5]"]}).ready()
    for host in (
        "localhost",
        "127.0.0.1:80",
        "[::1]:8080",
        "[::1]",
        "LOCALHOST.:1",
        "127.1.2.3",
        "llm.lan:443",
        "[::5]:1",
        "[0:0::5]",
        "LLM.LAN.",
        "localhost:",
        "[::FFFF:127.0.0.1]:80",
    ):
        assert asked_by(yard, f"Host: {host}")[0] == 200, host
    assert asked_by(yard)[0] in (200, 400)
    for host in (
        "evil.example",
        "localhost.evil.example",
        "10.0.0.1",
        "llm.lan.evil:8080",
        "127.0.0.1.evil",
        "[::6]",
        ":80",
    ):
        status, text = asked_by(yard, f"Host: {host}")
        assert status == 403, host
        assert b"yard.allowed_hosts" in text


def test_one_that_leaves_after_the_end_was_answered(yard):
    with yard.http() as http:
        body = {**CHAT, "stream": True, "fake_lingers_s": 3}
        with http.stream("POST", "/v1/chat/completions", json=body) as stream:
            for line in stream.iter_lines():
                if "[DONE]" in line:
                    break
    ok = 'switchyard_requests_total{engine="old",model="m",outcome="ok"}'
    until(lambda: yard.grown(ok) == 1, "the request to be counted", deadline_s=2.5)
