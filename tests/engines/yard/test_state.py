"""state.json: never half, never lost."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

from engines.errors import SwitchyardError
from engines.settings import Settings
from engines.yard.engine.launch_spec import MODULES, Recipe
from engines.yard.state import Canary, ModelState, StateFile, YardState


def recipe(**settings):
    return Recipe(
        engine="old",
        form="binary",
        program=("/bin/old", "serve"),
        version="1",
        flags=("--a",),
        model_id="m",
        gguf=Path("/models/m.gguf"),
        settings=Settings(**settings),
    )


def state():
    route = ModelState(serving="old", undo="new", canary=Canary(engine="new", weight=0.1), recipes={"old": recipe()})
    return YardState().with_model("m", route)


def test_what_was_saved_is_read_back(tmp_path):
    file = StateFile(tmp_path)
    file.save(state())
    assert file.load() == (state(), None)
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize(("stored", "present"), MODULES.items())
def test_a_module_that_moved_is_found_and_still_stored_under_its_old_name(tmp_path, stored, present):
    """A rollback from a stored recipe finds its module, and the version before the move could start it as well."""
    assert importlib.util.find_spec(present) is not None
    file = StateFile(tmp_path)
    file.save(state())
    text = json.loads((tmp_path / "state.json").read_text())
    text["models"]["m"]["recipes"]["old"]["program"] = ["/v/bin/python", "-m", stored]
    (tmp_path / "state.json").write_text(json.dumps(text))
    loaded, problem = file.load()
    assert problem is None
    assert loaded.models["m"].recipes["old"].program == ("/v/bin/python", "-m", present)
    file.save(loaded)
    assert json.loads((tmp_path / "state.json").read_text()) == text


def test_no_file_is_an_empty_state(tmp_path):
    assert StateFile(tmp_path).load() == (YardState(), None)


@pytest.mark.parametrize("garbage", ["", "{", "[]", '{"models": {"m": 1}}', '{"version": 1, "unknown": 2}', "\x00\xff"])
def test_garbage_is_set_aside_and_said(tmp_path, garbage):
    (tmp_path / "state.json").write_text(garbage)
    loaded, problem = StateFile(tmp_path).load()
    assert loaded == YardState()
    assert "set aside" in problem
    assert len(problem.splitlines()) == 1
    (aside,) = tmp_path.iterdir()
    assert aside.read_text() == garbage


def test_a_state_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    file = StateFile(tmp_path)
    file.save(state())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SwitchyardError, match=r"No space left.*nothing was changed"):
        file.save(YardState())
    monkeypatch.undo()
    assert file.load() == (state(), None)


def test_a_recipe_holds_no_key(tmp_path):
    file = StateFile(tmp_path)
    secret = recipe(api_key="hunter2-secret")
    file.save(YardState().with_model("m", ModelState(serving="old", recipes={"old": secret})))
    assert "hunter2" not in file.path.read_text()
    assert secret.serve(1, None).settings.api_key is None


def test_a_recipe_makes_the_same_command_again():
    again = Recipe.model_validate(json.loads(recipe(parallel=3).model_dump_json()))
    assert again == recipe(parallel=3)
    assert again.installation.knows("--a")
    assert again.serve(8099, None).settings.parallel == 3
