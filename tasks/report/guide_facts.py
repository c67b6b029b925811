"""The facts of a migration guide, read from the records once, with what is private hidden.

A model's id and the name that a person signed a decision with stay as given: commands need the one, a decision the
other.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from engines.driver import native_of
from engines.errors import BadInput
from engines.home import host
from engines.registry import driver
from engines.settings import NO_FILE
from engines.units import NOT_MEASURED, size
from engines.yard.engine.launch_spec import LaunchSpec
from engines.yard.state import YardState
from tasks.records.payload import plan_hash, redact
from tasks.records.store import Records
from tasks.records.tables import Run
from tasks.report.model_record import ModelRecord, shortened
from tasks.verdicts.verdict import CheckResult, Verdict, gate

NOT_RECORDED = "not recorded"
LOOK_BACK = 200  # runs of a plan
PORT = 65535  # stands for the free port that the yard picks at each start
PHASES = (
    ("evaluate", "", "Phase 1, evaluation"),
    ("migrate", "", "Phase 2, subprocess"),
    ("evaluate", "-native", "Phase 3, conformance"),
    ("migrate-native", "-native", "Phase 3, native"),
)
FIGURES = (
    ("performance.ttft_p50_ratio", "Time to first token (TTFT), median"),
    ("performance.ttft_p95_ratio", "Time to first token, p95"),
    ("performance.tpot_p50_ratio", "Time per output token (TPOT), median"),
    ("performance.e2e_p50_ratio", "Whole request (E2E), median"),
    ("memory.peak_ratio", "Peak memory"),
    ("parity.top1_agreement", "Same most likely token"),
    ("parity.trigger_similarity", "Tools called on the same prompts (F1)"),
    ("parity.schema_accuracy", "Calls valid under their schema"),
    ("compatibility.required_passed", "Required API behaviours"),
)
EFFECTS = {True: "has effect", False: "ignored", None: "unclear"}
LIVE = ("canary", "shadow", "rollback", "promote")  # checks on people's own requests
AS_SIGNED = frozenset({"who", "id", "names", "model"})
NOBODY = frozenset({"", "root", "user", "admin", "localhost"})  # names that identify nobody


@dataclass(frozen=True)
class Retirement:
    """An engine that nothing may start any more: since when, by whom, why, and where what brings it back is kept."""

    engine: str
    at: datetime
    who: str
    why: str
    archive: str


@dataclass(frozen=True)
class EngineFacts:
    """One engine with one model, and how it is started; `unsupported` is None where its driver cannot be asked."""

    name: str
    form: str
    version: str
    command: tuple[str, ...]
    settings: tuple[str, ...]
    unsupported: tuple[str, ...] | None

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.form})"


@dataclass(frozen=True)
class Deviation:
    """An API behaviour or a parameter that the two engines of a phase do not share."""

    phase: str
    what: str
    before: str
    after: str
    observed: str


@dataclass(frozen=True)
class PhaseFacts:
    """The result of one phase for one model. `compared` counts behaviours tried on both engines; None: never tried."""

    title: str
    evaluates: bool
    run_id: str
    at: datetime
    status: str
    verdict: Verdict
    plan_changed: bool
    elsewhere: bool
    checks: tuple[CheckResult, ...]
    deviations: tuple[Deviation, ...]
    compared: int | None


@dataclass(frozen=True)
class ModelFacts:
    """One model: who served it, who does, since when, and on which evidence."""

    id: str
    names: tuple[str, ...]
    file: str
    digest: str
    before: EngineFacts | None
    now: EngineFacts | None
    serving: str | None
    undo: str | None
    moved: bool
    moved_at: datetime | None
    selected: str
    canary: str
    rolled_back: datetime | None
    phases: tuple[PhaseFacts, ...]
    slow: tuple[str, ...]  # weights that an engine computes slowly

    @property
    def closed(self) -> PhaseFacts | None:
        """The last phase whose gate stayed closed."""
        return next((phase for phase in reversed(self.phases) if phase.verdict is not Verdict.PASS), None)


@dataclass(frozen=True)
class DecisionFacts:
    """What a person decided against, or instead of, the evidence."""

    run_id: str
    model: str
    kind: str
    who: str
    why: str
    at: datetime


@dataclass(frozen=True)
class Facts:
    """Everything that the guide says, fit to be shared."""

    plan: str
    plan_hash: str
    incumbent: str
    candidate: str
    host: str
    machine: str
    at: datetime
    address: str
    key_variable: str
    accepted: tuple[str, ...]
    models: tuple[ModelFacts, ...]
    decisions: tuple[DecisionFacts, ...]
    retirement: Retirement | None
    rollback_until: datetime | None

    @property
    def moved(self) -> list[ModelFacts]:
        """The models that another engine than the incumbent serves."""
        return [model for model in self.models if model.moved]

    @property
    def staying(self) -> list[ModelFacts]:
        """The others."""
        return [model for model in self.models if not model.moved]


# --- what is private -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Private:
    """What a guide leaves out: Switchyard's folder, the account, hosts, and where the named files lie."""

    home: Path
    user: str = ""
    user_home: str = ""
    hosts: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()


