"""The soak of what serves, over a yard of fake engines: windows of seconds, restarts of everything, and breaches."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from gguf_files import write_gguf
from processes import of_home
from pydantic import SecretStr
from rich.console import Console
from stored_series import list_series
from waiting import until

from engines.errors import BadInput, SwitchyardError
from engines.process.serving import free_port
from engines.yard.client import YardClient, wait_until_serving
from flows.cli.soak import exit_code, next_step, show
from flows.soak import markdown, nothing, soak_window, targets
from migrations.plan import Plan
from migrations.plan_file import build_plan, load_plan, plan_to_toml
from tasks.evidence.soak.window import Place, measure_window
from tasks.records.store import Records, open_records
from tasks.records.tables import Run

ROOT = Path(__file__).parents[2]
RIG = ROOT / "tests" / "rig"
OLD, NEW, NATIVE = "llama.cpp", "mistral.rs", "mistral.rs-native"
LONG = 3600.0  # a soak that no test sees the end of


@dataclasses.dataclass
class Box:
    """A yard of two fake engines with its plan, and the windows soaked on it."""

    home: Path
    plan: Plan
    toml: Path
    argv: list[str]

    @property
    def client(self) -> YardClient:
        return YardClient(self.home)

    def start(self) -> Box:
        """The yard, serving."""
        env = {**os.environ, "PYTHONPATH": str(ROOT), "FAKE_BOX": str(self.home)}
        with (self.home / "yard.log").open("ab") as log:
            yard = subprocess.Popen(self.argv, env=env, stdout=log, stderr=log, start_new_session=True)
        wait_until_serving(self.client, ["m"], yard.poll, (self.home / "yard.log").read_text, say=lambda _: None)
        return self

    def promoted(self, to: str = NEW) -> Box:
        self.client.order("promote", model="m", to=to)
        return self

    def stop(self) -> None:
        """Everything of it killed, as a power cut would."""
        for process in of_home(self.home, "FAKE_BOX"):
            with contextlib.suppress(psutil.Error):
                process.kill()
        until(lambda: not of_home(self.home, "FAKE_BOX"), "every process to be gone")

    def window(self, window_s: float = 1.0, plan: Plan | None = None) -> dict[str, Any]:
        with self.records() as records:
            return soak_window(plan or self.plan, self.home, records, window_s=window_s)

    def records(self) -> Records:
        return open_records(self.home / "switchyard.db")

    def runs(self) -> list[Run]:
        with self.records() as records:
            return records.history(kind="soak")

    def evidence(self, run_id: str) -> dict[str, dict[str, Any]]:
        with self.records() as records:
            rows = records.list_evidence(run_id, model_id="m", arm="candidate", kind="soak")
            return {row.key: row.payload for row in rows}

    def steps(self, run_id: str) -> dict[str, tuple[str, Any]]:
        with self.records() as records:
            return {step.step: (step.state, step.detail) for step in records.steps(run_id, "m")}

    def engine(self, name: str = NEW) -> dict[str, Any]:
        (route,) = self.client.status()["models"]
        return next(engine for engine in route["engines"] if engine["engine"] == name)

    def kill_engine(self) -> None:
        os.kill(self.engine()["pid"], signal.SIGKILL)

    def place(self) -> Place:
        return Place(client=self.client, key=None, model_id="m", engine=NEW)

    def meanwhile(self, act: Callable[[], None], at_samples: int = 1) -> tuple[threading.Thread, Callable[..., None]]:
        """A thread that acts once memory was sampled so often, and what a window has to call with its samples."""
        enough, seen = threading.Event(), list[str]()

        def on_memory(series: str, *_: object) -> None:
            seen.append(series)
            if len(seen) >= at_samples:
                enough.set()

        def wait_and_act() -> None:
            enough.wait(30)
            act()

        thread = threading.Thread(target=wait_and_act)
        thread.start()
        return thread, on_memory


MakeBox = Callable[..., Box]


@pytest.fixture
def make_box(tmp_path: Path) -> Iterator[MakeBox]:
    """Makes a box; `new` are habits of the candidate, `yard` and `measure` parts of the plan."""
    boxes: list[Box] = []

    def make(new: str = "", soak_s: float = LONG, **yard: Any) -> Box:
        folder = tmp_path / f"box{len(boxes)}"
        home, port = folder / "home", free_port()
        home.mkdir(parents=True)
        gguf = write_gguf(folder / "m.gguf")
        parts = {"yard": {"port": port, "load_stall_s": 20, "memory_back_s": 2, **yard}, "measure": {"soak_s": soak_s}}
        engines = {"incumbent": {"engine": OLD}, "candidate": {"engine": NEW}}
        plan = build_plan({"name": "a box", "models": [{"id": "m", "gguf": str(gguf)}], **engines, **parts})
        toml, spec = folder / "plan.toml", folder / "spec.json"
        toml.write_text(plan_to_toml(plan))
        spec.write_text(
            json.dumps({"home": str(home), "port": port, "gguf": str(gguf), "plan": parts, NEW: new.split()})
        )
        argv = [
            sys.executable,
            str(RIG / "fake_migration.py"),
            "yard",
            str(spec),
            str(home),
            str(port),
        ]
        box = Box(home, load_plan(toml), toml, argv)
        boxes.append(box)
        return box

    yield make
    for box in boxes:
        box.stop()


@pytest.fixture
def box(make_box: MakeBox) -> Box:
    """One whose candidate serves."""
    return make_box().start().promoted()


# nothing to soak


def test_without_a_yard_there_is_nothing_to_soak_and_no_run(make_box: MakeBox) -> None:
    """One line that says what to do; a schedule may ask every ten minutes."""
    box = make_box()
    outcome = box.window()
    assert (outcome["result"], outcome["run_id"], outcome["models"]) == ("nothing to soak", None, [])
    assert "switchyard serve" in outcome["why"]
    assert box.runs() == []
    assert exit_code(outcome) == 0


def test_an_incumbent_that_serves_is_not_soaked(make_box: MakeBox) -> None:
    """Nobody moved yet."""
    box = make_box().start()
    assert targets(box.plan, box.home) == []
    assert "is served by mistral.rs" in box.window()["why"]
    assert box.runs() == []


def test_a_key_that_is_not_set_is_said_before_a_run_is_recorded(box: Box) -> None:
    """A schedule asks again every ten minutes."""
    with pytest.raises(BadInput, match="NO_SUCH_KEY"):
        box.window(plan=box.plan.model_copy(update={"api_key_env": "NO_SUCH_KEY"}))
    assert box.runs() == []


def test_another_experiment_goes_first(box: Box) -> None:
    """It would be disturbed: the window is left out, and that is no failure."""
    with (box.home / "experiment.lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("an evaluation (pid 1)")
        lock.flush()
        outcome = box.window()
    assert outcome["result"] == "nothing to soak"
    assert "an evaluation (pid 1) is under way" in outcome["why"]


# windows


def test_a_window_is_evidence_and_the_next_one_joins_the_run(box: Box, notes: list[str]) -> None:
    """Load, times, memory of the engine and of the yard, and who it was."""
    first, second = box.window(1.5), box.window(1.5)
    assert notes == ["a box: this window takes under a minute; 1 h of soak are left"] * 2
    assert (first["result"], second["result"]) == ("window added", "window added")
    assert first["run_id"] == second["run_id"]
    (run,) = box.runs()
    assert (run.status, run.verdict) == ("interrupted", None)
    assert "next window" in str(run.error)
    windows = box.evidence(run.id)
    assert list(windows) == ["00000", "00001"]
    for window in windows.values():
        assert window["requests"] > 3
        assert window["failures"] == []
        assert window["exposure_s"] >= 1.5
        assert window["started_at"] < window["ended_at"]
        (life,) = window["lives"]
        assert life["memory_bytes"] > 0
        assert life["life"].startswith(f"{box.engine()['pid']}@")
        assert window["yard_memory_bytes"] > 0
    sent = box.client.status()["usage"]["fields"]
    assert sent["max_tokens"] > 3
    assert "seed" not in sent, "the soak's own seeds count as a field that the user's programs need"
    (model,) = second["models"]
    assert model["windows"] == 2
    assert model["exposure_s"] == pytest.approx(sum(w["exposure_s"] for w in windows.values()))
    assert model["breached"] == []
    with box.records() as records:
        row = records.list_evidence(run.id, kind="soak", arm="candidate")[0]
        series = {name: points for _, _, name, points in list_series(records, run.id)}
        assert {check.check for check in records.checks(run.id)["m"]} >= {"stability.failures", "stability.served"}
    assert row.environment["engines"][0]["engine"] == NEW
    assert row.environment["engines"][0]["argv"]
    assert set(series) == {"memory_bytes", "yard_memory_bytes"}
    assert all(points >= 4 for points in series.values())


def test_a_window_killed_half_way_leaves_a_run_that_the_next_one_joins(box: Box) -> None:
    """kill -9: its evidence is lost, the run is not."""
    code = (
        "import sys; from pathlib import Path; from flows.soak import soak_window; "
        "from migrations.plan_file import load_plan; from tasks.records.store import open_records; "
        "home = Path(sys.argv[2]); "
        "soak_window(load_plan(Path(sys.argv[1])), home, open_records(home / 'switchyard.db'), window_s=600)"
    )
    argv = [sys.executable, "-c", code, str(box.toml), str(box.home)]
    running = subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": str(ROOT), "FAKE_BOX": str(box.home)})
    until(lambda: box.runs() or running.poll() is not None, "the run to be recorded")
    until(lambda: box.engine()["state"] == "busy", "the window to be under way")
    running.kill()
    running.wait()
    (run,) = box.runs()
    assert run.shown_status == "killed"
    outcome = box.window()
    assert (outcome["run_id"], outcome["models"][0]["windows"]) == (run.id, 1)
    assert len(box.runs()) == 1


def test_a_yard_started_anew_between_two_windows_is_no_failure(box: Box) -> None:
    """A reboot, say: other processes, the same engine, the same run."""
    first = box.window()
    box.stop()
    box.start()
    outcome = box.window()
    assert outcome["run_id"] == first["run_id"]
    windows = list(box.evidence(outcome["run_id"]).values())
    assert [window["failures"] for window in windows] == [[], []]
    assert windows[0]["lives"][0]["life"] != windows[1]["lives"][0]["life"]
    assert windows[0]["yard_life"] != windows[1]["yard_life"]


def test_an_engine_killed_in_a_window_is_one_failure(make_box: MakeBox) -> None:
    """However many requests it broke; the yard's own words are the evidence, and the new process is weighed as well."""
    box = make_box("--itl-ms 3").start().promoted()
    thread, on_memory = box.meanwhile(box.kill_engine)
    window = measure_window(box.place(), length_s=3, on_memory=on_memory)
    thread.join()
    (failure,) = window["failures"]
    assert failure["type"] == "crash"
    assert "SIGKILL" in failure["error"]
    assert window["restarts"] == box.engine()["restarts"] == 1
    assert len({life["life"] for life in window["lives"]}) == 2
    assert window["outage"] is None
    assert not window["ended"]


