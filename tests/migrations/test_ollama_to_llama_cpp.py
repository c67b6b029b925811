"""The plan of a user's Ollama: every name by which clients ask stays, and belongs to one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engines.ollama.library import StoredModel
from migrations.ollama_to_llama_cpp import plan_for


def stored(name: str, file: str = "", **parameters: Any) -> StoredModel:
    return StoredModel(name=name, gguf=Path("/blobs", file or name), size=4, parameters=parameters)


@pytest.mark.parametrize(
    "names", [("m:7b", "m-7b:latest"), ("a-b:latest", "a/b:latest"), ("m:7b", "m-7b:latest", "m-7b-2:latest", "m/7b:x")]
)
@pytest.mark.parametrize("order", [1, -1])
def test_names_that_would_be_one_id_stay_apart(names: tuple[str, ...], order: int) -> None:
    """A client that asked for a model before gets the same file."""
    files = {model.name: model.gguf for model in map(stored, names)}
    plan = plan_for([stored(name) for name in names[::order]])
    assert len(plan.models) == len(names)
    for name, gguf in files.items():
        for asked in (name, name.removesuffix(":latest")):
            assert [model.gguf for model in plan.models if asked in (model.id, *model.aliases)] == [gguf]


def test_tags_of_one_file_are_one_model() -> None:
    """With other settings it is another one."""
    plan = plan_for([stored("m:135m", "f"), stored("m:latest", "f"), stored("m:long", "f", num_ctx=8192)])
    assert [(model.id, model.aliases) for model in plan.models] == [
        ("m", ("m:135m", "m:latest")),
        ("m-long", ("m:long",)),
    ]
