"""The migration guide: what a move changed, for the people and programs that use the port, from the records alone.

`guide_facts.gather` reads everything; `markdown` and `html` write the same of those facts.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from string import Template

from engines.units import NOT_MEASURED, quantity
from tasks.report.guide_facts import FIGURES, NOT_RECORDED, Deviation, EngineFacts, Facts, ModelFacts, PhaseFacts
from tasks.report.markup import Html, el, joined, row, table, verdict_mark
from tasks.report.model_record import shortened
from tasks.verdicts.verdict import CheckResult, Verdict, reasons

# --- the sections: each section is a list of Markdown blocks --------------------------------------------------


def _summary(facts: Facts) -> list[str]:
    known = any(model.phases or model.serving for model in facts.models)
    sentences = [
        f"This guide describes what the plan {facts.plan} (from {facts.incumbent} to {facts.candidate}) changed on "
        f"{facts.host}, as recorded by {facts.at:%Y-%m-%d}."
    ]
    if not known:
        sentences.append("Nothing is recorded of it yet: no model was evaluated, and none has moved.")
        sentences.append("The first step is an evaluation.")
    elif facts.moved:
        who = "; ".join(f"{model.id} is served by {model.serving}" for model in facts.moved)
        sentences.append(f"{len(facts.moved)} of {len(facts.models)} models moved: {who}.")
        sentences.append(f"Clients keep their address, {facts.address}/v1, and the model names that they use.")
    elif facts.staying:
        sentences.append("No model of it has moved.")
    if known and facts.staying:
        who = ", ".join(model.id for model in facts.staying)
        sentences.append(f"Left with {facts.incumbent}, for the reasons given below: {who}.")
    if n := len(facts.decisions):
        sentences.append(
            f"Decisions that people made against, or instead of, the evidence: {n}, repeated under Known limits."
        )
    if facts.moved or facts.retirement:
        sentences.append(_until(facts))
    return [_text(" ".join(sentences))]


def _until(facts: Facts) -> str:
    """Until when one may go back, in a sentence."""
    if gone := facts.retirement:
        retired = f"{gone.engine} was retired on {_time(gone.at)} by {gone.who} ({gone.why})"
        return f"{retired}; going back begins with a restore."
    if facts.rollback_until is None:
        return f"No end of the way back is set: it stays until {facts.incumbent} is retired."
    if facts.rollback_until > facts.at:
        return f"The way back is kept until {_time(facts.rollback_until)}."
    return f"The time to go back ended on {_time(facts.rollback_until)}: {facts.incumbent} may be retired any day."


def _affected(facts: Facts) -> list[str]:
    who = f"Every program that asks {facts.address}/v1 for one of these models, on {facts.host} ({facts.machine})."
    rows = [
        (
            ", ".join(map(_code, model.names)),
            _text(str(model.before or f"{facts.incumbent}, version {NOT_RECORDED}")),
            _text(str(model.now or model.serving or "no yard here has served it") + model.canary),
            _time(model.moved_at) if model.moved_at else "never",
        )
        for model in facts.models
    ]
    return [_text(who), _table(("Names clients use", "Before", "Served now", "Last moved"), rows)]


def _changed(facts: Facts) -> list[str]:
    blocks: list[str] = []
    for model in facts.moved:
        blocks.append(f"### {_text(model.id)}")
        for when, engine in (("Before", model.before), ("Now", model.now)):
            blocks.append(f"{when}: {_text(str(engine or NOT_RECORDED))}")
            blocks += [_typed(_line(engine.command) or NOT_RECORDED)] if engine else []
        blocks.append(_set(model.before, model.now))
    port = "The yard starts these on a free loopback PORT, with a key of its own; clients meet only the yard."
    return [*blocks, port] if blocks else ["Nothing: no model of this plan was moved."]


def _set(before: EngineFacts | None, now: EngineFacts | None) -> str:
    if before is None or now is None:
        return f"Settings: {NOT_RECORDED} for both."
    old, new = before.settings, now.settings
    both, gone, fresh = [s for s in old if s in new], [s for s in old if s not in new], [s for s in new if s not in old]
    words = (("Settings of both", both), ("only before", gone), ("only now", fresh))
    return "; ".join(f"{word}: {', '.join(map(_code, some))}" for word, some in words if some) or "No settings are set."


def _unsupported(facts: Facts) -> list[str]:
    lines = []
    for model in facts.moved:
        unsupported = model.now.unsupported if model.now else None
        if not unsupported:
            lines.append(f"{_code(model.id)}: {'nothing' if unsupported == () else NOT_RECORDED}")
        for what in unsupported or ():
            accepted = "accepted" if what.partition(":")[0] in facts.accepted else "not accepted"
            lines.append(f"{_code(model.id)}: {_text(what)} ({accepted} in the plan)")
    return [_list(lines)] if lines else ["Nothing: no model of this plan was moved."]


def _deviations(facts: Facts) -> list[str]:
    merged: dict[Deviation, list[str]] = {}
    counts = []
    for model in facts.models:
        tried = max((phase.compared or 0 for phase in model.phases), default=0)
        counts.append(
            f"{_code(model.id)}: {f'{tried} API behaviours tried on both engines' if tried else NOT_MEASURED}"
        )
        for deviation in (deviation for phase in model.phases for deviation in phase.deviations):
            merged.setdefault(deviation, []).append(model.id)
    rows = [
        (
            _text(one.what),
            _text(one.before),
            _text(one.after),
            _text(one.observed),
            _text(f"{', '.join(ids)}: {one.phase}"),
        )
        for one, ids in merged.items()
    ]
    heads = ("Behaviour", "Before", "After", "Seen after", "Where")
    return [_list(counts), _table(heads, rows) if rows else "No difference is recorded."]


def _stay(facts: Facts) -> list[str]:
    blocks = []
    for model in facts.staying:
        blocks += [f"### {_text(model.id)}", _why_stays(model, model.closed, facts.incumbent)]
        blocks += [_list(closed)] if model.closed and (closed := _grouped(reasons(model.closed.checks))) else []
    return blocks or ["None: every model of the plan moved."]


def _why_stays(model: ModelFacts, closed: PhaseFacts | None, incumbent: str) -> str:
    head = (
        f"It is served by {incumbent}" if model.serving else f"No yard here has served it; it is left with {incumbent}"
    )
    why = "its gate is open, and it was not moved" if model.phases else "it was never evaluated"
    if closed:
        why = f"{closed.title} (run {_code(closed.run_id)}) ended in **{closed.verdict}**"
    back = f" It was rolled back on {_time(model.rolled_back)}." if model.rolled_back else ""
    chosen = f" {_text(model.selected)} was chosen manually." if model.selected != "auto" else ""
    return f"{head}: {why}.{back}{chosen}"


def _check(facts: Facts) -> list[str]:
    served = [model for model in facts.models if model.serving]
    routes = ", ".join(_code(f"{model.id} → {model.serving}") for model in served)
    blocks = (
        [_typed("switchyard status"), f"shows {routes}."]
        if served
        else ["No yard here has served a model: no route to check."]
    )
    for model in served:
        blocks += _questions(model, facts)
    for run_id in dict.fromkeys(phase.run_id for model in facts.models for phase in model.phases if phase.evaluates):
        verdicts = [f"{m.id} {phase.verdict}" for m in facts.models for phase in m.phases if phase.run_id == run_id]
        shown = ", ".join(map(_code, verdicts))
        blocks += [_typed(f"switchyard report {run_id}"), f"judges the recorded evidence again and shows {shown}."]
    return blocks


def _questions(model: ModelFacts, facts: Facts) -> list[str]:
    """What to ask the port about one model, each with what it has to answer."""
    ask = {"model": model.id, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 16}
    key = f' -H "Authorization: Bearer ${facts.key_variable}"' if facts.key_variable else ""
    sent = f"{key} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(ask))}"
    fields = ", ".join(map(_code, ('"status": "ok"', f'"engine": {json.dumps(model.serving)}', '"fallback": false')))
    return [
        _typed(f"curl -s '{facts.address}/health?model={model.id}'"),
        f"answers 200 with {fields}; while nothing can serve it is 503, with the reason.",
        _typed(f"curl -s {facts.address}/v1/chat/completions{sent}"),
        "answers 200 with a text in `choices[0].message.content` and 1 or more in `usage.completion_tokens`.",
    ]


def _undo(facts: Facts) -> list[str]:
    lines, gone = [], facts.retirement
    for model in facts.moved:
        undo = None if gone and model.undo == gone.engine else model.undo
        lines += [f"switchyard rollback {model.id}    # back to {undo}"] if undo else []
        lines += [f"switchyard restore {gone.engine}"] if gone else []
        lines += [f"switchyard promote {model.id} --to {facts.incumbent}"] if undo != facts.incumbent else []
    if gone and not lines:
        lines = [f"switchyard restore {gone.engine}"]
    if not lines:
        return ["There is nothing to undo: no model of this plan was moved."]
    how = "Requests in flight are finished first; neither the plan nor the records are needed for it. Afterwards "
    kept = (
        f" What brings {gone.engine} back is in the yard's state and in {gone.archive or NOT_RECORDED}." if gone else ""
    )
    after = f"{how}`switchyard status` names the engine that serves."
    return [_typed(*dict.fromkeys(lines)), after, _text(_until(facts) + kept)]


def _limits(facts: Facts) -> list[str]:
    lines = [
        f"{'all models' if made.model == '-' else _code(made.model)}: {_text(made.kind)}, decided by {_text(made.who)} "
        f"on {_time(made.at)}: {_text(made.why)} (run {_code(made.run_id)})"
        for made in facts.decisions
    ]
    for model in facts.models:
        if not any(phase.evaluates for phase in model.phases):
            lines.append(f"{_code(model.id)}: never evaluated; its speed, memory and answers were {NOT_MEASURED}")
        for phase in model.phases:
            stated = not model.moved and phase is model.closed  # under "Models that stay, and why"
            lines += [f"{_code(model.id)}: {phase.title}: {what}" for what in _weak(phase, required=not stated)]
    own = f"Figures were taken on {facts.host}; another machine, model file or version needs an evaluation of its own."
    return [_list([*lines, _text(own)])]


def _weak(phase: PhaseFacts, *, required: bool) -> list[str]:
    """Why a phase proves less than it seems; behaviours that hold no gate stand in their own section."""
    doubts = ((phase.plan_changed, "the plan was changed since this run"), (phase.elsewhere, "it ran on another host"))
    ended = [f"its run is {phase.status}"] if phase.status != "done" else []
    open_ones = [result for result in phase.checks if result.verdict is not Verdict.PASS]
    free = [r for r in open_ones if not r.required and not r.check.startswith("compatibility.")]
    holding = [result for result in open_ones if result.required and required]
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


def _evidence(facts: Facts) -> list[str]:
    held = [(model, phase) for model in facts.models for phase in model.phases]
    runs = [(p.title, _code(m.id), _code(p.run_id), _time(p.at), f"**{p.verdict}**") for m, p in held]
    blocks = [_table(("Phase", "Model", "Run", "Begun", "Verdict"), runs) if runs else "No run is recorded."]
    for model, phase in held:
        if phase.evaluates:
            heads = ("Figure, after over before", "Value", "Limit", "Verdict", "In words")
            blocks += [
                f"### {_text(model.id)}, {phase.title}",
                _table(heads, [_figure(phase, *one) for one in FIGURES]),
            ]
    files = [(_code(model.id), _code(model.file), _code(model.digest)) for model in facts.models]
    plan = f"Plan {_code(facts.plan)}, SHA-256 {_code(facts.plan_hash)}"
    return [*blocks, "### Models and plan", _table(("Model", "File", "Digest"), files), plan]


def _figure(phase: PhaseFacts, check: str, label: str) -> tuple[str, ...]:
    result = next((result for result in phase.checks if result.check == check), None)
    if result is None:
        return label, NOT_MEASURED, "", "", ""
    unit = "share" if check.startswith("compatibility") else result.unit  # stored as a ratio of those that are required
    limit = "" if result.limit is None else quantity(result.limit, unit)
    return label, quantity(result.value, unit), limit, f"**{result.verdict}**", _text(shortened(result.why))


SECTIONS = (
    ("Summary", _summary),
    ("Who is affected", _affected),
    ("What changed", _changed),
    ("What is not supported", _unsupported),
    ("What behaves differently", _deviations),
    ("Models that stay, and why", _stay),
    ("Check it yourself", _check),
    ("How to undo, and until when", _undo),
    ("Known limits", _limits),
    ("Evidence", _evidence),
)


# --- Markdown --------------------------------------------------------------------------------------------------------


def markdown(facts: Facts) -> str:
    """The guide as Markdown (GitHub's), in which nothing from outside is taken for markup."""
    parts = [f"# {_text(_title(facts))}"]
    for title, section in SECTIONS:
        parts += [f"## {title}", *section(facts)]
    return "\n\n".join(parts) + "\n"


def _title(facts: Facts) -> str:
    return f"Migration guide: from {facts.incumbent} to {facts.candidate}"


def _text(text: str) -> str:
    """`text` as Markdown that means just these characters."""
    marked = re.sub(r"([\\`*\[\]]|(?<!\w)_|_(?!\w)|^[|#+-])", r"\\\1", _plain(text))
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


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in cells] for cells in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """`text` on one line, without characters that steer a terminal or turn a line round."""
    return "".join(char if char.isprintable() else "\ufffd" for char in re.sub(r"[\t\r\n\xa0]+", " ", text))