def redacted(text: str, private: Private) -> str:
    """`text` without secrets, home folders (`~`), the user's and the hosts' names; model files by their names only."""
    text = str(redact(text))
    for file in sorted(private.files, key=lambda file: -len(str(file))):
        text = text.replace(str(file), file.name)
        text = re.sub(rf"(?<![\w/]){re.escape(str(file.parent))}/?(?![\w./-])", "MODELS", text)
    text = re.sub(r"(?<![\w~])/[^\s'\",;]*/([^\s/'\",;]+\.gguf)", r"\1", text)
    homes = [r"/home/[^/\s'\":;,]+", r"/Users/[^/\s'\":;,]+", "/root"]
    homes += [re.escape(private.user_home)] if private.user_home not in ("", "/") else []
    text = re.sub(rf"(?<![\w~.-])(?:{'|'.join(reversed(homes))})(?![\w.-])", "~", text)
    text = text.replace(str(private.home), "$SWITCHYARD_HOME")
    if private.user not in NOBODY:
        user = re.escape(private.user)  # as a word, and as a part of a folder's name
        text = re.sub(rf"(?<![\w-]){user}(?![\w-])|(?<=/)[^/\s]*\b{user}\b[^/\s'\"]*", "USER", text)
    for name in set(private.hosts) - NOBODY:
        text = re.sub(rf"(?<![\w-]){re.escape(name)}(?:\.[A-Za-z][\w-]*)*(?![\w-])", "this host", text)
    return text


def _shared(value: Any, private: Private) -> Any:
    """`value` with every text in it redacted, but for what people signed and commands need."""
    if isinstance(value, tuple):
        return tuple(_shared(item, private) for item in value)
    if isinstance(value, CheckResult):
        return value.model_copy(update={"why": redacted(value.why, private)})
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value) if field.name not in AS_SIGNED]
        return replace(value, **{name: _shared(getattr(value, name), private) for name in names})
    return redacted(value, private) if type(value) is str else value


def _unquoted(result: CheckResult, *, replayed: bool) -> CheckResult:
    """The result without words of people's own conversations: a reason may quote a prompt or an answer."""
    area = result.check.split(".")[0]
    if area not in LIVE and not (replayed and (area == "parity" or result.check.endswith(".gate"))):
        return result
    quoted = r"(?<!\w)'(?:[^'\\]|\\.)*'(?!\w)|\"(?:[^\"\\]|\\.)*\""
    return result.model_copy(update={"why": re.split("[;(]", re.sub(quoted, "...", result.why))[0].strip()})


# --- gathering -------------------------------------------------------------------------------------------------------


def gather(
    records: Records,
    plan: BaseModel | Mapping[str, Any],
    state: YardState,
    *,
    home: Path,
    now: datetime,
    retirement: Retirement | None = None,
    rollback_until: datetime | None = None,
    show_host: bool = False,
) -> Facts:
    """The facts about `plan` (or its JSON form, as runs keep it): from the records, and the routes from the state.

    `home` is Switchyard's folder. `retirement` is for one that is not in the state yet. The host's name is left out
    unless `show_host`.
    """
    stored: Mapping[str, Any] = plan.model_dump(mode="json") if isinstance(plan, BaseModel) else plan
    runs = [run for name in _names(stored) for run in records.history(LOOK_BACK, name=name, host=host())]
    yard, incumbent = stored.get("yard") or {}, _name(stored["incumbent"])
    facts = Facts(
        plan=str(stored["name"]),
        plan_hash=plan_hash(stored),
        incumbent=incumbent,
        candidate=_name(stored["candidate"]),
        host=host(),
        machine=_machine((runs[0].environment or {}) if runs else {}),
        at=now,
        address=_address(str(yard.get("host", "127.0.0.1")), int(yard.get("port", 8080))),
        key_variable=stored.get("api_key_env") or "",
        accepted=tuple(stored.get("accepted_unsupported") or ()),
        models=tuple(_model(records, runs, stored, model, state) for model in stored["models"]),
        decisions=_decisions(records, runs),
        retirement=retirement or _retired(state, incumbent),
        rollback_until=rollback_until,
    )
    hosts = {
        facts.host,
        *(str(h) for run in runs for h in (run.owner_host, (run.environment or {}).get("host")) if h),
    }
    account, hidden = pwd.getpwuid(os.getuid()), () if show_host else tuple(hosts)
    files = tuple(_files(stored, state))
    shared: Facts = _shared(facts, Private(home, account.pw_name, account.pw_dir, hidden, files))
    return shared


