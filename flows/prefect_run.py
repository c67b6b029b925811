"""The Prefect run that this process carries out, if any."""

from __future__ import annotations


def flow_run_id() -> str | None:
    """Its id; None outside of a flow. Prefect is imported only here: it reads its settings at its import."""
    from prefect.runtime import flow_run

    found: str | None = flow_run.id
    return found
