"""llama.cpp's server hosted from the xllamacpp wheel: its flags as a function, its life as a process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import installed
import pytest

from engines.llama_cpp.host import parameters, parser, settings_of
from engines.process.serving import free_port

REPOSITORY = Path(__file__).parents[3]
KEY = "secret-of-the-test"


def host(*flags: str, log: Path | None = None) -> subprocess.Popen[bytes]:
    """The host as a process of its own; both streams to *log*."""
    command = [sys.executable, "-m", "engines.llama_cpp.host", "--", *flags]
    environment = os.environ | {"LLAMA_API_KEY": KEY}
    if log is None:
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE)
    with log.open("wb") as output:
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT)


def test_only_what_is_asked_is_set() -> None:
    """The least command line leaves every other field to llama.cpp."""
    arguments = parser().parse_args(["-m", "m.gguf"])
    assert settings_of(arguments, None) == {"model.path": "m.gguf", "hostnames": ["127.0.0.1"], "port": 8080}


def test_flags_become_the_fields_of_common_params() -> None:
    """Threads count for prefill too, a seed of -1 is llama.cpp's "random", all layers are -2."""
    flags = ["-m", "m.gguf", "--threads", "3", "--seed", "-1", "--n-gpu-layers", "all", "--no-prefill-assistant"]
    settings = settings_of(parser().parse_args(flags), "k")
    assert settings["cpuparams.n_threads"] == settings["cpuparams_batch.n_threads"] == 3
    assert (settings["sampling.seed"], settings["n_gpu_layers"]) == (0xFFFFFFFF, -2)
    assert (settings["prefill_assistant"], settings["api_keys"]) == (False, ["k"])


class Fields:
    """`common_params` with these fields and no others, as Cython has it."""

    def __init__(self, *names: str) -> None:
        vars(self).update({"model": SimpleNamespace(), "port": None} | dict.fromkeys(names))

    def __setattr__(self, name: str, value: object) -> None:
        if name not in vars(self):
            raise AttributeError(f"no attribute {name!r}")
        super().__setattr__(name, value)


@pytest.mark.parametrize(
    ("fields", "mode", "set_to"),
    [
        (("hostnames", "load_mode"), "mmap+mlock", {"hostnames": ["127.0.0.1"], "load_mode": 3}),
        (("hostname", "load_mode"), "none", {"hostname": "127.0.0.1", "load_mode": 0}),
        (("hostname", "use_mmap", "use_mlock"), "none", {"use_mmap": False, "use_mlock": False}),
        (("hostname", "use_mmap", "use_mlock"), "mmap+mlock", {"use_mmap": True, "use_mlock": True}),
        (("hostname", "use_mmap", "use_mlock"), "auto", {"use_mmap": None, "use_mlock": None}),
    ],
)
def test_a_field_is_set_by_the_name_that_the_version_has(
    fields: tuple[str, ...], mode: str, set_to: dict[str, Any]
) -> None:
    """xllamacpp 2026.10, 2026.8 and before; what it lacks is no field of its own."""
    version: Any = SimpleNamespace(CommonParams=lambda: Fields(*fields), llama_load_mode=int, __version__="1")
    found = parameters(version, parser().parse_args(["-m", "m.gguf", "--load-mode", mode]), None)
    assert {name: getattr(found, name) for name in set_to} == set_to
    with pytest.raises(ValueError, match="xllamacpp 1 has no sse_ping_interval"):
        parameters(version, parser().parse_args(["-m", "m.gguf", "--sse-ping-interval", "3"]), None)


def test_a_load_mode_that_the_version_does_not_have_is_named() -> None:
    """Direct input came with the load modes."""
    version: Any = SimpleNamespace(CommonParams=lambda: Fields("hostname", "use_mmap", "use_mlock"), __version__="1")
    with pytest.raises(ValueError, match="xllamacpp 1 has no load_mode"):
        parameters(version, parser().parse_args(["-m", "m.gguf", "--load-mode", "dio"]), None)


def test_help_lists_the_flags_that_a_driver_looks_for() -> None:
    """The driver decides by this text whether to say --load-mode or --mlock."""
    text = parser().format_help()
    assert {"--load-mode", "--cache-reuse", "--no-prefill-assistant", "--no-jinja"} <= set(
        text.replace(",", " ").split()
    )


@pytest.mark.parametrize("flags", [["--nonsense"], ["--flash-attn", "maybe"], ["--host", "0.0.0.0"]])
def test_what_it_cannot_do_is_refused_in_one_line(
    flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2; an address that others can reach needs a key."""
    from engines.llama_cpp.host import main

    monkeypatch.delenv("LLAMA_API_KEY", raising=False)
    with pytest.raises(SystemExit) as left:
        main(["-m", "m.gguf", *flags])
    assert left.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.engine
def test_it_serves_until_sigterm(tmp_path: Path) -> None:
    """Ready, one chat with the key, 401 without, and exit code 0 on SIGTERM in the middle of a stream."""
    port, log = free_port(), tmp_path / "log"
    flags = ["-m", str(installed.smollm2("xllamacpp")), "--host", "127.0.0.1", "--port", str(port), "--alias", "smol"]
    flags += ["--ctx-size", "512"]
    flags += ["--parallel", "1", "--n-gpu-layers", "0", "--threads", "1", "--batch-size", "256", "--ubatch-size", "128"]
    flags += ["--flash-attn", "on", "--cache-type-k", "q8_0", "--cache-type-v", "q8_0", "--cache-reuse", "256"]
    flags += ["--cache-ram", "0", "--jinja", "--no-prefill-assistant", "--metrics", "--seed", "7", "--offline"]
    flags += ["--load-mode", "mmap", "--sse-ping-interval", "3", "-lv", "3"]
    process = host(*flags, log=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as http:
            wait_until_ready(http, process, log)
            http.headers["Authorization"] = f"Bearer {KEY}"
            body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
            reply = http.post("/v1/chat/completions", json=body).json()
            assert (reply["model"], reply["usage"]["completion_tokens"]) == ("smol", 2)
            assert http.get("/props").json()["default_generation_settings"]["n_ctx"] == 512
            assert http.get("/metrics").status_code == 200
            assert httpx.post(f"{http.base_url}/v1/chat/completions", json=body).status_code == 401
            endless = {"prompt": "a", "stream": True, "n_predict": 400, "ignore_eos": True}
            with http.stream("POST", "/completion", json=endless) as stream:
                next(stream.iter_lines())
                process.send_signal(signal.SIGTERM)
                assert process.wait(30) == 0
    finally:
        process.kill()


def wait_until_ready(http: httpx.Client, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 120) -> None:
    """Return when /health is 200; fails with the log when the process ends or is late."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if http.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    pytest.fail(log.read_text(errors="replace"))


@pytest.mark.engine
@pytest.mark.parametrize("content", [None, b"GGUF\x03\x00\x00\x00 and then nothing"])
def test_a_model_that_cannot_be_loaded_ends_it_with_1(content: bytes | None, tmp_path: Path) -> None:
    """A missing and a broken file give exit code 1 and a line with the file.

    The wheel writes its log from a thread of its own: a line of that may come after ours.
    """
    installed.smollm2("xllamacpp")
    broken = tmp_path / "broken.gguf"
    if content is not None:
        broken.write_bytes(content)
    process = host("-m", str(broken), "--port", str(free_port()))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    # llama.cpp logs from a thread of its own into the same stream: a line of its may still lack its end
    (said,) = re.findall("error: cannot load .*", errors.decode())
    assert "broken.gguf" in said
