"""The plan of phase 3: from the candidate as a subprocess to the same engine, native."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from engines.driver import native_of
from engines.errors import BadInput
from engines.registry import native_driver
from migrations.plan import EngineChoice, Plan


def native_plan(plan: Plan, models: Collection[str] = ()) -> Plan:
    """`plan` for phase 3: its candidate as it serves is the incumbent now, the same engine native the candidate.

    With `models` it has those only: the others are not measured. Raises BadInput for a candidate without a native form.
    """
    native = native_driver(plan.candidate.engine)
    if native is None:
        raise BadInput(f"{plan.candidate.engine} has no native form: phase 3 is for mistral.rs")
    changes: dict[str, Any] = {
        "models": tuple(plan.model(name) for name in models) or plan.models,
        "name": f"{plan.name}-native",
        "incumbent": plan.candidate,
        "candidate": EngineChoice.model_validate({"engine": native.name, "name": native_of(plan.candidate.name)}),
    }
    return plan.model_copy(update=changes)
