"""`switchyard up` on real engines: whatever of it is killed, the yard serves, and the way back works."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import installed
import pytest
from gguf_files import write_gguf
from processes import of_home
from switchyard_command import command
from switchyard_up import LONG_S, MODEL, NEW, OLD, Up
from waiting import until

from engines.errors import SwitchyardError
from engines.process.serving import free_port
from engines.yard.client import YardClient, socket_path
from flows.cli.keep_up import RESTARTS, GaveUp, Kept, YardProcess
from flows.reconcile import reconcile
from tasks.records.store import Records, open_records

ROOT = Path(__file__).parents[3]
RIG = ROOT / "tests" / "rig"
SERVER, RUNNER = "prefect server", "deployments"  # as they are registered
DECIDED = {"who": "Ada", "reason": "a test"}


@pytest.fixture(scope="module")
def home_of_all(tmp_path_factory: pytest.TempPathFactory, prefect_of_all: Any) -> Iterator[Up]:
    installed.require(*installed.BOTH)
    up = Up(tmp_path_factory.mktemp("up"))
    prefect_of_all.put_database(up.home)
    yield up
    up.end()


@pytest.fixture
def up(home_of_all: Up) -> Up:
    """It is up, with records; a test that ends it leaves it to the next one to start it."""
    home_of_all.ensure()
    with home_of_all.records():
        pass
    return home_of_all


# while it is up


@pytest.mark.engine
def test_a_second_one_is_refused(up: Up) -> None:
    """In one line that says where the first one is."""
    done = up.run("up", up.plan, "--prefect-port", free_port())
    where = f"http://127.0.0.1:{up.prefect}"
    assert (
        done.stderr
        == f"error: `switchyard up` is already running (pid {up.up.pid}, {where}): `switchyard down` ends it\n"
    )
    assert done.returncode == 2


@pytest.mark.engine
def test_a_migration_that_is_killed_goes_on_under_its_run(up: Up) -> None:
    """SIGKILL in the rehearsal: Crashed in Prefect; the next run evaluates nothing and finishes the same rows."""
    up.serve_with(OLD)
    up.evaluated()
    orders = {**DECIDED, "without_canary": True}
    with up.traffic() as seen:
        first = up.begin("migrate", **orders)
        until((up.home / "rehearsal" / "killed" / "yard" / "control.sock").exists, "the rehearsal", LONG_S)
        assert up.steps("migrate")["rehearsal"] == "intent"
        with up.records() as records:
            evaluations = len(records.history(100, kind="evaluate"))
            whole, moving = (records.history(1, kind=kind)[0] for kind in ("whole", "migrate"))
        assert whole.owner_pid == moving.owner_pid
        os.kill(moving.owner_pid, signal.SIGKILL)
        assert up.ended(first)["type"] == "CRASHED"
        second = up.begin("migrate", **orders)
        state = up.ended(second)
        assert (state["type"], state["name"]) == ("COMPLETED", "PASS"), state
    assert set(seen) == {200}
    assert up.route()["serving"] == NEW
    with up.records() as records:
        history = {run.kind: run for run in records.history(3)}
        assert len(records.history(100, kind="evaluate")) == evaluations
        decisions = [(made.kind, made.who) for made in records.decisions(moving.id)]
    ends = {kind: (run.id, run.status, run.verdict) for kind, run in history.items()}
    assert ends["whole"] == (whole.id, "done", "PASS")
    assert ends["migrate"] == (moving.id, "done", "PASS")
    assert history["whole"].flow_run_id == history["migrate"].flow_run_id == second
    assert set(up.steps("migrate")) >= {"precondition", "yard", "rehearsal", "canary", "promote"}
    assert set(up.steps("migrate").values()) == set(up.steps("whole").values()) == {"done"}
    assert decisions == [("without-canary", "Ada")]


@pytest.mark.engine
def test_a_breach_rolls_the_model_back_once(up: Up) -> None:
    """The automation starts a rollback; told of the same again, it finds that another engine serves."""
    up.serve_with(NEW)
    before = len(up.runs_of("rollback"))
    up.breach(NEW)
    until(lambda: len(up.runs_of("rollback")) == before + 1, "a rollback", LONG_S)
    assert up.route()["committed"] == OLD
    assert up.ask() == 200
    up.breach(NEW)
    until(lambda: len(up.runs_of("rollback")) == before + 2, "a second one", LONG_S)
    first, second = up.runs_of("rollback")[before:]
    states = [first["state"], second["state"]]
    assert [state["name"] for state in states] == ["PASS", "PASS"]
    assert "one real token" in states[0]["message"]
    assert states[1]["message"] == f"{OLD} serves {MODEL}, not {NEW}: nothing was rolled back"
    with up.records() as records:
        (run,) = (run for run in records.history(kind="rollback") if run.flow_run_id in (first["id"], second["id"]))
        (decision,) = records.decisions(run.id)
    assert (run.flow_run_id, run.verdict) == (first["id"], "PASS")
    assert (decision.who, decision.why) == ("automation", 'soak.failures: 9 "cut" answers')
    until(lambda: len(up.events("prefect.automation.action.executed")) == 2, "both actions")
    assert up.events("prefect.automation.action.failed") == []


# killed


@pytest.mark.engine
def test_prefect_is_started_again_while_the_yard_serves(up: Up) -> None:
    """Without its server and its database the way back works; then what runs the flows is killed as well."""
    up.serve_with(NEW)
    pid = up.yard.status()["pid"]
    with up.traffic() as seen:
        up.up.send_signal(signal.SIGSTOP)  # so that it does not fix it before the rollback
        up.kill(SERVER)
        for left in (up.home / "prefect").glob("prefect.db*"):
            left.unlink()
        done = up.run("rollback", "--who", "Ada", "--reason", "a test")
        assert (done.returncode, up.route()["serving"]) == (0, OLD), done.stderr
        assert "one real token" in done.stdout
        up.up.send_signal(signal.SIGCONT)
        until(lambda: "Prefect's server runs again" in up.said(), "Prefect's server", LONG_S)
        assert up.api("deployments/name/migrate/migrate")["id"]  # they are known to a new database as well
        lost = up.begin("evaluate")
        until(lambda: up.state(lost)["type"] == "RUNNING", "an evaluation", LONG_S)
        up.kill(RUNNER)
        until(lambda: "the process of the deployments runs again" in up.said(), "the deployments", LONG_S)
        assert up.state(lost)["type"] == "CRASHED"
        assert up.ended(up.begin("reconcile"))["name"] == "PASS"
    assert "Prefect's server exited unexpectedly (signal SIGKILL); restarting, the yard keeps serving" in up.said()
    assert set(seen) == {200}
    assert up.yard.status()["pid"] == pid


@pytest.mark.engine
def test_a_yard_that_is_killed_is_started_again(up: Up) -> None:
    """With the route as it was; what it had in hand is lost, what comes once it runs again is served."""
    up.serve_with(NEW)
    pid = up.yard.status()["pid"]
    with up.traffic() as seen:
        until(lambda: 200 in seen, "an answer")
        os.kill(pid, signal.SIGKILL)
        until(lambda: "the yard runs again" in up.said(), "the yard", LONG_S)
        before = len(seen)
        until(lambda: len(seen) > before + 2, "answers")
    assert set(seen[before + 1 :]) == {200}
    assert "the yard exited unexpectedly (killed, or out of memory" in up.said()
    assert up.yard.status()["pid"] != pid
    assert (up.route()["committed"], up.route()["serving"]) == (NEW, NEW)


@pytest.mark.engine
def test_what_dies_again_and_again_is_given_up(up: Up) -> None:
    """Three times in ten minutes it is started again; then `up` ends, but not the yard: only `down` ends that."""
    pid = up.yard.status()["pid"]
    while up.up.poll() is None:
        until(lambda: up.part(RUNNER) is not None or up.up.poll() is not None, "the deployments", LONG_S)
        before = up.said().count("restarting")
        if up.part(RUNNER) is not None:
            up.kill(RUNNER)
            until(lambda n=before: up.up.poll() is not None or up.said().count("restarting") > n, "a start", LONG_S)
    assert up.up.returncode == 5
    assert f"exited {RESTARTS + 1} times within 10 minutes (now: signal SIGKILL); giving up" in up.said()
    assert (up.yard.status()["pid"], up.ask()) == (pid, 200)
    assert up.part(SERVER) is None
    assert (up.refused().returncode, up.ask()) == (2, 200)  # one that fails at its start leaves it alone as well
    done = up.run("down")
    assert (done.returncode, done.stdout) == (0, "all is down\n")
    assert of_home(up.home) == []


@pytest.mark.engine
def test_killed_itself_it_leaves_the_yard_and_finds_it_again(up: Up) -> None:
    """Prefect dies with it. Without Prefect and on broken records the way back works. Ctrl-C ends everything."""
    up.serve_with(NEW)
    pid, database = up.yard.status()["pid"], up.home / "switchyard.db"
    with up.traffic() as seen:
        up.up.kill()
        up.up.wait()
        until(lambda: not up.part(SERVER) and not up.part(RUNNER), "the end of Prefect")
        database.rename(up.home / "kept.db")
        for left in up.home.glob("switchyard.db-*"):
            left.unlink()
        database.write_bytes(b"this is no database" * 500)
        done = up.run("rollback")
        assert (done.returncode, up.route()["serving"]) == (0, OLD), done.stderr
        assert "not recorded: " in done.stderr
        assert "one real token" in done.stdout
        (up.home / "kept.db").rename(database)
        up.ensure()
        assert "a yard runs already and is kept" in up.said()
    assert set(seen) == {200}
    assert up.yard.status()["pid"] == pid
    up.up.send_signal(signal.SIGINT)
    assert up.up.wait(LONG_S) == 130
    assert up.said().splitlines()[-1] == "interrupted; all is down"
    assert of_home(up.home) == []


@pytest.mark.engine
def test_interrupted_while_the_yard_starts_it_leaves_nothing(home_of_all: Up) -> None:
    """The yard does not take orders yet; it is ended all the same."""
    home_of_all.end()
    home_of_all.start()
    until(lambda: any("serve" in found.cmdline() for found in of_home(home_of_all.home)), "a yard", LONG_S)
    home_of_all.up.send_signal(signal.SIGINT)
    assert home_of_all.up.wait(LONG_S) == 130
    until(lambda: not of_home(home_of_all.home), "every process to be gone", LONG_S)


# refused


@pytest.mark.engine
def test_a_taken_port_leaves_nothing_behind(tmp_path: Path) -> None:
    """One line says which, and what to do."""
    installed.require(*installed.BOTH)
    up = Up(tmp_path)
    done = up.refused()
    what = f"port {up.prefect} is taken: name another with --prefect-port, or end what listens there"
    assert (done.returncode, done.stderr) == (2, f"error: {what}\n")
    assert of_home(up.home) == []


@pytest.mark.parametrize(
    ("text", "word"), [("models = 3", "is not a list"), ("= no toml", "not valid TOML"), (None, "no such file")]
)
def test_a_plan_that_cannot_be_read_starts_nothing(tmp_path: Path, text: str | None, word: str) -> None:
    plan = tmp_path / "plan.toml"
    if text is not None:
        plan.write_text(text)
    environment = {**os.environ, "SWITCHYARD_HOME": str(tmp_path / "home"), "COLUMNS": "200"}
    done = subprocess.run(command("up", plan), env=environment, text=True, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: ")
    assert word in done.stderr
    assert not (tmp_path / "home").exists()


def test_three_starts_in_ten_minutes_are_enough() -> None:
    """Older ones are forgotten; a start that fails counts."""
    started: list[int] = []

    def start() -> None:
        started.append(1)
        if len(started) == 2:
            raise SwitchyardError("not this time")

    kept = Kept("it", lambda: "signal SIGKILL", start)
    for _ in range(RESTARTS):
        kept.look()
    with pytest.raises(GaveUp, match=r"it exited 4 times within 10 minutes \(now: signal SIGKILL\)"):
        kept.look()
    kept.began[0] -= 600
    kept.look()
    assert len(started) == RESTARTS + 1
    Kept("it", lambda: None, start).look()
    assert len(started) == RESTARTS + 1


def test_no_model_waits_for_prefect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The yard starts while Prefect's server does, and what reports to that server comes last."""
    module, order = importlib.import_module("flows.cli.up"), list[str]()

    def part(name: str) -> Any:
        def noted(step: str) -> Any:
            return lambda *_: order.append(f"{name} {step}")

        return SimpleNamespace(
            api_url="http://127.0.0.1:1/api", **{step: noted(step) for step in ("start", "ready", "stop")}
        )

    parts = {name: part(name) for name in ("PrefectServer", "YardProcess", "DeploymentsProcess")}
    for name in parts:
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: parts[name])
    for name in ("prepare_process", "_print_start", "keep_up", "stop_yard"):
        monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setenv("SWITCHYARD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PREFECT_API_URL", "")
    plan = tmp_path / "plan.toml"
    engines = '[incumbent]\nengine = "llama.cpp"\n[candidate]\nengine = "mistral.rs"\n'
    plan.write_text(f'{engines}[[models]]\nid = "m"\ngguf = "{write_gguf(tmp_path / "m.gguf")}"\n')
    module.up(plan, prefect_port=free_port(), schedules=False)
    assert order[:4] == ["PrefectServer start", "YardProcess start", "PrefectServer ready", "DeploymentsProcess start"]


