"""Long series put into the records, and listed, in one call."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import text

from tasks.records.series import Point
from tasks.records.store import Records
from tasks.records.tables import Arm


def append_samples(
    records: Records, run_id: str, model_id: str, arm: Arm, series: str, points: Sequence[Point]
) -> None:
    """Store `points` (epoch seconds, value or None) behind those of the series that are there."""
    with records.series_writer(run_id, model_id, arm) as writer:
        for t, value in points:
            writer.append(series, t, value)


def list_series(records: Records, run_id: str) -> list[tuple[str, str, str, int]]:
    """What series a run has: (model, arm, series, points)."""
    keys = "model_id, arm, series"
    query = text(f"SELECT {keys}, SUM(n) FROM sample WHERE run_id = :run GROUP BY {keys} ORDER BY {keys}")
    with records.engine.connect() as connection:
        return [(model, arm, series, int(n)) for model, arm, series, n in connection.execute(query, {"run": run_id})]