def test_an_engine_that_hangs_in_a_window_is_one_failure(make_box: MakeBox) -> None:
    """The yard finds it wedged and starts another one; the request that hung is part of it."""
    box = make_box("--itl-ms 3", wedged_after_s=1).start().promoted()
    thread, on_memory = box.meanwhile(lambda: os.kill(box.engine()["pid"], signal.SIGSTOP))
    window = measure_window(box.place(), length_s=10, on_memory=on_memory)
    thread.join()
    (failure,) = window["failures"]
    assert failure["type"] == "hang"
    assert window["restarts"] == box.engine()["restarts"] == 1


def test_a_key_that_is_refused_is_no_failure_of_the_engine(make_box: MakeBox) -> None:
    """It would move traffic back for nothing."""
    box = make_box()
    argv = [
        sys.executable,
        str(RIG / "fake_yard.py"),
        "--home",
        str(box.home),
        "--port",
        str(free_port()),
    ]
    box.argv = [*argv, "--gguf", str(box.plan.models[0].gguf), "--api-key=secret"]
    box.start().promoted("new")
    nameless = dataclasses.replace(box.place(), engine="new")
    with pytest.raises(BadInput, match="refused the soak's key"):
        measure_window(nameless, length_s=30)
    keyed = dataclasses.replace(nameless, key=SecretStr("secret"))
    assert measure_window(keyed, length_s=1)["failures"] == []


