"""Phase 2 as a table of contents: from phase 1's gate to all traffic on the candidate, one reversible step at a time.

    precondition    phase 1 opened the model's gate, or a person decided otherwise, by name and with a reason
    yard            one serves; else one is started, and it stays
    rehearsal       the fallback, on a yard of its own: candidate missing, killed, out of restarts
    canary          growing shares of live conversations, each judged; what fails goes back
    promote         all of it, and a last real token

`flows.rollout.steps` has the steps; each is recorded before and after, and done once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import flow

from engines.errors import SwitchyardError
from engines.home import home
from engines.process.process import end_orphans
from engines.yard.client import YardClient
from flows.orchestrator.artifacts import check_rows, put_table
from flows.orchestrator.ending import VERSION
from flows.orchestrator.step import take
from flows.progress import progress
from flows.rollout.model_move import MovePhase
from flows.rollout.orders import Orders
from flows.rollout.steps import SUBPROCESS, migrate
from flows.rollout.yard_config import canary_limits
from flows.rollout.yards import Yards, stage
from migrations.plan import Plan
from migrations.plan_file import load_plan
from tasks.evidence.canary import judge_canary
from tasks.evidence.next_turn import measure_next_turn
from tasks.evidence.rehearsal import engine_of, room, route_of
from tasks.records.store import open_records


@flow(
    name="migrate-subprocess",
    flow_run_name="migrate {plan_path.stem} · subprocess",
    version=VERSION,
    persist_result=False,
)
def subprocess_phase(plan_path: Path, orders: Orders | None = None) -> dict[str, Any]:
    """Phase 2 by itself, of the plan at this path."""
    return to_subprocess(load_plan(plan_path), plan_path, orders or Orders())


def to_subprocess(
    plan: Plan, plan_path: Path, orders: Orders, next_turns: Mapping[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Put the candidate behind the public port, for every model of the plan or those that `orders` names."""
    folder = home()
    end_orphans(folder)
    return carried_out(SUBPROCESS, plan, Yards(plan, folder, plan_path), orders, next_turns)


def next_turn(plan: Plan, plan_path: Path, model_id: str) -> dict[str, Any]:
    """What the move of a model costs the next turn of a conversation, on a yard of its own beside what serves."""
    yards, say = Yards(plan, home(), plan_path), progress.get().say
    incumbent, candidate = plan.incumbent.name, plan.candidate.name
    try:
        specs, held = yards.model(model_id).specs, [None, None]
        with contextlib.suppress(SwitchyardError):  # no yard runs
            route = route_of(YardClient(yards.home), model_id)
            held = [engine_of(route, route["serving"])[name] for name in ("memory_bytes", "vram_bytes")]
        if {incumbent, candidate} - set(specs):
            return {"failed": "; ".join(yards.model(model_id).missing.values())}
        form, why = room(specs, *held)
        if not form:
            return {"failed": f"what the move costs the next turn of a conversation is not measured: {why}"}
        with stage(yards, model_id, None, incumbent=incumbent, candidate=candidate, say=say) as opened:
            return measure_next_turn(opened, form=form, say=say)
    except SwitchyardError as error:
        return {"failed": str(error).splitlines()[0]}


def carried_out(
    phase: MovePhase,
    plan: Plan,
    yards: Yards,
    orders: Orders,
    next_turns: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """A migration under the records and a Prefect run: its outcome, published as an artifact."""
    judge = functools.partial(judge_canary, limits=canary_limits(plan))
    with open_records() as records:
        say = progress.get().say
        outcome = migrate(phase, plan, yards, records, judge, orders=orders, say=say, do=take, next_turns=next_turns)
    if rows := check_rows(outcome["models"]):
        put_table("switchyard-migrate", rows, outcome)
    return outcome