def test_a_yard_that_was_stopped_stays_so(tmp_path: Path) -> None:
    """It takes its control socket away; one that was killed cannot."""
    yard = YardProcess(None, tmp_path / "plan.toml", tmp_path)
    assert yard.died() is None
    socket_path(tmp_path).parent.mkdir()
    socket_path(tmp_path).touch()
    assert "killed" in str(yard.died())


# what is scheduled


def test_a_run_that_is_late_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a night of a laptop's sleep the missed ones do not pile up."""
    from prefect.runtime import flow_run

    from flows import deployments

    def due(minutes_ago: float) -> None:
        at = datetime.now(UTC) - timedelta(minutes=minutes_ago)
        monkeypatch.setitem(flow_run.FIELDS, "scheduled_start_time", lambda: at)

    monkeypatch.setenv("SWITCHYARD_HOME", str(tmp_path))
    for flow, minutes in ((deployments.evaluate, 120), (deployments.soak, 8), (deployments.reconcile_home, 4)):
        due(minutes + 2)
        state = flow.fn()
        assert state.type.value == "CANCELLED"
        assert state.message == f"scheduled {minutes + 2} min ago; skipped as late"
    assert list(tmp_path.iterdir()) == []
    due(3)
    assert deployments.reconcile_home.fn()["why"] == "nothing to clean up"


