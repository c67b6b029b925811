"""HTML and SVG as text in which nothing from outside is ever taken for markup, and figures as a reader wants them."""

from __future__ import annotations

import html
import math
import re

from engines.redaction import redacted_text

NOT_MEASURED = "not measured"
_EMPTY = frozenset(("br", "circle", "line", "path", "rect"))
_COUNTED = frozenset(("answers", "divergences", "failures", "findings", "parameters", "requests"))
# controls, lone surrogates, no-characters, and the overrides that write a line backwards
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]")
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")


class Html(str):
    """Text that is markup already; every other text is escaped when it becomes part of one."""

    __slots__ = ()


Part = str | int | None
Attribute = str | int | float | None


def el(name: str, *parts: Part, **attributes: Attribute) -> Html:
    """The element with its parts (None is left out) and attributes: `class_` is class, `data_value` is data-value."""
    given = "".join(_attribute(key, value) for key, value in attributes.items() if value is not None)
    if name in _EMPTY:
        return Html(f"<{name}{given}/>")
    return Html(f"<{name}{given}>{joined(*parts)}</{name}>")


def joined(*parts: Part) -> Html:
    """The parts one after the other, escaped where they are not markup."""
    return Html("".join(part if isinstance(part, Html) else escaped(str(part)) for part in parts if part is not None))


def escaped(text: str) -> str:
    """`text` as the content of an element or an attribute; what a page cannot or should not hold becomes a mark."""
    return html.escape(redacted_text(_UNFIT.sub("\ufffd", text)))  # older records may hold secrets


def figure(number: float | None) -> str:
    """`number` to 4 significant digits with thousands marked; "not measured" for None."""
    if number is None:
        return NOT_MEASURED
    if number == 0 or not math.isfinite(number):
        return "0" if number == 0 else "beyond all measure"
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
        return memory(value)
    if unit == "bytes/day":
        return f"{figure(value / 1e6)} MB/day"
    if unit == "share":
        return f"{figure(100 * value)} %"
    if unit == "ratio":
        return f"{figure(value)}×"
    if unit in _COUNTED:
        return f"{value:,.0f} {unit if value != 1 else unit.removesuffix('s')}"
    return f"{figure(value)} {unit}".strip()


def memory(n_bytes: float) -> str:
    """`n_bytes` in MiB, GiB and so on."""
    power = 0
    while abs(n_bytes) >= 1024 and power < len(_BINARY) - 1:
        n_bytes, power = n_bytes / 1024, power + 1
    return f"{figure(n_bytes)} {_BINARY[power]}"


def duration(seconds: float) -> str:
    """`12 s`, `2.5 min`, `3 h` or `3 days`."""
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h"), (math.inf, 86_400, "days")):
        if seconds < limit:
            return f"{figure(round(seconds / size, 1))} {unit}"
    raise AssertionError("the last limit is infinite")


def _attribute(key: str, value: Attribute) -> str:
    text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return f' {key.rstrip("_").replace("_", "-")}="{escaped(text)}"'
