"""docs/engines.md is what its command makes of real runs: no cell without a run or a reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engines import HEAD, PAGE, RESULTS, add, tables, written
from tasks.evidence.behaviours.battery import DEFAULT_REQUIRED
from tasks.records.store import Records, open_records
from tasks.verdicts.verdict import CheckResult, Verdict, not_measured

ENGINES = {
    ("llama.cpp", "binary"),
    ("llama.cpp", "hosted"),
    ("mistral.rs", "binary"),
    ("mistral.rs", "hosted"),
    ("mistral.rs-native", "native"),
    ("ollama", "binary"),
    ("vllm", "binary"),
}
ELSEWHERE = ("LocalAI", "TabbyAPI", "LM Studio")
COLUMNS = {"started", "behaviours", "parity", "faults", "moved"}
OLD, NEW = ("llama.cpp", "old", "b1"), ("mistral.rs", "mistral.rs", "0.8.1")


def test_the_page_is_what_the_command_makes() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert written(page, json.loads(RESULTS.read_text(encoding="utf-8"))) == page


def test_every_engine_has_a_row_or_a_reason() -> None:
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert {(row["engine"], row["form"]) for row in kept["rows"]} >= ENGINES
    assert all(any(one["engine"].startswith(name) and one["why"] for one in kept["not_run"]) for name in ELSEWHERE)
    for row in kept["rows"]:
        assert {name.split()[0] for name in row["results"]} == COLUMNS, row["engine"]
        assert all(one["run"] and one.get("missing", "said") for one in row["results"].values())


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    """One evaluation, the migration that followed it, and its rollback."""
    with open_records(tmp_path / "switchyard.db") as records:
        plan = {arm: {"engine": kind, "name": name} for arm, (kind, name, _) in zip(ARMS, (OLD, NEW), strict=True)}
        machine = {"cpu": "a CPU", "cpu_cores": 2, "ram_bytes": 2**34, "gpus": []}
        run = records.start_run("evaluate", "p", plan, environment=machine)
        for arm, (_, name, version) in zip(ARMS, (OLD, NEW), strict=True):
            seen = {"engines": [{"arm": arm, "engine": name, "form": "binary", "version": version}]}
            tried = {one: {"outcome": "passed"} for one in DEFAULT_REQUIRED}
            if arm == "candidate":
                tried |= {"usage_in_stream": {"outcome": "failed"}}
            records.put_evidence(run.id, "m", arm, "compatibility", {"behaviours": tried}, environment=seen)
        block = {"index": 0, "void": None, **{arm: {"load_s": 0.5, "ttft_ms": [1.0]} for arm in ARMS}}
        records.put_evidence(run.id, "m", "both", "performance", block, key="0")
        records.put_checks(run.id, "m", CHECKS)
        records.finish_run(run.id, "done", verdict=Verdict.INCONCLUSIVE)
        moved = records.start_run("migrate", "p", plan)
        for step, detail in STEPS.items():
            records.put_step(moved.id, "m", step, "done", detail)
        yield records


ARMS: Any = ("incumbent", "candidate")
CHECKS = [
    CheckResult(check="parity.prompt_tokens", verdict=Verdict.PASS, value=1.0, unit="share", why="equal"),
    CheckResult(check="parity.top1_agreement", verdict=Verdict.INCONCLUSIVE, value=0.98, unit="share", why="few"),
    not_measured("faults.sigkill", "not measured: parity.top1_agreement failed first"),
]
STEPS = {
    "precondition": {"override": "somebody: to see"},
    "rehearsal": {"left_out": "somebody: to see"},
    "canary 0.5": {"verdict": "PASS"},
    "promote": {"serving": "mistral.rs", "undo": "old"},
    "rolled back": {"by_run": "r"},
}


def test_a_row_is_what_was_recorded(records: Records) -> None:
    kept: dict[str, Any] = {"rows": [], "not_run": []}
    add(kept, records)
    once = json.dumps(kept)
    add(kept, records)
    assert json.dumps(kept) == once, "adding it again changes nothing"
    kept["rows"][0]["build"] = "B1"
    lines = [line.strip("| ").split(" | ") for line in tables(kept).splitlines() if line.startswith("|")]
    assert lines[0] == list(HEAD)
    old, new = lines[2:4]
    of = len(DEFAULT_REQUIRED)
    assert old[:6] == ["llama.cpp", "B1: b1", "program", "yes", "0.5 s", f"{of} of {of}"]
    assert old[8] == "to mistral.rs 0.8.1, without rehearsal, its shut gate overridden by hand; rolled back"
    assert new[5] == f"{of - 1} of {of}; lacks usage_in_stream"
    assert new[6] == "INCONCLUSIVE with llama.cpp B1 (top1_agreement): same token 98.00%"
    assert (new[7], new[8][:17]) == ("not run here, because (3)", "from llama.cpp B1")
    assert "3. not measured: parity.top1_agreement failed first" in tables(kept)


def test_forms_stand_beside_each_other_where_two_were_compared_with_another_engine() -> None:
    """A native form is one of its engine's; a build that was compared with its own kind alone has no figures."""

    def row(engine: str, form: str, other: str) -> dict[str, Any]:
        parity = {"with": f"{other} b1", "verdict": "PASS", "by": [], "figures": {"parity.mean_kld": 0.0}, "run": "r"}
        behaviours = {"tried": 1, "passed": 1, "of": 1, "lacks": [], "not_passed": {}, "run": "r"}
        results = {f"parity  {other} b1": parity, "behaviours": behaviours}
        return {"engine": engine, "form": form, "version": "1", "build": "", "results": results}

    rows = [row("llama.cpp", "binary", "llama.cpp"), row("llama.cpp", "hosted", "llama.cpp")]
    rows += [row("mistral.rs", "hosted", "llama.cpp"), row("mistral.rs-native", "native", "llama.cpp")]
    page = tables({"rows": rows, "not_run": [], "machine": "m"})
    assert "### llama.cpp" not in page
    assert "### mistral.rs: its forms" in page
    assert "|  | wheel, hosted, 1 | wheel, native, 1 |" in page
    assert "| mistral.rs | 1 | wheel, native |" in page
