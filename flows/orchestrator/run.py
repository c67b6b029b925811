"""The Prefect run that this process carries out, if any. Prefect reads its settings at its import: only in here."""

from __future__ import annotations

import contextlib
from uuid import UUID

import httpx


def flow_run_id() -> str | None:
    """Its id; None outside of a flow."""
    from prefect.runtime import flow_run

    found: str | None = flow_run.id
    return found


def tag_run(*tags: str) -> None:
    """Add tags to it, for the lists and filters of the UI; outside of a flow nothing. A label is worth no failure."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectException
    from prefect.runtime import flow_run

    if flow_run.id is None:
        return
    with contextlib.suppress(httpx.HTTPError, PrefectException), get_client(sync_client=True) as client:
        client.update_flow_run(UUID(flow_run.id), tags=sorted({*flow_run.tags, *tags}))
