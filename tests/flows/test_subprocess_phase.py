"""Phase 2 over fake engines: what moves, what does not, and what is left when it is killed; and once for real."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import installed
import psutil
import pytest
from gguf_files import write_gguf
from processes import of_home
from switchyard_command import json_of
from traffic import traffic
from waiting import until

from engines.errors import BadInput, EngineNotFound
from engines.model.digest import model_digest
from engines.process.serving import free_port
from engines.yard.client import YardClient
from engines.yard.config import ModelConfig, YardConfig
from flows.rollout.orders import Orders
from flows.rollout.phase_one import phase_one
from flows.rollout.rehearsal_yard import without
from flows.rollout.steps import SUBPROCESS, migrate
from flows.rollout.yards import Yards
from migrations.plan import Plan, content_hash
from migrations.plan_file import build_plan, plan_to_toml, remember_plan
from tasks.records.store import Records, open_records
from tasks.verdicts.verdict import CheckResult, Verdict

ROOT = Path(__file__).parents[2]
RIG = ROOT / "tests" / "rig"
SCRIPT = RIG / "fake_migration.py"
OLD, NEW = "llama.cpp", "mistral.rs"
NATIVE = "mistral.rs-native"
DECIDED = {"who": "Ada", "reason": "a test"}
OVERRIDE = {"override": ["m"], **DECIDED}
LIMITS = {"kill_detect_s": 60, "recover_s": 60}
CANARY = {"steps": [0.3, 0.6], "min_requests": 5, "max_minutes": 2}


@dataclasses.dataclass
class Box:
    """A machine with two fake engines: a home, a port, and the yard on it."""

    home: Path
    port: int
    spec: Path

    def start(self, phase: str = "migrate", **orders: Any) -> subprocess.Popen[str]:
        """`switchyard migrate`, running; in a session of its own, as a terminal would have it."""
        argv = [sys.executable, str(SCRIPT), phase, str(self.spec), json.dumps(orders)]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "FAKE_BOX": str(self.home)}
        return subprocess.Popen(
            argv, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )

    def migrate(self, phase: str = "migrate", **orders: Any) -> tuple[int, dict[str, Any]]:
        """The exit code and the outcome; `said` holds what was said on the way."""
        running = self.start(phase, **orders)
        out, err = running.communicate(timeout=120)
        return running.returncode, {**(json.loads(out) if out else {}), "said": err}

    @property
    def client(self) -> YardClient:
        return YardClient(self.home)

    def route(self) -> dict[str, Any]:
        return self.client.status()["models"][0]

    def ask(self, user: str = "me") -> int:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "user": user, "stream": True}
        with httpx.Client(timeout=60, trust_env=False, verify=False) as http:
            answer = http.post(f"http://127.0.0.1:{self.port}/v1/chat/completions", json=body)
            return answer.status_code if b"[DONE]" in answer.content and b"error" not in answer.content else 0

    def steps(self) -> dict[str, str]:
        """How far each step of the latest migration is."""
        if not (self.home / "switchyard.db").exists():
            return {}
        with open_records(self.home / "switchyard.db") as records:
            runs = records.history(1, kind="migrate")
            return {step.step: step.state for step in records.steps(runs[0].id)} if runs else {}

    def processes(self) -> list[psutil.Process]:
        """Everything that was started for this box and still runs."""
        return of_home(self.home, "FAKE_BOX")

    def traffic(self) -> contextlib.AbstractContextManager[list[int]]:
        """A user's requests all the while, each a conversation of its own; the HTTP statuses (0: cut)."""

        def ask(number: int) -> int | None:
            with contextlib.suppress(httpx.ConnectError):  # no yard yet
                return self.ask(f"user-{number}")
            return None

        return traffic(ask, 0.05)


MakeBox = Callable[..., Box]


