"""llama-server command lines in every spelling, and the process that listens on a port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import installed
import psutil
import pytest

from engines.errors import BadInput
from engines.llama_cpp.commands import parse_command, read_argv, read_listener
from engines.settings import EngineArgs, Settings

AGENT_BOX = (
    "--port 8080 --ctx-size 524288 --parallel 1 --n-gpu-layers 40 --threads 14 --batch-size 256 --ubatch-size 128 "
    "--flash-attn on --jinja --no-prefill-assistant --mlock --cache-reuse 256"
)
LISTENER = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
sys.stdin.read()
"""


def settings_of(flags: str) -> Settings:
    """The neutral settings that `flags` ask for."""
    return parse_command(f"llama-server -m m.gguf {flags}").settings


def test_the_command_to_migrate_comes_out_whole() -> None:
    """Twelve flags and a model: nothing is left over and nothing needs a note."""
    command = parse_command(f"llama-server -m nemotron.gguf {AGENT_BOX}")
    assert command.settings == Settings(
        context_tokens=524288,
        parallel=1,
        gpu_layers=40,
        threads=14,
        batch_tokens=256,
        ubatch_tokens=128,
        flash_attention=True,
        mlock=True,
        cache_reuse_tokens=256,
        jinja=True,
        prefill_assistant=False,
    )
    assert (command.binary, command.gguf, command.host, command.port) == (
        "llama-server",
        Path("nemotron.gguf"),
        "127.0.0.1",
        8080,
    )
    assert (command.own, command.unknown, command.notes, command.names) == (EngineArgs(args=("--jinja",)), [], [], [])
    assert command.model_id == "nemotron"


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        ("-c 4096", "context_tokens", 4096),
        ("--ctx-size 4096", "context_tokens", 4096),
        ("--ctx_size 4096", "context_tokens", 4096),
        ("--ctx-size=4096", "context_tokens", 4096),
        ("-c=4096", "context_tokens", 4096),
        ("-c 0", "context_tokens", None),
        ("-c 512 -c 1024", "context_tokens", 1024),
        ("-np 4", "parallel", 4),
        ("--parallel 4", "parallel", 4),
        ("-np -1", "parallel", 0),
        ("-ngl 99", "gpu_layers", 99),
        ("--gpu-layers 0", "gpu_layers", 0),
        ("--n-gpu-layers 7", "gpu_layers", 7),
        ("-ngl auto", "gpu_layers", None),
        ("-ngl all", "gpu_layers", 999),
        ("-ngl -1", "gpu_layers", None),
        ("-t 3", "threads", 3),
        ("--threads -1", "threads", None),
        ("-b 256", "batch_tokens", 256),
        ("-ub 128", "ubatch_tokens", 128),
        ("-fa on", "flash_attention", True),
        ("--flash-attn off", "flash_attention", False),
        ("-fa 0", "flash_attention", False),
        ("-fa auto", "flash_attention", None),
        ("-fa", "flash_attention", True),
        ("--flash-attn --metrics", "flash_attention", True),
        ("-c 512", "parallel", 0),
        ("--no-jinja", "jinja", False),
        ("--no-jinja --jinja", "jinja", True),
        ("--no-prefill-assistant", "prefill_assistant", False),
        ("--prefill-assistant", "prefill_assistant", True),
        ("--mlock", "mlock", True),
        ("--load-mode mmap+mlock", "mlock", True),
        ("-lm mlock", "mlock", False),
        ("--load-mode mmap", "mlock", False),
        ("--cache-reuse 0", "cache_reuse_tokens", 0),
        ("--cache-ram 0", "host_cache_mib", 0),
        ("-cram 512", "host_cache_mib", 512),
        ("--cache-ram -1", "host_cache_mib", -1),
        ("-ctk q8_0 -ctv q8_0", "kv_type", "q8_0"),
        ("--cache-type-k f16", "kv_type", "f16"),
        ("-ctk q8_0", "kv_type", None),
        ("-s 7", "seed", 7),
        ("--seed -1", "seed", None),
        ("--seed 4294967295", "seed", None),
        ("--chat-template-file t.jinja", "chat_template", Path("t.jinja")),
    ],
)
def test_each_spelling_of_a_setting(flags: str, name: str, value: object) -> None:
    """Short, long, underscored, glued: one setting."""
    assert getattr(settings_of(flags), name) == value


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        (
            "-dr ai/qwen3",
            "-dr ai/qwen3: llama-server downloads this model; a plan needs the file: give its path as gguf",
        ),
        ("stray", "stray: not a flag; left out"),
        ("-t $(nproc)", "-t $(nproc): only the shell knows its value; left out, add it to the plan"),
        ("--port 0", "--port 0: clients need a port that stays; the plan has 8080"),
        ("--shiny-token abc", "--shiny-token: looks like a secret and is not copied"),
        (
            "--api-key sk-secret",
            "--api-key: the key itself is not copied: export it as the environment variable that api_key_env in the "
            "plan names",
        ),
        (
            "--hf-token hf_secret",
            "--hf-token: a download token is not copied; the plan names a file that is already here",
        ),
    ],
)
def test_what_is_not_taken_over_is_noted(flags: str, note: str) -> None:
    """One plain line each; the rest of the command still counts."""
    assert note in parse_command(f"llama-server -m m.gguf {flags}").notes


