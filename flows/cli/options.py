"""Command-line options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Model = Annotated[str | None, typer.Argument(help="The model; not needed when there is only one.")]
PlanFile = Annotated[
    Path | None, typer.Argument(help="The plan (.toml); the one the yard served last, else ./switchyard.toml.")
]
Placement = Annotated[
    str,
    typer.Option(help="auto, side-by-side (both engines at once) or one-at-a-time (when memory does not hold both)."),
]
Reason = Annotated[str, typer.Option(help="Why; recorded.")]
To = Annotated[str | None, typer.Option(help="The engine; the plan's candidate by default.")]
Yes = Annotated[bool, typer.Option("--yes", help="Move it although its evidence is not PASS.")]
