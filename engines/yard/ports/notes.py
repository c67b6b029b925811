"""What is to be known about the yard's routes, in words for the page and for `switchyard status`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engines.units import number_of


def retired(status: Mapping[str, Any]) -> list[str]:
    return list(status.get("retired", {}).values())


def one_line(text: object, most: int = 160) -> str:
    """The first line of a text from outside, without control characters, at most `most` characters long."""
    line = "".join(sign if sign.isprintable() else " " for sign in str(text).strip().partition("\n")[0])
    return line if len(line) <= most else line[: most - 1] + "…"


def whole(text: object, most: int = 4000) -> str:
    """All lines of a text from outside, without control characters."""
    lines = str(text).strip()[:most].splitlines()
    return "\n".join("".join(sign if sign.isprintable() else " " for sign in line) for line in lines)


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
    if over := model.get("overflow"):
        shown.append(_overflow(over))
    # of one that was promoted the records have the verdict: the yard judged it a moment earlier
    if (last := model.get("last_canary")) and last.get("engine") != model["committed"]:
        shown.append(("muted", f"Last canary{_verdict(last)}"))
    for engine in model.get("engines", ()):
        if engine["engine"] == model["serving"] and (prompts := engine.get("prompts")):
            shown.append(("muted", f"Prompts over a restart: {prompts}"))
    usual = [f"{model['waiting']} waiting"]
    usual += [f"way back: {model['undo']}"] if model["undo"] else []
    usual += [f"engine chosen by hand: {model['selected']}"] if model["selected"] != "auto" else []
    return [*shown, ("muted", " · ".join(usual))]


def _overflow(over: Mapping[str, Any]) -> tuple[str, str]:
    more = f"new conversations while more than {number_of(over['waiting'], 'request')} wait"
    if over["takes"]:
        return "news", f"Overflow: {over['engine']} takes {more}; {over['conversations']:,} so far"
    return "muted", f"Overflow: {over['engine']} would take {more}: {over['why']}"


def _verdict(judged: Mapping[str, Any]) -> str:
    return f"; {judged['verdict']}: {whole(judged.get('why', ''))}" if judged.get("verdict") else ""