def test_no_model_is_noted() -> None:
    """llama-server without a model is a healthy, empty router."""
    notes = parse_command("llama-server -np 1").notes
    assert notes == ["no model file: without -m llama-server is an empty router; give the file as gguf in the plan"]
    assert parse_command("llama-server -np 1 -hf a/b").gguf is None


def test_secrets_are_never_echoed() -> None:
    """Neither a key nor a token is in anything that comes back, wherever it was given."""
    command = parse_command(
        "LLAMA_API_KEY=sk-secret1 LLAMA_ARG_MY_TOKEN=sk-secret2 llama-server -m m.gguf --api-key sk-secret3 "
        "--hf-token sk-secret4 --apikey sk-secret5 --api-key=sk-secret6"
    )
    assert command.has_api_key
    assert "sk-secret" not in repr(command)
    assert command.settings.api_key is None


def test_flags_without_a_neutral_word_are_passed_on_as_they_stood() -> None:
    """Those that no known build lists as well, and they are named."""
    kept = (
        "--temp 0.7 --spec-draft-n-max 4 --spec-default --control-vector-layer-range 1 2 -ot exps=CPU --no-mmap "
        "-ctk q8_0 -ctv q4_0 --chat-template chatml -n -1 --log-colors --shiny -1 --dull --load-mode dio"
    )
    command = parse_command(f"llama-server -m m.gguf --metrics {kept}")
    assert list(command.own.args) == kept.split()
    assert command.unknown == ["--shiny -1", "--dull"]


