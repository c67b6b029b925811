"""One step of a flow, as Prefect and the terminal show it."""

from __future__ import annotations

from collections.abc import Callable

from prefect import task
from prefect.cache_policies import NO_CACHE

from flows.progress import progress


@task(task_run_name="{subject} · {step}", cache_policy=NO_CACHE, persist_result=False)
def take(subject: str, step: str, work: Callable[[], None]) -> None:
    """One step of a model or an engine; `work` finds out by itself whether it is done already."""
    with progress.get().step(f"{subject} · {step}"):
        work()
