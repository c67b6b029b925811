from typing import Annotated

import typer

from flows.cli.options import Json, Model, To
from flows.cli.order import order


def shadow(
    model: Model = None,
    share: Annotated[float, typer.Option(min=0, max=1, help="Share of chat requests; 0 ends the copying.")] = 0.1,
    to: To = None,
    json_: Json = False,
) -> None:
    """Copy a share of a model's chat requests to another engine while nobody waits, to compare answers."""
    order("shadow", json_, model=model, to=to, share=share)