def test_a_run_that_finds_another_one_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two experiments would measure each other."""
    installed.require(*installed.BOTH)
    from flows import deployments

    monkeypatch.setenv("SWITCHYARD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "evaluate")
    code = (
        "import sys; from pathlib import Path; from flows.experiment_lock import alone\n"
        "with alone(Path(sys.argv[1]), 'a migration'): print('held', flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "home")]
    with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        state = deployments.evaluate.fn(plan=str(Up(tmp_path).plan))
        holder.communicate("")
    assert state.type.value == "CANCELLED"
    assert (
        state.message == f"a migration (pid {holder.pid}) is under way already: see `switchyard status`, or wait for it"
    )
    with open_records(tmp_path / "home" / "switchyard.db") as records:
        assert records.history() == []


# what a killed run left


class FakeYard:
    """A yard over two fake engines, `old` and `new`, and a run of its home whose process is gone."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        (self.home / "yard").mkdir(parents=True)
        self.log = folder / "yard.log"
        self.client = YardClient(self.home)
        argv = [sys.executable, str(RIG / "fake_yard.py"), "--home", str(self.home)]
        argv += ["--port", str(free_port()), "--gguf", str(write_gguf(folder / "m.gguf"))]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log)
        until(lambda: self._serves() or self.process.poll() is not None, "a yard")

    def _serves(self) -> bool:
        return self.client.runs() and self.route()["engines"][0]["state"] == "ready"

    def route(self) -> dict[str, Any]:
        return self.client.status()["models"][0]

    def back(self) -> None:
        """As it was at its start."""
        if self.route()["canary"] or self.route()["committed"] == "new":
            self.client.order("rollback", model="m")