def test_files_that_flags_name_start_where_the_command_ran() -> None:
    """Lists and scales included; a folder that the engine writes to as well."""
    flags = "--mmproj p.gguf --lora a.gguf,/b.gguf --lora-scaled c.gguf:0.5 --slot-save-path slots -lcd /x"
    command = parse_command(f"LLAMA_ARG_SPEC_DRAFT_MODEL=d.gguf llama-server -m m.gguf {flags}", cwd=Path("/srv"))
    mmproj, lora, scaled = "--mmproj /srv/p.gguf", "--lora /srv/a.gguf,/b.gguf", "--lora-scaled /srv/c.gguf:0.5"
    assert list(command.own.args) == f"{mmproj} {lora} {scaled} --slot-save-path /srv/slots -lcd /x".split()
    assert command.own.env == {"LLAMA_ARG_SPEC_DRAFT_MODEL": "/srv/d.gguf"}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "the command is empty; give the whole line that starts llama-server"),
        ("llama-server -a 'x", "the command cannot be read: no closing quotation; check its quotes"),
        (
            "ollama serve",
            "no llama-server in the command: it runs 'ollama serve'; give the line that starts llama-server",
        ),
        (
            "python -m vllm.entrypoints.openai.api_server",
            "no llama-server in the command: it runs 'python -m'; give the line that starts llama-server",
        ),
        ("llama-server -c lots", "-c: 'lots' is not a whole number; write the number itself"),
        (
            "llama-server --models-dir /m",
            "--models-dir: it makes llama-server a router of several models, and the yard is one; list the models in "
            "the plan; give the command of one model, or its file with --model",
        ),
        ("llama-server -ngl some", "-ngl: 'some' is not a whole number; write the number itself"),
        ("llama-server -ngl -3", "-ngl: -3 is below -2; llama-server does not take it"),
        ("llama-server -b 0", "-b: 0 is below 1; llama-server does not take it"),
        ("llama-server --port 70000", "--port: 70000 is above 65535; give a port that exists"),
        ("llama-server -fa maybe", "-fa: 'maybe' is not on, off or auto"),
        ("llama-server --ctx-size", "--ctx-size: its value is missing, nothing follows it"),
        ("llama-server --temp", "--temp: its value is missing, nothing follows it"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(text: str, line: str) -> None:
    """The flag, what stood there, and what to write."""
    with pytest.raises(BadInput) as caught:
        parse_command(text)
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("text", "binary"),
    [
        ("-m m.gguf -c 512", None),
        ("/opt/llama.cpp/build/bin/llama-server -m m.gguf -c 512", "/opt/llama.cpp/build/bin/llama-server"),
        ("llama-server-vulkan -m m.gguf -c 512", "llama-server-vulkan"),
        ("llama serve -m m.gguf -c 512", "llama"),
        ("nohup nice -n 5 ./llama-server -m m.gguf -c 512 > server.log 2>&1 &", "./llama-server"),
        ("llama-server \\\n  -m m.gguf \\\n  -c 512 | tee log", "llama-server"),
        ("CUDA_VISIBLE_DEVICES=0 LLAMA_ARG_CTX_SIZE=512 llama-server -m m.gguf", "llama-server"),
        ("docker run -p 8080:8080 ghcr.io/ggml-org/llama.cpp:server-cuda -m m.gguf -c 512", None),
    ],
)
def test_what_stands_around_the_command(text: str, binary: str | None) -> None:
    """Wrappers, variables, line breaks, redirections: the command itself is found."""
    command = parse_command(text)
    assert command.binary == binary
    assert (command.gguf, command.settings.context_tokens, command.unknown) == (Path("m.gguf"), 512, [])


def test_flags_win_over_the_environment() -> None:
    """As in llama.cpp: LLAMA_ARG_* first, then what the command says; switches have their NO_ form."""
    environ = {
        "LLAMA_ARG_CTX_SIZE": "1024",
        "LLAMA_ARG_THREADS": "2",
        "LLAMA_ARG_MODEL": "env.gguf",
        "LLAMA_ARG_MLOCK": "1",
        "LLAMA_ARG_JINJA": "false",
        "LLAMA_ARG_NO_PREFILL_ASSISTANT": "1",
        "LLAMA_ARG_TIMEOUT": "60",
        "PATH": "/bin",
    }
    command = read_argv(["llama-server", "-c", "2048", "-np", "1"], environ=environ)
    assert (command.settings.context_tokens, command.settings.threads, command.gguf) == (2048, 2, Path("env.gguf"))
    assert (command.settings.mlock, command.settings.jinja, command.settings.prefill_assistant) == (True, False, False)
    assert (command.own.env, command.notes) == ({"LLAMA_ARG_TIMEOUT": "60"}, [])


def test_relative_model_starts_where_the_command_ran() -> None:
    """An absolute one stays."""
    assert parse_command("llama-server -m m.gguf", cwd=Path("/srv")).gguf == Path("/srv/m.gguf")
    assert parse_command("llama-server -m /m/m.gguf", cwd=Path("/srv")).gguf == Path("/m/m.gguf")


