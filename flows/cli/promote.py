from flows.cli.may_move import require_evidence
from flows.cli.options import Json, Model, Placement, To, Yes
from flows.cli.order import order


def promote(
    model: Model = None,
    to: To = None,
    form: Placement = "auto",
    yes: Yes = False,
    json_: Json = False,
) -> None:
    """Move a model to another engine without failing a request; the way back is saved first.

    Example: `switchyard promote MODEL --yes`

    Prints what the evidence says of that model. Where that is not PASS it asks; without a terminal it needs --yes.
    Exit code 3: nothing was moved.
    """
    require_evidence(model, to, yes=yes, json_=json_)
    order("promote", json_, model=model, to=to, form=form)
