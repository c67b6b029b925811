from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import Json
from flows.cli.output import evaluation_table, out, prepared_home, print_json
from flows.evaluation.rejudge import rejudge


def report(
    run: Annotated[str, typer.Argument(help="A run's id, part of it, or `latest`.")] = "latest",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where the HTML goes.")] = None,
    json_: Json = False,
) -> None:
    """Write a run's HTML report again from its records, every verdict recomputed from the raw evidence."""
    outcome = rejudge(prepared_home(), run, output)
    if json_:
        print_json(outcome)
        return
    out.print(evaluation_table(outcome), soft_wrap=False)
    out.print(f"\nreport: {outcome['report']}")