@pytest.mark.parametrize(
    ("flags", "name"),
    [("-a unsloth/Qwen3:Q4", "unsloth-Qwen3-Q4"), ("-m /m/Smol.Q4_1.gguf", "Smol.Q4_1"), ("-np 1", "model")],
)
def test_model_id_is_one_that_a_plan_accepts(flags: str, name: str) -> None:
    """The alias, else the file, in letters, digits, dots, dashes and underscores."""
    assert parse_command(f"llama-server {flags}").model_id == name


# ---- the process on a port


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A process called llama-server in its own directory: its port and that directory."""
    program = tmp_path / "llama-server"
    program.write_text(f"#!{sys.executable}\n{LISTENER}")
    program.chmod(0o755)
    argv = [str(program), "-m", "m.gguf", "--port", "8080", "-np", "1"]
    environ = os.environ | {"LLAMA_ARG_CTX_SIZE": "512"}
    child = subprocess.Popen(argv, cwd=tmp_path, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        yield int(child.stdout.readline()), tmp_path
    finally:
        child.kill()
        child.communicate()


def test_listener_is_read_with_its_directory_and_environment(listener: tuple[int, Path]) -> None:
    """The model's path is whole; its LLAMA_ARG_* count as well."""
    port, directory = listener
    command = read_listener(port)
    assert (command.gguf, command.settings.context_tokens) == (directory / "m.gguf", 512)
    assert (command.port, command.settings.parallel) == (port, 1)


def test_nobody_on_the_port() -> None:
    """A port that was just given back."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(
        BadInput, match=rf"^port {port}: nobody listens there; start llama-server first, or give its command$"
    ):
        read_listener(port)


def test_somebody_else_on_the_port() -> None:
    """The test itself listens; it is no llama-server."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        who = rf"^port {port}: .+ \(pid {os.getpid()}\) listens there, not llama-server; "
        with pytest.raises(BadInput, match=who + "give llama-server's port or its command$"):
            read_listener(port)


def _connection(pid: int | None) -> SimpleNamespace:
    return SimpleNamespace(status=psutil.CONN_LISTEN, laddr=SimpleNamespace(port=8080), pid=pid)


def _denied(**_: Any) -> Any:
    raise psutil.AccessDenied


@pytest.mark.parametrize("connections", [lambda **_: [_connection(None)], _denied])
def test_hidden_owner_of_the_port(connections: Any) -> None:
    """Another user's process has no pid on Linux; macOS refuses the whole list."""
    line = "port 8080: this user may not see who listens there; run as that user or as root, or give the command"
    with pytest.raises(BadInput) as caught:
        read_listener(8080, connections=connections)
    assert str(caught.value) == line


def test_owner_that_ended_meanwhile() -> None:
    """Its pid is in the list, the process no longer there."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    with pytest.raises(BadInput, match=rf"^port 8080: pid {child.pid} ended while it was read; try again$"):
        read_listener(8080, connections=lambda **_: [_connection(child.pid)])


@pytest.mark.engine
def test_real_llama_server_is_read_from_its_port() -> None:
    """What was given to a running llama-server comes back."""
    model, directory = installed.smollm2(installed.LLAMA_SERVER), installed.llama_server().parent
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    argv = [str(directory / "llama-server"), "-m", model.name, "--port", str(port), "-c", "512", "-np", "1", "-t", "1"]
    environ = os.environ | {"LD_LIBRARY_PATH": str(directory)}
    child = subprocess.Popen(argv, cwd=model.parent, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _await_listener(port, child)
        command = read_listener(port)
    finally:
        child.kill()
        child.wait()
    assert (command.gguf, command.port, command.unknown) == (model, port, [])
    assert command.settings == Settings(context_tokens=512, parallel=1, threads=1)


def _await_listener(port: int, child: subprocess.Popen[bytes], deadline_s: float = 60) -> None:
    """Returns once somebody accepts on `port`; fails when the child is gone or the deadline has passed."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        assert child.poll() is None, "llama-server ended before it listened"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    pytest.fail(f"llama-server did not listen within {deadline_s} s")
