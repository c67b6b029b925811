"""The process that registers the deployments with Prefect and runs their flows on this host; started by `up`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.runner import Runner
from prefect.states import Crashed

from flows.deployments import deployments
from flows.schedules import time_zone

CONCURRENT = 4  # an experiment, and beside it a rollback, a report and the upkeep
SERVED = "deployments are served"


async def serve(plan: Path, *, schedules: bool) -> None:
    """Serve until SIGTERM, which ends running flows cleanly; schedules stay as they are for the next time."""
    runner = Runner(name="switchyard", limit=CONCURRENT, pause_on_shutdown=False, query_seconds=5)
    made = await deployments(plan, time_zone=time_zone(), schedules=schedules)
    ids = [await runner.aadd_deployment(one) for one in made]
    await _mark_orphans(ids)
    print(SERVED, flush=True)
    await runner.start()


async def _mark_orphans(deployment_ids: list[UUID]) -> None:
    """What the runner before us was running died with it; Prefect did not see that, and would count it for ever."""
    begun = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
    async with get_client() as client:
        runs = await client.read_flow_runs(
            deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=deployment_ids)),
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=begun))),
        )
        for run in runs:
            await client.set_flow_run_state(run.id, Crashed(message="its process is gone"), force=True)


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), schedules=sys.argv[2] == "--schedules"))
