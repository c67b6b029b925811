from flows.cli.options import Json, Model
from flows.cli.order import order


def load(model: Model = None, json_: Json = False) -> None:
    """Load a model now, unloading others if the memory budget requires it; a request would do the same."""
    order("load", json_, model=model)
