"""Runs flows that end in every way under one Prefect server, and prints what it shows of them as JSON."""

import json
import os
from pathlib import Path

from flows.orchestrator.server import with_prefect

with_prefect(Path(os.environ["SWITCHYARD_HOME"]), "flows.deployments:report")

import httpx  # noqa: E402
from prefect import flow  # noqa: E402

from flows import deployments  # noqa: E402
from flows.experiment_lock import Busy  # noqa: E402
from flows.orchestrator.ending import VERSION, by_command  # noqa: E402
from flows.orchestrator.step import take  # noqa: E402
from tasks.records.store import open_records  # noqa: E402

CHECKS = [
    {"check": "a.fine", "verdict": "PASS", "value": 0.5, "limit": 1.0, "unit": "ms", "why": "w", "required": True},
    {"check": "b.bad", "verdict": "FAIL", "value": 11400.0, "limit": 10.0, "unit": "ms", "why": "w", "required": True},
    {"check": "c.seen", "verdict": "FAIL", "value": 1.0, "limit": None, "unit": "", "why": "w", "required": False},
]
OUTCOME = {
    "run_id": "",
    "verdict": "FAIL",
    "models": [{"model": "m", "verdict": "FAIL", "checks": CHECKS, "risks": []}],
}


def interrupted() -> None:
    """As a signal does it, deep in a step."""
    raise KeyboardInterrupt


@flow(version=VERSION, persist_result=False)
def ended(how: str) -> dict:
    """Ends as it is told."""
    if how == "busy":
        raise Busy("a migration (pid 1) is under way already")
    if how == "ctrl-c":
        take("m", "answers", interrupted)
    if how == "broken":
        raise ValueError("no more memory")
    return {"verdict": how, "why": f"it is {how}"}


def by_hand(how: str) -> str:
    """What a command sees."""
    try:
        return str(by_command(ended)(how)["verdict"])
    except BaseException as error:
        return type(error).__name__


commands = {how: by_hand(how) for how in ("PASS", "FAIL", "INCONCLUSIVE", "busy", "ctrl-c", "broken")}

os.environ["PREFECT__RUNTIME__DEPLOYMENT__ID"] = "00000000-0000-0000-0000-000000000000"
with open_records() as records:
    run = records.start_run("evaluate", "p", {"name": "p"})
outcome = {**OUTCOME, "run_id": run.id, "report": str(Path(os.environ["SWITCHYARD_HOME"]) / "r.html")}
deployments.rejudge = lambda *_: outcome
deployments.report(return_state=True)


def refuse(*_: object) -> None:
    """Another one has the home."""
    raise Busy("an evaluation (pid 2) is under way already")


deployments._loaded, deployments.migrated = lambda _: (None, None), refuse
deployments.migrate(return_state=True)
deployments.rollback(return_state=True)

api = os.environ["PREFECT_API_URL"]
runs = httpx.post(f"{api}/flow_runs/filter", json={"sort": "START_TIME_ASC"}, trust_env=False).json()
artifacts = httpx.post(f"{api}/artifacts/filter", json={}, trust_env=False).json()
print(
    json.dumps(
        {
            "commands": commands,
            "states": [
                (
                    one["parameters"].get("how") or one["name"],
                    one["state_type"],
                    one["state_name"],
                    one["state"]["message"],
                )
                for one in runs
            ],
            "versions": sorted({one["flow_version"] for one in runs}),
            "artifacts": {one["key"]: one["data"] for one in artifacts},
        }
    )
)
