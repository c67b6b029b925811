"""The journal of a run: what is stored of it, however it ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.errors import BadInput
from tasks.records.journal import journal
from tasks.records.store import Records, open_records
from tasks.verdicts.verdict import Verdict, not_measured

PLAN = {"name": "nightly", "limits": {"ttft_p50_ratio": 1.1}}


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    with open_records(tmp_path / "switchyard.db") as opened:
        yield opened


def break_off(records: Records, kind: str, problem: BaseException, **how: Any) -> None:
    """A run that takes a step, has an end already, and then raises."""
    with journal(records, kind, PLAN, **how) as run:
        run.put_step("tiny", "promote", "intent")
        run.finish("done", verdict=Verdict.PASS)
        raise problem


def test_a_run_that_recorded_nothing_is_not_stored(records: Records) -> None:
    """Reading writes nothing either."""
    with journal(records, "migrate", PLAN) as run:
        assert (run.steps(), run.step("tiny", "promote"), run.checks("tiny"), run.decisions()) == ([], None, [], [])
        assert run.known_id is None
    with pytest.raises(BadInput), journal(records, "migrate", PLAN):
        raise BadInput("no")
    assert records.history() == []


def test_what_is_recorded_opens_the_run(records: Records) -> None:
    """The environment is asked for once, then."""
    with journal(records, "migrate", PLAN, environment=lambda: {"host": "box"}, flow_run_id="f-1") as run:
        run.put_step("tiny", "promote", "intent", to="mistral.rs")
        run.put_checks("tiny", [not_measured("soak", "no time")])
        run.put_decision("tiny", "promote", who="ada", why="it is better")
        assert records.find_run(run.id).status == "running"
        run.finish("interrupted", verdict=Verdict.INCONCLUSIVE, error="the next window follows")
    stored = records.find_run()
    assert (stored.kind, stored.name, stored.environment) == ("migrate", "nightly", {"host": "box"})
    assert (stored.status, stored.verdict, stored.error) == ("interrupted", "INCONCLUSIVE", "the next window follows")
    assert stored.flow_run_id == "f-1"
    assert [(step.step, step.state, step.detail) for step in run.steps("tiny")] == [
        ("promote", "intent", {"to": "mistral.rs"})
    ]
    assert [check.check for check in run.checks("tiny")] == ["soak"]
    assert [decision.who for decision in run.decisions("tiny")] == ["ada"]


def test_an_unfinished_run_is_resumed(records: Records) -> None:
    """What it recorded counts before anything is written again."""
    said: list[str] = []
    with pytest.raises(BadInput):
        break_off(records, "migrate", BadInput("no yard"))
    first = records.find_run()
    unfinished = records.unfinished(PLAN, kind="migrate")
    with journal(records, "migrate", PLAN, unfinished=unfinished, say=said.append) as second:
        assert second.step("tiny", "promote") is not None
        assert not said
        second.put_step("tiny", "promote", "done")
    assert said == [f"resuming run {first.id}"]
    assert [(run.id, run.status) for run in records.history()] == [(first.id, "done")]


@pytest.mark.parametrize(
    ("problem", "stored"),
    [
        (BadInput("no yard"), ("failed", "no yard")),
        (KeyboardInterrupt(), ("interrupted", "KeyboardInterrupt")),
        (ValueError("a defect"), ("interrupted", "ValueError")),
    ],
)
def test_an_exception_closes_the_run(records: Records, problem: BaseException, stored: tuple[str, str]) -> None:
    """Even one that had an end already: its report was not written."""
    with pytest.raises(type(problem)):
        break_off(records, "evaluate", problem)
    ended = records.find_run()
    assert (ended.status, ended.error) == stored


def test_a_flow_names_its_own_way_of_breaking_off(records: Records) -> None:
    """A window of a soak that fails is not the end of the soak; a migration that waits says so."""
    with pytest.raises(BadInput):
        break_off(records, "soak", BadInput("no yard"), on_error="interrupted")
    assert records.find_run().status == "interrupted"
    with pytest.raises(KeyboardInterrupt):
        break_off(records, "migrate", KeyboardInterrupt(), interrupted_by=lambda _: "waits for an answer")
    assert records.find_run(kind="migrate").error == "waits for an answer"


@pytest.mark.parametrize("acted", [False, True])
def test_a_refusal_is_no_run_unless_something_was_done(records: Records, acted: bool) -> None:
    """An intent that was refused did nothing; a decision, evidence or a step that is done stays."""

    def refused() -> None:
        with journal(records, "migrate", PLAN) as run:
            run.put_step("tiny", "promote", "intent")
            if acted:
                run.put_decision("tiny", "promote", who="ada", why="it is better")
            run.refused()
            raise BadInput("the port is taken")

    with pytest.raises(BadInput):
        refused()
    assert [(run.status, run.error) for run in records.history()] == [("failed", "the port is taken")] * acted
