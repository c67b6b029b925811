"""Tables of the records."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any, Literal

import psutil
from sqlalchemy import Column, DateTime, Dialect, Float, Index, LargeBinary, Text, UniqueConstraint
from sqlalchemy.orm import registry
from sqlalchemy.types import TypeDecorator
from sqlmodel import Field, SQLModel

from engines.errors import SwitchyardError
from engines.home import host as this_host
from tasks.records.payload import redact, unpack_json
from tasks.verdicts.verdict import CheckResult

Arm = Literal["incumbent", "candidate", "both", "-"]
Status = Literal["running", "done", "interrupted", "failed"]
StepState = Literal["intent", "done", "failed"]


class UtcTime(TypeDecorator[datetime]):
    """A moment with its zone, in UTC; SQLite stores no zone, so it is put back on the way out."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """The moment in UTC; a time without a zone is refused."""
        if value is not None and value.tzinfo is None:
            raise SwitchyardError(f"the time {value} has no zone: store times in UTC")
        return value.astimezone(UTC) if value else None

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """The moment, aware."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class JsonText(TypeDecorator[Any]):
    """Plain JSON without secrets, as text: readable with any SQL shell, alike on both databases."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str:
        """The text of `value`, its secrets redacted; NaN and infinity are refused."""
        return json.dumps(redact(value), separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        """The value."""
        return None if value is None else json.loads(value)


class _Table(SQLModel, registry=registry()):
    """Base of our tables: metadata of our own, so that nobody else's tables are created with them."""


class Run(_Table, table=True):
    """One run of a flow: `plan` is what was asked, `environment` where it ran, `owner_*` the process that runs it."""

    __tablename__ = "run"
    __table_args__ = (Index("ix_run_started_at", "started_at"), Index("ix_run_plan_hash", "plan_hash"))

    id: str = Field(primary_key=True)
    kind: str
    name: str
    plan: Any = Field(sa_column=Column("plan_json", JsonText(), nullable=False))
    plan_hash: str
    started_at: datetime = Field(sa_column=Column(UtcTime(), nullable=False))
    ended_at: datetime | None = Field(default=None, sa_column=Column(UtcTime()))
    status: str
    verdict: str | None = None
    error: str | None = Field(default=None, sa_column=Column(Text()))
    owner_host: str
    owner_pid: int
    owner_created: float
    environment: Any = Field(sa_column=Column(JsonText(), nullable=False))
    report_path: str | None = None
    flow_run_id: str | None = None

    @property
    def owner_alive(self) -> bool | None:
        """Whether the process that runs it still lives; None when it is on another host."""
        if self.owner_host != this_host():
            return None
        try:
            process = psutil.Process(self.owner_pid)
            # the clock may have been set by seconds since
            is_same = abs(process.create_time() - self.owner_created) < 5
            return bool(is_same and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:
            return True

    @property
    def shown_status(self) -> str:
        """The stored status, or "killed" for a run whose process died without a word."""
        return "killed" if self.status == "running" and self.owner_alive is False else self.status


class _OfRun(_Table):
    """Base of what belongs to one model in a run, and goes with the run."""

    id: int | None = Field(default=None, primary_key=True)
    run_id: str = Field(foreign_key="run.id", ondelete="CASCADE")
    model_id: str


class Evidence(_OfRun, table=True):
    """One thing measured: `payload` is plain JSON, from which every verdict can be computed again."""

    __tablename__ = "evidence"
    __table_args__ = (UniqueConstraint("run_id", "model_id", "arm", "kind", "key", name="uq_evidence"),)

    arm: str
    kind: str
    key: str = ""
    packed: bytes = Field(sa_column=Column("payload", LargeBinary(), nullable=False))
    environment: Any = Field(sa_column=Column(JsonText(), nullable=False))
    recorded_at: datetime = Field(sa_column=Column(UtcTime(), nullable=False))

    @property
    def payload(self) -> Any:
        """What was measured."""
        return unpack_json(self.packed)


class Check(_OfRun, table=True):
    """One stored `CheckResult`."""

    __tablename__ = "check"
    __table_args__ = (UniqueConstraint("run_id", "model_id", "check", name="uq_check"),)

    check: str
    verdict: str
    value: float | None = None
    limit: float | None = None
    unit: str = ""
    why: str = Field(sa_column=Column(Text(), nullable=False))
    required: bool = True
    recorded_at: datetime = Field(sa_column=Column(UtcTime(), nullable=False))

    @property
    def result(self) -> CheckResult:
        """The check as it was returned."""
        return CheckResult.model_validate(self, from_attributes=True)


class SeriesChunk(_OfRun, table=True):
    """Up to `CHUNK_POINTS` consecutive points of one series, packed as `tasks.records.series` says."""

    __tablename__ = "sample"
    __table_args__ = (UniqueConstraint("run_id", "model_id", "arm", "series", "chunk", name="uq_sample"),)

    arm: str
    series: str
    chunk: int
    start: datetime = Field(sa_column=Column(UtcTime(), nullable=False))
    n: int
    packed: bytes = Field(sa_column=Column(LargeBinary(), nullable=False))


class Correction(_Table, table=True):
    """Measured over estimated memory of a build (kind, version) and architecture: geometric mean of the launches."""

    __tablename__ = "correction"

    engine: str = Field(primary_key=True)
    architecture: str = Field(primary_key=True)
    ratio: float = Field(sa_column=Column(Float(), nullable=False))
    samples: int
    updated_at: datetime = Field(sa_column=Column(UtcTime(), nullable=False))


class Step(_OfRun, table=True):
    """One step of a migration: "intent" before it acts, "done" or "failed" after; a killed run leaves the intent."""

    __tablename__ = "step"
    __table_args__ = (UniqueConstraint("run_id", "model_id", "step", name="uq_step"),)

    step: str
    state: str
    detail: Any = Field(sa_column=Column(JsonText(), nullable=False))
    at: datetime = Field(sa_column=Column(UtcTime(), nullable=False))


class Decision(_OfRun, table=True):
    """What a person decided against, or instead of, the evidence: who, why and when. Never changed or removed."""

    __tablename__ = "decision"

    kind: str
    who: str = Field(sa_column=Column(Text(), nullable=False))
    why: str = Field(sa_column=Column(Text(), nullable=False))
    at: datetime = Field(sa_column=Column(UtcTime(), nullable=False))


METADATA = _Table.metadata
