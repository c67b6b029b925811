"""Engines that others run: addressed, never started, stopped or signalled; a key goes to one origin alone."""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import signal
import ssl
import textwrap
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from openai_stub import KEY, stub

from engines import registry
from engines.attached import dialects
from engines.attached.driver import plain_url
from engines.client.load import measure
from engines.driver import Installation
from engines.errors import BadInput, EngineNotFound, EngineRefuses
from engines.openai.call import parse
from engines.process.attached import AttachedEngine
from engines.process.serving import serving
from engines.registry import driver
from engines.settings import NO_FILE, Endpoint, EngineArgs, Serve, Settings
from migrations.plan import EngineChoice
from tasks.evidence.behaviours.caller import Caller

VARIABLE = "KEY_OF_THE_OTHER"
CHAT = "/v1/chat/completions"


def installation(url: str, dialect: str = "", key_env: str = "") -> Installation:
    kind = f"openai:{dialect}" if dialect else "openai"
    return driver(kind).attach(url, key_env)  # type: ignore[attr-defined]


def serve(url: str, **more: object) -> Serve:
    return Serve.model_validate({"model_id": "m", "gguf": NO_FILE, "port": 1, "url": url, **more})


class Noted(BaseHTTPRequestHandler):
    """Sends each request on to another origin, or notes the key that came with it."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        server: Origin = self.server  # type: ignore[assignment]
        server.keys.append(self.headers.get("authorization", ""))
        self.send_response(307)
        self.send_header("Location", f"{server.onwards}{self.path}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        """Nothing."""


class Origin(ThreadingHTTPServer):
    daemon_threads = True
    onwards = ""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Noted)
        self.keys: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextlib.contextmanager
def running(server: Origin) -> Iterator[Origin]:
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("http://127.0.0.1:1234", "http://127.0.0.1:1234"),
        ("http://127.0.0.1:1234/v1/", "http://127.0.0.1:1234"),
        ("https://models.example/team/v1", "https://models.example/team"),
    ],
)
def test_an_address_is_taken_with_and_without_v1(text: str, address: str) -> None:
    """As people copy it from a client's configuration."""
    assert plain_url(text) == address


def test_it_is_let_go_of_and_runs_on(tmp_path: Path) -> None:
    """Entered and left, the server answers as before, and a signal for it is refused."""
    with stub("needs no key", "serves any model") as url:
        found = installation(url)
        for _ in range(2):
            with serving(driver("openai"), found, serve(url), state_dir=tmp_path, log_path=tmp_path / "log") as served:
                assert (served.endpoint.base_url, served.process.pid, served.process.tree()) == (url, 0, [])
                with pytest.raises(ProcessLookupError, match="attached"):
                    served.process.send_signal(signal.SIGTERM)
    assert not (tmp_path / "processes").exists()


def test_nobody_there_is_said_at_once(tmp_path: Path) -> None:
    """There is no load to wait for."""
    with stub() as url:
        pass
    with (
        pytest.raises(EngineNotFound, match=rf"openai: nothing answers at {url}"),
        serving(driver("openai"), installation(url), serve(url), state_dir=tmp_path, log_path=tmp_path / "log"),
    ):
        pass


def test_the_models_name_there_is_its_own(tmp_path: Path) -> None:
    """And a server that refuses the plan's id says so."""
    with stub("needs no key") as url:
        there = serve(url, name_there="stub-model")
        with serving(driver("openai"), installation(url), there, state_dir=tmp_path, log_path=tmp_path / "log") as up:
            assert up.endpoint.model_id == "stub-model"


def test_a_key_is_not_redirected(tmp_path: Path) -> None:
    """Neither by the wait for a token, nor by the clients that measure."""
    with running(Origin()) as second, running(Origin()) as first:
        first.onwards = second.url
        asked = serve(first.url, settings=Settings.model_validate({"api_key": KEY}))
        with (
            pytest.raises(EngineRefuses, match="HTTP 307"),
            serving(driver("openai"), installation(first.url), asked, state_dir=tmp_path, log_path=tmp_path / "log"),
        ):
            pass
        endpoint = Endpoint(base_url=first.url, model_id="m", engine="openai", api_key=asked.settings.api_key)
        (record,) = measure(endpoint, [{"messages": []}])
        with Caller(endpoint) as caller:
            reply = caller.post(CHAT, {"messages": []})
        assert (record.ok, reply.status) == (False, 307)
        assert (set(first.keys), second.keys) == ({f"Bearer {KEY}"}, [])


def test_a_certificate_is_checked(tmp_path: Path) -> None:
    """A server that nobody vouches for gets no key."""
    first = Origin()
    first.socket = _context(tmp_path).wrap_socket(first.socket, server_side=True)
    with running(first):
        url = first.url.replace("http:", "https:")
        asked = serve(url, settings=Settings.model_validate({"api_key": KEY}))
        with (
            pytest.raises(EngineNotFound, match=r"(?i)certificate"),
            serving(driver("openai"), installation(url), asked, state_dir=tmp_path, log_path=tmp_path / "log"),
        ):
            pass
        (record,) = measure(Endpoint(base_url=url, model_id="m", engine="openai"), [{"messages": []}])
        assert "certificate" in str(record.error).lower()
        assert first.keys == []


