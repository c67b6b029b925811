"""Clients of llama.cpp beyond chat, through the yard on the real engine: SDKs, a browser, its web UI, nginx."""

import http.server
import json
import shutil
import subprocess
import threading
import time
from pathlib import Path

import httpx
import installed
import pytest
from real_yard import HELLO, LOCAL, Yard
from switchyard_command import environment_of
from waiting import until

from engines.process.serving import free_port

pytestmark = pytest.mark.engine

installed.require(*installed.BOTH, "openai")

CLIENTS = Path(__file__).parents[2] / ".venv-clients" / "bin" / "python"  # `make clients`
ANTHROPIC = """
import sys, anthropic
client = anthropic.Anthropic(base_url=sys.argv[1], api_key="none", max_retries=0)
asked = {"model": "smollm2", "max_tokens": 8, "messages": [{"role": "user", "content": "Hello"}]}
assert client.messages.count_tokens(model="smollm2", messages=asked["messages"]).input_tokens > 1
assert client.messages.create(**asked).content[0].text
with client.messages.stream(**asked) as stream:
    assert "".join(stream.text_stream)
    assert stream.get_final_message().stop_reason == "max_tokens"
"""
PAGE = """
async url => {
  const body = {model: "smollm2", max_tokens: 4, stream: true, messages: [{role: "user", content: "Hello"}]}
  const answer = await fetch(url + "/v1/chat/completions", {
    method: "POST", headers: {"Content-Type": "application/json", "X-Own": "page"}, body: JSON.stringify(body)})
  return await answer.text()
}
"""


def started(folder, **options):
    home = folder / "home"
    return Yard(environment_of(home), home, folder, **options)


@pytest.fixture(scope="module")
def yard(tmp_path_factory):
    yard = started(tmp_path_factory.mktemp("yard"))
    yield yard.ready()
    yard.end()


@pytest.fixture
def url(yard):
    return f"http://127.0.0.1:{yard.port}"


def answered(yard):
    return {sample["engine"] for sample in yard.orders.samples() if sample["ok"]}


def test_the_openai_sdk_has_its_responses(yard, url):
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert client.responses.create(model="smollm2", input="Hello", max_output_tokens=8).output_text
    events = list(client.responses.create(model="smollm2", input="Hello", max_output_tokens=8, stream=True))
    assert events[-1].type == "response.completed"
    completions = client.completions.create(model="smollm2", prompt="Once upon a", max_tokens=4, temperature=0)
    assert completions.choices[0].text.startswith(" ")
    assert client.chat.completions.create(model="x", messages=HELLO, max_tokens=2).choices[0].message.content


def test_the_anthropic_sdk_has_its_messages(yard, url):
    if not CLIENTS.exists():
        pytest.skip("needs anthropic: `make clients` installs it")
    done = subprocess.run([CLIENTS, "-c", ANTHROPIC, url], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_what_llama_cpp_answers_beside_openai_passes(yard, url):
    direct = next(e for e in yard.orders.status()["models"][0]["engines"] if e["engine"] == "llama.cpp")["argv"]
    engine = f"http://127.0.0.1:{direct[direct.index('--port') + 1]}"
    with httpx.Client(base_url=url, timeout=120, **LOCAL) as http, httpx.Client(base_url=engine, **LOCAL) as behind:
        for path in ("/", "/favicon.ico", "/manifest.webmanifest"):
            there, here = behind.get(path), http.get(path)
            assert (here.status_code, here.content) == (there.status_code, there.content)
            assert here.headers.get("etag") == there.headers.get("etag")
        assert http.post("/apply-template", json={"messages": HELLO}).json()["prompt"]
        assert http.get("/slots").json()[0]["id"] == 0
        assert http.get("/lora-adapters").json() == []
        assert http.get("/nothing").status_code == 404
        assert http.post("/infill", json={"input_prefix": "a", "input_suffix": "b"}).status_code == 501
        assert http.post("/v1/rerank", json={"query": "a", "documents": ["b"]}).status_code == 501
        text = http.post("/completion", json={"prompt": "Hello", "n_predict": 3, "stream": True}).text
        assert '"stop":true' in text
        assert "went away" not in text
    assert yard.engine("llama.cpp")["restarts"] == 0


def test_nginx_passes_pieces_as_they_come(yard, url, tmp_path):
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        pytest.skip("needs nginx: the distribution's package")
    port = free_port()
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; pid {tmp_path}/pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; client_body_temp_path {tmp_path}; proxy_temp_path {tmp_path};\n"
        f"fastcgi_temp_path {tmp_path}; uwsgi_temp_path {tmp_path}; scgi_temp_path {tmp_path};\n"
        f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass {url}; }} }} }}\n"
    )
    process = subprocess.Popen([program, "-p", tmp_path, "-c", tmp_path / "nginx.conf"], stderr=subprocess.DEVNULL)
    try:
        until(lambda: _answers(port), "nginx")
        chat = {"messages": HELLO, "max_tokens": 200, "stream": True, "ignore_eos": True}
        moments = set()
        with httpx.stream(
            "POST", f"http://127.0.0.1:{port}/v1/chat/completions", json=chat, timeout=120, **LOCAL
        ) as one:
            for _ in one.iter_raw():
                moments.add(time.monotonic_ns() // 1_000_000)
        assert len(moments) > 20  # 40 KB: read in buffers of 4 KB they would be ten
    finally:
        process.terminate()
        process.wait(10)


def _answers(port):
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", **LOCAL).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs a browser's driver: pip install playwright")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    with playwright.sync_playwright() as driver:
        try:
            chromium = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        except playwright.Error:
            pytest.skip("needs chromium")
        yield chromium
        chromium.close()