@pytest.fixture
def make_box(tmp_path: Path) -> Iterator[MakeBox]:
    """Makes a box; `old` and `new` are habits of the engines, the rest are parts of the plan."""
    boxes: list[Box] = []

    def make(old: str = "", new: str = "", native: str = "", **plan: Any) -> Box:
        folder = tmp_path / f"box{len(boxes)}"
        folder.mkdir()
        box = Box(folder / "home", free_port(), folder / "spec.json")
        parts = {"limits": LIMITS, "canary": CANARY, **plan}
        written = {"home": str(box.home), "port": box.port, "gguf": str(write_gguf(folder / "m.gguf")), "plan": parts}
        box.spec.write_text(json.dumps({**written, OLD: old.split(), NEW: new.split(), NATIVE: native.split()}))
        boxes.append(box)
        return box

    yield make
    for box in boxes:
        for process in box.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        until(lambda box=box: not box.processes(), "every process to be gone")


# the whole


def test_traffic_moves_step_by_step_and_no_request_fails(make_box: MakeBox) -> None:
    """No yard runs: one is started, outlives the migration, and serves the candidate at its end."""
    box = make_box()
    with box.traffic() as seen:
        code, outcome = box.migrate(**OVERRIDE)
    assert (code, outcome["verdict"]) == (0, "PASS"), outcome
    (model,) = outcome["models"]
    assert model["result"] == "promoted"
    assert [step["state"] for step in model["steps"]] == ["done"] * 5
    assert [step["step"] for step in model["steps"]][-3:] == ["canary 0.3", "canary 0.6", "promote"]
    assert [(made["kind"], made["who"], made["why"]) for made in model["decisions"]] == [("override", "Ada", "a test")]
    checks = {check["check"]: check for check in model["checks"]}
    assert all(check["verdict"] == "PASS" for check in checks.values() if check["required"])
    assert not checks["phase_1.gate"]["required"]
    assert {"rehearsal.hidden_candidate", "rehearsal.killed_candidate", "rehearsal.fallback"} < set(checks)
    assert (box.route()["serving"], box.route()["undo"], box.route()["canary"]) == (NEW, OLD, None)
    assert set(seen) == {200}
    assert outcome["yard_started"]["pid"] == box.client.status()["pid"]
    assert [line.partition(" - ")[2] for line in outcome["said"].splitlines() if " takes " in line] == [
        "m: the rehearsal takes under a minute",
        "m: canary 30% takes up to 2 min; with the shares after it 4 min",
        "m: canary 60% takes up to 2 min",
    ]


def test_a_finished_migration_says_so_and_changes_nothing(make_box: MakeBox) -> None:
    """The same command again: no new run, no move; one that was not concluded is."""
    box = make_box()
    orders = {**OVERRIDE, "without_canary": True, "without_rehearsal": True}
    assert box.migrate(**orders)[0] == 0
    events = len(box.client.status()["events"])
    code, outcome = box.migrate(**orders)
    assert (code, outcome["models"][0]["result"], outcome["run_id"]) == (0, "already promoted", None)
    assert len(box.client.status()["events"]) == events
    with open_records(box.home / "switchyard.db") as records:
        (run,) = records.history()
        records.finish_run(run.id, "interrupted")  # as one that was killed with its last step done
    again = box.migrate(**orders)[1]
    assert (again["run_id"], again["models"][0]["result"]) == (run.id, "already promoted")
    assert len(box.client.status()["events"]) == events
    with open_records(box.home / "switchyard.db") as records:
        assert [(run.status, run.verdict) for run in records.history()] == [("done", "PASS")]


def test_one_that_was_rolled_back_by_hand_starts_anew(make_box: MakeBox) -> None:
    """Done, but its effect is gone: all steps again, in a run of their own."""
    box = make_box()
    orders = {**OVERRIDE, "without_canary": True, "without_rehearsal": True}
    first = box.migrate(**orders)[1]
    box.client.order("rollback", model="m")
    code, second = box.migrate(**orders)
    assert (code, second["models"][0]["result"]) == (0, "promoted")
    assert second["run_id"] != first["run_id"]
    assert box.route()["serving"] == NEW


# phase 3: the same once more, without a server between

DRILLS = {"measure": {"load_cycles": 10}, "yard": {"wedged_after_s": 1, "load_stall_s": 20, "memory_back_s": 2}}
AT_ONCE = {"without_canary": True}


def moved(box: Box) -> Box:
    """Phase 2 is over."""
    code, outcome = box.migrate(**OVERRIDE, **AT_ONCE, without_rehearsal=True)
    assert code == 0, outcome
    return box


