"""A rollout over hosts: what is in a wave, when its gate opens, what is undone, what a second start resumes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import postgresql
import psutil
import pytest
from waiting import until

import flows
from engines.errors import BadInput
from engines.process.serving import free_port
from flows.deployments import migrate, rollback
from flows.fleet import KIND, Ended, Rollout, gate_of_wave, last_wave, roll_back_hosts, roll_out, waves_of
from flows.reconcile import reconcile
from tasks.records.store import Records, open_records

PASS = Ended("PASS", True)


def stays(model: str = "m") -> Ended:
    """A host on which one model moved and `model` did not."""
    moved = {"model": "good", "verdict": "PASS", "result": "migrated", "why": "fine"}
    left = {"model": model, "verdict": "FAIL", "result": "stays", "why": "its gate is shut"}
    return Ended("FAIL", True, "run-1", {"good": moved, model: left})


@pytest.mark.parametrize(
    ("hosts", "shares", "sizes"),
    [
        (20, [0, 0.3, 1], [1, 5, 14]),
        (10, [0, 0.3, 1], [1, 2, 7]),
        (3, [0, 0.3, 1], [1, 2]),
        (1, [0, 0.3, 1], [1]),
        (2, [1], [2]),
        (20, [0, 0.3], [1, 5]),
    ],
)
def test_one_host_then_a_share_then_all(hosts: int, shares: list[float], sizes: list[int]) -> None:
    """In the order given; a share that adds no host is no wave, and what is beyond the last share waits."""
    names = [f"h{number}" for number in range(hosts)]
    waves = waves_of(names, shares)
    assert [len(wave) for wave in waves] == sizes
    assert [name for wave in waves for name in wave] == names[: sum(sizes)]


def test_a_gate_opens_on_pass_alone() -> None:
    """A run that was cancelled, crashed, or ended with anything else keeps it shut, with its reason."""
    ends = {"a": PASS, "b": Ended("Crashed", False, "killed"), "c": Ended("INCONCLUSIVE", True), "d": stays()}
    assert gate_of_wave(ends) == {
        "b": "Crashed: killed",
        "c": "INCONCLUSIVE",
        "d": "m stays: its gate is shut",
    }
    assert gate_of_wave({"a": PASS}) == {}
    assert gate_of_wave({"a": Ended("PASS", False)}) == {"a": "PASS"}


def test_a_model_may_stay_where_a_person_said_so() -> None:
    """By its name, and only if it was left alone: one that was tried and put back is another matter."""
    assert gate_of_wave({"a": stays()}, ["m"]) == {}
    assert gate_of_wave({"a": stays()}, ["other"]) == {"a": "m stays: its gate is shut"}
    tried = {"model": "m", "verdict": "FAIL", "result": "subprocess: rolled back", "why": "the canary failed"}
    ends = {"a": Ended("FAIL", True, "", {"m": tried})}
    assert gate_of_wave(ends, ["m"]) == {"a": "m subprocess: rolled back: the canary failed"}


def test_an_incumbent_that_may_not_go_yet_keeps_no_gate_shut() -> None:
    """Its rollback window is over weeks later, and is asked of each host by itself."""
    moved = {"model": "m", "verdict": "PASS", "result": "migrated", "why": ""}
    kept = {"model": "(llama.cpp)", "verdict": "INCONCLUSIVE", "result": "not retired", "why": "7 days"}
    assert gate_of_wave({"a": Ended("INCONCLUSIVE", True, "", {"m": moved, "(llama.cpp)": kept})}) == {}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"hosts": ["a", "a"]}, "named twice"),
        ({"hosts": []}, "at least 1 item"),
        ({"waves": [0.5, 0.3]}, "share of all hosts"),
        ({"waves": [2]}, "share of all hosts"),
        ({"who": " "}, "your name and a reason"),
    ],
)
def test_orders_that_make_no_sense_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        orders(**wrong)


def orders(**changed: Any) -> Rollout:
    return Rollout(**{"hosts": ["a", "b", "c"], "who": "Ada", "reason": "a test", **changed})


# --- the rollout, over hosts that are played


class Killed(BaseException):
    """The end of our process."""


class Played:
    """Hosts whose runs end as given; what was started is in `started`, once for each key."""

    def __init__(self, **ends: Ended) -> None:
        self.ends = ends
        self.rollbacks: dict[str, Ended] = {}
        self.started: list[str] = []
        self.asked: dict[str, Mapping[str, Any]] = {}
        self.breaks: Callable[[str], bool] = lambda _: False
        self._keys: dict[str, str] = {}

    def missing(self, host: str) -> str | None:
        return "no deployments of z" if host == "z" else None

    def start(self, flow: str, host: str, parameters: Mapping[str, Any], *, key: str) -> str:
        if key not in self._keys:
            self._keys[key] = f"{flow} {host}"
            self.started.append(self._keys[key])
            self.asked[self._keys[key]] = parameters
        if self.breaks(f"start {self._keys[key]}"):
            raise Killed
        return self._keys[key]

    def ended(self, run_id: str) -> Ended | None:
        if self.breaks(run_id):
            raise Killed
        flow, host = run_id.split()
        return (self.ends if flow == "migrate" else self.rollbacks).get(host, PASS)


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    with open_records(tmp_path / "switchyard.db") as opened:
        yield opened


def out(records: Records, played: Played, **changed: Any) -> dict[str, Any]:
    return roll_out(orders(**changed), played, records, poll_s=0)


def results(outcome: Mapping[str, Any]) -> dict[str, str]:
    return {row["host"]: row["result"] for row in outcome["hosts"]}


def test_wave_after_wave_to_the_last_host(records: Records) -> None:
    """Every phase is approved beforehand, by name; the decision is recorded."""
    hosts = Played()
    outcome = out(records, hosts, plan="/etc/plan.toml")
    assert hosts.started == ["migrate a", "migrate b", "migrate c"]
    assert hosts.asked["migrate a"] == {"plan": "/etc/plan.toml", "approve": True, "who": "Ada", "reason": "a test"}
    assert (outcome["verdict"], outcome["why"]) == ("PASS", "3 of 3 hosts migrated")
    assert [row["wave"] for row in outcome["hosts"]] == [1, 2, 2]
    (run,) = records.history(kind=KIND)
    assert (run.status, run.verdict, run.name) == ("done", "PASS", "fleet plan")
    assert [made.who for made in records.decisions(run.id)] == ["Ada"]


def test_a_shut_gate_ends_it_and_takes_its_wave_back(records: Records) -> None:
    """Also the host of that wave that passed; the wave before it stays, the one after is not begun."""
    hosts = Played(c=stays())
    outcome = out(records, hosts, hosts=["a", "b", "c", "d"], waves=[0, 0.75, 1])
    assert hosts.started == ["migrate a", "migrate b", "migrate c", "rollback b", "rollback c"]
    assert results(outcome) == {"a": "migrated", "b": "rolled back", "c": "rolled back", "d": "not begun"}
    assert outcome["verdict"] == "FAIL"
    assert "c: m stays: its gate is shut" in outcome["why"]
    assert outcome["hosts"][2]["models"] == {"good": "migrated", "m": "stays"}
    assert hosts.asked["rollback b"] == {"who": "Ada", "reason": "wave 2 did not pass: a test"}


def test_a_wave_may_be_left_as_it_is(records: Records) -> None:
    outcome = out(records, Played(a=stays()), rollback_wave=False)
    assert results(outcome) == {"a": "migrate failed", "b": "not begun", "c": "not begun"}


def test_a_host_that_cannot_be_rolled_back_is_said_first(records: Records) -> None:
    hosts = Played(a=stays())
    hosts.rollbacks["a"] = Ended("Failed", False, "no yard runs")
    outcome = out(records, hosts)
    assert outcome["verdict"] == "ERROR"
    assert outcome["why"].startswith("0 of 3 hosts migrated; not rolled back: a; a: m stays")


def test_a_host_on_which_nothing_had_moved_was_not_rolled_back(records: Records) -> None:
    """Its gate was the shut one; it is said, and is no failure."""
    hosts = Played(c=stays())
    hosts.rollbacks["c"] = Ended("nothing had moved", True, "there is nothing to roll back")
    outcome = out(records, hosts)
    assert results(outcome) == {"a": "migrated", "b": "rolled back", "c": "nothing had moved"}
    assert outcome["verdict"] == "FAIL"
    back = roll_back_hosts(orders(hosts=["b", "c"]), hosts, records, poll_s=0)
    assert (back["verdict"], back["why"]) == ("PASS", "1 of 2 hosts rolled back; on 1 nothing had moved")


def test_the_same_orders_go_on_where_the_gate_was_shut(records: Records) -> None:
    """In the same run: what is done is left alone, what was rolled back is migrated anew."""
    hosts = Played(c=stays())
    first = out(records, hosts)
    hosts.ends, hosts.started = {}, []
    again = out(records, hosts)
    assert hosts.started == ["migrate b", "migrate c"]
    assert (again["verdict"], again["run_id"]) == ("PASS", first["run_id"])
    assert out(records, Played())["run_id"] != first["run_id"]  # it is done: a later one asks every host anew


@pytest.mark.parametrize(
    "moment", ["start migrate a", "migrate a", "start migrate c", "migrate c", "start rollback b", "rollback c"]
)
@pytest.mark.parametrize("fixed", [False, True])
def test_killed_anywhere_it_resumes_and_starts_nothing_twice(records: Records, moment: str, fixed: bool) -> None:
    """Also where a clean-up has meanwhile closed the rows that the dead process left open."""
    hosts = Played(c=stays())
    hosts.breaks = lambda now: now == moment
    with pytest.raises(Killed):
        out(records, hosts)
    if fixed:
        (run,) = records.history(kind=KIND)
        for step in records.steps(run.id):
            if step.state == "intent":
                records.put_step(
                    run.id, step.model_id, step.step, "failed", {**step.detail, "why": "its process ended"}
                )
    hosts.breaks = lambda _: False
    outcome = out(records, hosts)
    assert sorted(hosts.started) == ["migrate a", "migrate b", "migrate c", "rollback b", "rollback c"]
    assert results(outcome) == {"a": "migrated", "b": "rolled back", "c": "rolled back"}
    assert (outcome["verdict"], len(records.history(kind=KIND))) == ("FAIL", 1)


def test_an_unknown_host_is_refused_before_anything_starts(records: Records) -> None:
    hosts = Played()
    with pytest.raises(BadInput, match="no deployments of z"):
        out(records, hosts, hosts=["a", "z"])
    assert (hosts.started, records.history()) == ([], [])


def test_the_last_wave_can_be_taken_back(records: Records) -> None:
    """All its hosts at once; asked for again later, it is done again, for a host may have moved since."""
    with pytest.raises(BadInput, match="name the hosts"):
        last_wave(records)
    hosts = Played()
    out(records, hosts)
    assert last_wave(records) == ["b", "c"]
    for _ in range(2):
        hosts.started = []
        again = orders(hosts=last_wave(records), reason="Monday")
        back = roll_back_hosts(again, hosts, records, poll_s=0)
        assert hosts.started == ["rollback b", "rollback c"]
        assert (back["verdict"], back["why"]) == ("PASS", "2 of 2 hosts rolled back")
        hosts._keys.clear()


# --- hosts in one database


def test_hosts_on_one_database_keep_their_runs_apart(
    records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even two on one machine: nobody resumes another's run, or calls it killed."""
    plan = {"name": "p"}
    monkeypatch.setenv("SWITCHYARD_HOST", "a")
    run = records.start_run("evaluate", "p", plan)
    records.finish_run(run.id, "interrupted")
    assert records.unfinished(plan) is not None
    monkeypatch.setenv("SWITCHYARD_HOST", "b")
    assert records.unfinished(plan) is None
    assert records.find_run(run.id).owner_alive is None
    assert records.history(host="b") == []
    assert reconcile(tmp_path, records) == []


