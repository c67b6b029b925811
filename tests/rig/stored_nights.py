"""Evaluations of many nights put into the records, as `switchyard evaluate` leaves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import update

from tasks.evidence.nights import NIGHT
from tasks.records.store import Records
from tasks.records.tables import Run

ARMS = ("incumbent", "candidate")


def store_nights(
    records: Records,
    plan: Mapping[str, Any],
    values: Mapping[str, Sequence[Mapping[str, float]]],
    *,
    versions: Mapping[str, Sequence[str]] | None = None,
    environment: Mapping[str, Any] | None = None,
    until: datetime | None = None,
) -> list[str]:
    """The ids of evaluations of `plan`, a night each, the last one a day before `until` (default: now).

    `values` are the figures of model "m", night by night, by arm; `versions` those of its engines, which an
    `environment` replaces.
    """
    n_nights = max(map(len, values.values()))
    ids = []
    for night in range(n_nights):
        run = records.start_run("evaluate", plan["name"], plan)
        engines = [
            {"arm": arm, "engine": plan[arm]["engine"], "version": versions[arm][night] if versions else "1"}
            for arm in ARMS
        ]
        seen = environment or {"plan_hash": "p", "engines": engines}
        figures = {arm: dict(values[arm][night]) for arm in values}
        records.put_evidence(run.id, "m", "both", NIGHT, figures, environment=seen)
        records.finish_run(run.id)
        began = (until or datetime.now(UTC)) - timedelta(days=n_nights - night)
        with records.write() as session:
            session.execute(update(Run).filter_by(id=run.id).values(started_at=began))
        ids.append(run.id)
    return ids