def _context(folder: Path) -> ssl.SSLContext:
    """Of a certificate that it signed itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([]), datetime.datetime.now(datetime.UTC)
    built = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    built = built.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    pem = built.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    pkcs8, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    file = folder / "server.pem"
    file.write_bytes(pem + key.private_bytes(serialization.Encoding.PEM, pkcs8, plain))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return context


def test_settings_and_an_open_way_are_named() -> None:
    """What the plan asks for and others decide, and what crosses a network as it stands."""
    known = driver("openai:tabbyapi")
    asked = serve("http://10.0.0.7:5000", settings=Settings(context_tokens=4096, mlock=True, parallel=2))
    lines = known.unsupported(installation("http://10.0.0.7:5000", "tabbyapi"), asked)
    assert [line.partition(":")[0] for line in lines] == ["context_tokens", "mlock", "encryption", "dialect"]
    assert driver("openai").unsupported(installation("http://127.0.0.1:5000"), serve("http://127.0.0.1:5000")) == []


@pytest.mark.parametrize(
    ("dialect", "said", "message"),
    [
        ("tabbyapi", b'{"detail":"Invalid API key"}', "Invalid API key"),
        ("lmstudio", b'{"error":"no model is loaded"}', "no model is loaded"),
        ("localai", b'{"error":{"code":404,"message":"no such model","type":""}}', "no such model"),
        ("", b"upstream timed out", "upstream timed out"),
        ("", b"", "HTTP 404"),
    ],
)
def test_errors_of_every_shape_reach_a_client_in_one(dialect: str, said: bytes, message: str) -> None:
    """Clients of llama.cpp read `error.message` and `error.code`."""
    found = installation("http://127.0.0.1:1", dialect)
    spoken = driver(found.kind).dialect(found)(parse(CHAT, b"{}"), "m")
    status, body = spoken.whole(404, said)
    error = json.loads(body)["error"]
    assert (status, error["message"], error["code"]) == (404, message, 404)


def test_tabbyapi_calls_json_mode_by_its_own_name() -> None:
    found = installation("http://127.0.0.1:1", "tabbyapi")
    asked = parse(CHAT, b'{"model":"m","response_format":{"type":"json_object"}}')
    sent = json.loads(driver(found.kind).dialect(found)(asked, "EXL3").request())
    assert sent == {"model": "EXL3", "response_format": {"type": "json"}}


def test_one_that_has_a_driver_speaks_as_that_says() -> None:
    """`mistralrs` answers to `default`, llama-server counts tokens by slot."""
    mistral, llama = installation("http://127.0.0.1:1", "mistral.rs"), installation("http://127.0.0.1:1", "llama.cpp")
    assert driver(mistral.kind).served_name(mistral, "m") == "default"
    assert driver(llama.kind).progress_path == "/slots"
    assert driver(llama.kind).paths(llama, EngineArgs()) == driver("llama.cpp").paths(llama, EngineArgs())


def test_a_dialect_that_nobody_knows_is_refused() -> None:
    with pytest.raises(BadInput, match=r"unknown dialect 'koboldcpp'; known: llama\.cpp, mistral\.rs, ollama, vllm"):
        driver("openai:koboldcpp")


def test_the_page_on_adding_an_engine_works_as_it_stands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its entry, taken literally, makes a dialect that serves and a plan may name."""
    page = (Path(__file__).parents[3] / "docs" / "add-an-engine.md").read_text(encoding="utf-8")
    entry = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "SERVERS[" in block)
    monkeypatch.setattr(dialects, "SERVERS", servers := dict(dialects.SERVERS))
    monkeypatch.setattr(registry, "SERVERS", servers)
    exec(textwrap.dedent(entry), vars(dialects).copy())
    choice = EngineChoice.model_validate({"engine": "openai", "url": "http://127.0.0.1:1", "dialect": "koboldcpp"})
    known = driver(choice.engine)
    assert (choice.engine, known.progress_path) == ("openai:koboldcpp", "/api/extra/perf")
    with stub("needs no key", "serves any model") as url:
        found = installation(url, "koboldcpp")
        with serving(known, found, serve(url), state_dir=tmp_path, log_path=tmp_path / "log") as served:
            assert served.endpoint.base_url == url


def test_no_signal_has_a_pid() -> None:
    """Nothing of the machine is read for it either."""
    engine = AttachedEngine("other at http://127.0.0.1:1")
    assert (engine.poll(), engine.listens_on(1), engine.log_tail()) == (None, False, ())
    assert (engine.stop(), engine.poll(), engine.wait()) == (0, 0, 0)
