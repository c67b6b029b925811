"""Faults on purpose, against the fake engine: each is taken for what it is, and nothing of it is left."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from fake_driver import FakeDriver

from engines.driver import Installation
from engines.process.process import registered
from engines.settings import Serve, Settings
from tasks.evidence.engine_under_test import EngineUnderTest
from tasks.evidence.faults import KINDS, judge_faults, measure_faults
from tasks.verdicts.verdict import Verdict, gate

ROOMY = {"kill_detect_s": 60.0, "hang_detect_s": 60.0, "recover_s": 60.0}


class FileCheckingFake(FakeDriver):
    """A fake engine that refuses a model file shorter than `smallest` bytes."""

    def __init__(self, *habits: str, smallest: int = 0) -> None:
        super().__init__(*habits)
        self.smallest = smallest

    def argv(self, installation: Installation, serve: Serve) -> list[str]:
        """With the model file, which the plain fake does not look at."""
        check = ["--gguf", str(serve.gguf), "--checks-gguf", str(self.smallest)]
        return [*super().argv(installation, serve), *check]


def engine(home: Path, driver: FakeDriver) -> EngineUnderTest:
    """A candidate served by the fake engine, with a model of 4 KiB."""
    gguf = home / "m.gguf"
    gguf.write_bytes(b"GGUF" * 1024)
    return EngineUnderTest(
        arm="candidate",
        driver=driver,
        installation=driver.find(),
        model_id="m",
        gguf=gguf,
        settings=Settings(),
        home=home,
    )


@pytest.fixture(scope="module")
def drilled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    """(home, evidence, progress lines) of all drills on an engine that behaves well."""
    home = tmp_path_factory.mktemp("home")
    lines: list[str] = []
    driver = FileCheckingFake("--itl-ms", "5", smallest=4096)
    return home, measure_faults(engine(home, driver), lines.append), lines


def test_a_killed_engine_is_dead(drilled: tuple[Path, dict[str, Any], list[str]]) -> None:
    """Its client sees a cut answer, not a whole one."""
    seen = drilled[1]["sigkill"]
    assert seen["classified"] == "dead"
    assert signal.SIGKILL.name in seen["evidence"]
    assert seen["client_saw"] != "a whole answer"


def test_a_frozen_engine_is_wedged(drilled: tuple[Path, dict[str, Any], list[str]]) -> None:
    """It lives and its port is open; only its tokens stopped."""
    seen = drilled[1]["sigstop"]
    assert seen["classified"] == "wedged"
    assert "alive (stopped)" in seen["evidence"]


def test_a_cut_model_and_a_taken_port_are_refused(drilled: tuple[Path, dict[str, Any], list[str]]) -> None:
    """The engine's own words, and who holds the port."""
    _, evidence, _ = drilled
    assert evidence["truncated_gguf"]["classified"] == "refused"
    assert "not within the file bounds" in evidence["truncated_gguf"]["evidence"]
    assert evidence["port_taken"]["classified"] == "refused"
    assert "is taken by" in evidence["port_taken"]["evidence"]


def test_the_evidence_can_be_stored_and_passes_where_time_is_plenty(
    drilled: tuple[Path, dict[str, Any], list[str]],
) -> None:
    """Eight checks: two for each file and port, three for each drill on a running engine."""
    _, evidence, lines = drilled
    assert json.loads(json.dumps(evidence)) == evidence
    assert (tuple(evidence), lines) == (KINDS, [kind.replace("_", " ") for kind in KINDS])
    results = judge_faults(evidence, **ROOMY)
    assert len(results) == 8
    assert gate(results) is Verdict.PASS


def test_what_recovers_from_one_drill_is_there_for_the_next(drilled: tuple[Path, dict[str, Any], list[str]]) -> None:
    """A load of a large model less: killed, started; frozen, started; and once with the cut file."""
    home, evidence, _ = drilled
    assert {"load_s", "recover_s"} <= evidence["sigstop"].keys()
    logs = [path.name for path in (home / "logs").iterdir() if path.name.startswith("candidate-")]
    assert len(logs) == 4, logs


def test_nothing_of_the_drills_is_left(drilled: tuple[Path, dict[str, Any], list[str]]) -> None:
    """No process, no line in the register, no cut copy of the model."""
    home = drilled[0]
    assert registered(home) == []
    assert list((home / "processes").iterdir()) == []
    assert sorted(home.rglob("*.gguf")) == [home / "m.gguf"]


