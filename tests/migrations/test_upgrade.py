"""The plan of an upgrade, derived from the plan that serves."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from itertools import islice
from pathlib import Path

import pytest
from gguf_files import LLAMA, write_gguf

from engines.errors import BadInput
from migrations import new_build
from migrations.plan import Plan
from migrations.plan_file import load_plan
from migrations.upgrade import cannot_prove, is_upgrade_of, upgrade_file, upgrade_plan

Served = Callable[..., Plan]


def build(folder: Path, name: str, version: str) -> Path:
    """A program that says it is this llama-server."""
    path = folder / name
    path.write_text(
        f"#!/bin/sh\ncase $1 in --version) echo 'version: {version}' ;; *) echo ' --model --port --temp' ;; esac\n"
    )
    path.chmod(0o755)
    return path


@pytest.fixture
def served(tmp_path: Path) -> Served:
    """A plan from a llama-server to mistral.rs; `incumbent` and `model` are more keys of those tables."""

    def load(incumbent: str = "", model: str = "", more: str = "") -> Plan:
        gguf = write_gguf(tmp_path / "m.gguf", keys=LLAMA)
        path = tmp_path / "plan.toml"
        path.write_text(
            f'name = "mine"\naccepted_unsupported = ["mlock"]\n[incumbent]\nengine = "llama.cpp"\n'
            f'binary = "{build(tmp_path, "old", "1 (0000001)")}"\n{incumbent}\n'
            f'[candidate]\nengine = "mistral.rs"\n[[models]]\nid = "m"\ngguf = "{gguf}"\n{model}\n{more}'
        )
        return load_plan(path)

    return load


def test_it_serves_the_new_build_as_the_old_one_is_served(served: Served, tmp_path: Path) -> None:
    """Args of the engine and of the model go to both; the old build is pinned, the rest of the plan kept."""
    new = build(tmp_path, "new", "0.1 (build 1, commit 7e4c0a9)")
    own = 'engine = "llama.cpp"\n[models.engines."llama.cpp"]\nargs = ["--temp", "0.2"]'
    plan = served(
        'args = ["--temp", "0.1"]', own, "[limits]\nforeign_cpu = 0.5\nttft_p50_ratio = 40.0\n[yard]\nport = 1"
    )
    found = upgrade_plan(plan, "llama.cpp", new)
    assert (found.incumbent.name, found.candidate.name) == ("llama.cpp", "llama.cpp@7e4c0a9")
    assert (found.incumbent.binary, found.candidate.binary) == (tmp_path / "old", new)
    assert [found.own_args("m", name).args[1] for name in ("llama.cpp", "llama.cpp@7e4c0a9")] == ["0.2", "0.2"]
    assert found.candidate.args == found.incumbent.args == ("--temp", "0.1")
    assert (found.models[0].engine, found.yard, found.accepted_unsupported) == ("auto", plan.yard, ("mlock",))
    assert (found.measure.soak_s, found.measure.looks) == (600, (6, 12, 24))
    assert found.limits == new_build.PAIR.limits.model_copy(update={"foreign_cpu": 0.5})
    assert cannot_prove(found)[0].startswith("failures per day: 10 min without one bound the rate at about 432 a day")
    assert cannot_prove(plan) == ()


def test_an_upgrade_of_an_upgrade(served: Served, tmp_path: Path) -> None:
    """The build that was new serves; one of another version gets another name, also where that one was retired."""
    first = upgrade_plan(served(), "llama.cpp", build(tmp_path, "new", "2 (abcdef1)"))
    newer = build(tmp_path, "newer", "3 (abcdef2)")
    second = upgrade_plan(first, "llama.cpp@abcdef1", newer, taken=["llama.cpp@abcdef2"])
    assert (second.incumbent, second.candidate.name) == (first.candidate, "llama.cpp@abcdef2-2")
    assert (second.name, second.measure, second.limits) == (first.name, first.measure, first.limits)
    assert upgrade_plan(first, "llama.cpp", tmp_path / "new") == first  # asked for once more


@pytest.mark.parametrize(
    ("name", "upgrade"),
    [
        ("llama.cpp-to-mistral.rs", "llama.cpp-upgrade"),
        ("mine", "mine-upgrade"),
        ("llama.cpp-to-mistral.rs-upgrade", "llama.cpp-to-mistral.rs-upgrade"),
    ],
)
def test_it_is_named_for_what_it_does(served: Served, tmp_path: Path, name: str, upgrade: str) -> None:
    """An engine's upgrade is no move to the engine that the plan would have moved to; what has a name keeps it."""
    plan = served().model_copy(update={"name": name})
    found = upgrade_plan(plan, "llama.cpp", build(tmp_path, "new", "2 (abcdef1)"))
    assert found.name == upgrade
    assert cannot_prove(found)


def test_a_wheel_gives_its_version(served: Served, tmp_path: Path) -> None:
    new = build(tmp_path, "new", "2 (abcdef1)")
    assert upgrade_plan(served(), "llama.cpp", new, version="0.10092.0").candidate.name == "llama.cpp@0.10092.0"


def test_a_wheel_may_run_in_a_python_of_its_own(served: Served, tmp_path: Path) -> None:
    """It says by that Python which version it is; a Python without the wheel is refused."""
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\ncase $2 in -c) echo has 2026.1 ;; *) echo ' --model --port' ;; esac\n")
    python.chmod(0o755)
    found = upgrade_plan(served(), "llama.cpp", python, version="2026.1").candidate
    assert (found.name, found.form, found.python) == ("llama.cpp@2026.1", "hosted", python)
    python.write_text("#!/bin/sh\necho nothing of ours\n")
    with pytest.raises(BadInput, match="python3 is not the Python of an environment with xllamacpp"):
        upgrade_plan(served(), "llama.cpp", python)


def test_a_copy_of_the_build_is_another_build(served: Served, tmp_path: Path) -> None:
    """A true A/A; the same file is none, also by another path."""
    plan, copy = served(), build(tmp_path, "copy", "1 (0000001)")
    assert upgrade_plan(plan, "llama.cpp", copy).candidate.name == "llama.cpp@0000001"
    (tmp_path / "link").symlink_to(tmp_path / "old")
    for path in (tmp_path / "old", tmp_path / "link"):
        with pytest.raises(BadInput, match="is the build that serves"):
            upgrade_plan(plan, "llama.cpp", path)


def test_what_the_plan_has_no_build_of_cannot_be_upgraded(served: Served, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"-native serves, which has no other build: promote mistral\.rs first"):
        upgrade_plan(served(), "mistral.rs-native", build(tmp_path, "new", "2 (abcdef1)"))


def test_its_file_lies_beside_the_plan() -> None:
    """Numbered where one of that day is another; the file of an earlier upgrade is one that may be the same."""
    day = date(2026, 11, 29)
    names = [path.name for path in islice(upgrade_file(Path("/p/my.plan.toml"), day), 2)]
    assert names == ["my.plan.upgrade-2026-11-29.toml", "my.plan.upgrade-2026-11-29-2.toml"]
    assert is_upgrade_of(Path("/p") / names[1], Path("/p/my.plan.toml"))
    assert not is_upgrade_of(Path("/p/my.plan.toml"), Path("/p/my.plan.toml"))
    names = [path.name for path in islice(upgrade_file(Path("/p/a.upgrade-2026-11-01-2.toml"), day), 2)]
    assert names == ["a.upgrade-2026-11-01-2.toml", "a.upgrade-2026-11-29.toml"]
