"""Plain words: the environment of runs and evidence, what an engine does not support, the renamed keys of plans."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

KEYS = {"sampling": "measure", "accepted_losses": "accepted_unsupported"}
KEYS_OF_TABLES = {"measure": {"max_void_blocks": "max_discarded_blocks"}, "limits": {"top1_lower": "top1_lower_bound"}}


def upgrade() -> None:
    """Two columns and some JSON keys renamed. No value changes, nor does any plan's hash."""
    for table in ("run", "evidence"):
        op.execute(sa.text(f"ALTER TABLE {table} RENAME COLUMN circumstances TO environment"))
    _rewrite("run", "plan_json", _plan)
    _rewrite("evidence", "environment", _environment)


def _rewrite(table: str, column: str, change: Callable[[Any], Any]) -> None:
    connection = op.get_bind()
    rows = connection.execute(sa.text(f"SELECT id, {column} FROM {table}")).all()
    for row_id, stored in rows:
        if (text := json.dumps(change(json.loads(stored)), separators=(",", ":"))) != stored:
            update = sa.text(f"UPDATE {table} SET {column} = :text WHERE id = :id")
            connection.execute(update, {"text": text, "id": row_id})


def _plan(plan: Any) -> Any:
    if not isinstance(plan, dict):
        return plan
    plan = _renamed(plan, KEYS)
    return plan | {
        table: _renamed(plan[table], keys)
        for table, keys in KEYS_OF_TABLES.items()
        if isinstance(plan.get(table), dict)
    }


def _environment(environment: Any) -> Any:
    if not isinstance(environment, dict) or "engines" not in environment:
        return environment
    engines = [_renamed(engine, {"losses": "unsupported"}) for engine in environment["engines"]]
    return environment | {"engines": engines}


def _renamed(part: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    return {keys.get(key, key): value for key, value in part.items()}
