"""`switchyard init`: the plan listens where the imported command listened, and says what it cannot take over."""

from __future__ import annotations

import os
import random
import re
import shlex
import subprocess
import threading
import tomllib
from pathlib import Path
from typing import Any

import installed
import pytest
from gguf_files import LLAMA, write_gguf
from ollama_store import LAYER, OllamaStore
from switchyard_command import json_of

from migrations.llama_cpp_to_mistral_rs import PAIR

CASES = Path(__file__).parents[2] / "cases" / "init"
LOCAL = "127.0.0.1"
# what tests/cases/README.md calls right, as far as it is about the address
ADDRESSES = {
    "01-gemma4-full": ("0.0.0.0", 8016),
    "02-alias-with-slash": (LOCAL, 8001),
    "03-several-aliases": (LOCAL, 8080),
    "05-docker-server-image": ("0.0.0.0", 8082),
    "06-environment-in-front": (LOCAL, 8001),
    "08-log-colors-bare": (LOCAL, 8000),
    "10-hf-alias-model": (LOCAL, 9501),
    "12-systemd-line": ("0.0.0.0", 8080),
    "13-home-variable": (LOCAL, 8080),
    "14-mixed-kv": (LOCAL, 8080),
    "16-moe-offload": (LOCAL, 8080),
    "18-embeddings": (LOCAL, 8081),
    "24-script": ("0.0.0.0", 8001),
}


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "model.gguf")


@pytest.fixture
def imported(switchyard, tmp_path, gguf):
    """`init --from-command`: the plan's table, and what was said."""

    def run(command: str) -> tuple[dict[str, Any], dict[str, Any]]:
        given = ["init", "--from-command", command, "--model", gguf, "-o", tmp_path / "plan.toml", "--force", "--json"]
        done = switchyard(*given)
        assert done.returncode == 0, done.stderr
        return tomllib.loads((tmp_path / "plan.toml").read_text()), json_of(done)

    return run


def address(plan: dict[str, Any]) -> tuple[str, int]:
    return plan["yard"]["host"], plan["yard"]["port"]


def test_every_case_has_an_address() -> None:
    assert {path.stem for path in CASES.glob("*.cmd")} == set(ADDRESSES)


@pytest.mark.parametrize("case", ADDRESSES)
def test_the_plan_listens_where_the_command_did(imported, gguf, case):
    command = (CASES / f"{case}.cmd").read_text().replace("{M}", str(gguf))
    plan, said = imported(command)
    assert address(plan) == ADDRESSES[case]
    asked = ADDRESSES[case][0] != LOCAL
    assert asked == any("SWITCHYARD_API_KEY" in note and "other machines" in note for note in said["notes"])


