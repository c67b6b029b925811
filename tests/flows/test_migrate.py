"""All four phases of a plan: what is done, what is asked, what is left alone; the phases themselves are played."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gguf_files import write_gguf

from engines.driver import Installation
from engines.errors import BadInput, EngineError
from engines.model.digest import model_digest
from engines.yard.state import ModelState, StateFile
from flows.experiment_lock import SOAK, Busy, alone
from flows.migrate import KIND, Phases, migrate_all
from flows.rollout import steps
from flows.rollout.approval import Approval, Question
from flows.rollout.orders import Orders
from migrations.plan import Plan, content_hash
from migrations.plan_file import build_plan
from tasks.records.store import Records, open_records
from tasks.verdicts.verdict import CheckResult, Verdict

OLD, NEW, NATIVE = "llama.cpp", "mistral.rs", "mistral.rs-native"
GO = Approval(True, "Ada", "it looks fine")


class Box:
    """A home without a yard: each played phase writes down who serves, as a yard would. Every phase is in `done`."""

    def __init__(self, home: Path, records: Records, **verdicts: Verdict) -> None:
        self.home, self.records = home, records
        self.verdicts = verdicts or {"good": Verdict.PASS, "bad": Verdict.FAIL}
        self.done: list[str] = []
        self.asked: list[Question] = []
        self.next_turn: dict[str, Any] = {"failed": "it was not answered"}
        self.next_turns: list[Any] = []  # as the phases were given it
        self.breaks: str | None = None
        self.breaks_behind: str | None = None  # once the model has moved
        self.refuses: set[str] = set()
        self.refusal = "FAIL"
        (home / "yard").mkdir(exist_ok=True)
        self.file = StateFile(home / "yard")
        models = [{"id": name, "gguf": str(write_gguf(home / f"{name}.gguf"))} for name in self.verdicts]
        self.parts: dict[str, Any] = {
            "models": models,
            "incumbent": {"engine": OLD},
            "candidate": {"engine": NEW},
            "migrate": {"approve": "auto"},
        }

    @property
    def plan(self) -> Plan:
        return build_plan(self.parts)

    def run(self, *answers: Approval | None, **orders: Any) -> dict[str, Any]:
        left = list(answers)

        def ask(question: Question) -> Approval | None:
            self.asked.append(question)
            return left.pop(0) if left else None

        phases = Phases(
            self._evaluate,
            self._move(NEW),
            self._move(NATIVE),
            self._deprecate,
            lambda _: [Installation(NEW, "binary", ("x",), "1")],
            self._next_turn,
        )
        given = Orders.model_validate(orders)
        path = self.home / "p.toml"
        return migrate_all(self.plan, path, self.home, self.records, orders=given, ask=ask, phases=phases)

    def _next_turn(self, _: Plan, __: Path, model: str) -> dict[str, Any]:
        self._note(f"next turn of {model}")
        return self.next_turn

    def serving(self, model: str) -> str:
        found = self.file.read().models.get(model)
        return found.serving if found else OLD

    def _note(self, what: str) -> None:
        self.done.append(what)
        if self.breaks == what:
            raise KeyboardInterrupt

    def _evaluate(self, plan: Plan, _resume: str | None, _path: Path) -> dict[str, Any]:
        self._note("evaluate")
        run = self.records.start_run("evaluate", plan.name, plan.model_dump(mode="json"))
        for model in plan.models:
            under = {
                "plan_hash": content_hash(plan),
                "model_digest": model_digest(model.gguf),
                "engines": [{"arm": "candidate", "version": "1"}],
            }
            self.records.put_evidence(run.id, model.id, "both", "performance", {}, environment=under)
            result = CheckResult(check="parity.x", verdict=self.verdicts[model.id], why="seen")
            self.records.put_checks(run.id, model.id, [result])
        self.records.finish_run(run.id, "done")
        return {}

    def _move(self, to: str) -> Any:
        def move(_: Plan, __: Path, orders: Orders, next_turns: Any = None) -> dict[str, Any]:
            self.next_turns.append(next_turns)
            (model,) = orders.models
            override = f" over {orders.who}" if orders.override else ""
            self._note(f"{model} to {to}{override}")
            refused = to in self.refuses
            if not refused:
                state = self.file.read()
                self.file.save(state.with_model(model, ModelState(serving=to, undo=self.serving(model))))
            if self.breaks_behind == self.done[-1]:
                raise KeyboardInterrupt
            verdict, result = (self.refusal, "not moved") if refused else ("PASS", "promoted")
            end = {"model": model, "verdict": verdict, "result": result, "why": "as played"}
            return {"run_id": "r", "verdict": verdict, "models": [end]}

        return move

    def _deprecate(self, plan: Plan, who: str, _why: str) -> dict[str, Any]:
        self._note(f"deprecate by {who or 'nobody'}")
        stays = [model.id for model in plan.models if self.serving(model.id) == OLD]
        base = {"engine": OLD, "run_id": None, "checks": []}
        if stays:
            return {**base, "result": "not retired", "verdict": "FAIL", "why": f"{stays} need it"}
        if not who:
            return {**base, "result": "waits for approval", "verdict": "INCONCLUSIVE", "why": "nobody approved"}
        return {**base, "result": "retired", "verdict": "PASS", "why": "gone"}


@pytest.fixture
def records(tmp_path: Path) -> Any:
    with open_records(tmp_path / "switchyard.db") as opened:
        yield opened


@pytest.fixture
def box(tmp_path: Path, records: Records) -> Box:
    return Box(tmp_path, records)


def results(outcome: dict[str, Any]) -> dict[str, str]:
    return {model["model"]: model["result"] for model in outcome["models"]}


def test_one_model_goes_all_the_way_while_the_other_stays(box: Box) -> None:
    """And the incumbent stays because of it."""
    outcome = box.run()
    assert box.done == ["evaluate", f"good to {NEW}", f"good to {NATIVE}", "deprecate by nobody"]
    assert (box.serving("good"), box.serving("bad")) == (NATIVE, OLD)
    good, bad = outcome["models"]
    assert (good["result"], good["phases_done"]) == ("migrated", ["evaluate", "subprocess", "native"])
    assert (bad["result"], bad["verdict"]) == ("stays", "FAIL")
    assert "parity.x: seen" in bad["why"]
    assert (outcome["verdict"], outcome["retirement"]["result"]) == ("FAIL", "not retired")


def test_how_long_it_takes_stands_before_it_begins(box: Box, notes: list[str]) -> None:
    """The next start has less to do, and one that has nothing to do says nothing."""
    box.refuses = {NATIVE}
    box.run()
    assert notes[0] == "migration: takes about 12 days; soak 12 days; canary up to 1 day more"
    box.refuses.clear()
    box.run()
    assert notes[1].endswith("; soak 3 days; canary up to 6 h more"), "bad stays, and good is on the candidate already"
    box.run()
    assert len(notes) == 2


def test_what_broke_off_is_resumed_and_nothing_is_retired_before(box: Box, records: Records) -> None:
    """The yard died in phase 3, say: one run, one question for each phase."""
    box.parts["migrate"] = {"approve": "ask"}
    box.refuses, box.refusal = {NATIVE}, "ERROR"
    outcome = box.run(GO, GO)
    assert results(outcome)["good"] == "native: not moved"
    assert (outcome["verdict"], outcome["retirement"]["verdict"]) == ("FAIL", "INCONCLUSIVE")
    assert "good: as played" in outcome["retirement"]["why"]
    assert not any(done.startswith("deprecate") for done in box.done)
    box.refuses.clear()
    again = box.run()
    assert (again["run_id"], results(again)["good"]) == (outcome["run_id"], "migrated")
    assert [(question.model, question.phase) for question in box.asked] == [("good", "subprocess"), ("good", "native")]
    assert records.find_run(outcome["run_id"]).status == "done"


def test_the_question_shows_what_the_move_costs_a_conversation(box: Box) -> None:
    """Measured once, beside what serves, for a question that someone reads."""
    box.parts["migrate"] = {"approve": "ask"}
    for _ in range(2):
        box.run()
        assert box.asked[-1].costs() == ["it was not answered"]
    assert box.done.count("next turn of good") == 1
    box.run(GO, GO)
    assert [question.costs() for question in box.asked[2:]] == [["it was not answered"], []]


def test_what_a_question_showed_is_not_measured_again(box: Box) -> None:
    """The rehearsal takes it from there; what failed it tries itself."""
    box.parts["migrate"] = {"approve": "ask"}
    turn = {"ttft_ms": 9.0, "prompt_tokens": 3, "cached_tokens": 0, "by": OLD}
    box.next_turn = {"before": turn, "moved": {**turn, "by": NEW}}
    box.run()
    box.asked[-1].costs()
    box.run(GO, GO)
    assert box.next_turns == [{"good": box.next_turn}, None]
    shared: Any = SimpleNamespace(next_turns=box.next_turns[0])
    known: Any = SimpleNamespace(id="good", migration=shared)
    no_stage: Any = None
    assert steps._next_turn(known, no_stage, "auto") == box.next_turn


@pytest.mark.parametrize("to", [NEW, NATIVE])
def test_ended_behind_a_move_its_phase_is_concluded(box: Box, records: Records, to: str) -> None:
    """The model stands where it should, but the phase's own run is open: it knows what is left to do."""
    box.breaks_behind = f"good to {to}"
    with pytest.raises(KeyboardInterrupt):
        box.run()
    assert box.serving("good") == to
    box.breaks_behind = None
    box.done.clear()
    outcome = box.run()
    later = [f"good to {NATIVE}"] if to == NEW else []
    assert box.done == [f"good to {to}", *later, "deprecate by nobody"]
    assert results(outcome)["good"] == "migrated"
    assert {step.step: step.state for step in records.steps(outcome["run_id"])} == {
        "subprocess": "done",
        "native": "done",
    }


