"""Phase 4: who still needs the incumbent, when it may go, and that it comes back; with a yard and without one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_gguf

from engines.driver import Installation
from engines.errors import BadInput
from engines.settings import Settings
from engines.yard.engine.launch_spec import LaunchSpec
from engines.yard.state import ModelState, StateFile, YardState
from flows.deprecate import Deprecation, restore
from flows.evaluation.run import refuse_retired
from migrations.plan import Plan
from migrations.plan_file import build_plan
from tasks.records.store import Records, open_records
from tasks.verdicts.retirement import Standing, judge_retirement
from tasks.verdicts.verdict import Verdict

OLD, NEW = "llama.cpp", "mistral.rs"
DAY = 86_400.0
DECIDED = {"who": "Ada", "reason": "all is well"}
STEPS = ["precondition", "archive", "retire", "guide"]


def launch_spec(engine: str, gguf: Path) -> LaunchSpec:
    found = Installation(engine, "binary", (f"/opt/{engine}",), "1", where=f"/opt/{engine}")
    return LaunchSpec.of(found, "m", gguf, Settings(context_tokens=512))


class Box:
    """A home whose yard served the model on the candidate `moved_days` ago, and does not run now."""

    def __init__(self, home: Path, **state: Any) -> None:
        self.home, self.gguf = home, write_gguf(home / "m.gguf")
        (home / "yard").mkdir()
        self.file = StateFile(home / "yard")
        self.put(**state)

    def put(self, *, serving: str = NEW, moved_days: float | None = 30.0, undo: str | None = OLD) -> None:
        specs = {engine: launch_spec(engine, self.gguf) for engine in (OLD, NEW)}
        moved = None if moved_days is None else time.time() - moved_days * DAY
        self.file.save(YardState(models={"m": ModelState(serving=serving, undo=undo, specs=specs, moved_at=moved)}))

    def plan(self, **parts: Any) -> Plan:
        engines = {"incumbent": {"engine": OLD}, "candidate": {"engine": NEW}}
        return build_plan({"models": [{"id": "m", "gguf": str(self.gguf)}], **engines, **parts})

    def retire(self, records: Records, plan: Plan | None = None, **how: Any) -> dict[str, Any]:
        return Deprecation(plan or self.plan(), self.home, records, **how).run()

    @property
    def state(self) -> YardState:
        return self.file.load()[0]


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


@pytest.fixture
def records(tmp_path: Path) -> Any:
    with open_records(tmp_path / "switchyard.db") as opened:
        yield opened


def test_approved_and_past_its_window_it_is_archived_and_retired(box: Box, records: Records) -> None:
    outcome = box.retire(records, **DECIDED)
    assert (outcome["result"], outcome["verdict"]) == ("retired", "PASS"), outcome
    assert box.state.retired[OLD].who == "Ada"
    assert OLD not in box.state.models["m"].specs
    assert box.state.models["m"].undo is None
    archive = Path(outcome["archive"])
    assert set(json.loads((archive / "recipes.json").read_text())) == {"m"}
    assert "/opt/llama.cpp" in (archive / "README.md").read_text()
    assert [step.step for step in records.steps(outcome["run_id"])] == STEPS
    assert {step.state for step in records.steps(outcome["run_id"])} == {"done"}
    guide = (box.home / "guides" / "migration" / "guide.md").read_text()
    assert "llama.cpp" in guide
    assert "switchyard restore llama.cpp" in guide
    assert "Ada" in guide
    again = box.retire(records, **DECIDED)
    assert (again["result"], again["run_id"]) == ("already retired", None)


@pytest.mark.parametrize("last", ["archive", "retire", "guide"])
def test_ended_behind_any_step_it_resumes_the_same_run(box: Box, records: Records, last: str) -> None:
    """Retired already, what is missing of the rest is done; and nothing is asked or judged again."""

    def ended(step: str, work: Callable[[], None]) -> None:
        work()
        if step == last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        box.retire(records, do=ended, **DECIDED)
    retired = box.state.retired.get(OLD)
    outcome = box.retire(records)
    assert (outcome["result"], outcome["verdict"]) == ("retired", "PASS"), outcome
    assert retired in (None, box.state.retired[OLD])
    (run,) = records.history()
    assert (run.id, run.status, run.verdict) == (outcome["run_id"], "done", "PASS")
    assert {step.step: step.state for step in records.steps(run.id)} == dict.fromkeys(STEPS, "done")
    assert records.checks(run.id)["-"]
    assert (box.home / "guides" / "migration" / "guide.md").exists()
    assert box.retire(records)["result"] == "already retired"


def test_without_a_person_it_waits(box: Box, records: Records) -> None:
    outcome = box.retire(records)
    assert (outcome["result"], outcome["verdict"]) == ("waits for approval", "INCONCLUSIVE")
    assert box.state.retired == {}
    assert (outcome["run_id"], records.history()) == (None, []), "a question is no run"
    assert box.retire(records, **DECIDED)["result"] == "retired"


def test_a_plan_that_does_not_ask_needs_nobody(box: Box, records: Records) -> None:
    assert box.retire(records, box.plan(retire={"approve": "auto"}))["result"] == "retired"


@pytest.mark.parametrize(
    ("state", "verdict", "why"),
    [
        ({"serving": OLD, "undo": None}, "FAIL", "m: it is served by llama.cpp"),
        ({"moved_days": 2}, "INCONCLUSIVE", "m may want back until"),
        ({"moved_days": None}, "INCONCLUSIVE", "nobody knows since when"),
    ],
)
def test_who_still_needs_it_is_named(box: Box, records: Records, state: dict[str, Any], verdict: str, why: str) -> None:
    box.put(**state)
    outcome = box.retire(records, **DECIDED)
    assert (outcome["result"], outcome["verdict"]) == ("not retired", verdict)
    assert why in outcome["why"]
    assert box.state.retired == {}
    assert not (box.home / "archive").exists()
    assert (outcome["run_id"], records.history()) == (None, []), "a refusal is no run"


def test_the_window_can_be_waived_by_name_only(box: Box, records: Records) -> None:
    box.put(moved_days=0.1)
    with pytest.raises(BadInput, match="--who"):
        box.retire(records, at_once=True)
    outcome = box.retire(records, at_once=True, **DECIDED)
    assert outcome["result"] == "retired"
    assert any("not waited for: Ada" in check["why"] for check in outcome["checks"])


def test_a_model_that_was_never_migrated_keeps_it(box: Box, records: Records) -> None:
    box.file.save(YardState())
    assert "never migrated" in box.retire(records, **DECIDED)["why"]


def test_restored_without_a_yard_it_is_the_way_back_again(box: Box, records: Records) -> None:
    box.retire(records, **DECIDED)
    assert "is back" in restore(OLD, box.home, lambda _: None)
    assert box.state.retired == {}
    assert box.state.models["m"].undo == OLD
    assert OLD in box.state.models["m"].specs
    with pytest.raises(BadInput, match="not retired"):
        restore(OLD, box.home, lambda _: None)


def test_an_evaluation_does_not_start_it_unasked(box: Box, records: Records) -> None:
    refuse_retired(box.plan(), box.home)
    box.retire(records, **DECIDED)
    with pytest.raises(BadInput, match="--allow-retired"):
        refuse_retired(box.plan(), box.home)


def test_a_fallback_in_force_keeps_it() -> None:
    route = ModelState(serving=NEW, moved_at=0.0)
    (result,) = judge_retirement(OLD, [Standing("m", route, OLD)], window_s=1, now=10 * DAY)
    assert result.verdict is Verdict.FAIL
    assert "out of order" in result.why