# what else tests/cases/README.md calls right: keys of the plan by their path
RIGHT: dict[str, dict[str, Any]] = {
    "01-gemma4-full": {
        "incumbent.args": [
            *shlex.split("--threads-http 6 --ctx-checkpoints 8 --checkpoint-min-step 1024 --fit on --fit-target 512"),
            *shlex.split("--fit-ctx 262144 --mmproj /srv/models/mmproj-BF16.gguf --mmproj-offload --kv-unified"),
            *shlex.split("--no-cache-idle-slots --kv-offload --cont-batching --op-offload --warmup --reasoning off"),
        ],
        "settings.parallel": 1,
        "settings.host_cache_mib": 8192,
        "models.0.id": "gemma4-12b-q8",
    },
    "02-alias-with-slash": {
        "models.0.id": "unsloth-Qwen3.5-35B-A3B",
        "models.0.aliases": ["unsloth/Qwen3.5-35B-A3B"],
        "incumbent.args": [
            *["--temp", "0.6", "--top-p", "0.95", "--top-k", "20", "--min-p", "0.00", "--chat-template-kwargs"],
            '{"enable_thinking":false}',
        ],
    },
    "03-several-aliases": {"models.0.id": "chat", "models.0.aliases": ["small", "gpt-4o-mini"]},
    "05-docker-server-image": {"models.0.id": "smol", "settings.parallel": 2, "settings.context_tokens": 16384},
    "06-environment-in-front": {
        "incumbent.env": {
            "CUDA_VISIBLE_DEVICES": "1",
            "GGML_CUDA_ENABLE_UNIFIED_MEMORY": "1",
            "GGML_VK_VISIBLE_DEVICES": "1",
            "HSA_OVERRIDE_GFX_VERSION": "11.0.0",
        },
        "api_key_env": "SWITCHYARD_API_KEY",
    },
    "08-log-colors-bare": {
        "incumbent.args": ["-v", "--log-prefix", "--log-timestamps", "--log-colors", "--temp", "0.0", "--top-p", "0.8"],
        "settings.threads": 12,
    },
    "10-hf-alias-model": {"models.0.id": "gemma4", "settings.kv_type": "q8_0"},
    "12-systemd-line": {"incumbent.args": ["--no-mmap"], "settings.gpu_layers": 99},
    "14-mixed-kv": {"incumbent.args": ["-ctk", "q8_0", "-ctv", "q4_0"], "settings.kv_type": None},
    "16-moe-offload": {
        "incumbent.args": [
            *["-ot", r"blk\.(?:[0-9]|1[0-9])\.ffn_.*_exps\.=CPU"],
            *["-ncmoe", "20", "--no-mmap", "-ts", "3,1", "-dev", "CUDA0,CUDA1", "-mg", "0"],
            *["--rope-scaling", "yarn", "--rope-scale", "4", "--yarn-orig-ctx", "32768"],
        ]
    },
    "18-embeddings": {"incumbent.args": ["--embedding", "--pooling", "rank", "--reranking"]},
    "24-script": {
        "incumbent.env": {"CUDA_VISIBLE_DEVICES": "0", "GGML_CUDA_ENABLE_UNIFIED_MEMORY": "1"},
        "incumbent.args": ["--prio", "3", "--timeout", "3600", "--sleep-idle-seconds", "3600"],
        "settings.parallel": 3,
    },
}
# what only the incumbent has is named for the candidate, or for the reader
NAMED = {
    "01-gemma4-full": ["args --mmproj", "args --reasoning"],
    "05-docker-server-image": ["runs in a container", "is not on this machine"],
    "10-hf-alias-model": ["it would lie in"],
    "14-mixed-kv": ["args --cache-type-k", "args --cache-type-v"],
    "16-moe-offload": ["args --override-tensor", "args --n-cpu-moe", "args --rope-scaling"],
    "18-embeddings": ["args --embedding", "args --rerank"],
}


@pytest.mark.parametrize("case", RIGHT)
def test_every_flag_of_the_command_is_in_the_plan(imported, gguf, case):
    plan, said = imported((CASES / f"{case}.cmd").read_text().replace("{M}", str(gguf)))
    for path, expected in RIGHT[case].items():
        value: Any = plan
        for key in path.split("."):
            value = value[int(key)] if key.isdigit() else value.get(key)
        assert value == expected, path
    assert said["unknown"] == []
    lines = "\n".join([*said["unsupported"], *said["notes"]])
    assert all(words in lines for words in NAMED.get(case, [])), lines
    if "parallel" not in str(RIGHT[case]):
        assert plan["settings"]["parallel"] == 0


