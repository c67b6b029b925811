"""The whole migration on real engines, its flow run killed with SIGKILL in every phase, with a client on the port.

And the yard once, which fails what it had in hand; the other parts of `switchyard up` are killed in test_up.py.
Takes half an hour, so only when asked for: SWITCHYARD_TEST_EVERY_PHASE=1.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import installed
import pytest
from processes import of_home
from switchyard_up import ENDED, MODEL, NEW, Up
from waiting import until

from tasks.records.tables import Run

NATIVE = "mistral.rs-native"
PHASE_S = 900
OVER_S = 5.0
PARTS = """
[measure]
requests_per_block = 1
warmup_min = 0
warmup_max = 1
looks = [3]
calibration_blocks = 0
max_tokens = 4
parity_prompts = 6
parity_tokens = 24
soak_s = 10
every_behaviour = false
[client]
requires = ["chat_answer", "stream_shape", "stop_string", "max_tokens", "error_body"]
[limits]
mean_kld = 0.02
ttft_p50_ratio = 40
ttft_p95_ratio = 40
tpot_p50_ratio = 40
e2e_p50_ratio = 40
memory_peak_ratio = 20
failure_rate_margin = 0.4
foreign_cpu = 1
recover_s = 60
kill_detect_s = 60
hang_detect_s = 60
[canary]
steps = [0.5]
min_requests = 12
[retire]
rollback_window_days = 0
approve = "auto"
[migrate]
approve = "auto"
"""
POINTS = [  # a step of a run of this kind, or an evaluation's candidate: where it is killed
    ("evaluate", NEW),
    ("migrate", "rehearsal"),
    ("migrate", "canary 0.5"),
    ("migrate", "promote"),
    ("evaluate", NATIVE),
    ("migrate-native", "rehearsal"),
    ("migrate-native", "drills"),
    ("migrate-native", "canary 0.5"),
    ("migrate-native", "promote"),
    ("deprecate", "archive"),
]
YARD = ("migrate-native", "canary 0.5")  # here it is the yard that is killed
EVERY_START = ("yard", "precondition", "self_test", "archive")  # again: what they find may have changed

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif("SWITCHYARD_TEST_EVERY_PHASE" not in os.environ, reason="set SWITCHYARD_TEST_EVERY_PHASE=1"),
]


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    installed.require(*installed.BOTH)
    made = Up(tmp_path, PARTS)
    made.ensure()
    yield made
    made.end()


class Killed:
    """The migration, begun again whenever it was killed; what was on record then has to stay as it was."""

    def __init__(self, up: Up) -> None:
        self.up, self.flow_run = up, ""
        self.kept: dict[Any, Any] = {}

    def within(self, kind: str, step: str) -> bool:
        """Whether this step of the latest run of a kind is begun and not done."""
        return self.measuring(step) if kind == "evaluate" else self.up.steps(kind).get(step) == "intent"

    def measuring(self, candidate: str) -> bool:
        """Whether an evaluation of this candidate has its first block on record, and not its last."""
        with self.up.records() as records:
            for run in records.history(kind="evaluate"):
                if run.plan["candidate"]["engine"] == candidate and run.status == "running":
                    return 0 < len(records.list_evidence(run.id, kind="performance")) < 3
        return False

    def on_record(self) -> dict[Any, Any]:
        """When each piece of evidence and each step that is done was recorded."""
        with self.up.records() as records:
            runs = records.history(100)
            evidence = {
                (run.kind, row.id): (row.model_id, row.arm, row.kind, row.key, row.recorded_at)
                for run in runs
                for row in records.list_evidence(run.id)
                if row.kind not in EVERY_START
            }
            steps = {
                (run.id, step.model_id, step.step): step.at
                for run in runs
                for step in records.steps(run.id)
                if step.state == "done" and step.step not in EVERY_START
            }
        return evidence | steps

    def whole(self) -> Run:
        with self.up.records() as records:
            return records.history(1, kind="whole")[0]

    def at(self, kind: str, step: str) -> None:
        """Begin it, and kill it there."""
        self.begin(kind, step)
        os.kill(self.whole().owner_pid, signal.SIGKILL)
        assert self.up.ended(self.flow_run)["type"] == "CRASHED"
        self.unchanged()
        self.kept = self.on_record()

    def yard_at(self, kind: str, step: str) -> None:
        """Begin it, and kill the yard there: the migration cannot be carried out, the yard is started again."""
        self.begin(kind, step)
        os.kill(self.up.yard.status()["pid"], signal.SIGKILL)
        assert self.up.ended(self.flow_run)["name"] in ("ERROR", "Failed")
        until(lambda: self.up.ask() == 200, "the yard", PHASE_S)
        self.unchanged()
        self.kept = self.on_record()

    def begin(self, kind: str, step: str) -> None:
        """Begin it, and return when it is there."""
        self.flow_run = self.up.begin("migrate")
        here = threading.Event()
        with ThreadPoolExecutor(1) as asker:  # Prefect is asked beside: a step may take less than its answer
            try:
                asked = asker.submit(self.over_soon, here)
                until(lambda: self.within(kind, step) or asked.done(), f"{kind}: {step}", PHASE_S)
            finally:
                here.set()
            assert not asked.result(), (kind, step, self.up.state(self.flow_run))

    def over_soon(self, here: threading.Event) -> bool:
        """Wait until its run has ended, or until it is there; return whether it has ended."""
        while not here.wait(OVER_S):
            if self.over():
                return True
        return False

    def over(self) -> bool:
        return self.up.state(self.flow_run)["type"] in ("PAUSED", *ENDED)

    def unchanged(self) -> None:
        now = self.on_record()
        assert {key: now.get(key) for key in self.kept} == self.kept

    def done(self) -> dict[str, Any]:
        """Begun a last time: the state in which it ends."""
        self.flow_run = self.up.begin("migrate")
        until(self.over, "its end", PHASE_S)
        self.unchanged()
        return self.up.state(self.flow_run)


def test_it_is_killed_in_every_phase_and_comes_to_its_end(up: Up) -> None:
    """No request fails, nothing is measured or done twice, each part has one row; then a run changes nothing."""
    killed = Killed(up)
    with up.traffic() as seen:
        for point in POINTS:
            if point == YARD:
                assert up.lost == []
                first = len(seen)
                killed.yard_at(*point)
                last = len(seen)
            else:
                killed.at(*point)
        state = killed.done()
        assert (state["type"], state["name"]) == ("COMPLETED", "PASS"), state
        after = killed.on_record()
        again = killed.done()
        assert (again["name"], killed.on_record()) == ("PASS", after), again
    assert {*seen[:first], *seen[last + 1 :]} == {200}, [at for at, status in enumerate(seen) if status != 200]
    print(f"{len(seen)} requests; {state['message']}; again: {again['message']}")
    route = up.route()
    assert (route["id"], route["serving"], route["fallback"]) == (MODEL, NATIVE, None)
    with up.records() as records:
        runs = records.history(100)
        steps = {(run.kind, step.step): step.state for run in runs for step in records.steps(run.id)}
    kinds = ["deprecate", "evaluate", "evaluate", "migrate", "migrate-native", "whole"]
    assert sorted(run.kind for run in runs) == kinds
    assert {(run.status, run.verdict) for run in runs} == {("done", "PASS")}
    assert set(steps.values()) == {"done"}, steps
    moves = {point for point in POINTS if point[0] != "evaluate"}
    assert moves | {("whole", "subprocess"), ("whole", "native")} <= set(steps)
    assert up.run("down").returncode == 0
    assert of_home(up.home) == []
