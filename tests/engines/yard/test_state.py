"""state.json: never half, never lost."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

from engines.driver import Installation
from engines.errors import EngineNotFound, SwitchyardError
from engines.settings import Settings
from engines.yard.engine import launch_spec
from engines.yard.engine.launch_spec import MODULES, LaunchSpec, relocated
from engines.yard.state import Canary, ModelState, StateFile, YardState


def spec(**settings):
    return LaunchSpec(
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
    route = ModelState(serving="old", undo="new", canary=Canary(engine="new", weight=0.1), specs={"old": spec()})
    return YardState().with_model("m", route)


def test_what_was_saved_is_read_back(tmp_path):
    file = StateFile(tmp_path)
    file.save(state())
    assert file.load() == (state(), None)
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize("stored", MODULES)
def test_a_stored_module_is_there(stored):
    assert importlib.util.find_spec(MODULES[stored]) is not None


@pytest.mark.parametrize("stored", MODULES)
def test_a_module_that_moved_is_read_under_its_new_name_and_stored_under_its_old_one(tmp_path, monkeypatch, stored):
    """So a rollback finds the module, and the version before the move can start what this one has stored."""
    monkeypatch.setitem(launch_spec.MODULES, stored, "elsewhere.host")
    monkeypatch.setitem(launch_spec.STORED_NAMES, "elsewhere.host", stored)
    file = StateFile(tmp_path)
    file.save(state())
    text = json.loads(file.path.read_text())
    # only what follows -m is a module: an engine's own argument may be called the same
    text["models"]["m"]["recipes"]["old"]["program"] = ["/v/bin/python", "-m", stored, stored]
    file.path.write_text(json.dumps(text))
    loaded, problem = file.load()
    assert problem is None
    assert loaded.models["m"].specs["old"].program == ("/v/bin/python", "-m", "elsewhere.host", stored)
    assert loaded.models["m"].specs["old"].installation.program[2] == "elsewhere.host"
    file.save(loaded)
    assert json.loads(file.path.read_text()) == text


class Finds:
    """A driver as far as looking for its engine goes: the form that was asked for, found in `program`."""

    def __init__(self, version="1", program="/elsewhere/engine"):
        self.version, self.program, self.asked = version, program, []

    def find(self, form="auto", binary=None):
        self.asked.append(form)
        if self.version is None:
            raise EngineNotFound("old was not found: install it", engine="old")
        return Installation("old", "binary", (self.program, "serve"), self.version, where=self.program)


GONE = "/gone/bin/python"


@pytest.mark.parametrize(
    ("form", "program", "asked"),
    [
        ("binary", sys.executable, []),
        ("hosted", sys.executable, []),
        ("native", sys.executable, []),
        ("binary", "/bin/sh", []),
        ("hosted", "/bin/sh", ["hosted"]),  # another Python may hold another Switchyard
        ("native", "/bin/sh", ["auto"]),
        ("binary", GONE, ["binary"]),
        ("hosted", GONE, ["hosted"]),
        ("native", GONE, ["auto"]),
    ],
)
def test_the_same_engine_is_looked_for_where_its_program_may_be_gone(form, program, asked):
    driver, stored = Finds(), spec().model_copy(update={"form": form, "program": (program, "x")})
    found, line = relocated(stored, driver)
    assert driver.asked == asked
    assert found.program == (("/elsewhere/engine", "serve") if asked else (program, "x"))
    assert (found.model_id, found.gguf, found.settings) == (stored.model_id, stored.gguf, stored.settings)
    assert bool(line) == bool(asked)
    assert "\n" not in line


@pytest.mark.parametrize(("version", "why"), [(None, "install it"), ("2", "version 2")])
@pytest.mark.parametrize("form", ["binary", "hosted", "native"])
def test_a_program_that_is_gone_for_good_stays_as_stored_with_the_reason(form, version, why):
    stored = spec().model_copy(update={"form": form, "program": (GONE,)})
    found, line = relocated(stored, Finds(version))
    assert found == stored
    assert f"{GONE}, which is gone" in line
    assert why in line


def test_another_python_that_has_the_only_wheel_is_kept():
    stored = spec().model_copy(update={"form": "hosted", "program": ("/bin/sh",)})
    assert relocated(stored, Finds(None)) == (stored, "")


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
    secret = spec(api_key="hunter2-secret")
    file.save(YardState().with_model("m", ModelState(serving="old", specs={"old": secret})))
    assert "hunter2" not in file.path.read_text()
    assert secret.serve(1, None).settings.api_key is None


def test_a_recipe_makes_the_same_command_again():
    again = LaunchSpec.model_validate(json.loads(spec(parallel=3).model_dump_json()))
    assert again == spec(parallel=3)
    assert again.installation.knows("--a")
    assert again.serve(8099, None).settings.parallel == 3


def test_a_spec_without_a_kind_is_of_the_kind_that_it_is_called():
    """As every version before names has stored it; one whose name is its kind is stored as before."""
    told = spec().model_dump(mode="json")
    assert "kind" not in told
    assert LaunchSpec.model_validate(told).kind == "old"
    named = spec().model_copy(update={"engine": "old@2"})
    assert LaunchSpec.model_validate(named.model_dump(mode="json")) == named
    assert (named.kind, named.installation.kind, named.installation.engine) == ("old", "old", "old@2")


def test_an_engine_that_got_a_name_is_found_under_it():
    """Everything that a stored route says of it, retirement included."""
    before = state()
    named = before.renamed({"old": "old@1", "new": "new@1"}).models["m"]
    assert (named.serving, named.undo, named.selected) == ("old@1", "new@1", "auto")
    assert (named.canary.engine, list(named.specs), named.specs["old@1"].engine) == ("new@1", ["old@1"], "old@1")
    retired = YardState().with_model("k", ModelState(serving="new", specs={"old": spec()}))
    retired = retired.retire("old", at=1.0, who="Ada", why="x", archive="").renamed({"old": "old@1"})
    assert retired.retired["old@1"].specs["k"].engine == "old@1"
    assert before.renamed({}) == before
    two = before.with_model("k", ModelState(serving="old@1", specs={"old@1": spec()}))
    assert two.renamed({"old": "old@1"}) == two  # two builds, each under its own name