def box_for_native(make_box: MakeBox, **options: Any) -> Box:
    box = make_box(**options)
    written = json.loads(box.spec.read_text())
    written["plan"] |= DRILLS | {"yard": {**DRILLS["yard"], "port": box.port}}
    box.spec.write_text(json.dumps(written))
    return box


def test_native_is_drilled_and_takes_over(make_box: MakeBox) -> None:
    """Fallback to the subprocess, a hang, load cycles, then all traffic; the way back is the subprocess."""
    box = moved(box_for_native(make_box))
    with box.traffic() as seen:
        code, outcome = box.migrate("native", **OVERRIDE, **AT_ONCE)
    assert (code, outcome["verdict"], outcome["phase"]) == (0, "PASS", "native"), outcome
    checks = {check["check"]: check for check in outcome["models"][0]["checks"]}
    assert {"native.hang", "native.load_cycles", "native.cycle_memory_yard", "native.cycle_memory_engine"} < set(checks)
    assert NEW in checks["rehearsal.fallback"]["why"]
    assert "m: hang and load cycles: takes " in outcome["said"]
    assert (box.route()["serving"], box.route()["undo"]) == (NATIVE, NEW)
    assert set(seen) == {200}
    assert box.migrate("native", **OVERRIDE, **AT_ONCE)[1]["models"][0]["result"] == "already promoted"


def test_native_follows_on_the_subprocess_only(make_box: MakeBox) -> None:
    """Nothing moves while phase 2 is open, whoever decides."""
    box = box_for_native(make_box)
    code, outcome = box.migrate("native", **OVERRIDE)
    assert (code, outcome["models"][0]["result"]) == (3, "gate closed")
    assert "switchyard migrate --phase subprocess" in outcome["models"][0]["why"]
    assert not box.client.runs()


def test_native_that_does_not_come_up_stays_out(make_box: MakeBox) -> None:
    """The rehearsal says so; the subprocess goes on serving."""
    box = moved(box_for_native(make_box, native="--exit-code 1"))
    code, outcome = box.migrate("native", **OVERRIDE, **AT_ONCE)
    assert code in (3, 5), outcome
    assert box.route()["serving"] == NEW
    assert box.ask() == 200


# what does not move


def test_a_shut_gate_moves_nothing_and_starts_nothing(make_box: MakeBox) -> None:
    """One line says why and what to do."""
    box = make_box()
    code, outcome = box.migrate()
    (model,) = outcome["models"]
    assert (code, model["result"], model["verdict"]) == (3, "gate closed", "FAIL")
    assert model["why"].startswith("the gate of phase 1 is shut: it was never evaluated; run `switchyard evaluate`")
    assert "--override m --who NAME --reason TEXT" in model["why"]
    assert not box.client.runs()
    assert outcome["run_id"] is None, "a refusal is no run"


def test_without_traffic_the_canary_goes_out_and_a_decision_replaces_it(make_box: MakeBox) -> None:
    """INCONCLUSIVE is not settled: the same run is resumed, and its rehearsal is not done again."""
    box = make_box(canary={**CANARY, "max_minutes": 0.01})
    code, outcome = box.migrate(**OVERRIDE)
    assert (code, outcome["models"][0]["result"]) == (4, "not moved"), outcome
    assert "mistral.rs answered no requests within 0.01 minutes" in outcome["models"][0]["why"]
    assert (box.route()["serving"], box.route()["canary"]) == (OLD, None)
    until(lambda: box.route()["engines"][1]["pid"] is None, "the candidate to be gone")
    code, again = box.migrate(**OVERRIDE, without_canary=True)
    assert (code, again["run_id"]) == (0, outcome["run_id"])
    kinds = [made["kind"] for made in again["models"][0]["decisions"]]
    assert kinds == ["override", "without-canary"]
    rehearsals = [[s["at"] for s in o["models"][0]["steps"] if s["step"] == "rehearsal"] for o in (outcome, again)]
    assert rehearsals[0] == rehearsals[1]


