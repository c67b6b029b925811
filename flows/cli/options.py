"""Command-line options that several commands share."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from engines.redaction import redacted

EXIT_CODES = {"PASS": 0, "FAIL": 3, "INCONCLUSIVE": 4, "ERROR": 5}
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
To = Annotated[str | None, typer.Option(help="The engine; the plan's candidate where none is named.")]
PlanFile = Annotated[
    Path | None, typer.Argument(help="The plan (.toml); the one the yard served last, else ./switchyard.toml.")
]


def print_json(value: Any) -> None:
    """Print the result of a command on standard output as JSON, without secrets."""
    sys.stdout.write(json.dumps(redacted(value), indent=2, ensure_ascii=False) + "\n")
