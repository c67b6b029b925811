from typing import Annotated

import typer

from flows.cli.options import Json, Model, To
from flows.cli.order import order


def canary(
    model: Model = None,
    weight: Annotated[float, typer.Option(min=0, max=0.99, help="Share of conversations; 0 removes it.")] = 0.1,
    to: To = None,
    json_: Json = False,
) -> None:
    """Send a share of a model's conversations to another engine; each conversation stays on one engine.

    Example: `switchyard canary --weight 0.25`
    """
    order("canary", json_, model=model, to=to, weight=weight)
