from typing import Annotated

import typer

from engines.home import home
from flows.cli.options import Json, Model, Placement, Reason
from flows.cli.output import finish, out, print_step
from flows.rollback import Wish, roll_back


def rollback(
    model: Model = None,
    who: Annotated[str, typer.Option(help="Who wants it; recorded.")] = "",
    reason: Reason = "",
    form: Placement = "auto",
    json_: Json = False,
) -> None:
    """Move a model back to its last good route, proven by a real token; a canary is removed first.

    Example: `switchyard rollback MODEL --who Ada --reason "slow answers"`

    Needs neither Prefect nor the database: the yard itself keeps the way back.
    """
    outcome = roll_back(home(), model, Wish(who=who, reason=reason, form=form), print_step)
    finish(outcome, json_, lambda rolled_back: out.print(rolled_back["done"], markup=False))
