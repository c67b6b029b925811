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
from engines.units import NOT_MEASURED, duration, size
from tasks.evidence.nights import ALL_MODELS, NightSeries, nights_until
from tasks.records.store import Records
from tasks.records.tables import Run
from tasks.report.markup import TEMPLATES, joined, named, page_template
from tasks.report.model_record import ModelRecord
from tasks.report.model_section import LATENCIES, latency_figure, model_section, night_plots
from tasks.report.plots import ARMS
from tasks.verdicts.drift import Change

SAYS = {
    "PASS": "The gate is open: every required check passed.",
    "INCONCLUSIVE": "The gate stays closed: nothing failed, but not everything could be proven.",
    "ERROR": "The gate stays closed: a required check could not be carried out.",
    "FAIL": "The gate stays closed: the candidate is worse, or broken, in something that is required.",
}
CLIENT_ERRORS = (
    ("lateness, median", "lateness_p50_ms", "ms"),
    ("lateness, p99", "lateness_p99_ms", "ms"),
    ("TTFT error, p99", "ttft_error_p99_ms", "ms"),
    ("TPOT error", "tpot_error_percent", "%"),
    ("client's use of one core", "client_cpu_share", "share"),
)


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
        drawn = latency_figure(ModelRecord.read(records, run, model), *LATENCIES[0])
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
    plan = run.plan if isinstance(run.plan, Mapping) else {}
    self_test = records.get_evidence(run.id, "-", "-", "self_test")
    nights = nights_until(records, run)
    engines: dict[str, Mapping[str, Any]] = {}
    for model in models:
        engines = {**model.engines, **engines}
    unsupported = [(named(e), str(what)) for m in models for e in m.engines.values() for what in e["unsupported"]]
    body = TEMPLATES.get_template("report.html.jinja").render(
        run=run,
        plan=plan,
        models=models,
        engines=engines,
        verdict=str(outcome.get("verdict") or run.verdict or "INCONCLUSIVE"),
        cannot_prove=outcome.get("cannot_prove") or [],
        facts=_facts(run, models),
        self_test=None if self_test is None else self_test.payload,
        unsupported=dict.fromkeys(unsupported),
        accepted=plan.get("accepted_unsupported") or (),
        command=_command(run, outcome),
        plan_json=json.dumps(run.plan, indent=2, ensure_ascii=False),
        model_section=lambda model: model_section(model, [one for one in nights if one.model_id == model.name]),
        drift=[one.words(change) for one in nights for change in one.changes if _is_warned(one, change)],
        all_models=night_plots([one for one in nights if one.model_id == ALL_MODELS]),
        duration=duration,
        quote=shlex.quote,
        command_line=shlex.join,
        ARMS=ARMS,
        SAYS=SAYS,
        CLIENT_ERRORS=CLIENT_ERRORS,
    )
    title = joined(f"{run.name}: {outcome.get('verdict', NOT_MEASURED)} · Switchyard report {run.id}")
    return page_template().substitute(title=title, body=body)


def _is_warned(series: NightSeries, change: Change) -> bool:
    return series.is_worse(change) and series.is_current(change)


def _command(run: Run, outcome: Mapping[str, Any]) -> str:
    """What repeats the run, as it was typed; older runs recorded none."""
    recorded = run.environment.get("command") if isinstance(run.environment, Mapping) else None
    return shlex.join(recorded or ["switchyard", "evaluate", "demo" if outcome.get("cannot_prove") else "PLAN.toml"])


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


def _or_missing(value: object) -> str:
    return NOT_MEASURED if value is None or value == "" else str(value)
