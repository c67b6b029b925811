"""Blobs of Ollama's library that other engines do not load: named with the reason, before anything is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf_files import LLAMA, OTHERS, write_gguf

from engines.model.header import read_header
from engines.support import loads


@pytest.mark.parametrize(
    ("architecture", "changes", "why"),
    [
        ("qwen2vl", {"keys": {**LLAMA, "rope.dimension_sections": [16, 24, 24]}}, "has 3 entries, llama.cpp reads 4"),
        ("gemma3", {"tensors": {**OTHERS, "v.blk.0.attn_q.weight": "F16"}}, "v.blk.0.attn_q.weight is of a projector"),
        (
            "qwen35",
            {"tensors": {**OTHERS, "mtp.layers.0.weight": "F16"}},
            "mtp.layers.0.weight is of a projector or a draft",
        ),
    ],
)
def test_a_blob_with_more_than_a_model_is_for_ollama_alone(
    architecture: str, changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    """Of Ollama itself it is not known: only its own patches read such files."""
    header = read_header(write_gguf(tmp_path / "m.gguf", architecture, **changes))
    found = loads("llama.cpp", header)
    assert found.answer == "no"
    assert why in found.why
    assert loads("ollama", header, version="0.32.15").answer == "unknown"


def test_a_plain_model_loads_in_both(tmp_path: Path) -> None:
    """Most of what is in a store is a GGUF as llama.cpp writes one."""
    header = read_header(write_gguf(tmp_path / "m.gguf", keys=LLAMA))
    assert [loads(engine, header).answer for engine in ("llama.cpp", "ollama")] == ["yes", "yes"]
