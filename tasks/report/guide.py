"""The migration guide: what a move changed, for the people and programs that use the port, from the records alone.

`guide_facts.gather` reads everything; `guide.md.jinja` has the text, and `html` shows the same blocks as a page.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from engines.units import NOT_MEASURED, quantity
from tasks.report.guide_facts import FIGURES, NOT_RECORDED, Deviation, Facts, PhaseFacts
from tasks.report.markup import Html, el, joined, page_template, row, table, verdict_mark
from tasks.report.model_record import shortened
from tasks.verdicts.verdict import CheckResult, Verdict, reasons


def markdown(facts: Facts) -> str:
    """The guide as Markdown (GitHub's), in which nothing from outside is taken for markup."""
    deviations: dict[Deviation, list[str]] = {}
    held = [(model, phase) for model in facts.models for phase in model.phases]
    for model, phase in held:
        for deviation in phase.deviations:
            deviations.setdefault(deviation, []).append(model.id)
    text = _ENVIRONMENT.get_template("guide.md.jinja").render(
        facts=facts, title=_title(facts), held=held, deviations=deviations, undo=_undo(facts)
    )
    return re.sub("\n{3,}", "\n\n", text).strip() + "\n"


def html(facts: Facts) -> str:
    """The guide as one page that needs nothing beside it, in the report's clothes."""
    _, *blocks = markdown(facts).strip().split("\n\n")
    parts = [el("h1", _title(facts)), el("p", f"{facts.host} · {_time(facts.at)}", class_="soft"), *map(_block, blocks)]
    body = el("div", *parts, el("footer", "Switchyard · made from the records"), style="overflow-wrap:anywhere")
    return page_template().substitute(title=joined(_title(facts)), body=body)


def _title(facts: Facts) -> str:
    return f"Migration guide: from {facts.incumbent} to {facts.candidate}"


# --- what the text is made of ----------------------------------------------------------------------------------------


def _undo(facts: Facts) -> list[str]:
    """The commands that lead back, each once."""
    lines, gone = [], facts.retirement
    for model in facts.moved:
        undo = None if gone and model.undo == gone.engine else model.undo
        lines += [f"switchyard rollback {model.id}    # back to {undo}"] if undo else []
        lines += [f"switchyard restore {gone.engine}"] if gone else []
        lines += [f"switchyard promote {model.id} --to {facts.incumbent}"] if undo != facts.incumbent else []
    if gone and not lines:
        lines = [f"switchyard restore {gone.engine}"]
    return list(dict.fromkeys(lines))


def _weak(phase: PhaseFacts, *, stated: bool) -> list[str]:
    """Why a phase proves less than it seems; required checks that are `stated` elsewhere, and behaviours, are not."""
    doubts = ((phase.plan_changed, "the plan was changed since this run"), (phase.elsewhere, "it ran on another host"))
    ended = [f"its run is {phase.status}"] if phase.status != "done" else []
    open_ones = [result for result in phase.checks if result.verdict is not Verdict.PASS]
    free = [r for r in open_ones if not r.required and not r.check.startswith("compatibility.")]
    holding = [result for result in open_ones if result.required and not stated]
    return [*(what for holds, what in doubts if holds), *ended, *_grouped([*holding, *free])]


def _grouped(results: Iterable[CheckResult]) -> list[str]:
    """Checks that did not pass, each reason once."""
    by_reason: dict[tuple[str, bool, str], list[str]] = {}
    for result in results:
        by_reason.setdefault((result.verdict.value, result.required, result.why), []).append(_code(result.check))
    return [
        f"**{verdict}** {', '.join(checks)}{'' if required else ' (holds no gate)'}: {_text(shortened(why))}"
        for (verdict, required, why), checks in by_reason.items()
    ]


def _figure(phase: PhaseFacts, check: str) -> tuple[str, ...]:
    """Value, limit, verdict and reason of one check."""
    result = next((result for result in phase.checks if result.check == check), None)
    if result is None:
        return NOT_MEASURED, "", "", ""
    unit = "share" if check.startswith("compatibility") else result.unit  # stored as a ratio of those that are required
    limit = "" if result.limit is None else quantity(result.limit, unit)
    return quantity(result.value, unit, result.limit), limit, f"**{result.verdict}**", _text(shortened(result.why))


def _text(text: object) -> str:
    """`text` as Markdown that means just these characters."""
    marked = re.sub(r"([\\`*\[\]]|(?<!\w)_|_(?!\w)|^[|#+-])", r"\\\1", _plain(str(text)))
    return marked.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _code(text: str) -> str:
    inner = _plain(text)
    ticks = _fence(inner, 1)
    return f"{ticks} {inner} {ticks}" if "`" in inner else f"{ticks}{inner}{ticks}"


def _fence(text: str, least: int) -> str:
    return "`" * max(least, 1 + max((len(run) for run in re.findall("`+", text)), default=0))


def _typed(*lines: str) -> str:
    plain = [_plain(line) for line in lines]
    fence = _fence("".join(plain), 3)
    return "\n".join([f"{fence}sh", *plain, fence])


def _plain(text: str) -> str:
    """`text` on one line, without characters that steer a terminal or turn a line round."""
    return "".join(char if char.isprintable() else "\ufffd" for char in re.sub(r"[\t\r\n\xa0]+", " ", text))


def _line(command: Iterable[str]) -> str:
    """The command as one types it; `~`, `$SWITCHYARD_HOME` and PORT stay bare."""
    return " ".join(word if re.fullmatch(r"[\w@%+=:,./~$-]+", word) else shlex.quote(word) for word in command)


def _time(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters |= {"text": _text, "code": _code, "typed": _typed, "line": _line, "time": _time}
_ENVIRONMENT.filters |= {"json": json.dumps, "quote": shlex.quote, "reasons": reasons, "grouped": _grouped}
_ENVIRONMENT.globals |= {"typed": _typed, "weak": _weak, "figure": _figure, "FIGURES": FIGURES}
_ENVIRONMENT.globals |= {"NOT_MEASURED": NOT_MEASURED, "NOT_RECORDED": NOT_RECORDED}


# --- HTML, of the same blocks ----------------------------------------------------------------------------------------

_INLINE = re.compile(
    r"(?P<ticks>`+)(?P<code>.+?)(?P=ticks)(?!`)|\*\*(?P<verdict>\w+)\*\*|\\(?P<char>.)|&(?P<name>\w+);"
)
_NAMED = {"amp": "&", "lt": "<", "gt": ">"}


def _block(block: str) -> Html:
    lines = block.split("\n")
    if block.startswith("```"):
        return el("pre", "\n".join(lines[1:-1]))
    if block.startswith("- "):
        return el("ul", *(el("li", _inline(line[2:])) for line in lines))
    if block.startswith("#"):
        marks, _, words = block.partition(" ")
        return el(f"h{len(marks)}", _inline(words))
    if block.startswith("| "):
        heads, _, *rows = [line[2:-2].split(" | ") for line in lines]
        cells = [[_inline(cell.replace("\\|", "|")) for cell in line] for line in rows]
        return table(heads, [row(*zip(heads, line, strict=True)) for line in cells])
    return el("p", _inline(block))


def _inline(text: str) -> Html:
    parts, end = list[Html | str](), 0
    for found in _INLINE.finditer(text):
        parts += [text[end : found.start()], _span(found)]
        end = found.end()
    return joined(*parts, text[end:])


def _span(found: re.Match[str]) -> Html | str:
    if found["code"]:
        padded = "`" in found["code"]
        return el("code", found["code"][1:-1] if padded else found["code"])
    if found["verdict"]:
        return verdict_mark(found["verdict"])
    return found["char"] or _NAMED.get(found["name"], found[0])
