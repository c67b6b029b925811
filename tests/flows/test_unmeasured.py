"""A check that cannot be carried out is its model's verdict; the other models are measured all the same."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from played import plan_of
from switchyard_command import json_of

pytestmark = pytest.mark.usefixtures("prefect")
EXIT_CODES = {"PASS": 0, "FAIL": 3, "INCONCLUSIVE": 4, "ERROR": 5}
KEY = "a-key-that-has-no-telling-shape"


def by_model(outcome: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Checks by name, by model."""
    return {m["model"]: {check["check"]: check for check in m["checks"]} for m in outcome["models"]}


def verdicts(checks: dict[str, dict[str, Any]]) -> set[tuple[str, str]]:
    return {(name, check["verdict"]) for name, check in checks.items()}


def measured(home: Path, *, of: str = "") -> set[tuple[str, str]]:
    """(model, kind of evidence) of all runs, or of the latest."""
    only = " and run_id = (select max(id) from run)" if of == "latest" else ""
    with sqlite3.connect(f"file:{home / 'switchyard.db'}?mode=ro", uri=True) as db:
        return set(db.execute(f"select model_id, kind from evidence where kind != 'unmeasured'{only}").fetchall())


def recorded(home: Path) -> dict[tuple[str, ...], str]:
    """When each piece of evidence was recorded."""
    with sqlite3.connect(f"file:{home / 'switchyard.db'}?mode=ro", uri=True) as db:
        rows = db.execute(
            "select model_id, arm, kind, key, recorded_at from evidence where kind != 'unmeasured' and model_id != '-'"
        )
        return {row[:4]: row[4] for row in rows}


UNKNOWN, ASSERTION = "does not know this model", "assertion failed in the played attention kernel"
BREAKS = {  # by model: the check that it decides, its verdict, and words of its reason
    "candidate-refuses": ("launch.candidate", "FAIL", UNKNOWN),
    "both-refuse": ("launch.candidate", "FAIL", UNKNOWN),
    "incumbent-refuses": ("launch.incumbent", "ERROR", UNKNOWN),
    "candidate-dies": ("parity.first_tokens.candidate", "FAIL", ASSERTION),
    "incumbent-dies": ("parity.first_tokens.incumbent", "ERROR", ASSERTION),
    "candidate-odd-logprobs": ("parity.first_answers.candidate", "ERROR", ""),
    "cut": ("preflight.loads", "FAIL", "truncated"),
}


def test_models_that_break_leave_the_others_measured(switchyard, tmp_path, home):
    """Each with a verdict of its own, in the engine's own words, in the JSON, in the report and in the records."""
    plan = plan_of(tmp_path, *BREAKS, "last")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(cut.read_bytes()[:-2000])
    done = switchyard("evaluate", plan, "--json", timeout_s=600)
    outcome = json_of(done)
    found, models = by_model(outcome), {model["model"]: model["verdict"] for model in outcome["models"]}
    page = Path(outcome["report"]).read_text(encoding="utf-8").replace("<wbr>", "")
    for breaks, (check, verdict, words) in BREAKS.items():
        assert found[breaks][check]["verdict"] == verdict, (breaks, found[breaks])
        assert models[breaks] == verdict, breaks
        assert words in found[breaks][check]["why"]
        assert check in page
        assert "refuse" not in breaks or ("stability.failures", "INCONCLUSIVE") in verdicts(found[breaks])
    assert ("last", "faults") in measured(home)
    assert not any(name.startswith("launch.") for name in found["last"])
    assert done.returncode == EXIT_CODES[outcome["verdict"]] == 3
    assert "Traceback" not in done.stderr

    again = json_of(switchyard("report", outcome["run_id"], "--json"))
    assert again["models"] == outcome["models"], "the verdicts are not a function of the records"


def test_a_key_in_an_engines_last_words_is_not_stored(switchyard, environment, tmp_path, home):
    environment["PLAYED_KEY"] = KEY
    plan = plan_of(tmp_path, "both-refuse", "last", head='api_key_env = "PLAYED_KEY"')
    outcome = json_of(switchyard("evaluate", plan, "--json"))
    why = by_model(outcome)["both-refuse"]["launch.incumbent"]["why"]
    assert "the key is [redacted]" in why
    assert KEY not in json.dumps(outcome) + Path(outcome["report"]).read_text(encoding="utf-8")


def test_a_resumed_run_tries_again_what_broke_and_nothing_else(switchyard, tmp_path, home):
    """An engine that was fixed meanwhile is measured; a candidate that FAILed stays so."""
    plan = plan_of(tmp_path, "incumbent-refuses", "candidate-refuses", "last")
    first = json_of(switchyard("evaluate", plan, "--json"))
    before = recorded(home)
    again = switchyard("evaluate", "--resume", "latest", "--json")
    assert json_of(again)["run_id"] == first["run_id"]
    assert verdicts(by_model(json_of(again))["incumbent-refuses"]) == verdicts(by_model(first)["incumbent-refuses"])

    (tmp_path / "incumbent-refuses.gguf.fixed").touch()
    fixed = json_of(switchyard("evaluate", "--resume", "latest", "--json"))
    assert "launch.incumbent" not in by_model(fixed)["incumbent-refuses"]
    assert ("incumbent-refuses", "faults") in measured(home)
    assert by_model(fixed)["candidate-refuses"] == by_model(first)["candidate-refuses"]
    after = recorded(home)
    assert {key: after[key] for key in before} == before
    assert "is done" in switchyard("evaluate", "--resume", "latest").stderr


def test_records_that_cannot_be_written_end_the_run(switchyard, tmp_path, home):
    """Nothing that is measured could be kept: the models behind it are not tried."""
    plan = plan_of(tmp_path, "candidate-refuses", "last")
    assert switchyard("evaluate", plan, "--json").returncode == 3
    with sqlite3.connect(home / "switchyard.db") as db:
        db.execute(
            "create trigger no_more before insert on evidence when new.kind = 'unmeasured' "
            "begin select raise(abort, 'database or disk is full'); end"
        )
    done = switchyard("evaluate", plan, "--json")
    assert done.returncode == 5
    assert "disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert ("last", "parity.tokens") not in measured(home, of="latest")


def test_a_migration_resumes_the_evaluation_of_a_model_that_broke(switchyard, tmp_path, home):
    """And does not take it for the last word on that model."""
    plan = plan_of(tmp_path, "incumbent-refuses")
    first = json_of(switchyard("evaluate", plan, "--json"))
    (tmp_path / "incumbent-refuses.gguf.fixed").touch()
    switchyard("migrate", plan, "--json")
    runs = [run for run in json_of(switchyard("history", "--json"))["runs"] if run["kind"] == "evaluate"]
    assert [run["run_id"] for run in runs] == [first["run_id"]]
    assert ("incumbent-refuses", "faults") in measured(home)
