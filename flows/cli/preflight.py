"""`switchyard preflight`: a plan or GGUF files in, the report out."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.errors import BadInput, EngineError
from engines.registry import DRIVERS, driver
from migrations.plan_file import load_plan
from tasks.evidence.preflight import preflight


def examine(targets: Sequence[Path], *, context: int | None) -> dict[str, Any]:
    """What loads and fits, of the plan's models or of the files named; BadInput names the first that cannot be read."""
    plans = [target for target in targets if target.suffix == ".toml"]
    if plans and len(targets) > 1:
        raise BadInput(f"{plans[0]}: give one plan, or GGUF files, not both")
    if not plans:
        models = [(model_id, path) for model_id, path in zip(_ids(targets), targets, strict=True)]
        return preflight(models, context=context, versions=_versions(list(DRIVERS)))
    plan = load_plan(plans[0])
    engines = list(dict.fromkeys([plan.incumbent.engine, plan.candidate.engine]))
    return preflight(
        [(model.id, model.gguf) for model in plan.models],
        settings_by_model={model.id: plan.settings_for(model.id) for model in plan.models},
        engines=engines,
        context=context,
        versions=_versions(engines),
    )


def _ids(paths: Sequence[Path]) -> list[str]:
    """File names without the suffix; the path where two files share a name."""
    stems = [path.stem for path in paths]
    return [stem if stems.count(stem) == 1 else str(path) for stem, path in zip(stems, paths, strict=True)]


def _versions(engines: Sequence[str]) -> dict[str, str]:
    """The version of each engine that is on this machine: what it loads may depend on it."""
    versions = {}
    for engine in engines:
        with contextlib.suppress(EngineError):
            versions[engine] = driver(engine).find().version
    return versions