@pytest.fixture(scope="module")
def yard_of_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeYard]:
    yard = FakeYard(tmp_path_factory.mktemp("reconcile"))
    yield yard
    yard.process.terminate()
    yard.process.wait(60)


@pytest.fixture
def yard(yard_of_all: FakeYard) -> FakeYard:
    yard_of_all.back()
    return yard_of_all


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    with open_records(tmp_path / "switchyard.db") as opened:
        yield opened


def killed(records: Records, **steps: str) -> str:
    """The id of a migration to `new` whose process is gone, with these steps; `_` in their names is a blank."""
    run = records.start_run("migrate", "p", {"candidate": {"engine": "new"}})
    for step, state in steps.items():
        records.put_step(run.id, "m", step.replace("_", " "), state, {"kept": 1})  # type: ignore[arg-type]
    with records.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE run SET owner_created = owner_created - 1000 WHERE id = ?", (run.id,))
    return run.id


def states(records: Records, run_id: str) -> dict[str, str]:
    return {step.step: step.state for step in records.steps(run_id)}


def test_a_killed_run_is_marked_and_left_to_its_command(records: Records, tmp_path: Path) -> None:
    """Once; a run that lives, and one that is over, are left alone. No yard is needed."""
    alive = records.start_run("evaluate", "p", {})
    over = records.start_run("evaluate", "p", {})
    records.finish_run(over.id, "done")
    run_id = killed(records, precondition="done", rehearsal="intent", promote="intent")
    said: list[str] = []
    lines = reconcile(tmp_path, records, said.append)
    assert lines == said
    assert lines[-1] == f"run {run_id} (migrate) was killed; the same command resumes it"
    run = records.find_run(run_id)
    assert (run.status, run.error) == ("interrupted", "process vanished (killed or out of memory)")
    assert states(records, run_id) == {"precondition": "done", "rehearsal": "failed", "promote": "failed"}
    why = {step.step: step.detail for step in records.steps(run_id)}
    assert why["promote"] == {"kept": 1, "why": "its process ended before the model moved"}
    assert (records.find_run(alive.id).status, records.find_run(over.id).status) == ("running", "done")
    assert reconcile(tmp_path, records) == []


