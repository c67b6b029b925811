"""The orders that a yard takes over its control socket: the fields of each, for both ends, and their version.

Unknown fields are ignored. An order carries the version of the control socket that it needs, so that an older yard does
not misread it: a yard reports its version in its status, one of the first version reports none. Raise VERSION when an
order, or a field of one, is added, and enter it in SINCE as "order" or "order.field"; answers and status keep their
keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from engines.errors import BadInput

FIRST, VERSION = 1, 3
SINCE: dict[str, int] = {"reload.plan": 2, "overflow": 3}
MoveForm = Literal["auto", "side-by-side", "one-at-a-time"]


class _Fields(BaseModel):
    model_config = ConfigDict(frozen=True)


class Order(_Fields):
    """An order about the model with this id or alias; a yard's only one where it names none."""

    model: str | None = None


class RollbackOrder(Order):
    form: MoveForm = "auto"


class PromoteOrder(RollbackOrder):
    """`to` is the engine that shall serve; the candidate where it names none."""

    to: str | None = None


class CanaryOrder(Order):
    to: str | None = None
    weight: float = 0


class ShadowOrder(Order):
    to: str | None = None
    share: float = 0


class UseOrder(Order):
    engine: str


class DrainOrder(Order):
    on: bool = True


class OverflowOrder(Order):
    on: bool = True


class RestoreOrder(_Fields):
    engine: str


class RetireOrder(RestoreOrder):
    who: str = ""
    why: str = ""
    archive: str = ""


class ReloadOrder(Order):
    """`plan` is the path of the plan to serve from now on; the one served so far where it names none."""

    plan: str | None = None


ORDERS: dict[str, type[BaseModel]] = {
    "promote": PromoteOrder,
    "rollback": RollbackOrder,
    "canary": CanaryOrder,
    "shadow": ShadowOrder,
    "use": UseOrder,
    "drain": DrainOrder,
    "overflow": OverflowOrder,
    "retire": RetireOrder,
    "restore": RestoreOrder,
    "load": Order,
    "unload": Order,
    "stop": Order,
    "reload": ReloadOrder,
}


def order_of(name: str, fields: Mapping[str, Any]) -> BaseModel:
    """The order `name` with these fields. Raises BadInput, which names the field that is wrong."""
    try:
        return ORDERS[name].model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        given = f", not {first['input']!r}" if first["type"] == "literal_error" else ""
        raise BadInput(f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg']}{given}") from error


def version_needed(name: str, fields: Mapping[str, Any]) -> int:
    """The version of the control socket that has the order `name` with all these fields."""
    return max(SINCE.get(part, FIRST) for part in (name, *(f"{name}.{field}" for field in fields)))


def too_old(name: str) -> str:
    """Why a running yard cannot carry out the order `name` of a newer command, and what to do."""
    return (
        f"the running yard is older than this command and cannot carry out `{name}`: restart it (`switchyard stop`, "
        "then `switchyard serve`; installed as a service: `systemctl --user restart switchyard`)"
    )
