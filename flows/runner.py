"""The process that registers the deployments with Prefect and runs their flows on this host; started by `up`."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from prefect.runner import Runner

from flows.deployments import deployments

CONCURRENT = 4  # an experiment, and beside it a rollback, a report and the upkeep
SERVED = "deployments are served"


async def serve(plan: Path, *, schedules: bool) -> None:
    """Serve until SIGTERM, which ends running flows cleanly; schedules stay as they are for the next time."""
    runner = Runner(name="switchyard", limit=CONCURRENT, pause_on_shutdown=False, query_seconds=5)
    for made in await deployments(plan, time_zone=_time_zone(), schedules=schedules):
        await runner.aadd_deployment(made)
    print(SERVED, flush=True)
    await runner.start()


def _time_zone() -> str:
    """This host's time zone by name; UTC where it has none."""
    named = os.environ.get("TZ", "").lstrip(":")
    where = os.path.realpath("/etc/localtime").partition("zoneinfo/")[2]
    return named or where or "UTC"


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), schedules=sys.argv[2] == "--schedules"))
