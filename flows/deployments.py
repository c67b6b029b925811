"""The deployments in the Prefect UI: every flow with its form, schedule and tags, and the process that serves them.

`switchyard up` serves them on one host; `prefect.yaml` hands the same ones to the work pools of a fleet (a test holds
the two together). A scheduled run that is late, or finds another experiment under way, is Cancelled: none pile up.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import httpx
from prefect import Flow, flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, StateType
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.deployments.runner import RunnerDeployment
from prefect.events import DeploymentEventTrigger
from prefect.exceptions import PrefectException
from prefect.runner import Runner
from prefect.runtime import flow_run
from prefect.states import Cancelled, Crashed
from prefect.types.entrypoint import EntrypointType
from pydantic import Field

from engines.errors import BadInput
from engines.home import home as default_home
from engines.home import host
from engines.yard.client import YardClient
from engines.yard.state import StateFile
from flows import deprecate as deprecation
from flows import evaluate as evaluation
from flows import soak as soaking
from flows.evaluation.beside import DoesNotFit, lacking
from flows.evaluation.rejudge import rejudge
from flows.migrate import migrated
from flows.orchestrator.ending import NOTHING_MOVED, VERSION, concluding
from flows.orchestrator.notifications import put_notifications
from flows.progress import progress
from flows.reconcile import reconcile
from flows.rollback import Wish, movable, roll_back
from flows.rollout.approval import asks, in_advance
from flows.rollout.orders import Orders
from flows.schedules import EVALUATE, RECONCILE, SOAK, UPGRADE_CHECK, time_zone
from flows.upgrade import compared_at_night
from migrations.plan import Plan
from migrations.plan_file import load_plan, plan_path
from tasks.records.store import open_records

BREACH = "switchyard.soak.breached"
CONCURRENT = 4  # an experiment, and beside it a rollback, a report and the upkeep
SERVED = "deployments are served"
WARNING = "warning: "  # before a line that `switchyard up` shows


@flow(name="evaluate", flow_run_name=lambda: _name("evaluate"), version=VERSION, persist_result=False)
@concluding
def evaluate(plan: str = "", late_minutes: int = 120, with_soak: bool = False) -> Any:
    """Phase 1: measure both engines over every model of the plan, and judge; an unfinished run is resumed.

    Args:
        plan: the plan file (.toml); empty: the one the yard served last
        late_minutes: a scheduled run that starts later than this is skipped
        with_soak: also put load on both engines for the plan's soak_s, days by default, beside what the yard serves
    """
    return _unless_late(late_minutes, lambda: _evaluated(*_loaded(plan), with_soak=with_soak))


def _evaluated(plan: Plan, path: Path, *, with_soak: bool) -> dict[str, Any]:
    if (why := lacking(plan, default_home())) is not None:
        raise DoesNotFit(f"skipped: {why}; stop the yard and run `switchyard evaluate {path}` to measure all the same")
    with open_records() as records:
        unfinished = records.unfinished(plan.model_dump(mode="json"))
    command = ("switchyard", "evaluate", str(path))
    return evaluation.evaluate.fn(plan, unfinished.id if unfinished else None, with_soak=with_soak, command=command)


@flow(name="upgrade-check", flow_run_name=lambda: _name("upgrade-check"), version=VERSION, persist_result=False)
@concluding
def upgrade_check(plan: str = "", late_minutes: int = 120) -> Any:
    """Compare the build that the plan's `[upgrade] watch` leads to with the one that serves. Nothing moves.

    Args:
        plan: the plan file (.toml); empty: the one the yard served last
        late_minutes: a scheduled run that starts later than this is skipped
    """
    return _unless_late(late_minutes, lambda: compared_at_night(*_loaded(plan)))


@flow(name="migrate", flow_run_name=lambda: _name("migrate"), version=VERSION, persist_result=False)
@concluding
def migrate(
    plan: str = "",
    models: list[str] = [],  # noqa: B006
    override: list[str] = [],  # noqa: B006
    who: str = "",
    reason: str = "",
    without_canary: bool = False,
    without_rehearsal: bool = False,
    approve: bool = False,
) -> Any:
    """All four phases, every model as far as its gates let it. Where the plan asks, the run waits for its form here.

    Args:
        plan: the plan file (.toml); empty: the one the yard served last
        models: these models only; empty: all of the plan's
        override: models that migrate although their gate is closed; needs your name and a reason
        who: your name, for a decision against the evidence; it is recorded
        reason: why; it is recorded
        without_canary: move all traffic at once; needs your name and a reason
        without_rehearsal: do not rehearse the fallback first; needs your name and a reason
        approve: approve every phase in advance; needs your name and a reason
    """
    if approve:
        if not (who.strip() and reason.strip()):
            raise BadInput("an approval is recorded with a name and a reason: fill in who and reason")
        asks.set(in_advance(who, reason))
    decided = {"who": who, "reason": reason, "without_canary": without_canary, "without_rehearsal": without_rehearsal}
    orders = Orders.model_validate({"models": models, "override": override, **decided})
    return migrated(*_loaded(plan), orders)


@flow(name="rollback", flow_run_name=lambda: _name("rollback"), version=VERSION, persist_result=False)
@concluding
def rollback(model: str = "", who: str = "", reason: str = "", only_from: str = "") -> Any:
    """Put a model back on the engine it came from, at once, and prove it by a real token.

    Args:
        model: the model; empty: every model that was moved
        who: your name; it is recorded
        reason: why; it is recorded
        only_from: roll back only while this engine serves the model; empty: whatever serves it
    """
    home = default_home()
    wish = Wish(who=who, reason=reason, only_from=only_from, flow_run_id=flow_run.id)
    if model:
        names = [model]
    elif YardClient(home).runs():
        names = movable(home)
    else:  # what the yard wrote down
        stored = StateFile(home / "yard").read().models
        names = [name for name, state in stored.items() if state.undo or state.canary]
    if not names:
        return {"verdict": "PASS", "result": NOTHING_MOVED, "why": "there is nothing to roll back", "models": []}
    outcomes = []
    for name in names:
        with progress.get().step(f"{name} · rollback"):
            outcomes.append(roll_back(home, name, wish, progress.get().say))
    worst = next((one for one in outcomes if one["verdict"] != "PASS"), outcomes[0])
    return {"verdict": worst["verdict"], "why": worst["done"], "models": outcomes}


@flow(name="retire", flow_run_name=lambda: _name("retire"), version=VERSION, persist_result=False)
@concluding
def retire(plan: str = "", who: str = "", reason: str = "", now: bool = False, uninstall: bool = False) -> Any:
    """Phase 4: retire the incumbent, or say who still needs it.

    Args:
        plan: the plan file (.toml); empty: the one the yard served last
        who: your name; it is recorded
        reason: why; it is recorded
        now: do not wait for the rollback window; needs your name and a reason
        uninstall: also remove what Switchyard installed of it
    """
    loaded, _ = _loaded(plan)
    return deprecation.deprecate(loaded, who=who, reason=reason, at_once=now, uninstall=uninstall)


@flow(name="report", flow_run_name=lambda: _name("report"), version=VERSION, persist_result=False)
@concluding
def report(run: str = "latest") -> Any:
    """Make a run's verdicts again from its raw evidence, and write its HTML report.

    Args:
        run: the run's id, part of it, or latest
    """
    home = default_home()
    outcome = rejudge(home, run, None)
    with open_records() as records:
        evaluation.publish(records, home, outcome)
    why = f"run {outcome['run_id']}: {outcome['verdict']}; {outcome['report']}"
    return {**outcome, "result": "report written", "why": why}  # its gate may be closed: the report is none


@flow(name="soak", flow_run_name=lambda: _name("soak"), version=VERSION, persist_result=False)
@concluding
def soak(plan: str = "", window_s: Annotated[float, Field(ge=1, le=86_400)] = 240, late_minutes: int = 8) -> Any:
    """Add one window of load to the soak of the engine that serves; over days the windows become a verdict.

    Args:
        plan: the plan file (.toml); empty: the one the yard served last
        window_s: seconds of load that this run adds
        late_minutes: a scheduled run that starts later than this is skipped
    """
    return _unless_late(late_minutes, lambda: soaking.soak(plan, window_s))


@flow(name="reconcile", flow_run_name="reconcile", version=VERSION, persist_result=False)
@concluding
def reconcile_home(late_minutes: int = 4) -> Any:
    """End what a killed run left behind, mark it, and close what it left open.

    Args:
        late_minutes: a scheduled run that starts later than this is skipped
    """

    def work() -> dict[str, Any]:
        with open_records() as records:
            lines = reconcile(default_home(), records, progress.get().say)
        return {"verdict": "PASS", "why": "; ".join(lines) or "nothing to clean up", "lines": lines}

    return _unless_late(late_minutes, work)


# --- the name and the end of a run


def _name(what: str) -> str:
    asked = flow_run.parameters or {}
    about = asked.get("model") or Path(str(asked.get("plan") or "")).stem or asked.get("run") or ""
    return f"{what} {about}".rstrip()


def _unless_late(minutes: int, work: Callable[[], dict[str, Any]]) -> Any:
    due = flow_run.scheduled_start_time
    late_s = (datetime.now(UTC) - due).total_seconds() if due else 0.0
    if late_s > minutes * 60:
        return Cancelled(message=f"scheduled {late_s / 60:.0f} min ago; skipped as late")
    return work()


def _loaded(plan: str) -> tuple[Plan, Path]:
    path = plan_path(Path(plan) if plan else None, default_home())
    loaded = load_plan(path)
    if flow_run.id is not None:  # a label for the lists and filters of the UI is worth no failure
        tags = {loaded.incumbent.name, loaded.candidate.name, *(model.id for model in loaded.models)}
        with suppress(httpx.HTTPError, PrefectException), get_client(sync_client=True) as client:
            client.update_flow_run(UUID(flow_run.id), tags=sorted({*flow_run.tags, *tags}))
    return loaded, path


# --- the deployments


@dataclass(frozen=True)
class Offer:
    """One deployment: its flow, its tags, and its schedule (cron or interval; none: it runs only when started)."""

    flow: Flow[..., Any]
    phase: str
    cron: str | None = None
    every: timedelta | None = None
    needs_plan: bool = True


OFFERS: dict[str, Offer] = {
    "evaluate": Offer(evaluate, "1 evaluate", cron=f"0 {EVALUATE.hour} * * *"),
    "upgrade-check": Offer(upgrade_check, "upgrade"),
    "migrate": Offer(migrate, "all phases"),
    "soak": Offer(soak, "soak", every=SOAK.every),
    "rollback": Offer(rollback, "undo", needs_plan=False),
    "retire": Offer(retire, "4 deprecate"),
    "report": Offer(report, "records", needs_plan=False),
    "reconcile": Offer(reconcile_home, "upkeep", every=RECONCILE.every, needs_plan=False),
}


async def deployments(
    plan: Path, *, zone: str = "UTC", schedules: bool = True, watches: bool = False
) -> list[RunnerDeployment]:
    """All offers for one host, with `plan` filled into their forms; it `watches` for new builds, or does not."""
    # a slot of a run that was killed is free again only after minutes: what must be alone holds a file lock
    one_at_a_time = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
    made = []
    for name, offer in OFFERS.items():
        scheduled: list[Any] = []
        cron = f"0 {UPGRADE_CHECK.hour} * * *" if name == UPGRADE_CHECK.name and watches else offer.cron
        if cron and schedules:
            scheduled.append(CronSchedule(cron=cron, timezone=zone))
        if offer.every and schedules:
            scheduled.append(IntervalSchedule(interval=offer.every, timezone="UTC"))
        deployment = await offer.flow.ato_deployment(
            name,
            schedules=scheduled or None,
            parameters={"plan": str(plan)} if offer.needs_plan else {},
            description=(offer.flow.fn.__doc__ or "").partition("\n")[0],
            tags=["switchyard", offer.phase],
            triggers=[rollback_trigger()] if name == "rollback" else [],
            concurrency_limit=None if name == "rollback" else one_at_a_time,
            entrypoint_type=EntrypointType.MODULE_PATH,
            version=VERSION,
        )
        made.append(deployment)
    return made


def rollback_trigger() -> DeploymentEventTrigger:
    """Rolls back the model of a soak that failed on this host, if the engine it failed on still serves it."""
    return DeploymentEventTrigger(
        name="roll back when a soak fails",
        expect={BREACH},
        match={"prefect.resource.id": "switchyard.model.*", "switchyard.host": host()},
        parameters={
            "model": {"__prefect_kind": "jinja", "template": "{{ event.payload.model }}"},
            "only_from": {"__prefect_kind": "jinja", "template": "{{ event.payload.engine }}"},
            "who": "automation",
            "reason": {"__prefect_kind": "jinja", "template": "{{ event.payload.why }}"},
        },
    )


# --- the process that serves them


def main() -> None:
    """Serve the deployments of the plan named on the command line; `switchyard up` starts this as a process."""
    asyncio.run(serve(Path(sys.argv[1]), schedules=sys.argv[2] == "--schedules"))


async def serve(plan: Path, *, schedules: bool) -> None:
    """Register the deployments and run their flows until SIGTERM, which ends running flows cleanly."""
    runner = Runner(name="switchyard", limit=CONCURRENT, pause_on_shutdown=False, query_seconds=5)
    loaded = load_plan(plan)
    made = await deployments(plan, zone=time_zone(), schedules=schedules, watches=bool(loaded.upgrade.watch))
    ids = [await runner.aadd_deployment(one) for one in made]
    await _mark_orphans(ids)
    if (why := await put_notifications(loaded.notify.prefect_block)) is not None:
        print(f"{WARNING}{why}", flush=True)
    print(SERVED, flush=True)
    await runner.start()


async def _mark_orphans(deployment_ids: list[UUID]) -> None:
    """Mark the runs that died with an earlier runner as crashed; Prefect would count them as running for ever."""
    begun = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
    async with get_client() as client:
        runs = await client.read_flow_runs(
            deployment_filter=DeploymentFilter.model_validate({"id": {"any_": deployment_ids}}),
            flow_run_filter=FlowRunFilter.model_validate({"state": {"type": {"any_": begun}}}),
        )
        for run in runs:
            await client.set_flow_run_state(run.id, Crashed(message="its process is gone"), force=True)
