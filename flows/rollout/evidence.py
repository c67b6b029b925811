"""What the records say of a model before a person moves it by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.deadline import Background
from engines.driver import native_of
from engines.errors import SwitchyardError
from engines.registry import native_driver
from engines.yard.client import YardClient
from flows.rollout.phase_one import PhaseOne, phase_one
from migrations.native import native_plan
from migrations.plan import Plan
from migrations.plan_file import load_plan, plan_path
from tasks.records.store import DATABASE, LOCKED_S, READ_S, open_records


@dataclass(frozen=True)
class Move:
    """A move by hand: what it is, the latest verdict on it, and fields that clients send and its target ignores."""

    what: str
    known: PhaseOne
    ignored: Mapping[str, int]


def evidence_of_move(home: Path, model: str | None, to: str | None) -> Move | None:
    """What is known of a move beforehand; None where it needs no evidence.

    That is the way back, a model that is there already, and an order that the yard will refuse by itself. Nothing about
    the records may break it: what cannot be read is no verdict. Raises SwitchyardError where no yard runs.
    """
    routes = {str(route["id"]): route for route in YardClient(home).status()["models"]}
    plan = problem = None
    try:
        plan = load_plan(plan_path(None, home))
    except SwitchyardError as error:
        problem = PhaseOne(f"the plan cannot be read: {error}")
    ids = {name: one.id for one in (plan.models if plan else ()) for name in (one.id, *one.aliases)}
    name = ids.get(model, model) if model else next(iter(routes)) if len(routes) == 1 else None
    if (route := routes.get(name or "")) is None:
        return None
    committed = route.get("committed", route.get("serving"))
    target = (plan.named(to) if to else plan.candidate.name) if plan else to or "the candidate"
    if target in (committed, route.get("undo"), plan and plan.incumbent.name):
        return None
    engines = {engine["engine"]: engine.get("ignored_fields", {}) for engine in route["engines"]}
    today = engines.get(committed, {})
    ignored = {field: n for field, n in engines.get(target, {}).items() if field not in today}
    known = _verdict(plan, route, target) if plan else problem or PhaseOne("")
    return Move(f"{name} from {committed} to {target}", known, ignored)


def _verdict(plan: Plan, route: Mapping[str, Any], target: str) -> PhaseOne:
    model = next((one for one in plan.models if one.id == route["id"]), None)
    version = next((str(e["version"]) for e in route["engines"] if e["engine"] == target), None)
    builds = {str(e["engine"]): str(e.get("build", "")) for e in route["engines"]}
    if model is None or version is None:
        return PhaseOne("it was never evaluated")
    plans: Sequence[Plan] = [plan] if target == plan.candidate.name else []
    if native_driver(plan.candidate.engine) and target == native_of(plan.candidate.name):
        plans = [native_plan(plan), native_plan(plan, [model.id])]

    def read() -> list[PhaseOne]:
        with open_records(wait_s=LOCKED_S) as records:
            return [phase_one(records, asked, model, version, builds) for asked in plans]

    try:
        found = Background(DATABASE, read).result(READ_S)
    except SwitchyardError as error:
        return PhaseOne(f"the records cannot be read: {error}")
    known = (one for one in found if one.verdict is not None)
    return next(known, found[0] if found else PhaseOne("it was never evaluated"))