def test_a_page_of_another_origin_reads_a_stream(yard, url, browser):
    class Empty(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        text = page.evaluate(PAGE, url)
        server.shutdown()
    assert text.rstrip().endswith("[DONE]")


def test_the_web_ui_of_llama_cpp_chats(yard, url, browser):
    page = browser.new_page()
    failed = []
    page.on("response", lambda one: failed.append((one.status, one.url)) if one.status >= 500 else None)
    page.goto(url)
    box = page.locator("textarea").first
    box.wait_for(timeout=30_000)
    box.fill("Hello")
    with page.expect_response(lambda one: "/chat/completions" in one.url, timeout=60_000) as answer:
        box.press("Enter")
    assert answer.value.status == 200
    assert answer.value.finished() is None
    # a page that closes before its answer's end leaves a stream behind, as it names its conversation
    until(lambda: yard.engine("llama.cpp")["in_flight"] == 0, "the answer's end")
    assert answered(yard) == {"llama.cpp"}
    assert failed == [], json.dumps(failed)


def test_a_stream_that_goes_on_without_its_client_keeps_its_place(yard, url):
    """llama-server finishes a stream with this header for a client that comes back: its slot is taken until then."""
    chat = {"messages": HELLO, "max_tokens": 300, "ignore_eos": True, "stream": True}

    def leave(**headers):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=chat, headers=headers, timeout=60, **LOCAL) as one:
            next(one.iter_raw())

    def slots():
        return sum(slot["is_processing"] for slot in httpx.get(f"{url}/slots", timeout=30, **LOCAL).json())

    leave(**{"X-Conversation-Id": "a/b c"})
    assert yard.engine("llama.cpp")["in_flight"] == 1
    until(lambda: slots() == 1, "the slots as they are: the yard asks for them at most once in 1.5 s")
    assert yard.engine("llama.cpp")["in_flight"] == slots() == 1
    whole = httpx.get(f"{url}/v1/stream", params={"conv_id": "a/b c"}, timeout=120, **LOCAL).text
    assert whole.rstrip().endswith("[DONE]")
    until(lambda: yard.engine("llama.cpp")["in_flight"] == 0, "the place to be free")
    leave(**{"X-Conversation-Id": "c"})
    assert httpx.delete(f"{url}/v1/stream", params={"conv_id": "c"}, timeout=60, **LOCAL).status_code == 204
    until(lambda: yard.engine("llama.cpp")["in_flight"] == slots() == 0, "the place to be free")
    leave()
    until(lambda: yard.engine("llama.cpp")["in_flight"] == slots() == 0, "the engine to have stopped")


@pytest.mark.parametrize(
    "args", ['["--reranking"]', '["--rerank", "--embedding", "--pooling", "rank"]', '["--embedding", "--pooling=rank"]']
)
def test_a_reranking_server_is_ready_by_a_ranking(tmp_path, args):
    yard = started(tmp_path, incumbent=f"args = {args}")
    try:
        yard.ready()
        assert "one ranking after" in yard.engine("llama.cpp")["why"]
        with httpx.Client(base_url=f"http://127.0.0.1:{yard.port}", timeout=60, **LOCAL) as http:
            for path in ("/v1/rerank", "/v1/reranking", "/rerank", "/reranking"):
                answer = http.post(path, json={"query": "a cat", "documents": ["cats", "stones"]}).json()
                assert sorted(one["index"] for one in answer["results"]) == [0, 1]
        assert yard.orders.status()["incidents"] == []
    finally:
        yard.end()


def test_an_embedding_server_is_ready_by_an_embedding(tmp_path):
    yard = started(tmp_path, incumbent='args = ["--embedding", "--pooling", "mean"]')
    try:
        yard.ready()
        assert "one embedding after" in yard.engine("llama.cpp")["why"]
        answer = httpx.post(f"http://127.0.0.1:{yard.port}/v1/embeddings", json={"input": "Hello"}, timeout=60, **LOCAL)
        assert len(answer.json()["data"][0]["embedding"]) > 100
    finally:
        yard.end()