def test_an_engine_killed_between_two_windows_counts_in_the_second(box: Box) -> None:
    """The user's own requests met it; a third window does not count it again."""
    run_id = box.window()["run_id"]
    box.kill_engine()
    until(lambda: box.engine()["restarts"] == 1 and box.engine()["state"] == "ready", "the engine to be back")
    box.window()
    outcome = box.window()
    counted = [[f["type"] for f in window["failures"]] for window in box.evidence(run_id).values()]
    assert counted == [[], ["crash"], []]
    failures = next(c for c in outcome["models"][0]["checks"] if c["check"] == "stability.failures")
    assert failures["value"] == 1


def test_a_model_moved_by_hand_ends_the_window_and_is_no_failure(box: Box) -> None:
    """Nor a breach: somebody decided it."""
    thread, on_memory = box.meanwhile(lambda: box.client.order("rollback", model="m") and None)
    window = measure_window(box.place(), length_s=30, on_memory=on_memory)
    thread.join()
    assert (window["failures"], window["outage"]) == ([], None)
    assert f"{OLD} has replaced {NEW}" in window["ended"]


def test_a_yard_that_goes_away_ends_the_window_and_is_no_failure(box: Box) -> None:
    """The engine had no part in it."""
    thread, on_memory = box.meanwhile(box.stop)
    window = measure_window(box.place(), length_s=30, on_memory=on_memory)
    thread.join()
    assert (window["failures"], window["outage"]) == ([], None)
    assert "yard" in window["ended"]
    with pytest.raises(SwitchyardError, match="yard"):
        measure_window(box.place(), length_s=1)


