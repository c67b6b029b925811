"""Whether an engine can be retired, and the archive from which it comes back.

routes      every model of the plan is served by another engine, and none falls back to this one now
window      each model has been there long enough that nobody wants back: the plan's rollback window
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.registry import driver
from engines.yard.engine.launch_spec import LaunchSpec
from engines.yard.state import ModelState, YardState
from tasks.verdicts.verdict import CheckResult, Verdict, not_measured

DAY_S = 86_400.0


@dataclass(frozen=True)
class Standing:
    """Where one model stands. `route` is None for one that no yard has served yet; `fallback` is the one in force."""

    model_id: str
    route: ModelState | None
    fallback: str | None = None


def judge_retirement(
    engine: str, models: Sequence[Standing], *, window_s: float, now: float, waived: str | None = None
) -> list[CheckResult]:
    """Who still needs the engine, and whose window is open; `waived` says who decided not to wait for that."""
    results = []
    for model in models:
        results.append(_judge_route(engine, model))
        if results[-1].verdict is Verdict.PASS:
            results.append(_judge_window(model, window_s, now, waived))
    return results


def _judge_route(engine: str, model: Standing) -> CheckResult:
    check, route = f"retire.routes.{model.model_id}", model.route
    needs = None
    if route is None:
        needs = "it was never migrated"
    elif route.serving == engine:
        needs = f"it is served by {engine}"
    elif route.canary is not None and route.canary.engine == engine:
        needs = f"it has a canary on {engine}"
    elif model.fallback == engine:
        needs = f"{route.serving} is out of order and {engine} serves in its place"
    if needs:
        return CheckResult(check=check, verdict=Verdict.FAIL, why=f"{model.model_id}: {needs}")
    assert route is not None
    return CheckResult(check=check, verdict=Verdict.PASS, why=f"{model.model_id} is served by {route.serving}")


def _judge_window(model: Standing, window_s: float, now: float, waived: str | None) -> CheckResult:
    check = f"retire.window.{model.model_id}"
    moved = model.route.moved_at if model.route else None
    if waived:
        return not_measured(check, f"not waited for: {waived}", required=False)
    if moved is None:
        return not_measured(check, f"nobody knows since when {model.model_id} has been there")
    ends = moved + window_s
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(ends))
    value = (now - moved) / DAY_S
    verdict = Verdict.INCONCLUSIVE if now < ends else Verdict.PASS
    why = f"{model.model_id} has been there for {value:.1f} days; its window ended {day}"
    if now < ends:
        why = f"{model.model_id} may want back until {day}; wait, or add --now --who NAME --reason TEXT"
    return CheckResult(check=check, verdict=verdict, value=value, limit=window_s / DAY_S, unit="days", why=why)


def write_archive(folder: Path, engine: str, state: YardState, plan_toml: str) -> Path:
    """All it takes to have the engine back, by `switchyard restore` or by hand; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    specs = {name: route.specs[engine] for name, route in state.models.items() if engine in route.specs}
    specs |= state.retired[engine].specs if engine in state.retired else {}
    plain = {name: spec.model_dump(mode="json") for name, spec in specs.items()}
    (folder / "recipes.json").write_text(json.dumps(plain, indent=1), encoding="utf-8")
    (folder / "plan.toml").write_text(plan_toml, encoding="utf-8")
    (folder / "state.json").write_text(state.text(), encoding="utf-8")
    (folder / "README.md").write_text(_readme(engine, specs), encoding="utf-8")
    return folder


def _readme(engine: str, specs: Mapping[str, LaunchSpec]) -> str:
    lines = [
        f"# {engine}, retired",
        "",
        f"`switchyard restore {engine}` brings it back: on every route that it was on, and installed again where",
        "Switchyard had installed it. To start it by hand, without Switchyard:",
        "",
    ]
    for model_id, spec in specs.items():
        argv = driver(spec.kind).argv(spec.installation, spec.serve(8080, None))
        start = " ".join(argv) or f"# others run it at {spec.url}"
        where = spec.where or spec.form
        lines += [
            f"{model_id}, version {spec.version} ({where}):",
            "",
            "```sh",
            start,
            "```",
            "",
        ]
    lines += ["`recipes.json` has the settings, `plan.toml` the plan, `state.json` the routes as they were.", ""]
    return "\n".join(lines)
