"""Phase 3 as a table of contents: from the candidate as a subprocess to the candidate without a server between.

    conformance     an evaluation of both forms, each behind a yard of its own: behaviours, answers, speed, memory, soak
    precondition    that evaluation opened the model's gate, and the subprocess serves the model now
    rehearsal       the fallback to the subprocess: native missing, killed, out of restarts
    drills          a hang in mid-answer; the model loaded and unloaded again and again
    canary, promote as in phase 2

The native engine lives in a worker process of the yard: what breaks in native code, its memory included, ends with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prefect import flow

from engines.errors import SwitchyardError
from engines.home import home
from engines.process.process import end_orphans
from flows.evaluate import evaluate
from flows.evaluation.estimate import drills_s, takes
from flows.orchestrator.ending import VERSION
from flows.progress import progress
from flows.rollout.model_move import ModelMove, MovePhase
from flows.rollout.orders import Orders
from flows.rollout.phase_one import engines_here, phase_one
from flows.rollout.yards import Yards
from flows.subprocess_phase import carried_out
from migrations.native import native_plan
from migrations.plan import Plan
from migrations.plan_file import load_plan
from tasks.evidence.load_cycles import judge_hang, judge_load_cycles, measure_hang, measure_load_cycles
from tasks.records.store import open_records
from tasks.verdicts.verdict import CheckResult


def _refusal(move: ModelMove) -> str | None:
    """Why the model cannot move yet: its incumbent, the candidate as a subprocess, does not serve it."""
    migration = move.migration
    committed = move.route()["committed"] if move.client.runs() else "no yard runs, so nobody"
    if committed in (migration.incumbent, migration.candidate):
        return None
    return f"{committed} serves {move.id}, not {migration.incumbent}"


def _drills(move: ModelMove) -> None:
    def measure() -> dict[str, Any]:
        form, why = move.room()
        if not form:
            return {name: {"not_measured": why} for name in ("hang", "cycles")}
        progress.get().note(f"{move.id}: hang and load cycles: {takes(drills_s(move.migration.plan, move.model))}")
        stage, cycles = move.stage(), move.migration.plan.measure.load_cycles
        return {
            "hang": _or_why(lambda: measure_hang(stage, move.say)),
            "cycles": _or_why(lambda: measure_load_cycles(stage, cycles=cycles, say=move.say)),
        }

    def judge(evidence: Mapping[str, Any]) -> list[CheckResult]:
        return [judge_hang(evidence["hang"]), *judge_load_cycles(evidence["cycles"])]

    move.drill("drills", "candidate", measure, judge)


def _or_why(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, or why it could not be: a drill that breaks is evidence as well."""
    try:
        return measure()
    except SwitchyardError as error:
        return {"failed": str(error).splitlines()[0]}


NATIVE = MovePhase(
    name="native",
    kind="migrate-native",
    evaluation="the conformance",
    advice="look at `switchyard report`, and migrate again to measure anew",
    refusal=_refusal,
    drills=_drills,
)


@flow(name="migrate-native", flow_run_name="migrate {plan_path.stem} · native", version=VERSION, persist_result=False)
def native_phase(plan_path: Path, orders: Orders | None = None) -> dict[str, Any]:
    """Phase 3 by itself, of the plan at this path."""
    return to_native(load_plan(plan_path), plan_path, orders or Orders())


def to_native(plan: Plan, plan_path: Path, orders: Orders) -> dict[str, Any]:
    """Put the candidate's native form behind the public port, for every model of the plan or those `orders` names."""
    folder, derived = home(), native_plan(plan, orders.models)
    end_orphans(folder)
    found = engines_here(derived)
    builds = {one.engine: one.build for one in found}
    with open_records() as records:
        known = {model.id: phase_one(records, derived, model, found[0].version, builds) for model in derived.models}
        unfinished = records.unfinished(derived.model_dump(mode="json"), kind="evaluate")
    # both forms are evaluated against each other, unless the records have a verdict on just this
    if not all(found.open or model_id in orders.override for model_id, found in known.items()):
        command = ("switchyard", "migrate", str(plan_path), "--phase", "native")
        evaluate.fn(derived, unfinished.id if unfinished else None, command=command)
    return carried_out(NATIVE, derived, Yards(plan, folder, plan_path), orders)
