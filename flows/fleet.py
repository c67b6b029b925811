"""A migration over many hosts, in waves: one host, then a share of them, then all; a gate closes each wave.

Every host has its worker, its work queue and its own deployments (prefect.yaml); here they are only started, waited for
and judged. A gate that stays shut ends the rollout: the hosts of that wave are rolled back, earlier waves stay.

Killed and started again with the same orders, it reads its rows: it waits for the runs that it had started, starts none
twice, and leaves alone the hosts that are done.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import httpx
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from engines.errors import BadInput
from engines.units import number_of
from flows.deployments import Offer
from flows.orchestrator.artifacts import put_table
from flows.orchestrator.ending import NOTHING_MOVED, VERSION, concluding
from flows.orchestrator.run import run_journal
from flows.progress import progress
from tasks.records.journal import RunJournal
from tasks.records.store import Records, open_records
from tasks.verdicts.verdict import Verdict

KIND, UNDO = "fleet", "fleet-rollback"
MODELS = "switchyard-migration"  # the artifact in which a host's migration reports how far each model came
WAVES = [0, 0.3, 1.0]
POLL_S = 5.0
LOOK_BACK = 50
Say = Callable[[str], None]


# --- what is decided, without a host


class Rollout(BaseModel):
    """What a person asked for; the same orders again resume the same run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hosts: tuple[str, ...] = Field(min_length=1)
    plan: str = ""
    waves: tuple[float, ...] = Field(tuple(WAVES), min_length=1)
    accept_stays: tuple[str, ...] = ()
    rollback_wave: bool = True
    without_canary: bool = False
    who: str
    reason: str

    @field_validator("who", "reason")
    @classmethod
    def _said(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("a rollout approves every phase on every host: give your name and a reason")
        return value.strip()

    @field_validator("hosts")
    @classmethod
    def _once(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({host for host in hosts if hosts.count(host) > 1}):
            raise ValueError(f"{', '.join(twice)} is named twice")
        return hosts

    @field_validator("waves")
    @classmethod
    def _growing(cls, waves: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 <= share <= 1 for share in waves) or list(waves) != sorted(set(waves)):
            raise ValueError("a wave is the share of all hosts that is done after it, from 0 (one host) up to 1")
        return waves


@dataclass(frozen=True)
class Ended:
    """How a host's run ended: its state, whether it came to a verdict, and the result of each model."""

    state: str
    judged: bool
    why: str = ""
    models: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether its verdict is PASS, or it had nothing to roll back."""
        return self.judged and self.state in (Verdict.PASS, NOTHING_MOVED)


def waves_of(hosts: Sequence[str], shares: Iterable[float]) -> list[list[str]]:
    """The hosts of each wave, in the order given; `shares` of all of them are done after each, and at least one.

    Waves without a new host are left out; hosts beyond the last share are in none.
    """
    waves, done = [], 0
    for share in shares:
        # 0.3 of 10 is 3, although 0.3 * 10 is a little more
        upto = min(len(hosts), max(1, math.ceil(round(share * len(hosts), 9))))
        if upto > done:
            waves.append(list(hosts[done:upto]))
            done = upto
    return waves


def gate_of_wave(ends: Mapping[str, Ended], accepted: Iterable[str] = ()) -> dict[str, str]:
    """Why the gate stays shut, by host; empty when it opens.

    A host passes with PASS, or when all its models moved but those that a person, by name, let stay.
    """
    return {host: why for host, end in ends.items() if (why := _shut(end, frozenset(accepted)))}


def _shut(end: Ended, accepted: frozenset[str]) -> str:
    if end.passed:
        return ""
    # whether the incumbent may be retired is asked of each host later, and by itself
    models = {name: model for name, model in end.models.items() if not name.startswith("(")}
    if not end.judged or not models:
        return f"{end.state}: {end.why}" if end.why else end.state
    open_ = [
        f"{name} {model['result']}: {model['why']}"
        for name, model in models.items()
        if model["verdict"] != Verdict.PASS and not (model["result"] == "stays" and name in accepted)
    ]
    return "; ".join(open_)


# --- the hosts, behind Prefect


class Hosts:
    """The hosts as Prefect knows them: `migrate-HOST` and `rollback-HOST`, each on its work queue."""

    def __init__(self, client: SyncPrefectClient, *, pick_up_s: float) -> None:
        self._client = client
        self._pick_up_s = pick_up_s

    def missing(self, host: str) -> str | None:
        """Why nothing can be started there; None when it can."""
        try:
            for name in ("migrate", "rollback"):
                self._client.read_deployment_by_name(_deployment(name, host))
        except ObjectNotFound:
            return f"{host}: no deployments: SWITCHYARD_HOST={host} prefect --no-prompt deploy --all"
        return None

    def start(self, flow: str, host: str, parameters: Mapping[str, Any], *, key: str) -> str:
        """Start a flow on a host, once for a key: the id of its run."""
        known = self._client.read_deployment_by_name(_deployment(flow, host))
        started = self._client.create_flow_run_from_deployment(
            known.id, parameters=dict(parameters), idempotency_key=key, tags=["fleet", host]
        )
        return str(started.id)

    def ended(self, run_id: str) -> Ended | None:
        """How it ended; None while it runs. One that no worker picks up is cancelled."""
        try:
            run = self._client.read_flow_run(UUID(run_id))
            if run.state is None or not run.state.is_final():
                return self._unless_picked_up(run)
            how = run.state.name or run.state.type.value
            judged = run.state.is_completed() or (run.state.is_failed() and how in list(Verdict))
            return Ended(how, judged, run.state.message or "", self._models(run_id))
        except ObjectNotFound:
            return Ended("Gone", False, "Prefect knows no such run any more")
        except httpx.TransportError:  # its server is restarted; the runs on the hosts continue
            return None

    def _unless_picked_up(self, run: FlowRun) -> Ended | None:
        waited_s = (datetime.now(UTC) - run.expected_start_time).total_seconds() if run.expected_start_time else 0.0
        untouched = run.state is not None and run.state.name in ("Scheduled", "Late", "Pending")
        if not untouched or waited_s < self._pick_up_s:
            return None
        why = f"no worker picked it up within {self._pick_up_s / 60:g} minutes: is one running there?"
        self._client.set_flow_run_state(run.id, Cancelled(message=why), force=True)
        return Ended("Cancelled", False, why)

    def _models(self, run_id: str) -> dict[str, dict[str, str]]:
        found = self._client.read_artifacts(
            artifact_filter=ArtifactFilter(
                flow_run_id=ArtifactFilterFlowRunId(any_=[UUID(run_id)]), key=ArtifactFilterKey(any_=[MODELS])
            )
        )
        rows = json.loads(str(found[-1].data)) if found else []
        return {row["model"]: {name: str(value) for name, value in row.items()} for row in rows}


def _deployment(flow: str, host: str) -> str:
    return f"{flow}/{flow}-{host}"


# --- the rollout


class HostRuns:
    """The runs of one rollout: for each host a step `migrate` or `rollback`, with the host's run and how it ended."""

    def __init__(self, run: RunJournal, hosts: Hosts, say: Say, poll_s: float) -> None:
        self.run, self.hosts, self.say, self._poll_s = run, hosts, say, poll_s

    def is_done(self, host: str) -> bool:
        """Migrated by this run, and not rolled back since."""
        step = self.run.step(host, "migrate")
        return step is not None and step.state == "done" and not self.is_back(host)

    def is_back(self, host: str) -> bool:
        """Rolled back by this run, or being so, since it was last migrated."""
        step, undone = self.run.step(host, "migrate"), self.run.step(host, "rollback")
        return undone is not None and (step is None or undone.at > step.at)

    def is_open(self, host: str, what: str) -> bool:
        """Begun, and not judged yet, whatever a clean-up has made of the row meanwhile."""
        step = self.run.step(host, what)
        return step is not None and "ended" not in step.detail

    def shut(self, hosts: Sequence[str]) -> dict[str, str]:
        """Why each of these hosts kept the gate of its wave shut, as judged before."""
        steps = {host: self.run.step(host, "migrate") for host in hosts}
        return {host: str(step.detail["why"]) for host, step in steps.items() if step and step.state == "failed"}

    def carry_out(self, what: str, hosts: Sequence[str], asked: Mapping[str, Any], *, wave: int) -> dict[str, Ended]:
        """How the run of each host ended; all of them are started, then all are waited for."""
        for host in hosts:
            step = self.run.step(host, what)
            if step is None or "ended" in step.detail:  # what was judged is tried again
                attempt = step.detail["attempt"] + 1 if step is not None else 1
                self.run.put_step(host, what, "intent", attempt=attempt, wave=wave)
        runs = {host: self._started(host, what, asked) for host in hosts}
        ends: dict[str, Ended] = {}
        while waiting := [host for host in hosts if host not in ends]:
            ends |= {host: end for host in waiting if (end := self.hosts.ended(runs[host])) is not None}
            if len(ends) < len(hosts):
                time.sleep(self._poll_s)
        return {host: ends[host] for host in hosts}

    def _started(self, host: str, what: str, asked: Mapping[str, Any]) -> str:
        """The host's run: the one under way, else a new one. Killed before it is written down, its key finds it."""
        detail = self._detail(host, what)
        if "flow_run_id" not in detail:
            key = f"{self.run.id} {host} {what} {detail['attempt']}"
            detail["flow_run_id"] = self.hosts.start(what, host, asked, key=key)
            self.run.put_step(host, what, "intent", **detail)
        return str(detail["flow_run_id"])

    def _detail(self, host: str, what: str) -> dict[str, Any]:
        step = self.run.step(host, what)
        assert step is not None
        return dict(step.detail)

    def close(self, host: str, what: str, end: Ended, shut: str | None) -> None:
        """Record how it ended, and why that is not good enough."""
        how = {"ended": end.state, "why": shut or end.why, "models": dict(end.models)}
        self.run.put_step(host, what, "failed" if shut else "done", **{**self._detail(host, what), **how})
        self.say(f"{host}: {what}: {shut or end.state}")

    def roll_back(self, hosts: Sequence[str], who: str, reason: str, *, wave: int) -> None:
        """Put all models of these hosts back; a host on which none was moved passes."""
        for host, end in self.carry_out("rollback", hosts, {"who": who, "reason": reason}, wave=wave).items():
            self.close(host, "rollback", end, None if end.passed else f"{end.state}: {end.why}")

    def row(self, host: str) -> dict[str, Any]:
        """Where the host stands, for people."""
        migrated = self.run.step(host, "migrate")
        last = self.run.step(host, "rollback") if self.is_back(host) else migrated
        if last is None:
            return {"host": host, "wave": None, "result": "not begun", "why": "", "models": {}, "flow_run": None}
        done = {"migrate": "migrated", "rollback": "rolled back"}[last.step]
        if last.detail.get("ended") == NOTHING_MOVED:
            done = NOTHING_MOVED
        first = migrated or last
        return {
            "host": host,
            "wave": last.detail["wave"],
            "result": done if last.state == "done" else f"{last.step} failed",
            "why": str(first.detail.get("why", "")),
            "models": {name: model["result"] for name, model in first.detail.get("models", {}).items()},
            "flow_run": last.detail.get("flow_run_id"),
        }


def roll_out(
    orders: Rollout, hosts: Hosts, records: Records, *, say: Say = lambda _: None, poll_s: float = POLL_S
) -> dict[str, Any]:
    """Wave after wave until a gate stays shut: the result as plain JSON. Raises BadInput for an unknown host."""
    _require(hosts, orders.hosts)
    name, asked = f"fleet {Path(orders.plan).stem}".rstrip(), orders.model_dump(mode="json")
    with run_journal(records, KIND, asked, name=name, say=say) as run:
        run.put_decision("-", KIND, who=orders.who, why=orders.reason)
        runs = HostRuns(run, hosts, say, poll_s)
        shut = _waves(orders, runs)
        rows = [runs.row(host) for host in orders.hosts]
        why = "; ".join(f"{host}: {reason}" for host, reason in shut.items())
        return _concluded(run, rows, Verdict.FAIL if shut else Verdict.PASS, "migrated", why)


def roll_back_hosts(
    orders: Rollout, hosts: Hosts, records: Records, *, say: Say = lambda _: None, poll_s: float = POLL_S
) -> dict[str, Any]:
    """The hosts of `orders` back, all at once: the result as plain JSON. Raises BadInput for an unknown host."""
    names, who, reason = orders.hosts, orders.who, orders.reason
    _require(hosts, names)
    asked = {"hosts": list(names), "who": who, "reason": reason}
    with run_journal(records, UNDO, asked, name="fleet", say=say) as run:
        runs = HostRuns(run, hosts, say, poll_s)
        runs.roll_back(names, who, reason, wave=1)
        return _concluded(run, [runs.row(host) for host in names], Verdict.PASS, "rolled back", "")


def _waves(orders: Rollout, runs: HostRuns) -> dict[str, str]:
    """Why the gate of a wave stayed shut, by host; empty when all opened."""
    waves = waves_of(orders.hosts, orders.waves)
    for number, wave in enumerate(waves, 1):
        runs.say(f"wave {number} of {len(waves)}: {', '.join(wave)}")
        if any(runs.is_open(host, "rollback") for host in wave):  # killed while it was rolled back
            shut = runs.shut(wave)
        else:
            shut = _wave(orders, runs, number, [host for host in wave if not runs.is_done(host)])
        if shut:
            if orders.rollback_wave:
                # what passed in a wave is judged with what did not; what was rolled back since stays so
                owed = [host for host in wave if runs.is_open(host, "rollback") or not runs.is_back(host)]
                runs.roll_back(owed, orders.who, f"wave {number} did not pass: {orders.reason}", wave=number)
            return shut
    return {}


def _wave(orders: Rollout, runs: HostRuns, number: int, wave: Sequence[str]) -> dict[str, str]:
    asked: dict[str, Any] = {"approve": True, "who": orders.who, "reason": orders.reason}
    # what is left out here is as the host's deployment has it
    asked |= {"plan": orders.plan} if orders.plan else {}
    asked |= {"without_canary": True} if orders.without_canary else {}
    ends = runs.carry_out("migrate", wave, asked, wave=number)
    shut = gate_of_wave(ends, orders.accept_stays)
    for host, end in ends.items():
        runs.close(host, "migrate", end, shut.get(host))
    return shut


def last_wave(records: Records) -> list[str]:
    """The hosts of the last wave that was begun by the latest rollout. Raises BadInput without one."""
    for run in records.history(LOOK_BACK, kind=KIND):
        steps = [step for step in records.steps(run.id) if step.step == "migrate"]
        if steps:
            number = max(step.detail["wave"] for step in steps)
            return [step.model_id for step in steps if step.detail["wave"] == number]
    raise BadInput("no rollout is recorded: name the hosts")


def _require(hosts: Hosts, names: Sequence[str]) -> None:
    if lacking := [why for name in names if (why := hosts.missing(name))]:
        raise BadInput("; ".join(lacking))


def _concluded(run: RunJournal, rows: list[dict[str, Any]], verdict: Verdict, aim: str, why: str) -> dict[str, Any]:
    """The outcome; a run whose verdict is not PASS is resumed by the same orders, once that is fixed."""
    if stuck := [row["host"] for row in rows if row["result"] == "rollback failed"]:
        verdict = Verdict.ERROR
        why = f"not rolled back: {', '.join(stuck)}{f'; {why}' if why else ''}"
    run.finish("done" if verdict is Verdict.PASS else "interrupted", verdict=verdict, error=why or None)
    done = sum(row["result"] == aim for row in rows)
    unmoved = sum(row["result"] == NOTHING_MOVED for row in rows)
    parts = (f"{done} of {number_of(len(rows), 'host')} {aim}", f"on {unmoved} {NOTHING_MOVED}" if unmoved else "", why)
    summary = "; ".join(filter(None, parts))
    return {"run_id": run.id, "verdict": verdict.value, "why": summary, "hosts": rows}


# --- the flows


@flow(name="fleet", flow_run_name="fleet", version=VERSION, persist_result=False)
@concluding
def fleet(
    hosts: list[str],
    who: str,
    reason: str,
    plan: str = "",
    waves: list[float] = WAVES,
    accept_stays: list[str] = [],  # noqa: B006
    rollback_wave: bool = True,
    without_canary: bool = False,
    pick_up_minutes: Annotated[float, Field(gt=0)] = 15,
) -> dict[str, Any]:
    """Migrate host after host in waves; a wave that does not pass is rolled back and ends the rollout.

    Args:
        hosts: their names, in the order in which they are migrated; each has its own work queue and deployments
        who: your name; it approves every phase on every host, and is recorded
        reason: why; it is recorded
        plan: the plan file (.toml), at the same path on every host; empty: the one that each host was deployed with
        waves: the share of all hosts that is done after each wave; 0 is one host
        accept_stays: models that may stay on the incumbent without closing a gate
        rollback_wave: roll the hosts of a wave back when it does not pass
        without_canary: move all traffic of a host at once, where there is too little of it to judge a part
        pick_up_minutes: a host whose worker starts nothing for so long has failed
    """
    how = {"waves": waves, "accept_stays": accept_stays, "rollback_wave": rollback_wave}
    orders = _orders(hosts=hosts, plan=plan, who=who, reason=reason, without_canary=without_canary, **how)
    with open_records() as records, get_client(sync_client=True) as client:
        where = Hosts(client, pick_up_s=pick_up_minutes * 60)
        outcome = roll_out(orders, where, records, say=progress.get().say)
    publish(outcome)
    return outcome


@flow(name="rollback-fleet", flow_run_name="rollback fleet", version=VERSION, persist_result=False)
@concluding
def rollback_fleet(
    who: str,
    reason: str,
    hosts: list[str] = [],  # noqa: B006
    pick_up_minutes: Annotated[float, Field(gt=0)] = 15,
) -> dict[str, Any]:
    """Put every model of these hosts back on the engine it came from; all hosts at once.

    Args:
        who: your name; it is recorded
        reason: why; it is recorded
        hosts: their names; empty: the last wave of the latest rollout
        pick_up_minutes: a host whose worker starts nothing for so long has failed
    """
    with open_records() as records, get_client(sync_client=True) as client:
        orders = _orders(hosts=hosts or last_wave(records), who=who, reason=reason)
        where = Hosts(client, pick_up_s=pick_up_minutes * 60)
        outcome = roll_back_hosts(orders, where, records, say=progress.get().say)
    publish(outcome)
    return outcome


def _orders(**asked: Any) -> Rollout:
    try:
        return Rollout(**asked)
    except ValidationError as problem:
        first = problem.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BadInput(f"{place}: {first['msg'].removeprefix('Value error, ')}") from problem


def publish(outcome: dict[str, Any]) -> None:
    """Where every host stands, as a Prefect artifact of the run."""
    rows = [
        {**row, "models": ", ".join(f"{name} {result}" for name, result in row["models"].items())}
        for row in outcome["hosts"]
    ]
    put_table("switchyard-fleet", rows, outcome)


FLEET: dict[str, Offer] = {
    "fleet": Offer(fleet, "fleet", needs_plan=False),
    "rollback-fleet": Offer(rollback_fleet, "undo", needs_plan=False),
}