def test_a_candidate_that_dies_in_its_canary_goes_back(make_box: MakeBox) -> None:
    """FAIL: rolled back, and the user's requests were served all the while."""
    box = make_box(new="--die-after-s 6", canary={**CANARY, "min_requests": 5000})
    with box.traffic() as seen:
        code, outcome = box.migrate(**OVERRIDE, without_rehearsal=True)
    (model,) = outcome["models"]
    assert (code, model["result"], model["verdict"]) == (3, "not moved", "FAIL"), outcome
    assert model["why"].startswith("rolled back: canary.keeps_serving: mistral.rs broke down")
    assert {step["step"]: step["state"] for step in model["steps"]} == {
        "precondition": "done",
        "rehearsal": "done",
        "canary 0.3": "failed",
        "rollback": "done",
    }
    assert (box.route()["serving"], box.route()["canary"]) == (OLD, None)
    assert seen.count(200) > len(seen) - 3  # a stream that had begun on the candidate may be cut
    assert box.ask() == 200


def test_a_candidate_that_cannot_start_fails_in_the_rehearsal(make_box: MakeBox) -> None:
    """No traffic comes near it."""
    box = make_box(new="--exit-code 1")
    code, outcome = box.migrate(**OVERRIDE)
    (model,) = outcome["models"]
    assert (code, model["verdict"]) == (5, "ERROR"), outcome
    assert "rehearsal.killed_candidate: the drill failed: m stays on llama.cpp" in model["why"]
    assert [event for event in box.client.status()["events"] if event["kind"] == "move"] == []
    assert box.ask() == 200


def test_a_taken_port_is_one_clear_line(make_box: MakeBox) -> None:
    """The user's own server still listens there."""
    box = make_box()
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", box.port))
        holder.listen()
        code, outcome = box.migrate(**OVERRIDE)
    assert code == 5
    assert f"error: port {box.port} is taken by" in outcome["said"].splitlines()[-1]
    assert box.steps()["yard"] == "intent"


def test_two_migrations_at_once_are_refused(make_box: MakeBox) -> None:
    """They would undo each other's steps."""
    box = make_box()
    with box.traffic():
        first = box.start(**OVERRIDE)
        until(lambda: "rehearsal" in box.steps(), "the first one at work")
        code, outcome = box.migrate(**OVERRIDE)
        assert code == 2
        assert re.search(r"a migration (\(pid \d+\) )?is under way already", outcome["said"])
        assert first.wait(timeout=120) == 0


# killed


@pytest.mark.parametrize("point", ["rehearsal", "canary", "promote"])
def test_killed_at_any_point_the_yard_serves_and_the_same_command_resumes(make_box: MakeBox, point: str) -> None:
    """SIGKILL of the migration; a user's requests continue; the second start finishes the same run."""
    box = make_box(new="--load-s 1")
    orders = {**OVERRIDE, "without_canary": point == "promote"}
    reached = {
        "rehearsal": lambda: (box.home / "rehearsal" / "killed" / "yard" / "control.sock").exists(),
        "canary": lambda: box.client.runs() and (box.route()["canary"] or {}).get("weight") == 0.6,
        "promote": lambda: box.client.runs() and (box.route()["moving"] or "").startswith("promote"),
    }[point]
    with box.traffic() as seen:
        running = box.start(**orders)
        until(lambda: reached() or running.poll() is not None, point, deadline_s=90)
        running.kill()
        running.communicate()
        assert running.returncode == -signal.SIGKILL
        assert box.ask() == 200
        before = box.steps()
        code, outcome = box.migrate(**orders)
    (model,) = outcome["models"]
    assert (code, model["result"]) == (0, "promoted"), outcome
    assert before[{"canary": "canary 0.6"}.get(point, point)] == "intent"
    assert all(step["state"] == "done" for step in model["steps"])
    assert box.route()["serving"] == NEW
    assert set(seen) == {200}
    with open_records(box.home / "switchyard.db") as records:
        (run,) = records.history()
    assert (run.id, run.status, run.verdict) == (outcome["run_id"], "done", "PASS")
    yards = [process for process in box.processes() if "yard" in process.cmdline()]
    assert [process.pid for process in yards] == [box.client.status()["pid"]]