@pytest.mark.parametrize(
    "flags", ["", "-fa on --mlock", "--mlock --cache-reuse 256 --temp 0.3 --lora x.gguf -ub 128", "--api-key k"]
)
def test_the_gaps_in_the_plan_are_those_of_this_pair(imported, gguf, tmp_path, flags):
    """The accepted ones in the list, all of them above it, and what it means not to accept one."""
    (tmp_path / "x.gguf").write_bytes(gguf.read_bytes())
    plan, written = imported(f"llama-server -m {gguf} {flags.replace('x.gguf', str(tmp_path / 'x.gguf'))}")
    gaps = {line.partition(":")[0]: line for line in written["unsupported"]}
    assert set(plan["accepted_unsupported"]) == set(written["accepted"]) == set(gaps) & set(PAIR.accepted_unsupported)
    above = (tmp_path / "plan.toml").read_text().partition("accepted_unsupported =")[0]
    above = " ".join(above.replace("\n#", " ").split())
    assert above.count(" - ") >= len(gaps)
    accepted, _, open_ones = above.partition("and not accepted:")
    assert ("it blocks nothing. Add its name" in open_ones) is bool(set(gaps) - set(PAIR.accepted_unsupported))
    for name, line in gaps.items():
        assert " ".join(line.split()) in (accepted if name in PAIR.accepted_unsupported else open_ones)
    if "--mlock" in flags:
        assert "mlock" in plan["accepted_unsupported"]
    if not flags:
        assert plan["accepted_unsupported"] == []


def test_a_model_below_home_is_found(imported, gguf, tmp_path, environment):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "own.gguf").write_bytes(gguf.read_bytes())
    environment["HOME"] = str(tmp_path)
    for written in ("$HOME/models/own.gguf", "~/models/own.gguf", "${HOME}/models/own.gguf"):
        plan, _said = imported(f"llama-server -m {written}")
        assert plan["models"][0]["gguf"] == str(tmp_path / "models" / "own.gguf")


def test_a_file_is_read_like_a_command(switchyard, tmp_path, gguf):
    """A script, its text on standard input, and a llama-swap config with two models."""
    script = tmp_path / "start.sh"
    script.write_text(f"#!/bin/sh\nllama-server -m {gguf.name} --port 9 --temp 0.5\n")
    done = switchyard("init", "--from-file", script, "-o", tmp_path / "one.toml")
    assert done.returncode == 0, done.stderr
    one = tomllib.loads((tmp_path / "one.toml").read_text())
    assert (one["models"][0]["gguf"], one["yard"]["port"]) == (str(gguf), 9)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"models:\n  a:\n    cmd: llama-server -m {gguf} --port ${{PORT}} --temp 0.5\n"
        f"  b:\n    cmd: llama-server -m {gguf} --port ${{PORT}} -c 64\n"
    )
    assert switchyard("init", "--from-file", config, "-o", tmp_path / "two.toml").returncode == 0
    a, b = tomllib.loads((tmp_path / "two.toml").read_text())["models"]
    assert (a["id"], a["engines"]["llama.cpp"]["args"]) == ("a", ["--temp", "0.5"])
    assert (b["settings"]["context_tokens"], b["load"], "engines" in b) == (64, "demand", False)
    assert switchyard("preflight", tmp_path / "two.toml").returncode in (0, 3)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--from-file", "gone.sh"], "error: gone.sh: cannot be read: No such file or directory"),
        (["--from-file", "binary"], "error: binary: not UTF-8 text; give a unit, script"),
        (["--from-port", "1", "--from-command", "x"], "error: --from-port, --from-command, --from-file"),
        (
            ["--from-command", "llama-server -np 1"],
            "error: the command names no model file (-m FILE); add --model FILE",
        ),
        (["--from-command", "llama-server --models-dir /m"], "error: --models-dir: it makes llama-server a router"),
        ([], "error: give --from-port 8080, --from-command"),
    ],
)
def test_what_cannot_be_read_writes_nothing(switchyard, tmp_path, given, line):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    done = switchyard("init", *given, "-o", "plan.toml")
    assert done.returncode == 2
    assert done.stderr.startswith(line), done.stderr
    assert not (tmp_path / "plan.toml").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", (LOCAL, 8080)),
        ("--port 8016", (LOCAL, 8016)),
        ("--port=8016", (LOCAL, 8016)),
        ("--port 1 --port 8016", (LOCAL, 8016)),
        ("--port 08016", (LOCAL, 8016)),
        ("--port 0", (LOCAL, 8080)),
        ("--host localhost", ("localhost", 8080)),
        ("--host LOCALHOST", ("localhost", 8080)),
        ("--host ::1", ("::1", 8080)),
        ("--host :: --port 9000", ("::", 9000)),
        ("--host ''", ("0.0.0.0", 8080)),
        ("--host 192.168.1.20", ("192.168.1.20", 8080)),
        ("--host 127.0.0.2", ("127.0.0.2", 8080)),
        ("--host 0.0.0.0 --host 127.0.0.1", (LOCAL, 8080)),
        ("--host /run/llama.sock --port 9000", (LOCAL, 8080)),
        ("--host no-such-host.invalid", (LOCAL, 8080)),
    ],
)
def test_each_spelling_of_the_address(imported, gguf, words, expected):
    plan, said = imported(f"llama-server -m {gguf} {words}")
    assert address(plan) == expected
    left_out = any(word in words for word in ("--port 0 ", ".sock", ".invalid")) or words == "--port 0"
    assert left_out == any("8080" in note or "127.0.0.1" in note for note in said["notes"]), said["notes"]


