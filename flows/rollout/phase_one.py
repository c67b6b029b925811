"""Result of phase 1 for a model: the verdict of its latest evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

from engines.driver import Installation
from engines.errors import EngineNotFound
from engines.home import host
from migrations.plan import ModelPlan, Plan, content_hash
from tasks.records.store import Records
from tasks.verdicts.verdict import CheckResult, Verdict, gate, reasons

LOOK_BACK = 200  # evaluations; an older one than these is no evidence any more


@dataclass(frozen=True)
class PhaseOne:
    """Result of phase 1 for a model: why its gate is open or shut, by which run; `verdict` where it has one."""

    why: str
    run_id: str | None = None
    verdict: Verdict | None = None
    checks: tuple[CheckResult, ...] = ()

    @property
    def open(self) -> bool:
        """Whether the model may move."""
        return self.verdict is Verdict.PASS


def engines_here(plan: Plan) -> list[Installation]:
    """The candidate as it is on this machine, and the incumbent where it is still there. Raises EngineNotFound."""
    found = [plan.candidate.find()]
    with contextlib.suppress(EngineNotFound):
        found.append(plan.incumbent.find())
    return found


def phase_one(
    records: Records, plan: Plan, model: ModelPlan, candidate_version: str, builds: Mapping[str, str] | None = None
) -> PhaseOne:
    """The verdict of this host's latest evaluation of just this plan, model file and version of the candidate.

    `builds` has the `build_digest` of each engine by its name, as it is here now: one that was measured as another
    build shuts the gate.
    """
    identity = (content_hash(plan), model.digest)
    other: str | None = None
    for run in records.history(LOOK_BACK, kind="evaluate", host=host()):
        results = records.checks(run.id).get(model.id) if run.status == "done" else None
        if not results:
            continue
        under = records.evidence_environments(run.id, model.id)
        if not under or any((seen.get("plan_hash"), seen.get("model_digest")) != identity for seen in under):
            other = other or run.id
            continue
        versions = {e["version"] for seen in under for e in seen.get("engines", ()) if e["arm"] == "candidate"}
        if versions != {candidate_version}:
            measured = ", ".join(sorted(versions)) or "no version"
            return PhaseOne(f"run {run.id} measured {measured}; here is {candidate_version}", run.id)
        measured_builds = {(e.get("engine"), e.get("build")) for seen in under for e in seen.get("engines", ())}
        for name, build in (builds or {}).items():
            if any(engine == name and other and other != build for engine, other in measured_builds) and build:
                why = f"{name} has changed since run {run.id} measured it: its program, or a library beside it"
                return PhaseOne(f"{why}, is another one now; evaluate again", run.id)
        verdict, shut = gate(results), reasons(results)
        first = f": {shut[0].check}: {shut[0].why}" if shut else ""
        end = "opened it" if verdict is Verdict.PASS else f"ended with {verdict}{first}"
        return PhaseOne(f"run {run.id} {end}", run.id, verdict, tuple(results))
    if other:
        return PhaseOne(f"run {other} evaluated another plan or another model file", other)
    return PhaseOne("it was never evaluated")
