"""Really load a model in an engine, for one token: the arbiter where a header cannot know."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.driver import Installation
from engines.errors import (
    BadInput,
    EngineError,
    EngineExited,
    EngineNotEnded,
    EngineNotFound,
    EngineRefuses,
    PortTaken,
    WrongListener,
)
from engines.fit import Fit, estimate
from engines.model.header import read_header
from engines.registry import driver
from engines.settings import EngineArgs, Settings
from engines.yard.settings import YardSettings
from flows.evaluation.beside import free_beside
from flows.experiment_lock import alone
from migrations import carried
from migrations.plan import EngineChoice, Plan
from tasks.evidence.engine_under_test import EngineBehindYard, EngineUnderTest

CONTEXT_OF_FILES = 512  # tokens: enough for one, and little memory
# how engines begin the line that names the cause; the last of the most telling kind counts
_CAUSES = (r"error loading model: *(.*)", r"panicked at .*", r"^ *error: *(.*)", r".*(?:error|failed).*")
_PLACE = re.compile(r"cannot load \S+: ")


@dataclass(frozen=True)
class Load:
    """One model to be loaded in one engine, as it would be served."""

    model: str
    gguf: Path
    engine: EngineChoice
    settings: Settings
    own: EngineArgs = field(default_factory=EngineArgs)
    plan: Plan | None = None


def loads_of_plan(plan: Plan, context: int | None) -> list[Load]:
    """Each model of the plan in both engines, with its settings; `context` in place of the plan's."""
    found = []
    for model in plan.models:
        settings = plan.settings_for(model.id)
        if context is not None:
            settings = settings.model_copy(update={"context_tokens": context})
        for side in (one for one in (plan.incumbent, plan.candidate) if one.url is None):
            own = plan.own_args(model.id, side.name)
            found.append(Load(model.id, plan.given(model.id, side.name), side, settings, own, plan))
    return found


def loads_of_files(report: Mapping[str, Any], files: Mapping[str, Path], context: int | None) -> list[Load]:
    """Each file in each engine that the report of the headers names."""
    settings = Settings(context_tokens=context or CONTEXT_OF_FILES)
    return [
        Load(model["model"], files[model["model"]], EngineChoice(engine=entry["engine"]), settings)
        for model in report["models"]
        for entry in model["engines"]
    ]


def judged_by_load(
    report: dict[str, Any], loads: list[Load], home: Path, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """`report` with the answers of real loads in place of the headers', which stay as `header`.

    What cannot be tried (no memory beside what runs, no such engine here) keeps a header's no and is unknown otherwise.
    Raises Busy while another experiment has the home.
    """
    entries = {(m["model"], entry["engine"]): entry for m in report["models"] for entry in m["engines"]}
    with alone(home, "preflight --load"):
        for load in loads:
            entry = entries[load.model, load.engine.name]
            say(f"loading {load.model} in {load.engine.name}")
            answer, why, seconds = _tried(load, home)
            entry["header"] = {"loads": entry["loads"], "why": entry["why"]}
            if answer == "unknown" and entry["loads"] == "no":
                answer, why = "no", f"{entry['why']} (not tried: {why})"
            entry |= {"loads": answer, "why": why, "load_s": seconds}
    return report


def _tried(load: Load, home: Path) -> tuple[str, str, float | None]:
    """Yes, no or unknown; the reason; seconds to the first token."""
    try:
        installation = load.engine.find()
    except EngineNotFound as error:
        return "unknown", str(error), None
    if (lack := _lack(load, home)) is not None:
        return "unknown", lack, None
    kind = EngineBehindYard if installation.form == "native" else EngineUnderTest
    engine = kind(
        arm="candidate",
        driver=driver(load.engine.engine),
        installation=installation,
        model_id=load.model,
        gguf=load.gguf,
        settings=load.settings,
        own=load.own,
        request_defaults={} if load.plan is None else carried.request_defaults(load.plan, load.model, installation),
        home=home,
        stall_s=(YardSettings() if load.plan is None else load.plan.yard).load_stall_s,
    )
    started = time.monotonic()
    try:
        with engine.up():
            seconds = round(time.monotonic() - started, 1)
            return "yes", f"loaded and gave a token in {seconds:g} s ({_named(installation)})", seconds
    except EngineNotEnded:
        raise
    except (PortTaken, WrongListener) as error:  # another process was quicker: no word on the model
        return "unknown", f"{_named(installation)}: {str(error).splitlines()[0]}", None
    except EngineExited as error:
        if -error.returncode == signal.SIGKILL:
            return "unknown", f"killed while it loaded, by the kernel where memory ran out: {_cause(error)}", None
        return "no", f"{_named(installation)} exits: {_cause(error)}", None
    except EngineRefuses as error:
        return "no", f"{_named(installation)} loads it, and no token comes: {_cause(error)}", None
    except EngineError as error:
        return "unknown", f"{_named(installation)}: {_cause(error)}", None


def _named(installation: Installation) -> str:
    return f"{installation.engine} {installation.version}"


def _lack(load: Load, home: Path) -> str | None:
    """Why the load is not tried: memory beside what runs."""
    try:
        header = read_header(load.gguf)
        unbound = estimate(header, load.settings, load.engine.engine, own=load.own)
        free = free_beside(home, load.gguf, sum(need.mapped for need in unbound.needs))
        fit = estimate(header, load.settings, load.engine.engine, own=load.own, memory=free)
    except BadInput as error:
        return str(error)
    return None if fit.verdict in ("fits", "tight") else f"not loaded, {_why(fit)}"


def _why(fit: Fit) -> str:
    if fit.verdict == "unknown":
        return f"whether it fits beside what runs is unknown: {fit.why}"
    return f"it does not fit beside what runs: {fit.why}; unload a model, or try a smaller --context"


def _cause(error: EngineError) -> str:
    """The line of the engine's own output that names the cause, else the error's first line."""
    lines = [line.strip() for line in error.log_tail if line.strip()]
    return next(_causes(lines), str(error).splitlines()[0])


def _causes(lines: list[str]) -> Iterator[str]:
    for pattern in _CAUSES:
        for line in reversed(lines):
            if match := re.search(pattern, line):
                yield _PLACE.sub("", match[match.lastindex or 0])[:300]