def test_the_environment_in_front_counts_and_flags_win(imported, gguf):
    front = "LLAMA_ARG_PORT=8016 LLAMA_ARG_HOST=127.0.0.3"
    assert address(imported(f"{front} llama-server -m {gguf}")[0]) == ("127.0.0.3", 8016)
    assert address(imported(f"{front} llama-server -m {gguf} --port 8017")[0]) == ("127.0.0.3", 8017)
    docker = "docker run -p 127.0.0.1:9001:8016 -e LLAMA_ARG_PORT=8016 ghcr.io/ggml-org/llama.cpp:server"
    assert address(imported(f"{docker} -m {gguf} --host 0.0.0.0")[0]) == (LOCAL, 9001)


def test_an_open_host_is_valid_at_once_and_asks_for_a_key_in_words(switchyard, tmp_path, gguf):
    """The key itself is copied nowhere; the yard says what to set, and where, on one line."""
    secret = "sk-this-is-the-key"
    plan = tmp_path / "plan.toml"
    command = f"llama-server -m {gguf} --host 0.0.0.0 --port 8016 --api-key {secret}"
    done = switchyard("init", "--from-command", command, "-o", plan)
    assert "SWITCHYARD_API_KEY" in done.stdout
    assert "api_key_env" in plan.read_text()
    assert "export SWITCHYARD_API_KEY" in plan.read_text()
    assert secret not in plan.read_text() + done.stdout + done.stderr
    assert "8016" not in switchyard("preflight", plan).stderr
    refused = switchyard("serve", plan)
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    (line,) = [line for line in refused.stderr.splitlines() if "error" in line]
    assert "SWITCHYARD_API_KEY" in line

    plan.write_text(re.sub(r"(?m)^api_key_env.*$", "", plan.read_text()))
    (line,) = [line for line in switchyard("serve", plan).stderr.splitlines() if "error" in line]
    assert "api_key_env" in line
    assert "SWITCHYARD_API_KEY" in line


@pytest.mark.engine
def test_the_address_is_the_one_that_the_real_server_takes(imported):
    """Random spellings, several times over: what llama-server says it listens on is what the plan says."""
    installed.require(*installed.BOTH)
    gguf, binary = installed.smollm2(), installed.llama_server()
    dice = random.Random(11)
    for _ in range(8):
        words, environ = spelled(dice)
        real = listens_on([str(binary), "-m", str(gguf), "-c", "64", *words], environ)
        front = " ".join(f"{name}={shlex.quote(value)}" for name, value in environ.items())
        plan, _said = imported(f"{front} {binary} -m {gguf} -c 64 {shlex.join(words)}")
        host, port = address(plan)
        shown = f"[{host}]" if ":" in host else host
        assert f"http://{shown}:{port}" == real, (environ, words)


