from flows.cli.options import Json
from flows.cli.order import order


def reload(json_: Json = False) -> None:
    """Make the yard read its plan again without dropping a request; an invalid plan is refused."""
    order("reload", json_)