@pytest.mark.parametrize("moved", [True, False])
def test_an_open_promote_is_what_the_yard_says(yard: FakeYard, records: Records, moved: bool) -> None:
    """Moved: the same command proves it by a token and closes it. Not moved: it is over."""
    if moved:
        yard.client.order("promote", model="m", to="new")
    run_id = killed(records, promote="intent")
    reconcile(yard.home, records)
    assert states(records, run_id) == {"promote": "intent" if moved else "failed"}
    assert yard.route()["committed"] == ("new" if moved else "old")


@pytest.mark.parametrize("there", [True, False])
def test_an_open_canary_is_what_the_yard_says(yard: FakeYard, records: Records, there: bool) -> None:
    """While the yard has it, the yard judges it, and the same command continues to watch."""
    if there:
        yard.client.order("canary", model="m", to="new", weight=0.2)
    run_id = killed(records, canary_0_2="intent")
    reconcile(yard.home, records)
    assert list(states(records, run_id).values()) == ["intent" if there else "failed"]
    assert bool(yard.route()["canary"]) is there


def test_a_rollback_that_was_begun_is_finished(yard: FakeYard, records: Records) -> None:
    """The traffic at once, the row by its own command; what went back already stays."""
    yard.client.order("promote", model="m", to="new")
    run_id = killed(records, promote="done", rollback="intent")
    lines = reconcile(yard.home, records)
    assert yard.route()["serving"] == yard.route()["committed"] == "old"
    assert states(records, run_id) == {"promote": "done", "rollback": "intent"}
    assert lines == [f"run {run_id} (migrate) was killed; the same command resumes it"]
    moves = [event for event in yard.client.status()["events"] if event["kind"] == "move"]
    killed(records, promote="done", rollback="intent")
    reconcile(yard.home, records)
    assert [event for event in yard.client.status()["events"] if event["kind"] == "move"] == moves
