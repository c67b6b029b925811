"""`switchyard history`."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.cli.options import Json
from flows.cli.output import next_command, out, prepared_home, print_json, run_table
from flows.evaluation.rejudge import past


def history(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many runs.")] = 20,
    json_: Json = False,
) -> None:
    """List the runs so far, newest first."""
    prepared_home()
    runs = past(limit)
    if json_:
        print_json({"runs": runs})
    elif not runs:
        out.print("no run yet; " + next_command("switchyard evaluate demo"))
    else:
        out.print(run_table(runs), soft_wrap=False)
        evaluations = [run["run_id"] for run in runs if run["kind"] == "evaluate"]
        out.print(next_command(f"switchyard report {evaluations[0]}" if evaluations else "switchyard status"))
