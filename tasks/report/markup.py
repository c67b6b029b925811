"""HTML and SVG as text in which nothing from outside is ever taken for markup."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from engines.redaction import redacted_text
from engines.units import NOT_MEASURED, quantity

_EMPTY = frozenset(("br", "circle", "line", "path", "rect"))
# controls, lone surrogates, no-characters, and the overrides that write a line backwards
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]")


class Html(str):
    """Text that is markup already; every other text is escaped when it becomes part of one."""

    __slots__ = ()

    def __html__(self) -> Html:
        return self


DASH = Html("&ndash;")
Part = str | int | None
Attribute = str | int | float | None


def el(name: str, *parts: Part, **attributes: Attribute) -> Html:
    """The element with its parts (None is left out) and attributes: `class_` is class, `data_value` is data-value."""
    given = "".join(_attribute(key, value) for key, value in attributes.items() if value is not None)
    if name in _EMPTY:
        return Html(f"<{name}{given}/>")
    return Html(f"<{name}{given}>{joined(*parts)}</{name}>")


def joined(*parts: Part) -> Html:
    """The parts one after the other, escaped where they are not markup (ours or a template's)."""
    given = (part for part in parts if part is not None)
    return Html("".join(str(part) if hasattr(part, "__html__") else escaped(str(part)) for part in given))


def escaped(text: str) -> str:
    """`text` as the content of an element or an attribute; what a page cannot or should not hold becomes a mark."""
    return html.escape(redacted_text(_UNFIT.sub("\ufffd", text)))  # older records may hold secrets


@cache
def page_template() -> Template:
    """The page around every report and guide: its style, `$title` and `$body`."""
    return Template(Path(__file__).with_name("report_template.html").read_text("utf-8"))


def _template_source(name: str) -> str:
    """The template without the whitespace at the ends of its lines: that of a page means nothing, or too much."""
    return "".join(line.strip() for line in Path(__file__).with_name(name).read_text("utf-8").splitlines())


def verdict_mark(verdict: str) -> Html:
    """The verdict as a word, in its colour."""
    return el("span", verdict, class_=f"verdict {verdict}")


def named(engine: Mapping[str, Any]) -> str:
    """`mistral.rs 0.9.5 (hosted)`."""
    name = " ".join(str(engine[key]) for key in ("engine", "version") if engine.get(key))
    return (name or NOT_MEASURED) + (f" ({engine['form']})" if engine.get("form") not in (None, "auto") else "")


def row(*cells: tuple[str, Html | str], check: str | None = None) -> Html:
    """A row; each cell has the label that stands before it on a narrow screen."""
    made = [el("td", content, data_label=label or None, class_=_breaks(content)) for label, content in cells]
    return el("tr", *made, data_check=check)


def _breaks(content: Html | str) -> str | None:
    if content == DASH:
        return "none"
    # plain text may hold one long word (a path, a digest) and may break anywhere; a name or a level may not
    return "long" if not hasattr(content, "__html__") and len(content) > 24 else None


def table(heads: Sequence[str], rows: Iterable[Html]) -> Html:
    """A table whose rows stack on a narrow screen."""
    head = el("thead", el("tr", *(el("th", head, scope="col") for head in heads))) if any(heads) else None
    return el("div", el("table", head, el("tbody", *rows), class_="stack"), class_="wide")


def number(
    value: float | None, unit: str, shown: Callable[[float], str] | None = None, *, beside: float | None = None
) -> Html:
    """A figure with its unit, or as `shown` says it; `beside` is its limit. The exact value stands in `data-value`."""
    words = shown(value) if shown and value is not None else quantity(value, unit, beside)
    return el("span", words, class_="num", data_value=None if value is None else repr(value))


def _attribute(key: str, value: Attribute) -> str:
    text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return f' {key.rstrip("_").replace("_", "-")}="{escaped(text)}"'


TEMPLATES = Environment(
    loader=FunctionLoader(_template_source), autoescape=True, undefined=StrictUndefined, finalize=joined
)
TEMPLATES.globals |= {"el": el, "joined": joined, "named": named, "number": number, "quantity": quantity, "row": row}
TEMPLATES.globals |= {"table": table, "verdict_mark": verdict_mark, "NOT_MEASURED": NOT_MEASURED}
