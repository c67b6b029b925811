"""The report of a run: one HTML file that explains itself, plots first, made from the records alone.

It needs no network and no script. Whatever comes from outside (prompts, answers, log lines, paths) is escaped where
the page is put together, in `tasks.report.markup`; a figure that was not measured is marked so, never drawn as 0.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.errors import BadInput
from engines.units import NOT_MEASURED, duration, quantity, size
from tasks.records.store import Records
from tasks.records.tables import Run
from tasks.report.markup import Html, el, joined, named, page_template, row, table, verdict_mark
from tasks.report.model_record import ModelRecord
from tasks.report.model_section import latency_figure, model_section
from tasks.report.plots import ARMS

SAYS = {
    "PASS": "The gate is open: every required check passed.",
    "INCONCLUSIVE": "The gate stays closed: nothing failed, but not everything could be proven.",
    "ERROR": "The gate stays closed: a required check could not be carried out.",
    "FAIL": "The gate stays closed: the candidate is worse, or broken, in something that is required.",
}
NO_MODEL = "No model was measured in this run."


def write_report(records: Records, run_id: str, outcome: Mapping[str, Any], path: Path) -> Path:
    """`path`, where the report of the run now stands whole; a reader never sees half of one.

    `outcome` holds the verdicts: run_id, plan, verdict, models, and perhaps cannot_prove (lines). Raises BadInput when
    there is no such run or the file cannot be written.
    """
    page = render(records, run_id, outcome)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, page)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise BadInput(f"the report cannot be written to {path}: {reason}; name another place with --output") from error
    return path


def latency_images(records: Records, run_id: str, outcome: Mapping[str, Any]) -> dict[str, str]:
    """By model: the latency plot as an SVG data URI that needs nothing beside it; models without one are left out."""
    run = records.find_run(run_id)
    style = re.search(r"<style>.*?</style>", page_template().template, re.DOTALL)
    images = {}
    for model in outcome.get("models", []):
        drawn = latency_figure(ModelRecord.read(records, run, model))
        svg = re.search(r"<svg .*</svg>", drawn or "", re.DOTALL)
        if svg is None:
            continue
        opening, rest = svg[0].split(">", 1)
        whole = f'{opening} xmlns="http://www.w3.org/2000/svg">{style[0] if style else ""}{rest}'
        images[str(model["model"])] = f"data:image/svg+xml;base64,{base64.b64encode(whole.encode()).decode()}"
    return images


def render(records: Records, run_id: str, outcome: Mapping[str, Any]) -> str:
    """The page as text."""
    run = records.find_run(run_id)
    models = [ModelRecord.read(records, run, model) for model in outcome.get("models", [])]
    self_test = records.get_evidence(run.id, "-", "-", "self_test")
    body = joined(
        _header(run, outcome, models),
        *(model_section(model) for model in models),
        _cannot_prove(outcome.get("cannot_prove") or []),
        _environment(run, models, None if self_test is None else self_test.payload, outcome),
    )
    title = joined(f"{run.name}: {outcome.get('verdict', NOT_MEASURED)} · Switchyard report {run.id}")
    return page_template().substitute(title=title, body=body)


def _replace(path: Path, page: str) -> None:
    """Writes beside the target and renames: the old report stays whole until the new one is."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


# --- the head of the page --------------------------------------------------------------------------------------------


def _header(run: Run, outcome: Mapping[str, Any], models: Sequence[ModelRecord]) -> Html:
    verdict = str(outcome.get("verdict") or run.verdict or "INCONCLUSIVE")
    took = f", took {duration((run.ended_at - run.started_at).total_seconds())}" if run.ended_at else ""
    when = f"{run.started_at:%Y-%m-%d %H:%M} UTC{took} · run {run.id}"
    return el(
        "header",
        el("h1", f"{run.name}: may the engine be switched?"),
        el("p", *_engines(run, models)),
        el("p", when, class_="soft"),
        el("div", verdict_mark(verdict), el("p", SAYS.get(verdict, "")), class_=f"banner {verdict}"),
        _model_table(models) if models else el("p", NO_MODEL),
    )


def _engines(run: Run, models: Sequence[ModelRecord]) -> list[Html | str]:
    seen: dict[str, Mapping[str, Any]] = {}
    for model in models:
        seen = {**model.engines, **seen}
    plan = run.plan if isinstance(run.plan, Mapping) else {}
    parts: list[Html | str] = []
    for arm in ARMS:
        engine = seen.get(arm) or plan.get(arm) or {}
        parts += [el("span", class_=f"key {arm}"), f"{arm} ", el("b", named(engine)), " → "]
    return parts[:-1]


def _model_table(models: Sequence[ModelRecord]) -> Html:
    rows = [
        row(
            ("Model", el("a", model.name, href=f"#{model.anchor}")),
            ("Verdict", verdict_mark(model.verdict)),
            ("Why", model.why),
            ("Next", model.next_step),
        )
        for model in models
    ]
    return table(("Model", "Verdict", "Why", "What to do next"), rows)


def _cannot_prove(lines: Sequence[str]) -> Html | None:
    if not lines:
        return None
    items = [el("li", line) for line in lines]
    return joined(el("h2", "What this run cannot prove, however it comes out"), el("ul", *items))


# --- environment ---------------------------------------------------------------------------------------------------


