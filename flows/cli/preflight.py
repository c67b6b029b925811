"""`switchyard preflight`: a plan or GGUF files in, the report out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.errors import BadInput, EngineError
from engines.registry import drivers
from migrations.plan import load_plan
from tasks.evidence.preflight import preflight


def examine(targets: Sequence[Path], *, context: int | None) -> dict[str, Any]:
    """What loads and fits, of the plan's models or of the files named; BadInput names the first that cannot be read."""
    plans = [target for target in targets if target.suffix == ".toml"]
    if plans and len(targets) > 1:
        raise BadInput(f"{plans[0]}: give one plan, or GGUF files, not both")
    if not plans:
        models = [(model_id, path) for model_id, path in zip(_ids(targets), targets, strict=True)]
        return preflight(models, context=context, versions=_versions())
    plan = load_plan(plans[0])
    return preflight(
        [(model.id, model.gguf) for model in plan.models],
        settings_by_model={model.id: plan.settings_for(model.id) for model in plan.models},
        engines=list(dict.fromkeys([plan.incumbent.engine, plan.candidate.engine])),
        context=context,
        versions=_versions(),
    )


def _ids(paths: Sequence[Path]) -> list[str]:
    """File names without the suffix; the path where two files share a name."""
    stems = [path.stem for path in paths]
    return [stem if stems.count(stem) == 1 else str(path) for stem, path in zip(stems, paths, strict=True)]


def _versions() -> dict[str, str | None]:
    """The mistral.rs version on this machine, where there is one: its list of architectures depends on it."""
    try:
        return {"mistral.rs": drivers()["mistral.rs"].find().version}
    except EngineError:
        return {}
