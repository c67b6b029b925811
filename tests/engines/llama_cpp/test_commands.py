"""Commands as people have them: wrappers, scripts, units, containers and configs, read without being run."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.errors import BadInput
from engines.llama_cpp.commands import parse_command, parse_commands
from engines.llama_cpp.shell import read_shell

SERVER = "ghcr.io/ggml-org/llama.cpp:server-cuda"
FULL = "ghcr.io/ggml-org/llama.cpp:full"
UNKNOWN = "only the shell knows its value; left out, add it to the plan"
NOT_READ = "another file, which is not read; its variables are missing here"
RUN = "docker run -d --rm --gpus all -p 127.0.0.1:9000:8080/tcp -v /srv/m:/models:ro -e LLAMA_ARG_CTX_SIZE=64"
UNIT = """
[Unit]
Description=llama
[Service]
WorkingDirectory=/srv/llama
Environment="GGML_X=1" LLAMA_ARG_THREADS=4
Environment=MODEL=/srv/m.gguf
# a comment
ExecStart=-/usr/bin/llama-server \\
  -m ${MODEL} --port 8099 --mmproj %h/p.gguf \\
  --slot-save-path slots
"""
QUADLET = """
[Container]
Image=ghcr.io/ggml-org/llama.cpp:server
PublishPort=8088:8080
Volume=/srv/models:/models:Z
Environment=LLAMA_ARG_N_PARALLEL=3
Exec=-m /models/a.gguf --temp 0.7
"""
COMPOSE = """
services:
  web: {image: nginx, ports: ["80:80"]}
  llama:
    image: ghcr.io/ggml-org/llama.cpp:server-cuda
    ports: ["127.0.0.1:8085:8080"]
    volumes: ["/srv/models:/models:ro"]
    environment: {LLAMA_ARG_MODEL: /models/a.gguf, LLAMA_ARG_N_PARALLEL: 2, LLAMA_ARG_MLOCK: true}
    command: --ctx-size 4096 --lora /models/l.gguf
"""
COMPOSE_LONG = """
services:
  llama:
    image: someone/llm
    entrypoint: ["/app/llama-server"]
    command: ["-m", "/models/a.gguf", "--port", "9000", "--temp", "0.2"]
    ports: [{target: 9000, published: 9100, host_ip: 127.0.0.1}]
    volumes: [{type: bind, source: /srv, target: /models}]
    environment: [GGML_X=1, SECRET]
"""
SCRIPT = """#!/usr/bin/env bash
set -euo pipefail
DIR="$HOME/models"   # where they lie
ARGS=(-c 4096
  --alias 'a b'      # a name
)
ARGS+=(--temp 0.5)
EXTRA="-t 4 -b 512"
if [ -f x ]; then
  export CUDA_VISIBLE_DEVICES=0
