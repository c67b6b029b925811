"""A migration over many hosts, in waves: one host, then a share of them, then all; a gate closes each wave.

Every host has its worker, its work queue and its own deployments (prefect.yaml); here they are only started, waited for
and judged. A gate that stays shut ends the rollout: the hosts of that wave are rolled back, earlier waves stay.

The rows of the run are the truth. Killed and started again with the same orders it waits for the runs that it had
started, starts none twice, and leaves alone the hosts that are done.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Protocol
from uuid import UUID

import httpx
from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import Cancelled
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from engines.errors import BadInput, SwitchyardError
from flows.deployments import Offer, concluded
from flows.progress import progress
from tasks.evidence.environment import machine_environment
from tasks.records.store import Records, open_records
from tasks.records.tables import Run, Status, Step
from tasks.verdicts.verdict import Verdict

KIND, UNDO = "fleet", "fleet-rollback"
MODELS = "switchyard-migration"  # the artifact in which a host's migration says how far each model came
WAVES = [0, 0.3, 1.0]
POLL_S = 5.0
LOOK_BACK = 50
Say = Callable[[str], None]
Outcome = dict[str, Any]


# --- what is decided, without a host


class Rollout(BaseModel):
    """What was asked: the same again goes on with the same run."""

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
    """How a host's run ended: its state, whether it was completed, and what it says of each model."""

    state: str
    completed: bool
    why: str = ""
    models: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether its verdict is PASS."""
        return self.completed and self.state == Verdict.PASS


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
    models = {name: told for name, told in end.models.items() if not name.startswith("(")}
    if not end.completed or not models:
        return f"{end.state}: {end.why}" if end.why else end.state
    open_ = [
        f"{name} {told['result']}: {told['why']}"
        for name, told in models.items()
        if told["verdict"] != Verdict.PASS and not (told["result"] == "stays" and name in accepted)
    ]
    return "; ".join(open_)


# --- the hosts, behind Prefect


class Hosts(Protocol):
    """Where the hosts are: their flows can be started, once for a key, and be asked how they ended."""

    def missing(self, host: str) -> str | None:
        """Why nothing can be started there; None when it can."""

    def start(self, flow: str, host: str, parameters: Mapping[str, Any], *, key: str) -> str:
        """The id of the host's run; the one that was started with the same key before."""

    def ended(self, run_id: str) -> Ended | None:
        """How it ended; None while it goes on."""


class Workers:
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
        """The id of the host's run; the one that was started with the same key before."""
        known = self._client.read_deployment_by_name(_deployment(flow, host))
        started = self._client.create_flow_run_from_deployment(
            known.id, parameters=dict(parameters), idempotency_key=key, tags=["fleet", host]
        )
        return str(started.id)

    def ended(self, run_id: str) -> Ended | None:
        """How it ended; None while it goes on. One that no worker picks up is cancelled."""
        try:
            run = self._client.read_flow_run(UUID(run_id))
            if run.state is None or not run.state.is_final():
                return self._unless_picked_up(run)
            how = run.state.name or run.state.type.value
            return Ended(how, run.state.is_completed(), run.state.message or "", self._models(run_id))
        except ObjectNotFound:
            return Ended("Gone", False, "Prefect knows no such run any more")
        except httpx.TransportError:  # its server is started anew: what runs on the hosts goes on
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
        return {row["model"]: {name: str(told) for name, told in row.items()} for row in rows}


def _deployment(flow: str, host: str) -> str:
    return f"{flow}/{flow}-{host}"


# --- the rollout


