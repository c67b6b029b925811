"""Command-line options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
To = Annotated[str | None, typer.Option(help="The engine; the plan's candidate where none is named.")]
PlanFile = Annotated[
    Path | None, typer.Argument(help="The plan (.toml); the one the yard served last, else ./switchyard.toml.")
]
