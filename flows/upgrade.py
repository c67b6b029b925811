"""An upgrade: another build of the engine that serves, evaluated, and moved to behind the running yard.

evaluate    cheap checks first: tokens, templates, answers; then the API, speed, a soak
take over   the yard gets the plan that has both builds; no request is dropped
move        rehearsal, canary, promote, of each model whose gate opened; the old build is the way back
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import flow

from engines.home import home
from engines.yard.client import YardClient
from engines.yard.state import StateFile
from flows.evaluate import evaluate
from flows.evaluation.beside import DoesNotFit, lacking
from flows.orchestrator.ending import NOTHING_NEW, VERSION
from flows.progress import progress
from flows.rollout.new_build import asked_plan, serving, watched, written
from flows.rollout.orders import Orders
from flows.rollout.phase_one import PhaseOne, engines_here, phase_one
from flows.rollout.yards import take_over
from flows.subprocess_phase import to_subprocess
from migrations.plan import Plan
from migrations.plan_file import load_plan
from tasks.records.store import open_records
from tasks.verdicts.verdict import Verdict, worst


@flow(name="upgrade", flow_run_name="upgrade {path.stem}", version=VERSION, persist_result=False)
def upgrade(path: Path, check_only: bool = False, orders: Orders | None = None) -> dict[str, Any]:
    """Evaluate the plan of an upgrade, unless the records have its verdicts, and move each model whose gate is open."""
    plan, evaluation, migration = load_plan(path), None, None
    known, unfinished = _known(plan)
    if not all(found.verdict for found in known.values()):
        evaluation = evaluate.fn(plan, unfinished, command=("switchyard", "evaluate", str(path)))
        known, _ = _known(plan)
    movable = tuple(model for model, found in known.items() if found.open)
    if movable and not check_only:
        if YardClient(home()).runs():
            progress.get().note(take_over(home(), path, progress.get().say))
        migration = to_subprocess(plan, path, (orders or Orders()).model_copy(update={"models": movable}))
    return {
        "plan": plan.name,
        "plan_file": str(path),
        "verdict": _verdict(known, migration).value,
        "models": [_end(model, found, migration) for model, found in known.items()],
        "evaluation": evaluation,
        "migration": migration,
    }


def compared_at_night(base: Plan, path: Path) -> dict[str, Any]:
    """The build that `[upgrade] watch` of `base` leads to against the one that serves, once; no soak, and no move."""
    if not base.upgrade.watch:
        return _nothing_new("the plan has no [upgrade] watch")
    old = serving(base, StateFile(home() / "yard").read())
    if (newer := watched(base, old, home())) is None:
        return _nothing_new(f"{base.upgrade.watch} is the build that serves as {old}")
    plan = asked_plan(base, old, *newer, home())
    known, unfinished = _known(plan)
    if unfinished is None and all(found.verdict for found in known.values()):
        verdicts = ", ".join(f"{model}: {found.verdict}" for model, found in known.items())
        return _nothing_new(f"{plan.candidate.name} is compared already ({verdicts})")
    if (short := lacking(plan, home())) is not None:
        raise DoesNotFit(f"skipped: {short}; stop the yard and run `switchyard upgrade --to {newer[0]} --check-only`")
    file, _ = written(plan, path)
    outcome = evaluate.fn(plan, unfinished, with_soak=False, command=("switchyard", "evaluate", str(file)))
    failed = outcome["verdict"] in (Verdict.FAIL, Verdict.ERROR)
    next_ = f"stay on {old}" if failed else f"`switchyard upgrade {path} --to {newer[0]}` adds the soak and moves"
    return {**outcome, "why": f"{plan.candidate.name} against {old}: {next_}; report: {outcome['report']}"}


def _nothing_new(why: str) -> dict[str, Any]:
    return {"verdict": Verdict.PASS.value, "result": NOTHING_NEW, "why": why, "models": []}


def _known(plan: Plan) -> tuple[dict[str, PhaseOne], str | None]:
    """The verdict on each model by just this plan and these builds, and a run of it that is unfinished."""
    found = engines_here(plan)
    builds = {one.engine: one.build for one in found}
    with open_records() as records:
        unfinished = records.unfinished(plan.model_dump(mode="json"))
        known = {model.id: phase_one(records, plan, model, found[0].version, builds) for model in plan.models}
    return known, unfinished.id if unfinished else None


def _verdict(known: Mapping[str, PhaseOne], migration: Mapping[str, Any] | None) -> Verdict:
    moved = [Verdict(migration["verdict"])] if migration else []
    return worst([*moved, *(found.verdict or Verdict.INCONCLUSIVE for found in known.values())])


def _end(model: str, found: PhaseOne, migration: Mapping[str, Any] | None) -> dict[str, Any]:
    """How it ended for one model: by its move, else by its evaluation."""
    for end in (migration or {}).get("models", ()):
        if end["model"] == model:
            return dict(end)
    result = "may move" if found.open else "stays"
    verdict = found.verdict or Verdict.INCONCLUSIVE
    return {"model": model, "verdict": verdict.value, "result": result, "why": found.why}
