"""What of the incumbent's own flags reaches the candidate: as defaults of requests, or not at all, and then by name."""

from __future__ import annotations

from typing import Any

from engines.driver import Installation
from engines.own_args import Flag
from engines.registry import driver
from migrations.plan import Plan


def request_defaults(plan: Plan, model_id: str, found: Installation) -> dict[str, Any]:
    """Fields that a request to `found` gets where it does not set them: the incumbent has them from its flags.

    Empty for the incumbent itself. Names are those of the engine.
    """
    dialect = driver(found.kind).dialect(found)
    fields = {flag.field: flag.default for flag in _not_repeated(plan, model_id, found) if flag.field}
    return {dialect.words.get(name, name): value for name, value in fields.items() if name not in dialect.ignores}


def unsupported(plan: Plan, model_id: str, found: Installation) -> list[str]:
    """What `found` cannot honour when it serves the model, one line each, named before the colon."""
    return [
        *driver(found.kind).unsupported(found, plan.serve(model_id, found.engine)),
        *not_given(plan, model_id, found),
    ]


def named(line: str) -> str:
    """The name of what is not supported, by which a plan accepts it."""
    return line.partition(":")[0]


def no_chat(plan: Plan, model_id: str) -> str | None:
    """Why the model cannot be evaluated: its incumbent is no server for chat; None where it is one."""
    name = plan.incumbent.name
    other = driver(plan.incumbent.engine).own_args.other_server(plan.own_args(model_id, name))
    return f"{other}; an evaluation compares chat: keep it on {name}, the yard serves it" if other else None


def not_given(plan: Plan, model_id: str, found: Installation) -> list[str]:
    """The incumbent's own flags that `found` serves without, one line each; empty for the incumbent itself."""
    lines = []
    ignores = driver(found.kind).dialect(found).ignores
    for flag in _not_repeated(plan, model_id, found):
        if flag.field in ignores:
            lines.append(f"args {flag.key}: a default of requests today; {found.engine} does not act on {flag.field}")
        elif not flag.field and not flag.is_quiet:
            lines.append(f"args {flag.key}: given to {plan.incumbent.name} only; {found.engine} serves without it")
    return lines


def _not_repeated(plan: Plan, model_id: str, found: Installation) -> list[Flag]:
    """The incumbent's own flags that `found` is not given as well."""
    if found.engine == plan.incumbent.name:
        return []
    given = driver(plan.incumbent.engine).own_args.flags(plan.own_args(model_id, plan.incumbent.name))
    repeated = driver(found.kind).own_args.flags(plan.own_args(model_id, found.engine))
    return [flag for key, flag in given.items() if key not in repeated]