class Journal:
    """The rows of one run over hosts: for each a step `migrate` or `rollback`, with the host's run and how it ended."""

    def __init__(
        self, records: Records, run: Run, hosts: Hosts, *, say: Say = lambda _: None, poll_s: float = POLL_S
    ) -> None:
        self.records, self.run, self.hosts = records, run, hosts
        self.say, self._poll_s = say, poll_s

    def step(self, host: str, what: str) -> Step | None:
        """The row of a host's `migrate` or `rollback`."""
        return next((step for step in self.records.steps(self.run.id, host) if step.step == what), None)

    def is_done(self, host: str) -> bool:
        """Migrated by this run, and not rolled back since."""
        step = self.step(host, "migrate")
        return step is not None and step.state == "done" and not self.is_back(host)

    def is_back(self, host: str) -> bool:
        """Rolled back by this run, or being so, since it was last migrated."""
        step, undone = self.step(host, "migrate"), self.step(host, "rollback")
        return undone is not None and (step is None or undone.at > step.at)

    def is_open(self, host: str, what: str) -> bool:
        """Begun, and not judged yet, whatever a clean-up has made of the row meanwhile."""
        step = self.step(host, what)
        return step is not None and "ended" not in step.detail

    def shut(self, hosts: Sequence[str]) -> dict[str, str]:
        """Why each of these hosts kept the gate of its wave shut, as judged before."""
        steps = {host: self.step(host, "migrate") for host in hosts}
        return {host: str(step.detail["why"]) for host, step in steps.items() if step and step.state == "failed"}

    def carry_out(self, what: str, hosts: Sequence[str], asked: Mapping[str, Any], *, wave: int) -> dict[str, Ended]:
        """How the run of each host ended; all of them are started, then all are waited for."""
        for host in hosts:
            self._intend(host, what, wave)
        runs = {host: self._started(host, what, asked) for host in hosts}
        ends: dict[str, Ended] = {}
        while waiting := [host for host in hosts if host not in ends]:
            ends |= {host: end for host in waiting if (end := self.hosts.ended(runs[host])) is not None}
            if len(ends) < len(hosts):
                time.sleep(self._poll_s)
        return {host: ends[host] for host in hosts}

    def _intend(self, host: str, what: str, wave: int) -> None:
        step = self.step(host, what)
        if step is None or "ended" in step.detail:  # what was judged is tried again
            attempt = step.detail["attempt"] + 1 if step is not None else 1
            self.records.put_step(self.run.id, host, what, "intent", {"attempt": attempt, "wave": wave})

    def _started(self, host: str, what: str, asked: Mapping[str, Any]) -> str:
        """The host's run: the one under way, else a new one. Killed before it is written down, its key finds it."""
        step = self.step(host, what)
        assert step is not None
        detail = dict(step.detail)
        if "flow_run_id" not in detail:
            key = f"{self.run.id} {host} {what} {detail['attempt']}"
            detail["flow_run_id"] = self.hosts.start(what, host, asked, key=key)
            self.records.put_step(self.run.id, host, what, "intent", detail)
        return str(detail["flow_run_id"])

    def close(self, host: str, what: str, end: Ended, shut: str | None) -> None:
        """How it ended, and why that is not good enough."""
        step = self.step(host, what)
        assert step is not None
        told = {"ended": end.state, "why": shut or end.why, "models": dict(end.models)}
        self.records.put_step(self.run.id, host, what, "failed" if shut else "done", {**step.detail, **told})
        self.say(f"{host}: {what}: {shut or end.state}")

    def roll_back(self, hosts: Sequence[str], who: str, reason: str, *, wave: int) -> None:
        """All models of these hosts back; a host that was not moved says so and passes."""
        for host, end in self.carry_out("rollback", hosts, {"who": who, "reason": reason}, wave=wave).items():
            self.close(host, "rollback", end, None if end.passed else f"{end.state}: {end.why}")

    def row(self, host: str) -> Outcome:
        """Where the host stands, for people."""
        last = self.step(host, "rollback") if self.is_back(host) else self.step(host, "migrate")
        if last is None:
            return {"host": host, "wave": None, "result": "not begun", "why": "", "models": {}, "flow_run": None}
        done = {"migrate": "migrated", "rollback": "rolled back"}[last.step]
        first = self.step(host, "migrate") or last
        return {
            "host": host,
            "wave": last.detail["wave"],
            "result": done if last.state == "done" else f"{last.step} failed",
            "why": str(first.detail.get("why", "")),
            "models": {name: told["result"] for name, told in first.detail.get("models", {}).items()},
            "flow_run": last.detail.get("flow_run_id"),
        }


