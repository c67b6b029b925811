"""Whether an evaluation fits beside what the yard serves."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_files import LLAMA, write_gguf

from engines.fit import estimate
from engines.model.free_memory import FreeMemory
from engines.model.header import read_header
from flows.evaluation.beside import lack
from migrations.plan import Plan

EXPERTS = {f"blk.{layer}.ffn_up_exps.weight": "F32" for layer in range(64)}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    gguf = write_gguf(tmp_path / "m.gguf", keys=LLAMA, tensors={"token_embd.weight": "F32"} | EXPERTS)
    engines = {"incumbent": {"engine": "llama.cpp"}, "candidate": {"engine": "llama.cpp", "name": "again"}}
    return Plan.model_validate({**engines, "models": [{"id": "m", "gguf": gguf}]})


def needed(plan: Plan) -> int:
    """Bytes that the incumbent is expected to take alone."""
    model = plan.models[0]
    own = plan.own_args(model.id, "llama.cpp")
    fit = estimate(read_header(model.gguf), plan.settings, "llama.cpp", own=own, memory=FreeMemory(1 << 50))
    return fit.needs[0].expected


def missing(plan: Plan, ram_bytes: int) -> str | None:
    """The lack beside an engine of the yard that serves the same model."""
    headers = {"m": read_header(plan.models[0].gguf)}
    return lack(plan, headers, [("m", "llama.cpp", 1 << 20)], FreeMemory(ram_bytes))


def test_the_same_weights_mapped_twice_are_needed_once(plan: Plan) -> None:
    """llama.cpp beside llama.cpp: the pages of the file are there, and the system counts them as free."""
    assert missing(plan, needed(plan)) is None
    assert "is missing" in (missing(plan, needed(plan) - 1) or "")


def test_flags_of_the_plan_count(plan: Plan) -> None:
    """A cache of 32-bit floats takes twice the room."""
    own = plan.incumbent.model_copy(update={"args": ("-ctk", "f32", "-ctv", "f32")})
    larger = plan.model_copy(update={"incumbent": own, "candidate": own.model_copy(update={"name": "again"})})
    assert needed(larger) - needed(plan) == 4096 * 256
    assert missing(larger, needed(larger)) is None
    assert "1.0 MiB is missing" in (missing(larger, needed(plan)) or "")