def _line(command: Iterable[str]) -> str:
    """The command as one types it; `~`, `$SWITCHYARD_HOME` and PORT stay bare."""
    return " ".join(word if re.fullmatch(r"[\w@%+=:,./~$-]+", word) else shlex.quote(word) for word in command)


def _time(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


# --- HTML, of the same blocks ----------------------------------------------------------------------------------------

_INLINE = re.compile(
    r"(?P<ticks>`+)(?P<code>.+?)(?P=ticks)(?!`)|\*\*(?P<verdict>\w+)\*\*|\\(?P<char>.)|&(?P<name>\w+);"
)
_NAMED = {"amp": "&", "lt": "<", "gt": ">"}


def html(facts: Facts) -> str:
    """The guide as one page that needs nothing beside it, in the report's clothes."""
    parts = [el("h1", _title(facts)), el("p", f"{facts.host} · {_time(facts.at)}", class_="soft")]
    for title, section in SECTIONS:
        parts += [el("h2", title), *(_block(block) for block in section(facts))]
    body = el("div", *parts, el("footer", "Switchyard · made from the records"), style="overflow-wrap:anywhere")
    template = Template(Path(__file__).with_name("report_template.html").read_text("utf-8"))
    return template.substitute(title=joined(_title(facts)), body=body)


def _block(block: str) -> Html:
    lines = block.split("\n")
    if block.startswith("```"):
        return el("pre", "\n".join(lines[1:-1]))
    if block.startswith("- "):
        return el("ul", *(el("li", _inline(line[2:])) for line in lines))
    if block.startswith("### "):
        return el("h3", _inline(block[4:]))
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
