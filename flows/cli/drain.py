from typing import Annotated

import typer

from flows.cli.options import Json, Model
from flows.cli.order import order


def drain(
    model: Model = None,
    off: Annotated[bool, typer.Option("--off", help="Let requests through again.")] = False,
    json_: Json = False,
) -> None:
    """Hold a model's new requests and return when none is in flight; `--off` lets them through again."""
    order("drain", json_, model=model, on=not off)
