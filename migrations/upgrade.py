"""The plan of an upgrade: what serves now against another build of the same engine. The old plan stays as it is."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from datetime import date
from pathlib import Path
from typing import Any

from engines.errors import BadInput
from engines.registry import PYTHONS
from engines.units import duration, figure
from migrations.carried import request_defaults
from migrations.new_build import PAIR
from migrations.plan import EngineChoice, ModelPlan, Plan
from migrations.plan_file import build_plan

NAME = "-upgrade"  # how the names of such plans end
SOAK_S = 600.0
LOOKS = (6, 12, 24)
OF_THE_MACHINE = ("foreign_cpu", "client_cpu", "kill_detect_s", "hang_detect_s", "recover_s", "memory_headroom_ratio")
_SUFFIX = re.compile(r"\.upgrade-\d{4}-\d\d-\d\d(-\d+)?$")
_COMMIT = re.compile(r"\b[0-9a-f]{7,40}\b")


def upgrade_plan(plan: Plan, serving: str, binary: Path, *, version: str = "", taken: Collection[str] = ()) -> Plan:
    """`plan` as the upgrade of the engine that is `serving` to the build at `binary`, served as it is served now.

    The new build is called by `version`, else by what it reports; `taken` are names that it may not have. Raises
    BadInput for a build that cannot be compared, EngineNotFound for one that does not run.
    """
    old = next((one for one in (plan.incumbent, plan.candidate) if one.name == serving), None)
    if old is None:
        raise BadInput(f"{serving} serves, which has no other build: promote {plan.candidate.name} first")
    was = old.find()
    if any(request_defaults(plan, model.id, was) for model in plan.models):
        raise BadInput(f"{serving} gets defaults from the flags of {plan.incumbent.name}: write them as its own `args`")
    found = build_at(old.engine, binary).find()
    if was.form == "binary":  # pinned: a search would find the new build one day
        old = old.model_copy(update={"binary": Path(was.program[0])})
        if binary.resolve() == Path(was.program[0]).resolve():
            raise BadInput(f"{binary} is the build that serves; name another one, or a copy of its folder")
    name = _name(old.engine, version or found.version, {old.name, *taken})
    new = build_at(old.engine, binary, name=name, args=old.args, env=old.env)
    looks = min(plan.measure.looks, LOOKS, key=lambda looks: looks[-1])
    changes = {
        "name": plan.name if plan.name.endswith(NAME) else f"{_subject(plan.name, old.engine)[:120]}{NAME}",
        "incumbent": old,
        "candidate": new,
        "models": tuple(_model(plan, model, old.name, name) for model in plan.models),
        "measure": plan.measure.model_copy(update={"soak_s": min(plan.measure.soak_s, SOAK_S), "looks": looks}),
        "limits": PAIR.limits.model_copy(update={key: getattr(plan.limits, key) for key in OF_THE_MACHINE}),
    }
    return build_plan({**dict(plan), **changes}, where="the upgrade")


def build_at(kind: str, program: Path, **more: Any) -> EngineChoice:
    """The engine at `program`: its own, or the Python of an environment with its wheel. BadInput where it has none."""
    is_python = re.fullmatch(r"python[0-9.]*", program.name) is not None
    if is_python and kind not in PYTHONS:
        raise BadInput(f"{program} is a Python, and {kind} runs in none of its own; name a program of {kind}")
    return EngineChoice(engine=kind, **{"python" if is_python else "binary": program}, **more)


def _subject(name: str, kind: str) -> str:
    """What is upgraded: the plan by its name, or the engine where the name is that of a move to another one."""
    return kind if re.fullmatch(r".+-to-.+", name) else name


def _model(plan: Plan, model: ModelPlan, old: str, new: str) -> ModelPlan:
    """The model with what it gives the old build for both; which engine serves it is what the upgrade decides."""
    own = [args for who, args in model.engines.items() if plan.named(who) == old]
    engines = {who: args for args in own for who in (old, new)}
    return model.model_copy(update={"engine": "auto", "engines": engines, "overflow": None})


def upgrade_file(plan_file: Path, day: date) -> Iterator[Path]:
    """Where the plan of an upgrade may lie: `PLAN.upgrade-DATE.toml` beside the plan, numbered, and the plan itself."""
    if _SUFFIX.search(plan_file.stem):
        yield plan_file
    stem = f"{_SUFFIX.sub('', plan_file.stem)}.upgrade-{day.isoformat()}"
    yield from (plan_file.with_name(f"{stem}{number}.toml") for number in ("", *(f"-{n}" for n in range(2, 1000))))


def is_upgrade_of(file: Path, plan_file: Path) -> bool:
    """Whether `file` is where the plan of an upgrade of `plan_file` lies."""
    return _SUFFIX.search(file.stem) is not None and _SUFFIX.sub("", file.stem) == plan_file.stem


def cannot_prove(plan: Plan) -> tuple[str, ...]:
    """What the evidence of an upgrade leaves open; nothing for a plan that soaks longer, or is none."""
    soak_s, is_upgrade = (
        plan.measure.soak_s,
        plan.incumbent.engine == plan.candidate.engine and plan.name.endswith(NAME),
    )
    if not is_upgrade or soak_s > SOAK_S:
        return ()
    soak, rate = duration(soak_s), figure(3 * 86_400 / soak_s)
    return (
        f"failures per day: {soak} without one bound the rate at about {rate} a day (95%); 3 clean days bound it at 1",
        f"leaks: a slope in bytes per day needs 48 hours; {soak} show only growth that a crash would show as well",
        "rare requests: images, tools and long contexts count as far as the plan's own transcripts have them",
    )


def _name(kind: str, version: str, taken: Collection[str]) -> str:
    """`KIND@VERSION`, the version by its commit where it has one; numbered where the name is another engine's."""
    commit = _COMMIT.search(version)
    short = commit[0] if commit else re.sub(r"[^A-Za-z0-9._+-]+", "-", version).strip("-")[:40]
    names = (f"{kind}@{short}{number}" for number in ("", *(f"-{n}" for n in range(2, 1000))))
    return next(name for name in names if name not in taken)