fi
cd /srv && nohup llama-server -m "$DIR/${NAME:-m}.gguf" "${ARGS[@]}" $EXTRA --seed 7 > log 2>&1 &
"""

# text -> what is read of it
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "wrappers": ("sudo -E numactl -N 0 nice -n 5 taskset -c 0-3 /opt/llama-server -m /a.gguf -t 4", {"threads": 4}),
    "env": ("env GGML_X=2 ./llama-server -m /a.gguf", {"env": {"GGML_X": "2"}, "binary": "./llama-server"}),
    "sh -c": (
        'sh -c "cd /srv && exec llama-server -m a.gguf -c 64 2>>/tmp/x"',
        {"gguf": "/srv/a.gguf", "context_tokens": 64},
    ),
    "sudo env sh -c": ("sudo env GGML_X=2 bash -lc 'llama-server -m /a.gguf'", {"env": {"GGML_X": "2"}}),
    "tmux": ("tmux new -d -s x 'llama-server -m /a.gguf --port 9'", {"port": 9}),
    "pipe": ("llama-server -m /a.gguf --port 9 2>&1 | tee log", {"port": 9, "args": []}),
    "and": ("sleep 5 && llama-server -m /a.gguf --port 9 || echo failed", {"port": 9, "args": []}),
    "lines": ("llama-server \\\r\n -m /a.gguf \\\r\n --port 9\r\n", {"port": 9}),
    "fish": ("set -gx CUDA_VISIBLE_DEVICES 1\nllama-server -m /a.gguf", {"env": {"CUDA_VISIBLE_DEVICES": "1"}}),
    "quotes": (
        'llama-server -m \'/a b.gguf\' -ot "x\\.(y|z)=CPU" --alias "it\'s"',
        {"gguf": "/a b.gguf", "args": ["-ot", "x\\.(y|z)=CPU"], "names": ["it's"]},
    ),
    "single quotes": (
        'llama-server -m /a.gguf --chat-template-kwargs \'{"a": "$HOME"}\'',
        {"args": ["--chat-template-kwargs", '{"a": "$HOME"}']},
    ),
    "comment": ("# llama-server -m /no.gguf\nllama-server -m /a.gguf # --port 9", {"port": 8080, "gguf": "/a.gguf"}),
    "heredoc": ("cat > x <<EOF\nllama-server -m /no.gguf\nEOF\nllama-server -m /a.gguf", {"gguf": "/a.gguf"}),
    "here-string port": ("PORT=9\nllama-server -m /a.gguf --port ${PORT}", {"port": 9}),
    "script": (
        SCRIPT,
        {
            "gguf": str(Path.home() / "models/m.gguf"),
            "context_tokens": 4096,
            "threads": 4,
            "batch_tokens": 512,
            "names": ["a b"],
            "args": ["--temp", "0.5"],
            "seed": 7,
            "env": {"CUDA_VISIBLE_DEVICES": "0"},
        },
    ),
    "docker": (
        f"{RUN} {SERVER} -m /models/a.gguf --mmproj /models/p.gguf",
        {
            "host": "127.0.0.1",
            "port": 9000,
            "gguf": "/srv/m/a.gguf",
            "context_tokens": 64,
            "args": ["--mmproj", "/srv/m/p.gguf"],
            "binary": None,
        },
    ),
    "docker glued": (
        f"docker run -itp9000:80 --volume=/srv:/m --env=GGML_X=1 {SERVER} -m /m/a.gguf --port 80",
        {"host": "0.0.0.0", "port": 9000, "gguf": "/srv/a.gguf", "env": {"GGML_X": "1"}},
    ),
    "docker mount": (
        f"docker run --mount type=bind,source=/srv,target=/m {SERVER} -m /m/a.gguf",
        {"host": "0.0.0.0", "port": 8080, "gguf": "/srv/a.gguf"},
    ),
    "podman host": (
        f"podman run --network host -v /srv:/m {FULL} --server -m /m/a.gguf --port 9001",
        {"host": "0.0.0.0", "port": 9001},
    ),
    "docker inner host": (
        f"docker run --net=host {SERVER} --host 127.0.0.1 -m /m/a.gguf",
        {"host": "127.0.0.1", "port": 8080},
    ),
    "unit": (
        UNIT,
        {
            "binary": "/usr/bin/llama-server",
            "gguf": "/srv/m.gguf",
            "port": 8099,
            "threads": 4,
            "env": {"GGML_X": "1"},
            "args": ["--mmproj", str(Path.home() / "p.gguf"), "--slot-save-path", "/srv/llama/slots"],
        },
    ),
    "unit line": ("ExecStart=/usr/bin/llama-server -m /a.gguf --port 9", {"port": 9}),
    "quadlet": (
        QUADLET,
        {"host": "0.0.0.0", "port": 8088, "gguf": "/srv/models/a.gguf", "parallel": 3, "args": ["--temp", "0.7"]},
    ),
    "compose": (
        COMPOSE,
        {
            "host": "127.0.0.1",
            "port": 8085,
            "gguf": "/srv/models/a.gguf",
            "parallel": 2,
            "mlock": True,
            "context_tokens": 4096,
            "args": ["--lora", "/srv/models/l.gguf"],
        },
    ),
    "compose long": (
        COMPOSE_LONG,
        {"host": "127.0.0.1", "port": 9100, "gguf": "/srv/a.gguf", "env": {"GGML_X": "1"}, "args": ["--temp", "0.2"]},
    ),
}


CASES |= {
    "pkill first": ("pkill -f llama-server; llama-server -m /a.gguf --port 9", {"port": 9}),
    "pgrep first": ("if ! pgrep llama-server; then\n  llama-server -m /a.gguf --port 9\nfi", {"port": 9}),
    "systemctl first": ("sudo systemctl stop llama-server && llama-server -m /a.gguf --port 9", {"port": 9}),
    "function": ("start() {\n  llama-server -m /a.gguf --port 9\n}\nstart", {"port": 9}),
    "binary in a variable": ("BIN=/opt/llama-server; $BIN -m /a.gguf", {"binary": "/opt/llama-server"}),
    "unknown folder": ("$LLAMA/llama-server -m /a.gguf -c 64", {"context_tokens": 64, "gguf": "/a.gguf"}),
    "home in a variable": (
        "D=~/m:~\nexport HF_HOME=~/h\nllama-server -m /a.gguf --slot-save-path $D",
        {"args": ["--slot-save-path", f"{Path.home()}/m:{Path.home()}"]},
    ),
    "[[ ]]": ('[[ -n "$X" ]] && Y=1 || Y=2\nllama-server -m /a.gguf -c 64', {"context_tokens": 64}),
    "compose defaults": (
        "services: {a: {image: 'ggml-org/llama.cpp:server', command: '-m /m/${F:-a}.gguf --alias $$x', "
        "volumes: ['${D:-/srv}:/m'], ports: ['${P-9}:8080']}}",
        {"gguf": "/srv/a.gguf", "port": 9, "names": ["$x"]},
    ),
}


@pytest.fixture(scope="session")
def shell_words(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """Has bash run a text; the words that its llama-server was started with."""
    folder = tmp_path_factory.mktemp("bash")
    program, seen = folder / "llama-server", folder / "seen"
    program.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" > {seen}\n")
    program.chmod(0o755)
    if (bash := shutil.which("bash")) is None:
        pytest.skip("needs bash")

    def run(text: str) -> list[str]:
        env = {"HOME": "/h", "PATH": f"{folder}:/usr/bin:/bin"}
        subprocess.run([bash, "--norc", "-c", f"set -f\n{text}\nwait"], env=env, check=False, capture_output=True)
        return seen.read_bytes().decode().split("\0")[:-1]

    return run


@pytest.mark.parametrize("name", CASES)
def test_what_is_read(name: str) -> None:
    text, expected = CASES[name]
    command = parse_command(text)
    read = {
        **command.settings.model_dump(),
        "args": list(command.own.args),
        "env": command.own.env,
        "gguf": str(command.gguf),
        **{key: getattr(command, key) for key in ("binary", "host", "port", "names")},
    }
    assert {key: read[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("llama-server -m /a.gguf -t $(nproc)", f"-t $(nproc): {UNKNOWN}"),
        ("llama-server -m /a.gguf -t `nproc`", f"-t `nproc`: {UNKNOWN}"),
        ("llama-server -m /a.gguf --port $PORT", f"--port $PORT: {UNKNOWN}"),
        ("GGML_X=$(id) llama-server -m /a.gguf", f"variable GGML_X: {UNKNOWN}"),
        (
            "services: {a: {image: 'ggml-org/llama.cpp:server', command: '-m /a.gguf --alias ${NAME}'}}",
            "$NAME: not set in the compose file; its value is missing here",
        ),
        ("FOO=1 llama-server -m /a.gguf", "variable FOO: not one that llama-server reads; left out"),
        (". ./env.sh\nllama-server -m /a.gguf", ". ./env.sh: another file, which is not read"),
        (f"docker run --env-file x {SERVER} -m /a.gguf", f"--env-file x: {NOT_READ}"),
        (
            f"docker run -e KEEP {SERVER} -m /a.gguf",
            "variable KEEP: its value comes from the shell, and is not known here; left out",
        ),
        (
            f"docker run {SERVER} -m /a.gguf",
            "no port is published: the plan has the port inside the container; change yard.port if needed",
        ),
        (
            "[Service]\nEnvironmentFile=-/etc/x\nExecStart=llama-server -m /a.gguf",
            f"EnvironmentFile -/etc/x: {NOT_READ}",
        ),
        (
            "llama-server -m /a.gguf &\nllama-server -m /b.gguf",
            "2 commands start llama-server here: the first one is read; give the others alone",
        ),
    ],
)
def test_what_is_not_known_is_named(text: str, note: str) -> None:
    assert note in parse_command(text).notes


def test_a_container_says_that_its_build_is_another() -> None:
    [note] = [note for note in parse_command(f"docker run -p 1:8080 {SERVER} -m /a.gguf").notes if "container" in note]
    assert note.startswith(f"{SERVER} runs in a container: the incumbent becomes a llama-server found on this machine")


@pytest.mark.parametrize("key", ["--api-key $KEY", "--api-key-file /k", "--api-key 'a b'"])
def test_a_key_is_noticed_wherever_it_comes_from(key: str) -> None:
    command = parse_command(f"llama-server -m /a.gguf {key}")
    assert command.has_api_key
    assert "$KEY" not in repr(command)


def test_each_model_of_a_llama_swap_config_is_read() -> None:
    text = """