def test_a_second_run_changes_nothing_and_writes_nothing(tmp_path: Path, records: Records) -> None:
    box = Box(tmp_path, records, good=Verdict.PASS)
    box.run(GO)
    runs = len(records.history(100))
    box.done.clear()
    box.asked.clear()
    outcome = box.run(GO)
    assert box.done == ["deprecate by nobody", "deprecate by Ada"]  # the one that is asked: it knows that it is done
    assert (outcome["verdict"], results(outcome)) == ("PASS", {"good": "migrated"})
    assert len(records.history(100)) == runs + 1


def test_a_plan_that_asks_waits_where_nobody_answers(box: Box) -> None:
    box.parts["migrate"] = {"approve": "ask"}
    outcome = box.run()
    assert results(outcome) == {"good": "waits for approval", "bad": "stays"}
    assert "--yes --who NAME" in outcome["models"][0]["why"]
    assert box.serving("good") == OLD
    (question,) = box.asked
    assert (question.phase, question.model, question.verdict) == ("subprocess", "good", Verdict.PASS)
    assert "- **PASS** parity: 1 of 1 required check" in question.markdown()


def test_a_question_alone_is_no_run(box: Box) -> None:
    """Evaluated before, nobody answers: there is nothing to record, however often it is asked."""
    box.parts["migrate"] = {"approve": "ask"}
    box._evaluate(box.plan, None, box.home)
    box.done.clear()
    assert results(box.run())["good"] == results(box.run())["good"] == "waits for approval"
    assert (box.done.count("evaluate"), box.records.history(10, kind=KIND)) == (0, [])


