"""Figures as a reader wants them: sizes, durations, and quantities with their unit."""

from __future__ import annotations

import math
import time

NOT_MEASURED = "not measured"
_COUNTED = frozenset(("answers", "divergences", "failures", "findings", "parameters", "requests"))
_SIZES = (("B", 0), ("KiB", 1), ("MiB", 1), ("GiB", 2), ("TiB", 2))


def figure(number: float | None) -> str:
    """`number` to 4 significant digits with thousands marked; "not measured" for None."""
    if number is None:
        return NOT_MEASURED
    if number == 0 or not math.isfinite(number):
        return "0" if number == 0 else "infinite"
    if abs(number) < 1e-4:
        return f"{number:.2e}"
    digits = max(0, 3 - math.floor(math.log10(abs(number))))
    text = f"{number:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def quantity(value: float | None, unit: str = "") -> str:
    """`value` with its unit, in the size that a reader thinks in; "not measured" for None, never 0."""
    if value is None:
        return NOT_MEASURED
    if unit == "bytes":
        return size(value)
    if unit == "bytes/day":
        return f"{figure(value / 1e6)} MB/day"
    if unit == "share":
        return f"{figure(100 * value)} %"
    if unit == "ratio":
        return f"{figure(value)}×"
    if unit in _COUNTED:
        return f"{value:,.0f} {unit if value != 1 else unit.removesuffix('s')}"
    return f"{figure(value)} {unit}".strip()


def size(n_bytes: float | None) -> str:
    """`310 B`, `47.6 MiB` or `3.00 GiB`; "not measured" for None."""
    if n_bytes is None:
        return NOT_MEASURED
    power = 0
    while abs(n_bytes) >= 1024 and power < len(_SIZES) - 1:
        n_bytes, power = n_bytes / 1024, power + 1
    unit, digits = _SIZES[power]
    return f"{n_bytes:,.{digits}f} {unit}"


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