macros:
  base: llama-server --port ${PORT} -ngl 99
models:
  org/big:
    cmd: |
      ${base}
      -m /m/q.gguf
      # a comment
      --temp 0.7
    aliases: [gpt-4o]
    env: ["CUDA_VISIBLE_DEVICES=0"]
  small: {cmd: "/opt/llama-server -m /m/v.gguf --port ${PORT}"}
  other: {cmd: "vllm serve x"}
"""
    big, small = parse_commands(text)
    assert (big.model_id, big.aliases, big.settings.gpu_layers) == ("org-big", ("org/big", "gpt-4o"), 99)
    assert (big.own.args, big.own.env) == (("--temp", "0.7"), {"CUDA_VISIBLE_DEVICES": "0"})
    assert (small.model_id, small.binary, small.port) == ("small", "/opt/llama-server", 8080)
    assert not [note for note in small.notes if "--port" in note]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("C:\\llama\\llama-server.exe -m C:\\a.gguf", "the command names a Windows path"),
        ("llama-server -m 'a", "the command cannot be read: no closing quotation; check its quotes"),
        ('llama-server -m "a', "the command cannot be read: no closing quotation; check its quotes"),
        ("llama-server -m $(a", "the command cannot be read: no closing quotation; check its quotes"),
        ("services: {web: {image: nginx}}", "no llama-server among the services (web)"),
        ("models: {a: {cmd: vllm serve x}}", "no model of this llama-swap config is served by llama-server"),
        (
            "[Service]\nExecStart=/usr/bin/ollama serve",
            "no llama-server in the command: it runs '/usr/bin/ollama serve'",
        ),
        ("docker run nginx", "no llama-server in the command: it runs 'docker run'"),
        ("#!/bin/sh\n# nothing", "no llama-server in the command: it runs 'nothing'"),
        ("llama-server --gpt-oss-20b-default", "--gpt-oss-20b-default: it chooses a model and its settings by itself"),
    ],
)
def test_what_cannot_be_read_is_one_line(text: str, line: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_commands(text)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


PLAIN = st.text(st.sampled_from("abc/.,:=-_%@+^"), min_size=1, max_size=5)
INSIDE = st.lists(
    st.one_of(PLAIN, st.sampled_from(["$A.", "${A}", "${B:-d e}", "${A:+p q}", " ", "'", "#", ";", "\\$x"])), max_size=4
)
FRAGMENT = st.one_of(
    PLAIN,
    st.sampled_from(["$A.", "${A}", "${B:-d}", "${B-e}", "${A:+p}", "\\ ", "\\'", "\\$", "~", "~/m", "{}", "a#b"]),
    st.sampled_from(["${B:-$A}", '${B:-"d  e"}', "${A% y}", "${A##* }", "${B:-${A}}"]),
    st.sampled_from(["$(dirname /a/b)", '"$(basename "$A")"', "`echo q`", "$(cd /usr && pwd)"]),
    st.text(st.sampled_from('ab $`\\"#;|&(){}~'), max_size=6).map(lambda text: f"'{text}'"),
    INSIDE.map(lambda parts: f'"{"".join(parts)}"'),
)
WORD = st.lists(FRAGMENT, min_size=1, max_size=3).map("".join).filter(lambda word: not word.startswith(("~+", "~-")))
BRACES = st.sampled_from(
    ["{a,b}", "x{1..3}y", "{3..1}", "{a,}", "{a,{b,c}d}", "'q'{a,\"b c\"}.${L[0]}", "'{a,b}'", '{"a":1,b:2}']
)
ENDS = st.sampled_from(
    ["", " > /dev/null 2>&1", " 2>/dev/null", " # a comment", " &", "; true", " && true", " | cat", "\n"]
)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.one_of(WORD, st.just('"${L[@]}"'), st.just("$C"), BRACES), min_size=1, max_size=5), ENDS)
def test_words_are_those_that_bash_finds(shell_words: Callable[[str], list[str]], words: list[str], end: str) -> None:
    """Quotes, expansions, arrays and splitting, beside what a real shell passes to the program."""
    text = f"A='x y'\nC='1  2 3'\nL=(one 'two three' \"$A\")\nllama-server {' '.join(words)}{end}\n"
    found = read_shell(text, {"HOME": "/h"}, {}).commands[0]
    assert found.words[0] == "llama-server"
    assert found.words[1:] == shell_words(text)


@given(st.lists(st.text(st.characters(exclude_characters="\x00\r", exclude_categories=["Cs"]), min_size=1), min_size=1))
def test_quoted_words_come_out_as_they_were(words: list[str]) -> None:
    """Any text in single quotes is one word, and nothing in it is followed."""
    quoted = ["'" + word.replace("'", "'\\''") + "'" for word in words]
    [command] = read_shell("x " + " ".join(quoted), {}, {}).commands
    assert command.words == ["x", *(word.replace("\\\n", " ") for word in words)]


@given(st.text(st.sampled_from("ab $'\"\\`(){}<>|&;#~=\n\t-0*"), max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    """In no case does the reader hang or fail otherwise."""
    with contextlib.suppress(ValueError):
        read_shell(text, {"a": "b"}, {})


MANIFEST = """
apiVersion: apps/v1
kind: Deployment
spec:
  template:
    spec:
      containers:
      - name: proxy
        image: nginx
      - name: llama
        image: ghcr.io/ggml-org/llama.cpp:server
        args: ["-m", "/models/a.gguf", "--temp", "0.5", "--port", "8001", "--host", "0.0.0.0"]
        env:
        - {name: LLAMA_ARG_CTX_SIZE, value: "4096"}
        - {name: LLAMA_API_KEY, valueFrom: {secretKeyRef: {name: keys, key: llama}}}
        ports: [{containerPort: 8001}]
        volumeMounts: [{name: models, mountPath: /models}]
      volumes:
      - {name: models, hostPath: {path: /srv/models}}