def test_an_engine_that_serves_a_cut_model_fails(tmp_path: Path) -> None:
    """It would answer in garbage; one that never starts is no drill at all, and an ERROR."""
    evidence = measure_faults(engine(tmp_path, FileCheckingFake("--itl-ms", "5")))
    by_check = {result.check: result.verdict for result in judge_faults(evidence, **ROOMY)}
    assert by_check["faults.truncated_gguf"] is Verdict.FAIL
    assert evidence["truncated_gguf"]["classified"] == "served"


def test_a_drill_that_cannot_be_carried_out_is_an_error_with_its_reason(tmp_path: Path) -> None:
    """Neither a pass nor a failure of the engine."""
    evidence = measure_faults(engine(tmp_path, FakeDriver("--exit-code", "3")))
    by_check = {result.check: result for result in judge_faults(evidence, **ROOMY)}
    for check in ("faults.sigkill", "faults.sigstop"):
        assert by_check[check].verdict is Verdict.ERROR
        assert "exit status 3" in by_check[check].why
    assert by_check["faults.port_taken"].verdict is Verdict.PASS


def interrupted(**changes: Any) -> dict[str, Any]:
    """Evidence of a drill on a running engine: noticed at once, mended in two seconds."""
    seen = {
        "load_s": 1.5,
        "no_progress_s": 2.0,
        "classified": "dead",
        "evidence": "the process ended with signal SIGKILL",
        "detect_s": 0.1,
        "client_saw": "ReadError",
        "recover_s": 2.0,
    }
    return seen | changes


def evidence_with(**drills: dict[str, Any]) -> dict[str, Any]:
    """All drills well, save those given."""
    refused = {"classified": "refused", "evidence": "error: no", "detect_s": 0.1}
    return {
        "sigkill": interrupted(),
        "sigstop": interrupted(classified="wedged", detect_s=2.1),
        "truncated_gguf": refused,
        "port_taken": refused,
    } | drills


LIMITS = {"kill_detect_s": 1.0, "hang_detect_s": 1.0, "recover_s": 5.0}


@pytest.mark.parametrize(
    ("kind", "changes", "failed"),
    [
        ("sigkill", {"classified": "lost stream"}, "faults.sigkill"),
        ("sigkill", {"detect_s": 1.1}, "faults.sigkill_detect_s"),
        ("sigkill", {"recover_s": 6.6}, "faults.sigkill_recover_s"),
        ("sigstop", {"classified": "dead"}, "faults.sigstop"),
        ("sigstop", {"classified": "wedged", "detect_s": 3.1}, "faults.sigstop_detect_s"),
    ],
)
def test_a_fault_misnamed_noticed_late_or_mended_late_fails(kind: str, changes: dict[str, Any], failed: str) -> None:
    """A hang may take its silence longer to notice than a death; a recovery may take the load time longer."""
    right = {"sigkill": "dead", "sigstop": "wedged"}[kind]
    results = judge_faults(evidence_with(**{kind: interrupted(classified=right) | changes}), **LIMITS)
    assert [result.check for result in results if result.verdict is Verdict.FAIL] == [failed]


def test_times_within_the_silence_and_the_load_pass() -> None:
    """At the limit itself as well."""
    drills = {
        "sigkill": interrupted(detect_s=1.0, recover_s=6.5),
        "sigstop": interrupted(classified="wedged", detect_s=3.0),
    }
    assert gate(judge_faults(evidence_with(**drills), **LIMITS)) is Verdict.PASS


@pytest.mark.parametrize("kind", ["truncated_gguf", "port_taken"])
def test_another_error_than_a_refusal_fails(kind: str) -> None:
    """A cut model that makes it hang was not refused."""
    seen = {"classified": "EngineStalled", "evidence": "no progress"}
    results = {result.check: result.verdict for result in judge_faults(evidence_with(**{kind: seen}), **LIMITS)}
    assert results[f"faults.{kind}"] is Verdict.FAIL


@pytest.mark.parametrize("kind", KINDS)
def test_every_failed_drill_is_an_error(kind: str) -> None:
    """And it alone: the others are judged as they went."""
    results = judge_faults(evidence_with(**{kind: {"failed": "it did not start"}}), **LIMITS)
    assert [result.check for result in results if result.verdict is Verdict.ERROR] == [f"faults.{kind}"]
    assert gate(results) is Verdict.ERROR