def test_an_answer_is_asked_for_once(box: Box) -> None:
    """The run that was broken off after it is resumed; nothing is measured twice."""
    box.parts["migrate"] = {"approve": "ask"}
    box.breaks = f"good to {NEW}"
    with pytest.raises(KeyboardInterrupt):
        box.run(GO)
    (first,) = box.records.history(10, kind=KIND)
    assert first.status == "interrupted"
    box.breaks = None
    outcome = box.run(GO)
    assert [question.phase for question in box.asked] == ["subprocess", "native"]
    assert box.done.count("evaluate") == 1
    assert outcome["run_id"] == first.id
    assert {made["kind"]: made["who"] for made in outcome["decisions"]} == {"subprocess": "Ada", "native": "Ada"}


def test_no_is_an_answer(box: Box) -> None:
    """It is recorded, and another run asks again."""
    box.parts["migrate"] = {"approve": "ask"}
    outcome = box.run(Approval(False, "Ada", "not on a Friday"))
    assert results(outcome)["good"] == "stays"
    assert "Ada said no: not on a Friday" in outcome["models"][0]["why"]
    assert [made["kind"] for made in outcome["decisions"]] == ["subprocess, no"]
    box.run(GO, GO)
    assert box.serving("good") == NATIVE


def test_inconclusive_always_asks_and_yes_is_an_override(tmp_path: Path, records: Records) -> None:
    box = Box(tmp_path, records, unsure=Verdict.INCONCLUSIVE)
    assert results(box.run()) == {"unsure": "waits for approval"}
    box.run(GO)
    assert f"unsure to {NEW} over Ada" in box.done
    assert box.serving("unsure") == NATIVE