def _names(plan: Mapping[str, Any]) -> tuple[str, str]:
    """Under which names runs are recorded: the plan's, and phase 3's."""
    return str(plan["name"]), f"{plan['name']}-native"


def _name(engine: Mapping[str, Any]) -> str:
    """The name of an engine of a plan; without one, its kind."""
    return str(engine.get("name") or engine["engine"])


def _as_native(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The plan that phase 3 makes of this one: the candidate as it serves, and native."""
    kind, name = plan["candidate"]["engine"], _name(plan["candidate"])
    named = {} if name == kind else {"name": native_of(name)}
    native = {**named, "engine": native_of(kind), "form": "auto", "binary": None}
    return {**plan, "name": _names(plan)[1], "incumbent": plan["candidate"], "candidate": native}


def _files(plan: Mapping[str, Any], state: YardState) -> Iterable[Path]:
    """Model files, templates, tokenizers and transcripts that plan and specs name."""
    for part in (
        plan.get("settings") or {},
        *plan["models"],
        *(model.get("settings") or {} for model in plan["models"]),
    ):
        keys = ("gguf", "transcripts", "chat_template", "tokenizer_json")
        yield from (Path(part[key]) for key in keys if part.get(key))
    held = [route.specs for route in state.models.values()] + [gone.specs for gone in state.retired.values()]
    yield from (spec.gguf for specs in held for spec in specs.values() if spec.gguf != NO_FILE)


def _machine(environment: Mapping[str, Any]) -> str:
    cpu, ram, gpus = environment.get("cpu"), environment.get("ram_bytes"), environment.get("gpus")
    names = ", ".join(str(gpu["name"]) for gpu in gpus or []) or ("no GPU" if gpus == [] else f"GPUs {NOT_RECORDED}")
    return f"{cpu or f'processor {NOT_RECORDED}'}, RAM {size(ram) if ram else NOT_RECORDED}, {names}"


def _address(host: str, port: int) -> str:
    """Where a program on the same host asks; an address in somebody's network stays private."""
    local = host in ("0.0.0.0", "localhost", "127.0.0.1", "::", "::1")
    return f"http://{'127.0.0.1' if local else 'YARD_HOST'}:{port}"


def _retired(state: YardState, engine: str) -> Retirement | None:
    gone = state.retired.get(engine)
    return Retirement(engine, _moment(gone.at), gone.who, gone.why, gone.archive) if gone else None


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _decisions(records: Records, runs: Sequence[Run]) -> tuple[DecisionFacts, ...]:
    made = sorted((d for run in runs for d in records.decisions(run.id)), key=lambda decision: decision.at)
    return tuple(DecisionFacts(d.run_id, d.model_id, d.kind, d.who, d.why, d.at) for d in made)


def _model(
    records: Records, runs: Sequence[Run], plan: Mapping[str, Any], entry: Mapping[str, Any], state: YardState
) -> ModelFacts:
    name, incumbent = str(entry["id"]), _name(plan["incumbent"])
    route, gone = state.models.get(name), state.retired.get(incumbent)
    canary = route.canary if route else None
    judged = [
        (title, run) for kind, more, title in PHASES if (run := _latest(records, runs, plan["name"] + more, kind, name))
    ]
    seen = [ModelRecord.read(records, run, {"model": name}) for _, run in judged]
    spec = (route.specs if route else {}).get(incumbent) or (gone.specs if gone else {}).get(name)
    measured = next((engine for one in seen for engine in one.engines.values() if engine["engine"] == incumbent), None)
    back = [step.at for _, run in judged for step in records.steps(run.id, name) if step.step == "rollback"]
    return ModelFacts(
        id=name,
        names=(name, *(entry.get("aliases") or ())),
        file=str(entry.get("gguf", NOT_RECORDED)),
        digest=next((one.digest for one in seen if one.digest), NOT_MEASURED),
        before=_engine(spec) if spec else _measured(measured) if measured else None,
        now=_engine(route.specs[route.serving]) if route and route.serving in route.specs else None,
        serving=route.serving if route else None,
        undo=route.undo if route else None,
        moved=route is not None and route.serving != incumbent,
        moved_at=_moment(route.moved_at) if route and route.moved_at else None,
        selected=route.selected if route else "auto",
        canary=f"; {canary.engine} for {canary.weight:.0%} of conversations" if canary else "",
        rolled_back=max(back, default=None),
        phases=tuple(_phase(records, *found, plan, record) for found, record in zip(judged, seen, strict=True)),
        slow=next((tuple(one.slow) for one in seen if one.slow), ()),
    )


def _latest(records: Records, runs: Sequence[Run], name: str, kind: str, model: str) -> Run | None:
    """The latest run of a phase that judged the model; of evaluations the latest that got done, where one did."""
    judged = [run for run in runs if (run.kind, run.name) == (kind, name) and model in records.checks(run.id)]
    done = [run for run in judged if run.status == "done" or kind != "evaluate"]
    return next(iter(done or judged), None)


def _phase(records: Records, title: str, run: Run, plan: Mapping[str, Any], seen: ModelRecord) -> PhaseFacts:
    replayed = any(model.get("transcripts") for model in seen.plan.get("models") or [])
    checks = tuple(_unquoted(result, replayed=replayed) for result in records.checks(run.id)[seen.name])
    compared, deviations = _compared(title, seen)
    return PhaseFacts(
        title=title,
        evaluates=run.kind == "evaluate",
        run_id=run.id,
        at=run.started_at,
        status=run.shown_status,
        verdict=gate(checks),
        plan_changed=run.plan_hash != plan_hash(plan if run.name == plan["name"] else _as_native(plan)),
        elsewhere=run.owner_host != host(),
        checks=checks,
        deviations=deviations,
        compared=compared,
    )


def _engine(spec: LaunchSpec) -> EngineFacts:
    argv, unsupported, serve = list[str](), None, spec.serve(PORT, None)
    with contextlib.suppress(BadInput):  # an engine that this Switchyard does not know
        known = driver(spec.kind)
        argv = known.argv(spec.installation, serve)
        unsupported = (*known.unsupported(spec.installation, serve), *spec.not_given)
    settings = spec.settings.model_dump(mode="json", exclude_defaults=True)
    return EngineFacts(spec.engine, spec.form, spec.version, _command(argv), _settings(settings), unsupported)


def _measured(engine: Mapping[str, Any]) -> EngineFacts:
    """The engine as it stands beside the evidence, where no spec is kept."""
    settings = {name: value for name, value in (engine.get("settings") or {}).items() if value is not None}
    form, version = str(engine.get("form") or NOT_RECORDED), str(engine.get("version") or NOT_RECORDED)
    argv, unsupported = engine.get("argv") or [], tuple(engine.get("unsupported") or ())
    return EngineFacts(str(engine["engine"]), form, version, _command(argv), _settings(settings), unsupported)


def _command(argv: Sequence[str]) -> tuple[str, ...]:
    """The words of a command without secrets; its port, another one at each start, as PORT."""
    words = [str(word) for word in redact(list(argv))]
    return tuple("PORT" if at and words[at - 1] in ("--port", "-p") else word for at, word in enumerate(words))


def _settings(settings: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{name} = {json.dumps(value)}" for name, value in settings.items())


def _compared(phase: str, seen: ModelRecord) -> tuple[int | None, tuple[Deviation, ...]]:
    """How many API behaviours were tried on both engines, and those, and parameters, in which they differ."""
    tried = _both(seen, "compatibility", "behaviours")
    unlike = [(f"{name}: {new['claim']}", old["outcome"], new["outcome"], new) for name, old, new in tried]
    for name, old, new in _both(seen, "parity.parameters", "parameters"):
        unlike.append((f"{name}: a parameter", EFFECTS[old["effect"]], EFFECTS[new["effect"]], new))
    found = (
        Deviation(phase, what, old.replace("_", " "), new.replace("_", " "), shortened(str(record["observed"])))
        for what, old, new, record in unlike
        if old != new
    )
    return len(tried) or None, tuple(found)


def _both(seen: ModelRecord, kind: str, part: str) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """The records of both engines under each name; what was redacted on its way into the records is left out."""
    old, new = ((seen.one(arm, kind) or {}).get(part) or {} for arm in ("incumbent", "candidate"))
    pairs = [(name, old[name], new.get(name)) for name in old]
    return [(name, a, b) for name, a, b in pairs if isinstance(a, Mapping) and isinstance(b, Mapping)]
