"""The Prefect run that this process carries out."""

from __future__ import annotations


def flow_run_id() -> str | None:
    """Its id; None outside of a flow."""
    from prefect.runtime import flow_run  # Prefect reads its settings at its import: not before they are set

    found: str | None = flow_run.id
    return found
