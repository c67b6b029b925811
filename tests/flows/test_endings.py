"""How a run ends in Prefect: by state, name, artifact and version."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engines.home import program_version
from flows.evaluation.outcome import model_outcome, only_lacks_its_soak
from flows.orchestrator.artifacts import check_rows, worst_first
from flows.orchestrator.ending import NOTHING_MOVED, state_of
from tasks.evidence.unmeasured import SOAK_LEFT_OUT, judge_unmeasured, left_out
from tasks.verdicts.verdict import CheckResult, Verdict, not_measured

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("outcome", "ended"),
    [
        ({"verdict": "PASS"}, ("COMPLETED", "PASS")),
        ({"verdict": "FAIL"}, ("FAILED", "FAIL")),
        ({"verdict": "INCONCLUSIVE"}, ("FAILED", "INCONCLUSIVE")),
        ({"verdict": "ERROR"}, ("FAILED", "ERROR")),
        ({"verdict": "INCONCLUSIVE", "result": "window added"}, ("COMPLETED", "window added")),
        ({"verdict": None, "result": "nothing to soak"}, ("COMPLETED", "nothing to soak")),
        ({"verdict": "FAIL", "result": "breached"}, ("FAILED", "FAIL")),
        ({"verdict": "PASS", "result": NOTHING_MOVED}, ("COMPLETED", "nothing had moved")),
        ({"verdict": "INCONCLUSIVE", "result": "PASS without a soak"}, ("COMPLETED", "PASS without a soak")),
        ({"verdict": "FAIL", "result": "report written"}, ("COMPLETED", "report written")),
    ],
)
def test_a_closed_gate_has_failed_by_its_own_name(outcome: dict[str, Any], ended: tuple[str, str]) -> None:
    """What has no gate, or not yet, has not."""
    state = state_of(outcome)
    assert (state.type.value, state.name) == ended


SOAK = ("both", SOAK_LEFT_OUT, left_out("as scheduled ones do"))
PASSED = CheckResult(check="parity.x", verdict=Verdict.PASS, why="seen")
NO_SOAK = judge_unmeasured(*SOAK)


@pytest.mark.parametrize(
    ("checks", "unmeasured", "only"),
    [
        ([PASSED, NO_SOAK], [SOAK], True),
        ([PASSED], [], True),  # another model's soak is the one that lacks
        ([not_measured("parity.x", "too few"), NO_SOAK], [SOAK], False),
        ([CheckResult(check="parity.x", verdict=Verdict.FAIL, why="seen"), NO_SOAK], [SOAK], False),
        ([PASSED, NO_SOAK], [], False),  # a soak that was measured, and is too short
    ],
)
def test_a_soak_left_out_on_purpose_is_no_failure_of_the_night(checks: Any, unmeasured: Any, only: bool) -> None:
    """What the night measured is; and the model's own verdict opens no gate either way."""
    trial: Any = SimpleNamespace(unmeasured=lambda: unmeasured)
    model = model_outcome("m", checks)
    assert only_lacks_its_soak(trial, model) is only
    assert (model["verdict"] == "PASS") is (checks == [PASSED])


def test_a_state_says_how_it_ended_for_each_model() -> None:
    """Where there is no reason of the whole run."""
    models = [{"model": "a", "verdict": "PASS"}, {"model": "b", "verdict": "FAIL", "result": "stays"}]
    said = state_of({"verdict": "FAIL", "run_id": "r", "models": models, "report": "/r.html"}).message
    assert said == "a: PASS; b: stays; report: /r.html"
    assert state_of({"verdict": "FAIL", "why": "because", "models": models}).message == "because"


def test_tables_begin_with_what_failed() -> None:
    """In their order otherwise."""
    rows = [{"verdict": verdict, "n": n} for n, verdict in enumerate(("PASS", "FAIL", "INCONCLUSIVE", "ERROR", "FAIL"))]
    assert [row["n"] for row in worst_first(rows)] == [1, 4, 3, 2, 0]


def test_figures_in_tables_have_their_unit() -> None:
    """A behaviour has none."""
    facts = {"verdict": "FAIL", "why": "w", "required": True}
    checks = [
        {"check": "x", "value": 2484.3, "limit": 1100.0, "unit": "ms", **facts},
        {"check": "y", "value": None, "limit": None, "unit": "", **facts},
        {"check": "z", "value": 1.0, "limit": None, "unit": "ms", **facts, "required": False},
    ]
    rows = check_rows([{"model": "m", "checks": checks}], required=True)
    assert [(row["check"], row["value"], row["limit"]) for row in rows] == [
        ("x", "2,484 ms", "1,100 ms"),
        ("y", "", ""),
    ]


def test_every_ending_as_prefect_shows_it(environment: dict[str, str], home: Path) -> None:
    """Of commands and of deployments: a gate, a refused double start, Ctrl-C, an error, a report."""
    argv = [sys.executable, str(ROOT / "tests" / "rig" / "flow_endings.py")]
    env = {**environment, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout.splitlines()[-1])
    assert shown["commands"] == {
        **{verdict: verdict for verdict in ("PASS", "FAIL", "INCONCLUSIVE")},
        **{"busy": "Busy", "ctrl-c": "KeyboardInterrupt", "broken": "ValueError"},
    }
    states = {how: (kind, name) for how, kind, name, _ in shown["states"]}
    said = {how: message for how, _, _, message in shown["states"]}
    assert states == {
        "PASS": ("COMPLETED", "PASS"),
        "FAIL": ("FAILED", "FAIL"),
        "INCONCLUSIVE": ("FAILED", "INCONCLUSIVE"),
        "busy": ("CANCELLED", "Cancelled"),
        "ctrl-c": ("CANCELLED", "Cancelled"),
        "broken": ("FAILED", "Failed"),
        "report latest": ("COMPLETED", "report written"),
        "migrate": ("CANCELLED", "Cancelled"),
        "rollback": ("COMPLETED", "nothing had moved"),
    }
    assert said["FAIL"] == "it is FAIL"
    assert said["busy"] == "a migration (pid 1) is under way already"
    assert said["ctrl-c"] == "interrupted"
    assert said["migrate"] == "an evaluation (pid 2) is under way already"
    assert shown["versions"] == [program_version()]
    rows = json.loads(shown["artifacts"]["switchyard-verdict"])
    assert [(row["verdict"], row["check"], row["value"]) for row in rows] == [
        ("FAIL", "b.bad", "11,400 ms"),
        ("PASS", "a.fine", "0.5 ms"),
    ]
    assert (home / "r.html").as_uri() in shown["artifacts"]["switchyard-report"]
