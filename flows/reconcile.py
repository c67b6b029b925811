"""Cleaning up after a crash: engines without an owner end, runs without a process are closed, and their open steps.

It asks the kernel for processes, the yard for traffic and the records for what was under way; what the same command
would resume is left to that. Safe at any time, and twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.states import Crashed

from engines.errors import SwitchyardError
from engines.home import host
from engines.process.process import end_orphans
from engines.yard.client import YardClient
from tasks.evidence.rehearsal import route_of
from tasks.records.store import Records
from tasks.records.tables import Run, Step

LOOK_BACK = 200
Say = Callable[[str], None]


def reconcile(home: Path, records: Records, say: Say = lambda _: None) -> list[str]:
    """What was found and fixed, one line each; nothing for a home where all is well."""
    lines = [f"ended, left behind by a killed run: {ended}" for ended in end_orphans(home)]
    for run in records.history(LOOK_BACK, host=host()):
        if run.shown_status == "killed":
            lines += _closed(run, records, YardClient(home), say)
    for line in lines:
        say(line)
    return lines


def _closed(run: Run, records: Records, yard: YardClient, say: Say) -> list[str]:
    """A run whose process is gone, marked so; its open steps closed where their effect is gone as well."""
    lines = []
    for step in records.steps(run.id):
        if step.state == "intent" and (why := _over(step, run, yard, say)):
            records.put_step(run.id, step.model_id, step.step, "failed", {**step.detail, "why": why})
            lines.append(f"run {run.id}: {step.model_id} · {step.step}: {why}")
    records.finish_run(run.id, "interrupted", error="process vanished (killed or out of memory)")
    lines.append(f"run {run.id} ({run.kind}) was killed; the same command resumes it")
    if run.flow_run_id:
        # Prefect shows a run whose process it did not see die as running for ever; best effort: our records count
        with contextlib.suppress(Exception), get_client(sync_client=True) as client:
            known = client.read_flow_run(UUID(run.flow_run_id)).state
            if known is not None and (known.is_running() or known.is_pending()):
                crashed: Any = Crashed(message="its process is gone")
                client.set_flow_run_state(UUID(run.flow_run_id), crashed, force=True)
    return lines


def _over(step: Step, run: Run, yard: YardClient, say: Say) -> str | None:
    """Why an open step is over; None when its effect lasts and the same command resumes there."""
    route: dict[str, Any] = {"committed": None, "canary": None}  # where no yard has the model
    with contextlib.suppress(SwitchyardError):
        route = route_of(yard, step.model_id)
    plan = run.plan if isinstance(run.plan, dict) else {}
    chosen = plan.get("candidate", {})
    candidate = chosen.get("name", chosen.get("engine"))
    has_moved = route["committed"] is not None and route["committed"] == candidate
    if step.step == "rollback":
        # traffic goes back at once; the row stays open for the command that concludes it
        if route["canary"] or has_moved:
            with contextlib.suppress(SwitchyardError):
                yard.order("rollback", say, model=step.model_id)
        return None
    if step.step == "promote":
        return None if has_moved else "its process ended before the model moved"
    if step.step.startswith("canary") and route["canary"]:
        return None  # the yard judges it, and takes it out by itself
    return "its process ended in it"
