"""`/yard`: one small page without scripts or anything from the network; it shows what `switchyard status` shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from engines.units import ago, figure, quantity
from engines.yard.ports.notes import notes, one_line, retired, whole

SHOWN_INCIDENTS = 12


def page(status: Mapping[str, Any], reports: Sequence[str] = ()) -> str:
    """The whole page, with links to the reports of these names; it loads itself again every 5 s."""
    not_served = 0
    for model in status["models"]:
        states = {engine["engine"]: engine["state"] for engine in model["engines"]}
        not_served += not model.get("dormant") and states.get(model["serving"]) not in ("ready", "busy")
    return TEMPLATE.render(status=status, reports=reports, not_served=not_served, shown_incidents=SHOWN_INCIDENTS)


def _spark(values: Sequence[float], unit_size: float, unit: str) -> dict[str, str] | None:
    """The values as a line, oldest first, from zero up: noise looks small, and growth looks like growth."""
    if len(values) < 2:
        return None
    low, high = min(values), max(values)
    points = " ".join(
        f"{100 * i / (len(values) - 1):.1f},{30 - 28 * value / (high or 1):.1f}" for i, value in enumerate(values)
    )
    return {
        "points": points,
        "label": f"{figure(low / unit_size)} to {figure(high / unit_size)} {unit}, last {len(values)}",
    }


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
_ENVIRONMENT.filters |= {"ago": ago, "one_line": one_line, "quantity": quantity, "whole": whole}
_ENVIRONMENT.globals |= {"notes": notes, "retired": retired, "spark": _spark}
TEMPLATE = _ENVIRONMENT.get_template("page.html")