---
kind: Service
spec: {ports: [{port: 80}]}
"""
PROPERTY_LIST = """<?xml version="1.0" encoding="UTF-8"?>
<plist version="1.0"><dict><key>Label</key><string>llama</string>
<key>ProgramArguments</key><array><string>/opt/llama-server</string><string>-m</string><string>/srv/models/a.gguf</string>
<string>--temp</string><string>0.5</string><string>--port</string><string>8001</string></array>
<key>EnvironmentVariables</key><dict><key>LLAMA_ARG_CTX_SIZE</key><string>4096</string></dict></dict></plist>
"""
CMD = (
    "set LLAMA_ARG_CTX_SIZE=4096\r\nllama-server.exe ^\r\n -m /srv/models/a.gguf ^\r\n --temp 0.5 ^\r\n --port 8001\r\n"
)
POWERSHELL = "llama-server.exe `\n -m /srv/models/a.gguf -c 4096 `\n --temp 0.5 --port 8001\n"


@pytest.mark.parametrize("text", [MANIFEST, PROPERTY_LIST, POWERSHELL], ids=["kubernetes", "launchd", "powershell"])
def test_other_systems_start_it_as_well(text: str) -> None:
    command = parse_command(text)
    assert (command.gguf, command.port) == (Path("/srv/models/a.gguf"), 8001)
    assert command.values["context_tokens"] == 4096
    assert command.own.args == ("--temp", "0.5")


def test_a_manifest_names_what_it_keeps_elsewhere() -> None:
    assert "variable LLAMA_API_KEY: its value is kept in the cluster; left out" in parse_command(MANIFEST).notes


def test_lines_of_cmd_are_one_command() -> None:
    command = parse_command(CMD)
    assert (command.port, command.own.args) == (8001, ("--temp", "0.5"))


@pytest.mark.parametrize(
    "text", ["a:\n  b: llama-server -m x\n", "kind: Pod\nspec: {containers: [{image: nginx}]}\n", "<plist>"]
)
def test_a_file_of_another_kind_is_refused_in_one_line(text: str) -> None:
    """Its words are not taken for flags."""
    with pytest.raises(BadInput) as refused:
        parse_command(text)
    assert "\n" not in str(refused.value)