def spelled(dice: random.Random) -> tuple[list[str], dict[str, str]]:
    """Flags in any order and number, and variables, of one random address each."""

    def port() -> str:
        return str(dice.randint(20_000, 30_000))

    def host() -> str:
        return dice.choice(["127.0.0.1", "localhost", "::1", "0.0.0.0", "127.0.0.9"])

    pairs = [["--port", port()] for _ in range(dice.randint(0, 2))] + [["--host", host()]] * dice.randint(0, 2)
    dice.shuffle(pairs)
    environ = {"LLAMA_ARG_PORT": port()}
    if dice.random() < 0.5:
        environ["LLAMA_ARG_HOST"] = host()
    return [word for pair in pairs for word in pair], environ


def listens_on(argv: list[str], environ: dict[str, str]) -> str:
    """The address that the server itself prints."""
    server = subprocess.Popen(
        argv, env={**os.environ, **environ}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    last_resort = threading.Timer(60, server.kill)
    last_resort.start()
    try:
        assert server.stdout is not None
        for line in server.stdout:
            if found := re.search(r"listening on (http://\S+)", line):
                return found[1]
        raise AssertionError(f"{argv} ended without listening")
    finally:
        last_resort.cancel()
        server.kill()
        server.wait()


def test_the_models_of_an_ollama_become_a_plan(switchyard, environment, tmp_path: Path, gguf: Path) -> None:
    """By the names that clients use; the store is only read, and what cannot be read is a note."""
    store = OllamaStore(tmp_path / "models")
    digest = store.add("library/smollm2/135m", gguf.read_bytes(), params={"num_thread": 2}, template="{{ .Prompt }}")
    store.add("library/smollm2/latest", gguf.read_bytes(), params={"num_thread": 2}, template="{{ .Prompt }}")
    store.manifest("library/gone/latest", {"layers": [{"mediaType": f"{LAYER}model", "digest": "sha256:" + "0" * 64}]})
    store.add("library/cut/latest", gguf.read_bytes()[:100])
    store.add("library/vectors/latest", write_gguf(tmp_path / "v.gguf", keys={**LLAMA, "pooling_type": 1}).read_bytes())
    before = sorted((path, path.stat().st_mtime_ns) for path in store.folder.rglob("*"))
    path = tmp_path / "plan.toml"
    environment["OLLAMA_MODELS"] = str(store.folder)
    done = switchyard("init", "--from-ollama", "-o", path, "--json")
    assert done.returncode == 0, done.stderr
    plan, notes = tomllib.loads(path.read_text()), json_of(done)["notes"]
    assert (plan["incumbent"]["engine"], plan["candidate"]["engine"]) == ("ollama", "llama.cpp")
    model, vectors = plan["models"]
    assert (model["id"], model["aliases"]) == ("smollm2", ["smollm2:135m", "smollm2:latest"])
    assert f"{vectors['id']}:latest: gives embeddings; it cannot be moved: an evaluation compares chat" in notes
    assert model["gguf"] == str(store.path(digest))
    assert model["settings"] == {"context_tokens": 4096, "threads": 2}
    assert any(note.startswith("gone:latest: blob ") for note in notes)
    assert any(note.startswith("cut:latest: ") and note.endswith("; pull the model anew") for note in notes)
    assert [note for note in notes if "template: " in note] == [
        "smollm2:135m, smollm2:latest: template: its Go template is not converted; "
        "others use the Jinja template in the file"
    ]
    assert sorted((path, path.stat().st_mtime_ns) for path in store.folder.rglob("*")) == before


def test_no_store_of_ollama_is_one_line(switchyard, environment, tmp_path: Path) -> None:
    """Nothing is written."""
    path = tmp_path / "plan.toml"
    environment["OLLAMA_MODELS"] = str(tmp_path)
    done = switchyard("init", "--from-ollama", "-o", path)
    assert (done.returncode, path.exists()) == (2, False)
    assert "no models of Ollama were found" in done.stderr
