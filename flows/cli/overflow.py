from typing import Annotated

import typer

from flows.cli.options import Json, Model
from flows.cli.order import order


def overflow(
    model: Model = None,
    off: Annotated[bool, typer.Option("--off", help="No more conversations for it; it finishes what it has.")] = False,
    json_: Json = False,
) -> None:
    """Let the plan's second engine take new conversations while too many requests wait; `--off` ends it."""
    order("overflow", json_, model=model, on=not off)
