"""The yard's routes, without engines."""

from __future__ import annotations

from pathlib import Path

from engines.settings import Settings
from engines.yard.config import ModelConfig, YardConfig
from engines.yard.engine.launch_spec import LaunchSpec
from engines.yard.settings import YardSettings
from engines.yard.state import ModelState, StateFile, YardState
from engines.yard.yard import Yard

ENGINES = ("llama.cpp", "mistral.rs")


def specs_of(model: str) -> dict[str, LaunchSpec]:
    common = {"form": "binary", "program": ("/bin/sh",), "version": "1", "flags": (), "settings": Settings()}
    return {one: LaunchSpec(engine=one, model_id=model, gguf=Path("/m.gguf"), **common) for one in ENGINES}


async def test_a_commit_of_one_model_leaves_the_others_where_the_plan_put_them(tmp_path):
    """The plan's choice of an engine is in force although it is not in the stored state."""
    folder = tmp_path / "yard"
    folder.mkdir()
    stored = {name: ModelState(serving="llama.cpp", specs=specs_of(name)) for name in "ab"}
    StateFile(folder).save(YardState(models=stored))
    models = tuple(
        ModelConfig(id=name, incumbent=ENGINES[0], candidate=ENGINES[1], specs=specs_of(name), engine=engine)
        for name, engine in (("a", "auto"), ("b", "mistral.rs"))
    )
    yard = Yard(YardConfig(settings=YardSettings(), models=models, api_key=None), home=tmp_path)
    await yard.open()
    try:
        yard.commit(yard.routes["a"], selected="mistral.rs")
        assert (yard.routes["a"].state.selected, yard.routes["b"].state.serving) == ("mistral.rs", "mistral.rs")
        assert yard.state.models["b"].serving == "llama.cpp"
        yard.save(yard.state.retire("third", at=0, who="me", why="test", archive=""))
        assert yard.routes["b"].state.serving == "mistral.rs"
    finally:
        await yard.stop()