def test_a_rollback_that_was_begun_is_finished_first(make_box: MakeBox) -> None:
    """An intent without its end, found in the records: no new attempt before it is settled."""
    box = make_box()
    orders = {**OVERRIDE, "without_canary": True, "without_rehearsal": True}
    _, outcome = box.migrate(**orders)
    with open_records(box.home / "switchyard.db") as records:
        records.put_step(outcome["run_id"], "m", "rollback", "intent", {"why": "it failed"})
        records.finish_run(outcome["run_id"], "interrupted")
    code, again = box.migrate(**orders)
    assert (code, again["run_id"], again["models"][0]["verdict"]) == (3, outcome["run_id"], "FAIL")
    assert (box.route()["serving"], box.steps()["rollback"]) == (OLD, "done")


def test_an_interrupt_takes_the_canary_out(make_box: MakeBox) -> None:
    """Nobody judges it any more."""
    box = make_box(canary={**CANARY, "min_requests": 5000})
    running = box.start(**OVERRIDE, without_rehearsal=True)
    until(lambda: box.client.runs() and box.route()["canary"] and not box.route()["moving"], "a canary")
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    assert box.route()["canary"] is None
    assert box.ask() == 200


# what phase 1 says


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    with open_records(tmp_path / "switchyard.db") as opened:
        yield opened


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    gguf = write_gguf(tmp_path / "m.gguf")
    engines = {"incumbent": {"engine": OLD}, "candidate": {"engine": NEW}}
    return build_plan({"models": [{"id": "m", "gguf": gguf}], **engines})


def evaluated(records: Records, plan: Plan, verdict: Verdict, **environment: Any) -> str:
    """A recorded evaluation of the plan that ended with `verdict`."""
    under = {
        "plan_hash": content_hash(plan),
        "model_digest": model_digest(plan.models[0].gguf),
        "engines": [{"arm": "candidate", "version": "1"}],
        **environment,
    }
    run = records.start_run("evaluate", plan.name, plan.model_dump(mode="json"))
    records.put_evidence(run.id, "m", "both", "performance", {}, environment=under)
    records.put_checks(run.id, "m", [CheckResult(check="parity.x", verdict=verdict, why="seen")])
    records.finish_run(run.id, "done", verdict=verdict)
    return run.id


def test_only_the_latest_evaluation_counts(records: Records, plan: Plan) -> None:
    """A gate that was open is shut by a later run that failed, and opened again by one that passed."""
    model = plan.models[0]
    assert phase_one(records, plan, model, "1").why == "it was never evaluated"
    first = evaluated(records, plan, Verdict.PASS)
    assert phase_one(records, plan, model, "1").run_id == first
    assert phase_one(records, plan, model, "1").open
    failed = evaluated(records, plan, Verdict.FAIL)
    found = phase_one(records, plan, model, "1")
    assert (found.open, found.why) == (False, f"run {failed} ended with FAIL: parity.x: seen")
    evaluated(records, plan, Verdict.PASS)
    assert phase_one(records, plan, model, "1").open


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"plan_hash": "another"}, "evaluated another plan or another model file"),
        ({"model_digest": "another"}, "evaluated another plan or another model file"),
        ({"engines": [{"arm": "candidate", "version": "0"}]}, "measured 0; here is 1"),
    ],
)
def test_an_evaluation_of_something_else_opens_nothing(
    records: Records, plan: Plan, environment: dict[str, Any], said: str
) -> None:
    """Another plan, another file, another version of the candidate."""
    evaluated(records, plan, Verdict.PASS, **environment)
    found = phase_one(records, plan, plan.models[0], "1")
    assert not found.open
    assert found.why.endswith(said)


def test_an_evaluation_that_did_not_get_done_is_passed_over(records: Records, plan: Plan) -> None:
    """The one before it still stands."""
    done = evaluated(records, plan, Verdict.PASS)
    records.start_run("evaluate", plan.name, plan.model_dump(mode="json"))
    assert phase_one(records, plan, plan.models[0], "1").run_id == done


# orders and yards


def test_decisions_want_a_name_and_a_reason(plan: Plan) -> None:
    """Each kind of them; and an unknown model is named."""
    for given in ({"override": ("m",)}, {"without_canary": True}, {"without_rehearsal": True}):
        with pytest.raises(BadInput, match="--who and --reason"):
            Orders.model_validate({**given, "who": "Ada"}).checked(plan)
        Orders.model_validate({**given, **DECIDED}).checked(plan)
    with pytest.raises(BadInput, match="unknown model 'x': the plan has m"):
        Orders(models=("x",)).checked(plan)


