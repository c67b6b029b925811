"""HTML and SVG as text in which nothing from outside is ever taken for markup."""

from __future__ import annotations

import html
import re

from engines.redaction import redacted_text

_EMPTY = frozenset(("br", "circle", "line", "path", "rect"))
# controls, lone surrogates, no-characters, and the overrides that write a line backwards
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]")


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


def _attribute(key: str, value: Attribute) -> str:
    text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return f' {key.rstrip("_").replace("_", "-")}="{escaped(text)}"'
