"""`switchyard upgrade`: another build of the engine that serves, evaluated and moved to on the yard that runs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from played import plan_of, played
from switchyard_command import json_of
from traffic import traffic

from engines.model.digest import model_digest
from engines.process.serving import free_port
from engines.yard.client import YardClient
from flows.rollout.phase_one import engines_here
from migrations.plan import Plan, content_hash
from migrations.plan_file import load_plan
from migrations.upgrade import upgrade_plan
from tasks.records.store import open_records
from tasks.verdicts.verdict import Verdict, at_most

pytestmark = pytest.mark.usefixtures("prefect")
Switchyard = Callable[..., subprocess.CompletedProcess[str]]
OLD, NEW = "llama.cpp", "llama.cpp@abcdef1"
AT_ONCE = ("--without-canary", "--who", "Ada", "--reason", "no clients at night")


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A plan from llama.cpp to mistral.rs, as `init` writes one."""
    return plan_of(tmp_path, "m", tail=f"[yard]\nport = {free_port()}\n")


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """A newer build of the engine that serves."""
    program = played(tmp_path / "new", "llama-server")
    program.with_name("build").write_text("2 (abcdef1)")
    program.with_name("libllama.so").write_text("another")
    return program


def opened(home: Path, plan: Plan) -> None:
    """A PASS on record for just this plan and these builds."""
    engines = [
        {"engine": e.engine, "version": e.version, "build": e.build, "arm": "candidate"} for e in engines_here(plan)
    ]
    under: dict[str, Any] = {"plan_hash": content_hash(plan), "model_digest": model_digest(plan.models[0].gguf)}
    with open_records(home / "switchyard.db") as records:
        run = records.start_run("evaluate", plan.name, plan.model_dump(mode="json"))
        records.put_evidence(run.id, "m", "both", "performance", {}, environment={**under, "engines": engines[:1]})
        records.put_checks(run.id, "m", [at_most("parity.mean_kld", 0.0, limit=0.0005, unit="nats")])
        records.finish_run(run.id, "done", verdict=Verdict.PASS)


def test_the_plan_stays_and_another_has_both_builds(
    switchyard: Switchyard, yard: YardClient, plan: Path, build: Path, home: Path
) -> None:
    """Ten minutes of soak at most, nearer limits, the old build pinned; a gate that stays shut moves nothing."""
    before = plan.read_bytes()
    done = switchyard("upgrade", "--to", build, "--json")
    outcome = json_of(done)
    assert done.returncode == {"FAIL": 3, "INCONCLUSIVE": 4}[outcome["verdict"]], done.stderr
    assert "pause the clients" in done.stderr
    assert plan.read_bytes() == before
    written = load_plan(Path(outcome["plan_file"]))
    assert Path(outcome["plan_file"]).name.startswith("plan.upgrade-20")
    assert (written.incumbent.name, written.candidate.name) == (OLD, NEW)
    assert (written.incumbent.binary, written.candidate.binary) == (plan.with_name("llama-server"), build)
    assert (written.limits.mean_kld, written.measure.soak_s, written.measure.looks) == (0.0005, 1, (3,))
    checks = {check["check"]: check["verdict"] for check in outcome["evaluation"]["models"][0]["checks"]}
    assert checks["parity.prompt_tokens"] == "PASS"
    assert [risk["risk"] for risk in outcome["evaluation"]["models"][0]["risks"]][
        1
    ] == "the new build answers differently"
    assert outcome["evaluation"]["cannot_prove"]
    assert (outcome["migration"], outcome["models"][0]["result"]) == (None, "stays")
    assert yard.status()["models"][0]["committed"] == OLD
    again = switchyard("upgrade", "--to", build, "--json")  # it has its verdict
    assert (json_of(again)["evaluation"], json_of(again)["plan_file"]) == (None, outcome["plan_file"])


