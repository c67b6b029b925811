"""The whole demo of one plan, with a client on the port: everything that a migration may go through, and back.

evaluate and move    as `switchyard migrate` does: gate, rehearsal, canary, promotion
soak                 one window through the yard's port
roll back            each model that moved
retire               on request: moved again, and the incumbent retired and restored
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow

from engines.home import home
from engines.yard.client import YardClient
from flows.deprecate import deprecate, restore
from flows.migrate import migrated
from flows.orchestrator.ending import VERSION
from flows.progress import progress
from flows.rollback import Wish, roll_back
from flows.rollout.orders import Orders
from flows.soak import soak_window
from flows.subprocess_phase import to_subprocess
from migrations.plan_file import load_plan
from tasks.records.store import open_records

WHO, WHY = "demo", "to show the way"


@flow(name="demo", flow_run_name="demo {path.stem}", version=VERSION, persist_result=False)
def whole_way(path: Path, window_s: float, retire: bool = False) -> dict[str, Any]:
    """The outcome of the migration, with what was shown after it: one line a step under "shown"."""
    plan, shown, say = load_plan(path), [], progress.get().say
    outcome = migrated(plan, path, Orders())
    moved = [end["model"] for end in outcome["models"] if "subprocess" in end["phases_done"]]
    if moved:
        with progress.get().step("a window of the soak"), open_records() as records:
            soaked = soak_window(plan, home(), records, window_s=window_s, say=say, in_flow=True)
        shown.append(f"soak through the port, {window_s:.0f} s: {soaked['verdict']}, {soaked['result']}")
    for model in moved:
        with progress.get().step(f"{model} · rollback"):
            shown.append(f"rolled back: {roll_back(home(), model, Wish(WHO, WHY), say)['done']}")
    if moved and retire:
        at_once = Orders(models=tuple(moved), without_canary=True, without_rehearsal=True, who=WHO, reason=WHY)
        to_subprocess(plan, path, at_once)
        retired = deprecate(plan, who=WHO, reason=WHY, at_once=True)
        shown.append(f"{retired['engine']}: {retired['result']}: {retired['why']}")
        if retired["result"] == "retired":
            shown.append(restore(retired["engine"], home(), say))
        for model in moved:  # where a demo begins
            YardClient(home()).order("promote", say, model=model, to=plan.incumbent.name, form="auto")
    return {**outcome, "shown": shown}