# breaches


def test_a_fallback_is_a_breach_and_ends_the_soak(make_box: MakeBox) -> None:
    """Recorded as a step; the model is not soaked again until it is moved anew."""
    box = make_box(restarts=0).start().promoted()
    run_id = box.window()["run_id"]
    box.kill_engine()
    until(lambda: box.client.status()["models"][0]["fallback"], "the fallback")
    outcome = box.window()
    assert (outcome["result"], outcome["verdict"], exit_code(outcome)) == ("breached", "FAIL", 3)
    assert "fallback to llama.cpp" in outcome["models"][0]["breached"][0]
    (window,) = list(box.evidence(run_id).values())[1:]
    assert [failure["type"] for failure in window["failures"]] == ["crash"]
    state, detail = box.steps(run_id)["breach 00001"]
    assert (state, detail["engine"]) == ("done", NEW)
    (run,) = box.runs()
    assert (run.status, run.verdict) == ("failed", "FAIL")
    assert Path(str(run.report_path)).is_file()
    again = box.window()
    assert again["result"] == "nothing to soak"
    assert "was breached" in again["why"]
    box.client.order("rollback", model="m")
    box.promoted()
    anew = box.window()
    assert (anew["result"], len(box.runs())) == ("window added", 2)
    assert anew["run_id"] != run_id


def test_a_breach_in_the_window_ends_it_at_once(make_box: MakeBox) -> None:
    """Not after the hour that was asked for."""
    box = make_box(restarts=0).start().promoted()
    thread, on_memory = box.meanwhile(box.kill_engine)
    window = measure_window(box.place(), length_s=LONG, on_memory=on_memory)
    thread.join()
    assert window["outage"] == window["ended"] == f"fallback to {OLD}"
    assert [failure["type"] for failure in window["failures"]] == ["crash"]


# the end


def test_a_soak_that_is_long_enough_comes_to_a_verdict_once(make_box: MakeBox) -> None:
    """Done, with its report; asked again there is nothing to soak, and native form is another engine."""
    box = make_box(soak_s=2).start().promoted()
    assert box.window(1.2)["result"] == "window added"
    outcome = box.window(1.2)
    assert (outcome["result"], outcome["verdict"], exit_code(outcome)) == ("done", "PASS", 0)
    assert Path(outcome["report"]).is_file()
    (run,) = box.runs()
    assert (run.status, run.verdict) == ("done", "PASS")
    again = box.window()
    assert (again["result"], len(box.runs())) == ("nothing to soak", 1)
    assert "ended with PASS" in again["why"]
    other = box.promoted(NATIVE).window()
    assert (other["models"][0]["engine"], other["models"][0]["windows"]) == (NATIVE, 1)
    assert len(box.runs()) == 2


