from flows.cli.options import Json, Model, Placement, To
from flows.cli.order import order


def promote(model: Model = None, to: To = None, form: Placement = "auto", json_: Json = False) -> None:
    """Move a model to another engine without failing a request; the way back is saved first."""
    order("promote", json_, model=model, to=to, form=form)
