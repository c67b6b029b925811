"""Two builds of one engine in one plan, through every command: each goes by its name."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from played import two_builds
from switchyard_command import json_of

from engines.process.serving import free_port
from engines.yard.client import YardClient
from flows.rollout.phase_one import engines_here, phase_one
from migrations.plan_file import load_plan
from tasks.records.store import open_records

pytestmark = pytest.mark.usefixtures("prefect")
Switchyard = Callable[..., subprocess.CompletedProcess[str]]
ONE, TWO = "llama.cpp@one", "llama.cpp@two"


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return two_builds(tmp_path, "m", tail=f"[yard]\nport = {free_port()}\n")


def test_a_yard_that_runs_takes_over_another_plan(switchyard: Switchyard, yard: YardClient, plan: Path) -> None:
    """No engine restarts, the plan is the yard's from then on, and one that cannot be taken over changes nothing."""

    def engines() -> dict[str, int | None]:
        return {engine["engine"]: engine["pid"] for engine in yard.status()["models"][0]["engines"]}

    assert switchyard("load", "m").returncode == 0
    before = engines()
    other = plan.with_name("other.toml")
    other.write_text(plan.read_text().replace(f'"{TWO}"', '"llama.cpp@three"'))
    done = switchyard("reload", other)
    assert done.returncode == 0, done.stderr
    assert engines() == {ONE: before[ONE], "llama.cpp@three": None}
    assert (before[ONE], switchyard("promote", "--yes").returncode) != (None, 0)  # by its name the candidate now
    assert yard.status()["models"][0]["committed"] == "llama.cpp@three"
    assert switchyard("rollback").returncode == 0
    other.write_text("[incumbent]\n")
    refused = switchyard("reload", other)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "llama.cpp@three" in engines()


def test_they_are_examined_and_evaluated_apart(switchyard: Switchyard, plan: Path, home: Path) -> None:
    """Each under its own name, from its own program; what changes beside the program shuts the gate again."""
    examined = json_of(switchyard("preflight", plan, "--json"))["models"][0]
    assert [entry["engine"] for entry in examined["engines"]] == [ONE, TWO]
    outcome = json_of(switchyard("evaluate", plan, "--json"))
    checks = {check["check"]: check for check in outcome["models"][0]["checks"]}
    assert (checks["preflight.loads"]["verdict"], checks["performance.errors"]["verdict"]) == ("PASS", "PASS")
    assert TWO in checks["preflight.loads"]["why"]
    page = Path(outcome["report"]).read_text(encoding="utf-8")
    assert (ONE in page, TWO in page, "1 (first)" in page, "1 (second)" in page) == (True, True, True, True)

    loaded = load_plan(plan)
    with open_records(home / "switchyard.db") as records:

        def why() -> str:
            found = engines_here(loaded)
            builds = {one.engine: one.build for one in found}
            return phase_one(records, loaded, loaded.models[0], found[0].version, builds).why

        assert "changed" not in why()
        library = plan.with_name("two") / "libllama.so"
        library.write_text("another build of the same version")
        assert f"{TWO} has changed since run {outcome['run_id']} measured it" in why()


def test_they_are_promoted_rolled_back_and_retired_by_name(
    switchyard: Switchyard, yard: YardClient, plan: Path, home: Path
) -> None:
    """The yard runs one or the other; metrics, state and retirement know which."""

    def serving() -> tuple[str, str]:
        (route,) = yard.status()["models"]
        engine = next(one for one in route["engines"] if one["engine"] == route["committed"])
        return route["committed"], engine["version"]

    def answered() -> None:
        port = load_plan(plan).yard.port
        body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        assert httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60).status_code == 200

    assert serving() == (ONE, "1 (first)")
    answered()
    assert switchyard("promote", "m", "--to", TWO, "--yes").returncode == 0
    assert serving() == (TWO, "1 (second)")
    answered()
    metrics = httpx.get(f"http://127.0.0.1:{load_plan(plan).yard.port}/metrics", timeout=60).text
    assert all(f'engine="{name}"' in metrics for name in (ONE, TWO))
    assert switchyard("rollback", "m").returncode == 0
    assert serving() == (ONE, "1 (first)")
    assert switchyard("promote", "m", "--yes").returncode == 0
    done = switchyard("retire", plan, "--now", "--who", "Ada", "--reason", "the new build is good", "--json")
    assert done.returncode == 0, done.stderr
    assert json_of(done)["engine"] == ONE
    refused = switchyard("promote", "m", "--to", ONE, "--yes")
    assert refused.returncode == 2
    assert f"{ONE} was retired" in refused.stderr
    assert switchyard("restore", ONE).returncode == 0
    assert switchyard("promote", "m", "--to", ONE, "--yes").returncode == 0
    assert serving() == (ONE, "1 (first)")
    guide = switchyard("guide", plan)
    assert guide.returncode == 0, guide.stderr
    assert f"Migration guide: from {ONE} to {TWO}" in (home / "guides" / "played" / "guide.md").read_text()