def roll_out(
    orders: Rollout,
    hosts: Hosts,
    records: Records,
    *,
    say: Say = lambda _: None,
    poll_s: float = POLL_S,
    flow_run_id: str | None = None,
) -> Outcome:
    """Wave after wave until a gate stays shut: what it came to, as plain JSON. Raises BadInput for an unknown host."""
    _require(hosts, orders.hosts)
    asked = orders.model_dump(mode="json")
    journal = _opened(KIND, f"fleet {Path(orders.plan).stem}".rstrip(), asked, hosts, records, say, poll_s, flow_run_id)
    with _ended_however(journal):
        records.put_decision(journal.run.id, "-", KIND, who=orders.who, why=orders.reason)
        shut = _waves(orders, journal)
    rows = [journal.row(host) for host in orders.hosts]
    why = "; ".join(f"{host}: {reason}" for host, reason in shut.items())
    return _concluded(journal, rows, Verdict.FAIL if shut else Verdict.PASS, "migrated", why)


def roll_back_hosts(
    names: Sequence[str],
    hosts: Hosts,
    records: Records,
    *,
    who: str,
    reason: str,
    say: Say = lambda _: None,
    poll_s: float = POLL_S,
    flow_run_id: str | None = None,
) -> Outcome:
    """These hosts back, all at once: what it came to, as plain JSON. Raises BadInput for an unknown host."""
    _require(hosts, names)
    asked = {"hosts": list(names), "who": who, "reason": reason}
    journal = _opened(UNDO, "fleet", asked, hosts, records, say, poll_s, flow_run_id)
    with _ended_however(journal):
        journal.roll_back(names, who, reason, wave=1)
    rows = [journal.row(host) for host in names]
    return _concluded(journal, rows, Verdict.PASS, "rolled back", "")


def _waves(orders: Rollout, journal: Journal) -> dict[str, str]:
    """Why the gate of a wave stayed shut, by host; empty when all opened."""
    waves = waves_of(orders.hosts, orders.waves)
    for number, wave in enumerate(waves, 1):
        journal.say(f"wave {number} of {len(waves)}: {', '.join(wave)}")
        if any(journal.is_open(host, "rollback") for host in wave):  # killed while it was rolled back
            shut = journal.shut(wave)
        else:
            shut = _wave(orders, journal, number, [host for host in wave if not journal.is_done(host)])
        if shut:
            if orders.rollback_wave:
                reason = f"wave {number} did not pass: {orders.reason}"
                journal.roll_back([host for host in wave if _is_owed(journal, host)], orders.who, reason, wave=number)
            return shut
    return {}


def _wave(orders: Rollout, journal: Journal, number: int, wave: Sequence[str]) -> dict[str, str]:
    asked: dict[str, Any] = {"approve": True, "who": orders.who, "reason": orders.reason}
    # what is left out here is as the host's deployment says
    asked |= {"plan": orders.plan} if orders.plan else {}
    asked |= {"without_canary": True} if orders.without_canary else {}
    ends = journal.carry_out("migrate", wave, asked, wave=number)
    shut = gate_of_wave(ends, orders.accept_stays)
    for host, end in ends.items():
        journal.close(host, "migrate", end, shut.get(host))
    return shut


def _is_owed(journal: Journal, host: str) -> bool:
    """Not rolled back since it was migrated: what passed in a wave is judged with what did not."""
    return journal.is_open(host, "rollback") or not journal.is_back(host)


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


def _opened(
    kind: str,
    name: str,
    asked: Mapping[str, Any],
    hosts: Hosts,
    records: Records,
    say: Say,
    poll_s: float,
    flow_run_id: str | None,
) -> Journal:
    """The rows to go on with: those of the same orders that did not get done, else new ones."""
    unfinished = records.unfinished(asked, kind=kind)
    if unfinished is not None:
        say(f"going on with run {unfinished.id}")
        run = records.resume_run(unfinished.id, flow_run_id=flow_run_id)
    else:
        run = records.start_run(kind, name, asked, environment=machine_environment(), flow_run_id=flow_run_id)
    return Journal(records, run, hosts, say=say, poll_s=poll_s)


