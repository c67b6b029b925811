"""The Prefect run that this process carries out, and the recorded run that goes with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from tasks.evidence.environment import machine_environment
from tasks.records.journal import RunJournal, journal
from tasks.records.store import Records


def run_journal(
    records: Records, kind: str, plan: Mapping[str, Any], *, command: Sequence[str] = (), **how: Any
) -> AbstractContextManager[RunJournal]:
    """The journal of a run of `plan`, with this machine and this flow run; `how` as `journal` takes it.

    It resumes the unfinished run of that plan, unless `how` names another or None. `command` is what repeats the run.
    """
    from prefect.runtime import flow_run  # Prefect reads its settings at its import: not before they are set

    if "unfinished" not in how:
        how["unfinished"] = records.unfinished(plan, kind=kind)

    def environment() -> dict[str, Any]:
        return {**machine_environment(), **({"command": list(command)} if command else {})}

    return journal(records, kind, plan, environment=environment, flow_run_id=flow_run.id, **how)