def _environment(
    run: Run, models: Sequence[ModelRecord], self_test: Mapping[str, Any] | None, outcome: Mapping[str, Any]
) -> Html:
    return joined(
        el("h2", "Environment"),
        table(("", ""), [row(("", el("b", name)), ("", value)) for name, value in _facts(run, models)]),
        el("h3", "The measuring client's own error"),
        *_self_test(self_test),
        el("h3", "Blocks and calibration"),
        *(_blocks(model) for model in models),
        el("h3", "What the engines do not support"),
        *_unsupported(run, models),
        el("h3", "To do it again"),
        *_commands(run, models, is_demo=bool(outcome.get("cannot_prove"))),
        el("footer", f"Switchyard · run {run.id} · plan {run.plan_hash} · every figure is from the run's records"),
    )


def _facts(run: Run, models: Sequence[ModelRecord]) -> list[tuple[str, str]]:
    machine = run.environment if isinstance(run.environment, Mapping) else {}
    packages, clock = machine.get("packages") or {}, machine.get("clock") or {}
    facts = [
        ("host", _or_missing(machine.get("host"))),
        ("processor", f"{_or_missing(machine.get('cpu'))}, {_or_missing(machine.get('cpus_allowed'))} threads usable"),
        ("memory", size(machine["ram_bytes"]) if machine.get("ram_bytes") else NOT_MEASURED),
        ("graphics", _gpus(machine.get("gpus"))),
        ("system", f"{_or_missing(machine.get('kernel'))}, Python {_or_missing(machine.get('python'))}"),
        ("clock", f"{_or_missing(clock.get('name'))}, kernel source {_or_missing(clock.get('source'))}"),
        ("packages", ", ".join(f"{name} {version}" for name, version in packages.items()) or NOT_MEASURED),
        ("plan hash", run.plan_hash),
    ]
    facts += [(f"model {model.name}", f"{_or_missing(model.gguf)} · {_or_missing(model.digest)}") for model in models]
    return facts


def _gpus(gpus: Sequence[Mapping[str, Any]] | None) -> str:
    if gpus is None:
        return NOT_MEASURED
    return "; ".join(f"{gpu['name']}, {size(gpu['memory_bytes'])}, driver {gpu['driver']}" for gpu in gpus) or "none"


def _self_test(found: Mapping[str, Any] | None) -> list[Html]:
    if found is None:
        return [el("p", f"{NOT_MEASURED}: the run holds no self-test of its client", class_="absent")]
    wanted = (
        ("lateness, median", "lateness_p50_ms", "ms"),
        ("lateness, p99", "lateness_p99_ms", "ms"),
        ("TTFT error, p99", "ttft_error_p99_ms", "ms"),
        ("TPOT error", "tpot_error_percent", "%"),
        ("client's use of one core", "client_cpu_share", "share"),
    )
    words = ", ".join(f"{name} {quantity(found.get(key), unit)}" for name, key, unit in wanted)
    passed = "passed" if found.get("passed") else "did not pass"
    summary = f"Against the reference server of known timing it {passed} ({found.get('why', '')}): {words}."
    return [el("p", summary), el("p", "A difference smaller than three times this error is not judged.", class_="soft")]


def _blocks(model: ModelRecord) -> Html:
    parts = []
    for kind in ("performance", "calibration"):
        blocks = model.blocks(kind)
        void = [block for block in blocks if block.get("void") is not None]
        reasons = [el("li", f"{kind} block {block['index']} was discarded: {block['void']}") for block in void]
        words = f"{model.name}: {len(blocks)} {kind} blocks, {len(void)} discarded" if blocks else (
            f"{model.name}: {kind} {NOT_MEASURED}"
        )  # fmt: skip
        parts += [el("p", words), el("ul", *reasons) if reasons else None]
    noise = [el("li", f"{c.check}: {c.verdict.value}: {c.why}") for c in model.checks if c.check.startswith("calib")]
    return joined(*parts, el("ul", *noise) if noise else None)


def _unsupported(run: Run, models: Sequence[ModelRecord]) -> list[Html]:
    accepted = set((run.plan or {}).get("accepted_unsupported") or ()) if isinstance(run.plan, Mapping) else set()
    lines = dict.fromkeys(
        (named(engine), str(what))
        for model in models
        for engine in model.engines.values()
        for what in engine["unsupported"]
    )
    if not lines:
        seen = any(model.engines for model in models)
        return [el("p", "Every setting of the plan is supported." if seen else NOT_MEASURED)]
    notes = {what: " (accepted in the plan)" if what.partition(":")[0] in accepted else "" for _, what in lines}
    return [el("ul", *(el("li", f"{engine}: {what}{notes[what]}") for engine, what in lines))]


def _commands(run: Run, models: Sequence[ModelRecord], *, is_demo: bool) -> list[Html]:
    target = "demo" if is_demo else "PLAN.toml"
    lines = [f"switchyard evaluate {target}", f"switchyard report {shlex.quote(run.id)}"]
    parts = [
        el("p", "The evaluation once more, and this report with every verdict recomputed from the records:"),
        el("pre", "\n".join(lines)),
        el("p", "The engines as they were started (the port is a free one each time):"),
    ]
    for model in models:
        for arm, engine in model.engines.items():
            parts += [el("p", f"{model.name} · {arm} · {named(engine)}"), el("pre", shlex.join(engine["argv"]))]
    plan = json.dumps(run.plan, indent=2, ensure_ascii=False)
    return [*parts, el("details", el("summary", "The plan as it was recorded"), el("pre", plan), class_="block")]


def _or_missing(value: object) -> str:
    return NOT_MEASURED if value is None or value == "" else str(value)
