"""Figures as a reader wants them: sizes, durations, and quantities with their unit."""

from __future__ import annotations

import math
import re
import time

NOT_MEASURED = "not measured"
_COUNTED = frozenset(("answers", "failures", "findings", "parameters", "requests", "unexplained divergences"))
_SHOWN_AS = {"bytes/day": (1e-6, " MB/day"), "share": (100.0, "%"), "%": (1.0, "%"), "ratio": (1.0, "×")}
SMALLEST = 6  # digits after the point; what is smaller is said to be under that
_SIZES = (("B", 0), ("KiB", 1), ("MiB", 1), ("GiB", 2), ("TiB", 2))


def figure(number: float | None, beside: float | None = None) -> str:
    """`number` to 3 significant digits with thousands marked; "not measured" for None.

    Where that reads like `beside`, its limit, and is not equal to it, as many digits as set the two apart.
    """
    if number is None:
        return NOT_MEASURED
    if not math.isfinite(number):
        return "infinite"
    shown = _rounded(number, 3)
    for digits in range(4, 10):
        if beside is None or number == beside or shown != _rounded(beside, 3):
            break
        shown = _rounded(number, digits)
    return shown


def _rounded(number: float, digits: int) -> str:
    if abs(number) < 10.0**-SMALLEST:
        return "0" if number == 0 else f"under 0.{'1':0>{SMALLEST}}" if number > 0 else f"-0.{'1':0>{SMALLEST}}"
    places = min(max(digits - 1 - math.floor(math.log10(abs(number))), 0), SMALLEST)
    text = f"{number:,.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def quantity(value: float | None, unit: str = "", beside: float | None = None) -> str:
    """`value` with its unit, in the size that a reader thinks in; "not measured" for None, never 0.

    `beside` is the limit in the same unit: what differs from it never reads like it.
    """
    if value is None:
        return NOT_MEASURED
    if unit == "bytes":
        return size(value)
    named = re.sub(r"(?<=\w{3})s(?=/|$)", "", unit) if value == 1 else unit  # `1 failure/day`
    if unit in _COUNTED:
        return f"{value:,.0f} {named}"
    factor, name = _SHOWN_AS.get(unit, (1.0, f" {named}" if unit else ""))
    if unit == "share" and beside is None:
        beside = 1.0  # nearly all is not all
    return f"{figure(factor * value, None if beside is None else factor * beside)}{name}"


def size(n_bytes: float | None) -> str:
    """`310 B`, `47.6 MiB` or `3.00 GiB`; "not measured" for None."""
    if n_bytes is None:
        return NOT_MEASURED
    power = 0
    while abs(n_bytes) >= 1024 and power < len(_SIZES) - 1:
        n_bytes, power = n_bytes / 1024, power + 1
    unit, digits = _SIZES[power]
    return f"{n_bytes:,.{digits}f} {unit}"


def number_of(n: int, noun: str) -> str:
    """`1 window`, `2 windows`, `1,204 prompts`: how many there are of a thing, named in the singular."""
    if n == 1:
        return f"1 {noun}"
    ending = "es" if noun.endswith(("s", "x")) else "s"
    return f"{n:,} {noun.removesuffix('y')}ies" if noun.endswith(("ry", "py")) else f"{n:,} {noun}{ending}"


def duration(seconds: float) -> str:
    """`12 s`, `2.5 min`, `3 h` or `3 days`."""
    for limit, length, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{figure(round(seconds / length, 1))} {unit}"
    return f"{figure(round(seconds / 86_400, 1))} days"


def ago(moment: float, now: float | None = None) -> str:
    """How long ago a moment (s since the epoch) was, in one unit: `12 s`, `3 min`, `5 h`, `2 d`."""
    seconds = max((time.time() if now is None else now) - moment, 0)
    for length, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
