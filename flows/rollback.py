"""Back to the last good route: one order to the yard, proven by a real token. Needs no database and no Prefect.

`switchyard rollback`, the button in the Prefect UI and an automation all come through here. The yard keeps the way
back in its own file; what is recorded besides is for people, and never in the way.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.deadline import Background
from engines.errors import BadInput, SwitchyardError
from engines.home import host
from engines.yard.client import YardClient, public_address
from migrations.plan import Plan
from migrations.plan_file import load_plan, plan_path
from tasks.evidence.environment import machine_environment
from tasks.evidence.rehearsal import one_token, route_of
from tasks.records.store import DATABASE, LOCKED_S, Records, open_records
from tasks.records.tables import Run
from tasks.verdicts.verdict import Verdict

KIND = "rollback"
MOVES = ("migrate", "migrate-native")
WAIT_S = 120.0
LOOK_BACK = 50
RECORD_S = 6.0  # for the records as a whole, whatever hangs
Say = Callable[[str], None]


@dataclass(frozen=True)
class Wish:
    """Who wants it and why; `only_from` leaves a model alone that another engine serves by now (a stale click)."""

    who: str = ""
    reason: str = ""
    only_from: str = ""
    form: str = "auto"
    flow_run_id: str | None = None


def roll_back(home: Path, model: str | None, wish: Wish, say: Say = lambda _: None) -> dict[str, Any]:
    """One model back, and a real token as proof; plain JSON. Raises BadInput where there is nothing to go back to."""
    yard = YardClient(home)
    if not model:
        known = [str(route["id"]) for route in yard.status()["models"]]
        if len(known) != 1:
            raise BadInput(f"name the model: {', '.join(known)}")
        model = known[0]
    before = route_of(yard, model)
    name = str(before["id"])
    if wish.only_from and before["committed"] != wish.only_from:
        why = f"{before['committed']} serves {name}, not {wish.only_from}: nothing was rolled back"
        return {"model": name, "result": "nothing to do", "verdict": Verdict.PASS.value, "done": why}
    plan = key = None
    with contextlib.suppress(SwitchyardError):  # only for the name in the records, and for the clients' key
        plan = load_plan(plan_path(None, home))
        key = plan.api_key(os.environ)
    with _recorded(plan, name, wish, say) as note:
        done = yard.order("rollback", say, model=name, form=wish.form)
        token = one_token(public_address(yard.status()["address"]), name, key, wait_s=WAIT_S)
        after = route_of(yard, name)
        proof = f"one real token in {token['took_s']:.2f} s" if token["answered"] else f"no token: {token['error']}"
        verdict = Verdict.PASS if token["answered"] else Verdict.ERROR
        note |= {
            "model": name,
            "result": "rolled back" if token["answered"] else "rolled back, not proven",
            "verdict": verdict.value,
            "done": f"{done}; {proof}",
            "from": before["committed"],
            "serving": after["serving"],
            "token": token,
        }
    return note


def movable(home: Path) -> list[str]:
    """The models that have a way back: a canary, or an engine before the last move."""
    return [str(route["id"]) for route in YardClient(home).status()["models"] if route["canary"] or route["undo"]]


# --- the records, which may be gone


@contextlib.contextmanager
def _recorded(plan: Plan | None, model: str, wish: Wish, say: Say) -> Iterator[dict[str, Any]]:
    """The intent, then done or failed, and the migration marked, as far as the database can be written.

    The intent is recorded beside the block, not before it: a database that hangs or is locked delays nothing. What
    could not be recorded is reported, in one line.
    """
    note: dict[str, Any] = {}
    begun = Background(DATABASE, lambda: _begun(plan, model, wish))
    try:
        yield note
    except BadInput:  # a refusal is no run
        _record(begun, lambda records, run: records.drop_empty_run(run.id))
        raise
    except BaseException as error:
        why = str(error) or type(error).__name__
        if problem := _record(begun, lambda records, run: _failed(records, run, model, wish, why)):
            say(f"not recorded that the rollback failed: {problem}")
        raise
    if problem := _record(begun, lambda records, run: _concluded(records, run, model, wish, note)):
        say(f"rolled back, but not recorded: {problem}")


def _record(begun: Background[tuple[Records, Run]], conclude: Callable[[Records, Run], object]) -> str | None:
    """Conclude what was begun; why that could not be done, None when it could."""
    try:
        records, run = begun.result(RECORD_S)
        with records:
            Background(DATABASE, lambda: conclude(records, run)).result(RECORD_S)
    except Exception as error:  # nothing about the records may break a rollback
        return str(error) or type(error).__name__
    return None


def _begun(plan: Plan | None, model: str, wish: Wish) -> tuple[Records, Run]:
    records = open_records(wait_s=LOCKED_S)
    try:
        run = records.start_run(
            KIND,
            plan.name if plan else "-",
            plan.model_dump(mode="json") if plan else {},
            environment=machine_environment(),
            flow_run_id=wish.flow_run_id,
        )
        records.put_step(run.id, model, KIND, "intent", {"only_from": wish.only_from, "who": wish.who})
    except BaseException:
        records.close()
        raise
    return records, run


def _decided(records: Records, run: Run, model: str, wish: Wish) -> None:
    if wish.who:
        records.put_decision(run.id, model, KIND, who=wish.who, why=wish.reason or "no reason was given")


def _failed(records: Records, run: Run, model: str, wish: Wish, why: str) -> None:
    _decided(records, run, model, wish)
    records.put_step(run.id, model, KIND, "failed", {"why": why})
    records.finish_run(run.id, "failed", error=why)


def _concluded(records: Records, run: Run, model: str, wish: Wish, note: dict[str, Any]) -> None:
    _decided(records, run, model, wish)
    records.put_step(run.id, model, KIND, "done", note)
    records.finish_run(run.id, "done", verdict=Verdict(note["verdict"]))
    by = f" by {wish.who}" if wish.who else ""
    why = f"{model} was rolled back{by}{f': {wish.reason}' if wish.reason else ''} (run {run.id})"
    for moved in records.history(LOOK_BACK, host=host()):
        steps = {step.step: step.state for step in records.steps(moved.id, model)} if moved.kind in MOVES else {}
        if steps.get("promote") == "done" and "rolled back" not in steps:
            records.put_step(moved.id, model, "rolled back", "done", {"by_run": run.id, "why": why})
            records.note_run(moved.id, error=why)
            return
