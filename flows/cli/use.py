from typing import Annotated

import typer

from flows.cli.may_move import require_evidence
from flows.cli.options import Json, Model, Yes
from flows.cli.order import order


def use(
    engine: Annotated[str, typer.Argument(help="auto, or an engine's name.")],
    model: Model = None,
    yes: Yes = False,
    json_: Json = False,
) -> None:
    """Choose a model's engine by hand; `auto` leaves the choice to promote and rollback.

    Example: `switchyard use mistral.rs --yes`

    Asks like `promote` where the evidence is not PASS. Exit code 3: nothing was moved.
    """
    if engine != "auto":
        require_evidence(model, engine, yes=yes, json_=json_)
    order("use", json_, model=model, engine=engine)