def test_fail_is_overridden_by_name_only(box: Box) -> None:
    """It is never asked for, and a name without a reason is refused."""
    with pytest.raises(BadInput, match="--who and --reason"):
        box.run(override=("bad",), who="Ada")
    outcome = box.run(override=("bad",), who="Ada", reason="I know it")
    assert f"bad to {NEW} over Ada" in box.done
    assert {"model": "bad", "kind": "subprocess", "who": "Ada", "why": "I know it"}.items() <= next(
        made for made in outcome["decisions"] if made["model"] == "bad"
    ).items()
    assert [question.phase for question in box.asked] == ["deprecate"]


def test_a_phase_that_fails_leaves_the_model_where_it_was(box: Box) -> None:
    box.refuses = {NATIVE}
    outcome = box.run()
    good = outcome["models"][0]
    assert (good["result"], good["serving"]) == ("native: not moved", NEW)
    assert good["phases_done"] == ["evaluate", "subprocess"]


def test_phases_that_the_plan_leaves_out_are_left_out(box: Box) -> None:
    box.parts["migrate"] = {"approve": "auto", "phases": ["subprocess"]}
    outcome = box.run()
    assert box.done == ["evaluate", f"good to {NEW}"]
    assert outcome["retirement"] is None


def test_retirement_is_asked_for_last(tmp_path: Path, records: Records) -> None:
    box = Box(tmp_path, records, good=Verdict.PASS)
    outcome = box.run(GO)
    assert [question.what for question in box.asked] == [f"Retire {OLD}"]
    assert (outcome["retirement"]["result"], outcome["verdict"]) == ("retired", "PASS")


def test_an_error_is_recorded_and_the_next_run_resumes_it(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise EngineError("no more memory")

    monkeypatch.setattr(box, "_evaluate", broken)
    with pytest.raises(EngineError):
        box.run()
    (run,) = box.records.history(1, kind=KIND)
    assert (run.status, run.error) == ("failed", "no more memory")
    monkeypatch.undo()
    assert box.run()["run_id"] == run.id


@contextlib.contextmanager
def held(home: Path, what: str, *, for_s: float = 3600.0) -> Iterator[None]:
    """Another process has the home for `what`; it lets go after a while, or when it is killed."""
    code = (
        "import sys, time; from pathlib import Path; from flows.experiment_lock import alone\n"
        "with alone(Path(sys.argv[1]), sys.argv[2]): print('held', flush=True); time.sleep(float(sys.argv[3]))"
    )
    argv = [sys.executable, "-c", code, str(home), what, str(for_s)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            yield
        finally:
            holder.kill()


def test_two_at_once_are_refused(box: Box) -> None:
    """The kernel lets go of the lock with the process that has it."""
    with held(box.home, "an evaluation"), pytest.raises(Busy, match=r"an evaluation \(pid \d+\) is under way already"):
        box.run()
    box.run()


def test_the_end_of_a_soaks_window_is_waited_for(box: Box) -> None:
    """But no window waits for another."""
    with held(box.home, SOAK), pytest.raises(Busy), alone(box.home, SOAK):
        pass
    with held(box.home, SOAK, for_s=0.5):
        assert box.run()["run_id"]
