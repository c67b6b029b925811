"""`/yard`: one small page without scripts or anything from the network; it shows what `switchyard status` shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from engines.units import ago

SHOWN_INCIDENTS = 12


def page(status: Mapping[str, Any], reports: Sequence[str] = ()) -> str:
    """The whole page, with links to the reports of these names; it loads itself again every 5 s."""
    return TEMPLATE.render(
        status=status,
        reports=reports,
        not_served=sum(not model.get("dormant") and not _is_served(model) for model in status["models"]),
        shown_incidents=SHOWN_INCIDENTS,
    )


def _is_served(model: Mapping[str, Any]) -> bool:
    states = {engine["engine"]: engine["state"] for engine in model["engines"]}
    return states.get(model["serving"]) in ("ready", "busy")


def retired(status: Mapping[str, Any]) -> list[str]:
    """A line for each engine that nothing starts any more."""
    return list(status.get("retired", {}).values())


def one_line(text: object, most: int = 160) -> str:
    """The first line of a text from outside, without control characters, at most `most` characters long."""
    line = "".join(sign if sign.isprintable() else " " for sign in str(text).strip().partition("\n")[0])
    return line if len(line) <= most else line[: most - 1] + "…"


def notes(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is to be known about a route, each with its kind: bad, wait, news or muted."""
    shown = []
    if model["unservable"]:
        shown.append(("bad", f"Not served: {model['unservable']}"))
    if model["fallback"]:
        shown.append(("bad", f"Fallback: {model['committed']} is out of order, {model['fallback']} serves"))
    if model["moving"]:
        shown.append(("wait", f"Under way: {model['moving']}"))
    if model.get("dormant"):
        shown.append(("muted", "Not loaded; the next request loads it"))
    if model["holding"]:
        shown.append(("wait", "Holding new requests"))
    if canary := model["canary"]:
        share = f"{canary['engine']} answers {canary['weight']:.0%} of the conversations"
        shown.append(("news", f"Canary: {share}{_verdict(canary)}"))
    if shadow := model.get("shadow"):
        shown.append(("news", f"Shadow: {shadow['engine']} gets copies of {shadow['share']:.0%}{_verdict(shadow)}"))
    if last := model.get("last_canary"):
        shown.append(("muted", f"Last canary{_verdict(last)}"))
    usual = [f"{model['waiting']} waiting"]
    usual += [f"way back: {model['undo']}"] if model["undo"] else []
    usual += [f"engine chosen by hand: {model['selected']}"] if model["selected"] != "auto" else []
    return [*shown, ("muted", " · ".join(usual))]


def _verdict(judged: Mapping[str, Any]) -> str:
    return f"; {judged['verdict']}: {one_line(judged.get('why', ''))}" if judged.get("verdict") else ""


def _spark(values: Sequence[float], unit_size: float, unit: str) -> dict[str, str] | None:
    """The values as a line, oldest first, from zero up: noise looks small, and growth looks like growth."""
    if len(values) < 2:
        return None
    low, high = min(values), max(values)
    points = " ".join(
        f"{100 * i / (len(values) - 1):.1f},{30 - 28 * value / (high or 1):.1f}" for i, value in enumerate(values)
    )
    return {"points": points, "label": f"{low / unit_size:.0f} to {high / unit_size:.0f} {unit}, last {len(values)}"}


def _mib(n_bytes: int | None) -> float | None:
    return None if n_bytes is None else n_bytes / 2**20


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
_ENVIRONMENT.filters |= {"ago": ago, "one_line": one_line, "mib": _mib}
_ENVIRONMENT.globals |= {"notes": notes, "retired": retired, "spark": _spark}
TEMPLATE = _ENVIRONMENT.get_template("page.html")