@contextlib.contextmanager
def _ended_however(journal: Journal) -> Iterator[None]:
    """The run marked when it breaks off; what it started on the hosts goes on, and is waited for the next time."""
    try:
        yield
    except SwitchyardError as error:
        journal.records.finish_run(journal.run.id, "failed", error=str(error))
        raise
    except BaseException as error:  # Ctrl-C and Prefect's cancellation are no Exceptions
        journal.records.finish_run(journal.run.id, "interrupted", error=type(error).__name__)
        raise


def _concluded(journal: Journal, rows: list[Outcome], verdict: Verdict, aim: str, why: str) -> Outcome:
    """The outcome; a run whose verdict is not PASS is gone on with by the same orders, once that is mended."""
    if stuck := [row["host"] for row in rows if row["result"] == "rollback failed"]:
        verdict = Verdict.ERROR
        why = f"not rolled back: {', '.join(stuck)}{f'; {why}' if why else ''}"
    status: Status = "done" if verdict is Verdict.PASS else "interrupted"
    journal.records.finish_run(journal.run.id, status, verdict=verdict, error=why or None)
    done = sum(row["result"] == aim for row in rows)
    summary = f"{done} of {len(rows)} hosts {aim}{f'; {why}' if why else ''}"
    return {"run_id": journal.run.id, "verdict": verdict.value, "why": summary, "hosts": rows}


# --- the flows


@flow(name="fleet", flow_run_name="fleet", persist_result=False)
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
) -> Any:
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
    orders = _orders(
        hosts=tuple(hosts),
        plan=plan,
        waves=tuple(waves),
        accept_stays=tuple(accept_stays),
        rollback_wave=rollback_wave,
        without_canary=without_canary,
        who=who,
        reason=reason,
    )
    with open_records() as records, get_client(sync_client=True) as client:
        workers = Workers(client, pick_up_s=pick_up_minutes * 60)
        outcome = roll_out(orders, workers, records, say=progress.get().say, flow_run_id=flow_run.id)
    publish(outcome)
    return concluded(outcome)


@flow(name="rollback-fleet", flow_run_name="rollback fleet", persist_result=False)
def rollback_fleet(
    who: str,
    reason: str,
    hosts: list[str] = [],  # noqa: B006
    pick_up_minutes: Annotated[float, Field(gt=0)] = 15,
) -> Any:
    """Put every model of these hosts back on the engine it came from; all hosts at once.

    Args:
        who: your name; it is recorded
        reason: why; it is recorded
        hosts: their names; empty: the last wave of the latest rollout
        pick_up_minutes: a host whose worker starts nothing for so long has failed
    """
    with open_records() as records, get_client(sync_client=True) as client:
        orders = _orders(hosts=tuple(hosts or last_wave(records)), who=who, reason=reason)
        outcome = roll_back_hosts(
            orders.hosts,
            Workers(client, pick_up_s=pick_up_minutes * 60),
            records,
            who=orders.who,
            reason=orders.reason,
            say=progress.get().say,
            flow_run_id=flow_run.id,
        )
    publish(outcome)
    return concluded(outcome)


def _orders(**asked: Any) -> Rollout:
    try:
        return Rollout(**asked)
    except ValidationError as problem:
        first = problem.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BadInput(f"{place}: {first['msg'].removeprefix('Value error, ')}") from problem


def publish(outcome: Outcome) -> None:
    """Where every host stands, as a Prefect artifact of the run."""
    rows = [
        {**row, "models": ", ".join(f"{name} {result}" for name, result in row["models"].items())}
        for row in outcome["hosts"]
    ]
    create_table_artifact(
        key="switchyard-fleet", table=rows, description=f"Run {outcome['run_id']}: {outcome['verdict']}"
    )


FLEET: dict[str, Offer] = {
    "fleet": Offer(fleet, "fleet", needs_plan=False),
    "rollback-fleet": Offer(rollback_fleet, "undo", needs_plan=False),
}