def test_an_open_gate_moves_behind_the_running_yard_and_back(
    switchyard: Switchyard, yard: YardClient, plan: Path, build: Path, home: Path
) -> None:
    """With `--check-only` nothing moves; the way back needs no database, and the old build ends by `retire`."""
    opened(home, upgrade_plan(load_plan(plan), OLD, build))
    checked = switchyard("upgrade", "--to", build, "--check-only", "--json")
    assert (checked.returncode, json_of(checked)["models"][0]["result"]) == (0, "may move"), checked.stderr
    assert "without --check-only" in json_of(checked)["next"]
    pid = yard.status()["pid"]
    address = f"http://127.0.0.1:{load_plan(plan).yard.port}/v1/chat/completions"

    def ask(number: int) -> int:
        body = {"model": "m", "messages": [{"role": "user", "content": f"Hello {number}"}], "max_tokens": 4}
        return httpx.post(address, json={**body, "stream": True}, timeout=60).status_code

    with traffic(ask, 0) as statuses:
        done = switchyard("upgrade", "--to", build, *AT_ONCE, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(statuses) == {200}
    assert json_of(done)["models"][0]["result"] == "promoted"
    (route,) = yard.status()["models"]
    assert (route["committed"], route["undo"], yard.status()["pid"]) == (NEW, OLD, pid)
    again = switchyard("upgrade", plan, "--to", build)
    assert (again.returncode, "is the build that serves" in again.stderr) == (2, True), again.stderr
    (home / "switchyard.db").rename(home / "gone.db")
    assert switchyard("rollback", "m").returncode == 0
    assert yard.status()["models"][0]["committed"] == OLD
    assert switchyard("promote", "m", "--yes").returncode == 0
    retired = switchyard(
        "retire", json_of(done)["plan_file"], "--now", "--who", "Ada", "--reason", "the new one is good"
    )
    assert retired.returncode == 0, retired.stdout + retired.stderr


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ((), "either --to PATH or --to-wheel NAME==VERSION"),
        (("--to", "{new}", "--to-wheel", "x==1"), "either --to PATH or --to-wheel"),
        (("--to", "{folder}/none"), "no executable file"),
        (("--to", "{folder}/mistralrs"), "is not a llama-server: it says 'mistralrs 0.9.5'"),
        (("--to", "{folder}/llama-server"), "is the build that serves"),
        (("--to-wheel", "x>=1"), "write NAME==VERSION"),
        (("--to", "{new}", "--from-port", "1"), "port"),
        (("--to", "{new}", "--without-canary"), "add --who and --reason"),
    ],
)
def test_what_cannot_be_an_upgrade_is_one_line(
    switchyard: Switchyard, plan: Path, build: Path, how: tuple[str, ...], said: str
) -> None:
    """And nothing is written."""
    words = [word.format(new=build, folder=plan.parent) for word in how]
    done = switchyard("upgrade", *([] if "--from-port" in how else [plan]), *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert said in done.stderr
    assert not list(plan.parent.glob("*upgrade*"))


def test_options_that_the_new_build_lacks_are_named_before_anything_is_written(
    switchyard: Switchyard, plan: Path, build: Path
) -> None:
    """In the new build's own words where its help has some."""
    args = 'args = ["--temp", "0.1", "--draft-max", "4"]'
    plan.write_text(plan.read_text().replace('engine = "llama.cpp"', f'engine = "llama.cpp"\n{args}'))
    plan.with_name("help").write_text("--temp N   x\n--draft-max N   x\n")
    build.with_name("help").write_text("--draft-max N   the argument has been removed. use --spec-draft-n-max\n")
    done = switchyard("upgrade", plan, "--to", build)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert (
        "--temp is no option there; --draft-max: the argument has been removed. use --spec-draft-n-max" in done.stderr
    )
    assert not list(plan.parent.glob("*upgrade*"))


def test_a_server_without_a_yard_is_read_from_its_port(switchyard: Switchyard, plan: Path, tmp_path: Path) -> None:
    """Its program is the old build."""
    port, program, model = free_port(), plan.with_name("llama-server"), plan.with_name("m.gguf")
    with subprocess.Popen([program, "-m", model, "--port", str(port)], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline().strip() == "listening"
            done = switchyard("upgrade", "--from-port", port, "--to", program)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
            assert "is the build that serves" in done.stderr
        finally:
            server.kill()
