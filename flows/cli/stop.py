from flows.cli.options import Json
from flows.cli.order import order


def stop(json_: Json = False) -> None:
    """Stop the yard after finishing the requests in flight."""
    order("stop", json_)
