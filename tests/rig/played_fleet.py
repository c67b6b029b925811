"""Hosts of a fleet on which a migration is played: real runs on real workers, and a file in each home that directs it.

python tests/rig/played_fleet.py deploy HOST ...      puts the played flows in place of those in prefect.yaml
python tests/rig/played_fleet.py roll-out ARGUMENTS   the rollout, its arguments as JSON; prints the outcome
"""

import json
import sys
from typing import Any

from prefect import Flow, flow
from prefect.deployments.runner import EntrypointType
from waiting import until

from engines.home import home
from flows.fleet import fleet
from flows.migrate import publish
from flows.orchestrator.ending import concluding
from tasks.records.store import open_records
from tasks.verdicts.verdict import Verdict

PLAN = {"name": "the same on every host"}
HOLD_S = 120


@flow(name="migrate", persist_result=False)
@concluding
def migrate(who: str, reason: str, plan: str = "", approve: bool = False) -> Any:
    """A migration that ends as the file `verdict` says, once the file `hold` is gone; each adds a line to `done`."""
    assert approve
    with open_records() as records:
        left = records.unfinished(PLAN, kind="whole")
        run = records.resume_run(left.id) if left else records.start_run("whole", PLAN["name"], PLAN)
        until(lambda: not (home() / "hold").exists(), "the hold to end", HOLD_S)
        verdict = Verdict((home() / "verdict").read_text())
        moved = verdict is Verdict.PASS
        result, why = ("migrated", "it serves") if moved else ("stays", "its gate is shut")
        model = {"model": "m", "result": result, "serving": "-", "verdict": verdict.value, "why": why}
        outcome = {"run_id": run.id, "verdict": verdict.value, "models": [model], "retirement": None}
        # never "done": each host has to find its own, of the same plan, and no other
        records.finish_run(run.id, "interrupted", verdict=verdict)
    publish(outcome)
    _note(f"migrate for {who}: {reason}")
    return outcome


@flow(name="rollback", persist_result=False)
@concluding
def rollback(who: str, reason: str) -> Any:
    """A rollback that passes."""
    _note(f"rollback for {who}: {reason}")
    return {"verdict": "PASS", "why": "back"}


def _note(line: str) -> None:
    with (home() / "done").open("a") as file:
        print(line, file=file)


def deploy(name: str) -> None:
    # by its full name: here the module is called __main__
    import played_fleet

    played: tuple[Flow[..., Any], ...] = (played_fleet.migrate, played_fleet.rollback)
    for one in played:
        made: Any = one.to_deployment(
            f"{one.name}-{name}",
            work_pool_name="switchyard",
            work_queue_name=name,
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        made.apply()


def main() -> None:
    what, *rest = sys.argv[1:]
    if what == "deploy":
        for name in rest:
            deploy(name)
    else:
        print(json.dumps(fleet(**json.loads(rest[0]))))


if __name__ == "__main__":
    main()
