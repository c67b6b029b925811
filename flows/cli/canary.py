from typing import Annotated

import typer

from flows.cli.may_move import require_evidence
from flows.cli.options import Json, Model, To, Yes
from flows.cli.order import order


def canary(
    model: Model = None,
    weight: Annotated[float, typer.Option(min=0, max=0.99, help="Share of conversations; 0 removes it.")] = 0.1,
    to: To = None,
    yes: Yes = False,
    json_: Json = False,
) -> None:
    """Send a share of a model's conversations to another engine; each conversation stays on one engine.

    Example: `switchyard canary --weight 0.25`

    Asks like `promote` where the evidence is not PASS. Exit code 3: nothing was moved.
    """
    if weight:
        require_evidence(model, to, yes=yes, json_=json_)
    order("canary", json_, model=model, to=to, weight=weight)
