from pathlib import Path
from typing import Annotated

import typer

from engines.home import home
from flows.cli.options import Json, PlanFile
from flows.cli.output import print_lines
from flows.rollout.guide import write_guide
from migrations.plan_file import load_plan, plan_path
from tasks.records.store import open_records


def guide(
    plan: PlanFile = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of guide.md and guide.html.")] = None,
    json_: Json = False,
) -> None:
    """Write the migration guide from the records: what changed, what is unsupported, how to undo it.

    It also names who stays on the incumbent, and why.
    """
    folder = home()
    loaded = load_plan(plan_path(plan, folder))
    with open_records() as records:
        written = write_guide(records, loaded, folder, output)
    files = [str(path) for path in written]
    print_lines({"files": files}, files, json_)