def test_a_run_killed_before_its_own_end_is_ended_by_the_next_call(box: Box) -> None:
    """The model's end was recorded, the run's was not."""
    outcome = box.window()
    with box.records() as records:
        detail = {"engine": NEW, "version": outcome["models"][0]["version"], "verdict": "INCONCLUSIVE"}
        records.put_step(outcome["run_id"], "m", "soaked", "done", detail)
    assert box.window()["result"] == "nothing to soak"
    (run,) = box.runs()
    assert run.status == "done"
    assert Path(str(run.report_path)).is_file()


def test_the_incumbents_soak_of_the_evaluation_is_what_it_is_compared_with(make_box: MakeBox) -> None:
    """Summed up once into the run."""
    box = make_box(soak_s=2).start().promoted()
    segment = {
        **{"exposure_s": 60.0, "requests": 50, "kinds": {"turn": 50}, "restarts": 1, "silent_empty": 0},
        **{"failures": [{"at_s": 1.0, "type": "crash", "error": "it ended"}], "ttft_ms": [1.0] * 50},
        **{"decode_tok_s": [1.0] * 50, "prompt_tokens": [5] * 50},
    }
    with box.records() as records:
        run = records.start_run("evaluate", box.plan.name, box.plan.model_dump(mode="json"))
        for key in ("00000", "00001"):
            records.put_evidence(run.id, "m", "incumbent", "soak", segment, key=key)
        records.finish_run(run.id)
    outcome = box.window(2.5)
    with box.records() as records:
        (row,) = records.list_evidence(outcome["run_id"], arm="incumbent", kind="soak")
    assert (row.payload["exposure_s"], len(row.payload["failures"])) == (120.0, 2)
    failures = next(c for c in outcome["models"][0]["checks"] if c["check"] == "stability.failures")
    assert "incumbent: 2" in failures["why"]


# what is shown


def test_people_are_shown_the_checks_and_what_to_do_next(box: Box) -> None:
    outcome = box.window()
    out = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    show(outcome, out)
    text = out.export_text()
    assert "stability.served" in text
    assert text.rstrip().endswith(next_step(outcome))
    assert "| PASS | stability.failures | 0 failures | 0 failures |" in markdown(outcome)


def test_what_to_do_next_fits_the_result() -> None:
    assert "status" in next_step(nothing("p", "why"))
    breached = {"result": "breached", "models": [{"model": "m", "breached": ["x"]}]}
    assert "switchyard rollback m" in next_step(breached)


# in Prefect

FLOW = """
import json, os, sys, time
from pathlib import Path
from flows.orchestrator.server import with_prefect

flow = with_prefect(Path(os.environ["SWITCHYARD_HOME"]), "flows.deployments:soak")
outcomes = [flow(sys.argv[1], 1.0) for _ in range(2)]

import httpx
api = os.environ["PREFECT_API_URL"]
artifacts = httpx.post(f"{api}/artifacts/filter", json={}).json()
print(json.dumps({
    "results": [outcome["result"] for outcome in outcomes],
    "artifacts": sorted((a["key"], a["type"]) for a in artifacts),
    "names": [run["name"] for run in httpx.post(f"{api}/flow_runs/filter", json={}).json()],
    "runs": [outcome["run_id"] for outcome in outcomes],
}))
"""


def test_a_window_in_prefect_leaves_one_percentage_and_one_table(
    make_box: MakeBox, environment: dict[str, str]
) -> None:
    """The second call finds the breach of the first reported, and publishes nothing."""
    box = make_box(restarts=0).start().promoted()
    box.kill_engine()
    until(lambda: box.client.status()["models"][0]["fallback"], "the fallback")
    env = {**environment, "SWITCHYARD_HOME": str(box.home), "PYTHONPATH": str(ROOT), "FAKE_BOX": str(box.home)}
    argv = [sys.executable, "-c", FLOW, str(box.toml)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout.splitlines()[-1])
    assert shown["results"] == ["breached", "nothing to soak"]
    assert shown["artifacts"] == [
        ["switchyard-soak-a-box", "markdown"],
        ["switchyard-soak-progress-a-box", "progress"],
    ]
    assert shown["names"] == ["soak plan"] * 2
    state, detail = box.steps(shown["runs"][0])["breach 00000"]
    assert (state, detail["told"]) == ("done", True)
    assert box.runs()[0].flow_run_id