def test_a_yard_of_another_plan_is_told_apart(plan: Plan, tmp_path: Path) -> None:
    """By content: the same plan at another path is the same."""
    path = tmp_path / "served.toml"
    yards = Yards(plan, tmp_path, path)
    assert yards.differs() is None
    (tmp_path / "yard").mkdir()
    path.write_text(plan_to_toml(plan))
    remember_plan(path, tmp_path)
    assert yards.differs() is None
    path.write_text(plan_to_toml(plan.model_copy(update={"settings": plan.settings.model_copy(update={"seed": 1})})))
    assert yards.differs() == (
        f"the yard that runs serves another plan ({path}): stop it with `switchyard stop` and migrate again"
    )


def test_a_candidate_that_is_not_here_is_on_record(records: Records, plan: Plan, tmp_path: Path) -> None:
    """`switchyard history` shows what was tried, and why it failed."""
    yards = Yards(plan, tmp_path, tmp_path / "plan.toml")
    model = ModelConfig(id="m", incumbent=OLD, candidate=NEW, specs={}, missing={NEW: "mistral.rs was not found here"})
    yards.config = YardConfig(settings=plan.yard, models=(model,), api_key=None)
    with pytest.raises(EngineNotFound):
        migrate(SUBPROCESS, plan, yards, records, lambda *_: [], orders=Orders())
    (run,) = records.history(kind="migrate")
    assert (run.status, run.error) == ("failed", "mistral.rs was not found here")


# for real


@pytest.mark.engine
@pytest.mark.usefixtures("prefect")
def test_llama_cpp_to_mistral_rs_for_real(switchyard: Any, home: Path, tmp_path: Path) -> None:
    """The command on real engines: refused without a gate, promoted by override, then nothing left to do."""
    gguf = installed.smollm2(*installed.BOTH)
    port, path = free_port(), tmp_path / "plan.toml"
    path.write_text(f"""
name = "for real"
[incumbent]
engine = "llama.cpp"
form = "binary"
[candidate]
engine = "mistral.rs"
form = "hosted"
[settings]
context_tokens = 512
host_cache_mib = 0
threads = 1
[[models]]
id = "smollm2"
gguf = "{gguf}"
[limits]
recover_s = 60
kill_detect_s = 60
[yard]
port = {port}
""")
    shut = switchyard("migrate", path, "--phase", "subprocess")
    assert shut.returncode == 3, shut.stderr
    assert "the gate of phase 1 is shut: it was never evaluated" in shut.stdout
    decided = ("--override", "smollm2", "--without-canary", "--who", "Ada", "--reason", "a test")
    orders = ("--phase", "subprocess", *decided, "--json")
    try:
        done = switchyard("migrate", path, *orders)
        assert done.returncode == 0, done.stdout + done.stderr
        (model,) = json_of(done)["models"]
        known = {c["check"] for c in model["checks"] if c["verdict"] != "PASS"}
        # what the next turn costs is a time, reported only: on a busy machine it is over its limit
        assert known - {"rehearsal.next_turn"} == {"phase_1.gate", "canary"}
        route = YardClient(home).status()["models"][0]
        assert (route["serving"], route["undo"]) == (NEW, OLD)
        answer = httpx.post(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8},
            timeout=60,
        )
        assert answer.json()["usage"]["completion_tokens"] > 1
        again = switchyard("migrate", path, *orders)
        assert (again.returncode, json_of(again)["models"][0]["result"]) == (0, "already promoted")
    finally:
        switchyard("stop")
        until(lambda: not YardClient(home).runs(), "the yard to be gone", deadline_s=60)


def test_hiding_an_engine_is_what_a_machine_without_it_says(plan: Plan) -> None:
    """It was chosen, and it is missing; the other one stays."""
    from engines.yard.config import ModelConfig, YardConfig

    model = ModelConfig(id="m", incumbent=OLD, candidate=NEW, specs={OLD: None, NEW: None})  # type: ignore[dict-item]
    (hidden,) = without(YardConfig(settings=plan.yard, models=(model,)), NEW).models
    assert (set(hidden.specs), hidden.engine, set(hidden.missing)) == ({OLD}, NEW, {NEW})