# --- what a host's own flows have to allow for it


def test_an_approval_in_advance_has_a_name_and_a_reason() -> None:
    with pytest.raises(BadInput, match="fill in who and reason"):
        migrate.fn(approve=True, who="Ada")


def test_a_host_on_which_nothing_moved_is_back_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without a yard: a wave is rolled back as a whole, and this host's gate may have been the shut one."""
    monkeypatch.setenv("SWITCHYARD_HOME", str(tmp_path))
    outcome = rollback.fn()
    assert (outcome["verdict"], outcome["result"]) == ("PASS", "nothing had moved")


# --- two hosts for real: PostgreSQL, Prefect, a worker each; only what moves no engine is played

ROOT = Path(flows.__file__).parent.parent
RIG = ROOT / "tests" / "rig"
PLAYED = RIG / "played_fleet.py"


class Place:
    """A fleet on this machine: its databases, its Prefect, and a home for each host."""

    def __init__(self, folder: Path, database: str, stack: contextlib.ExitStack) -> None:
        self.folder, self._stack = folder, stack
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "SWITCHYARD_"))}
        port = free_port()
        self.environment = {
            **kept,
            "PYTHONPATH": f"{ROOT}:{RIG}",
            "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "DO_NOT_TRACK": "1",
            "SWITCHYARD_DATABASE_URL": f"postgresql://{database}/switchyard",
        }
        url = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://{database}/prefect"}
        arguments = ("server", "start", "--host", "127.0.0.1", "--port", port, "--no-ui")
        self.start("server", "-m", "prefect", *arguments, **url)
        until(self._answers, "Prefect's server", 90)
        self.done("-m", "prefect", "work-pool", "create", "switchyard", "--type", "process")

    def home(self, host: str) -> Path:
        path = self.folder / host
        path.mkdir(exist_ok=True)
        return path

    def _env(self, host: str, given: Mapping[str, str]) -> dict[str, str]:
        own = {"SWITCHYARD_HOST": host, "SWITCHYARD_HOME": str(self.home(host))}
        return {**self.environment, **own, "PREFECT_HOME": str(self.home(host) / "prefect"), **given}

    def start(self, host: str, *arguments: object, **given: str) -> subprocess.Popen[str]:
        """A process of a host; it ends with the test, and what it started with it."""
        with (self.home(host) / "log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                env=self._env(host, given),
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._stack.callback(_end, process)
        return process

    def worker(self, host: str) -> None:
        with (self.home(host) / "worker.log").open("w") as log:
            argv = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "switchyard", "--work-queue", host]
            process = subprocess.Popen(argv, env=self._env(host, {}), cwd=self.folder, stdout=log, stderr=log)
        self._stack.callback(_end, process)

    def done(self, *arguments: object, host: str = "control") -> str:
        """What a command printed, once it ended well."""
        process = self.start(host, *arguments)
        printed, _ = process.communicate(timeout=180)
        assert process.returncode == 0, (self.home(host) / "log").read_text()
        return printed

    def asked(self, path: str, **body: Any) -> Any:
        return httpx.post(f"{self.environment['PREFECT_API_URL']}/{path}", json=body).raise_for_status().json()

    def lines(self, host: str) -> list[str]:
        """What was played on a host."""
        file = self.home(host) / "done"
        return [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []

    def _answers(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.environment['PREFECT_API_URL']}/health", timeout=2).status_code == 200
        return False


def _end(process: subprocess.Popen[Any]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        for one in psutil.wait_procs(family, timeout=10)[1]:
            one.kill()
    process.wait()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with postgresql.server("prefect", "switchyard") as url, contextlib.ExitStack() as stack:
        yield Place(tmp_path, url, stack)


@pytest.mark.engine
def test_two_workers_are_two_hosts(place: Place) -> None:
    """A wave whose gate stays shut comes back on both; killed in the next try, it resumes and starts nothing twice."""
    arguments = {"hosts": ["a", "b"], "who": "Ada", "reason": "a test", "waves": [1.0]}
    place.done("-m", "prefect", "--no-prompt", "deploy", "--all", host="c")
    made = {one["name"]: one["work_queue_name"] for one in place.asked("deployments/filter")}
    assert (made["migrate-c"], made["fleet"], len(made)) == ("c", "fleet", 10)

    place.done(PLAYED, "deploy", "a", "b")
    for host, verdict in (("a", "PASS"), ("b", "FAIL")):
        (place.home(host) / "verdict").write_text(verdict)
        place.worker(host)
    outcome = json.loads(place.done(PLAYED, "roll-out", json.dumps(arguments)))
    assert results(outcome) == {"a": "rolled back", "b": "rolled back"}
    assert outcome["hosts"][1]["models"] == {"m": "stays"}
    assert [place.lines(host) for host in "ab"] == [["migrate", "rollback"]] * 2

    (place.home("b") / "verdict").write_text("PASS")
    (place.home("b") / "hold").touch()
    coordinator = place.start("control", PLAYED, "roll-out", json.dumps(arguments))
    until(lambda: place.lines("a")[2:] and _runs(place, "b", "RUNNING"), "b to be under way", 90)
    coordinator.send_signal(signal.SIGKILL)
    coordinator.wait()
    (place.home("b") / "hold").unlink()
    again = json.loads(place.done(PLAYED, "roll-out", json.dumps(arguments)))
    assert (again["verdict"], results(again)) == ("PASS", {"a": "migrated", "b": "migrated"})
    assert again["run_id"] == outcome["run_id"]
    assert [place.lines(host) for host in "ab"] == [["migrate", "rollback", "migrate"]] * 2


def _runs(place: Place, queue: str, state: str) -> bool:
    found = place.asked("flow_runs/filter", flow_runs={"state": {"type": {"any_": [state]}}})
    return any(run["work_queue_name"] == queue for run in found)
