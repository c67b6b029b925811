from typing import Annotated

import typer

from flows.cli.options import Json, Model
from flows.cli.order import order


def use(
    engine: Annotated[str, typer.Argument(help="auto, or an engine's name.")],
    model: Model = None,
    json_: Json = False,
) -> None:
    """Choose a model's engine by hand; `auto` leaves the choice to promote and rollback."""
    order("use", json_, model=model, engine=engine)
