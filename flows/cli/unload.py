from flows.cli.options import Json, Model
from flows.cli.order import order


def unload(model: Model = None, json_: Json = False) -> None:
    """Stop a model's engine once its requests are done; the next request loads it again."""
    order("unload", json_, model=model)
