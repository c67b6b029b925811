"""The records: what was measured, judged, learned, done and decided, stored as it happens.

SQLite at `home()/switchyard.db`, or PostgreSQL by URL. A `Records` is cheap to open and is opened per unit of work;
every call is one short transaction, so that several processes write at once and a killed run keeps what it stored.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import threading
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Self

import psutil
from sqlalchemy import Engine, delete, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import Session, col

from engines.errors import BadInput, NoMeasurement, SwitchyardError
from engines.home import host as this_host
from tasks.records.payload import pack_json, plan_hash, redact, storable_text
from tasks.records.schema.upgrade import BUSY_TIMEOUT_S, SCHEMA, Schema, database, explained, open_database, shown
from tasks.records.series import Point, Series, joined, pack, unpack
from tasks.records.tables import (
    METADATA,
    Arm,
    Check,
    Correction,
    Decision,
    Evidence,
    Run,
    SeriesChunk,
    Status,
    Step,
    StepState,
    _Table,
)
from tasks.verdicts.verdict import CheckResult, Verdict

# a command that only reads must not wait for a database that is locked, or out of reach
DATABASE = "the database of the records"
LOCKED_S = 3.0  # for each lock of another program; our own writers hold theirs for milliseconds
READ_S = 10.0  # for all of it, whatever hangs
CHUNK_POINTS = 3600


def open_records(
    where: str | Path | None = None, *, schema: Schema = SCHEMA, wait_s: float = BUSY_TIMEOUT_S
) -> Records:
    """The records at a path or URL, or at their usual place; created or upgraded in place first.

    A wait for another program's lock ends after `wait_s` seconds. Raises BadInput for what the user can fix: no such
    directory, not a database, another program's, a newer Switchyard's. Close it, or use it in a `with`.
    """
    url = database(where)
    return Records(open_database(url, schema, wait_s=wait_s), shown(url))


class _Database:
    """A database with one short transaction per unit of work, and upserts that SQLite and PostgreSQL both take."""

    def __init__(self, engine: Engine, place: str) -> None:
        self.engine = engine
        self.place = place
        self._writing = engine.execution_options(writes=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; safe to call twice."""
        self.engine.dispose()

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """A session that reads; what the driver raises comes as one line of ours."""
        with explained(self.engine.url), Session(self.engine) as session:
            yield session

    @contextlib.contextmanager
    def write(self) -> Iterator[Session]:
        """A session that is committed at the end of the block."""
        with explained(self.engine.url), Session(self._writing, expire_on_commit=False) as session:
            yield session
            session.commit()

    def insert(self, table: type[_Table]) -> postgresql.Insert | sqlite.Insert:
        """An INSERT that knows ON CONFLICT: both databases have it in one form, SQLAlchemy in a module for each."""
        insert = postgresql.insert if self.engine.dialect.name == "postgresql" else sqlite.insert
        return insert(METADATA.tables[str(table.__tablename__)])

    def put(self, table: type[_Table], rows: list[dict[str, Any]], *, on: tuple[str, ...]) -> None:
        """Store `rows`, each in place of the one with the same values in the columns `on`."""
        if not rows:
            return
        statement = self.insert(table)
        fresh = {name: statement.excluded[name] for name in rows[0] if name not in on}
        with self.write() as session:
            session.execute(statement.on_conflict_do_update(index_elements=list(on), set_=fresh), rows)


class Records(_Database):
    """The stored rows. Rows that are handed out are copies: to change one, call the method that stores it."""

    # runs

    def start_run(
        self, kind: str, name: str, plan: Any, *, environment: Any = None, flow_run_id: str | None = None
    ) -> Run:
        """A new run in state "running", owned by this process; its id sorts by time."""
        run = Run(
            id="",
            kind=kind,
            name=storable_text(name),
            plan=redact(plan),
            plan_hash=plan_hash(plan),
            started_at=_now(),
            status="running",
            environment=redact(environment or {}),
            flow_run_id=flow_run_id,
            **_this_process(),
        )
        with self.write() as session:
            while not run.id or session.get(Run, run.id) is not None:
                run.id = f"{run.started_at:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
            session.add(run)
        return run

    def find_run(self, ref: str = "latest", *, kind: str | None = None) -> Run:
        """The run with id `ref`, or the only one whose id begins or ends with it, or this host's latest (of `kind`).

        Raises BadInput when there is none, or when several match.
        """
        if ref == "latest":
            found = self.history(1, kind=kind, host=this_host())
            if not found:
                wanted = f"run of kind {kind}" if kind else "run"
                raise BadInput(f"{self.place}: no {wanted} is recorded yet for this host")
            return found[0]
        with self.read() as session:
            exact = session.get(Run, ref)
            if exact:
                return exact
            some = (col(Run.id).startswith(ref, autoescape=True)) | col(Run.id).endswith(ref, autoescape=True)
            matches = list(session.scalars(select(Run).where(some).order_by(col(Run.id)).limit(6)))
        if not ref or not matches:
            raise BadInput(f"no run {ref!r} in {self.place}: `switchyard history` lists them")
        if len(matches) > 1:
            some_ids = ", ".join(run.id for run in matches[:5])
            raise BadInput(f"{ref!r} fits several runs: {some_ids}: give more of the id")
        return matches[0]

    def unfinished(self, plan: Any, *, kind: str = "evaluate") -> Run | None:
        """This host's latest run of just this plan that did not get done and that nobody alive is running."""
        query = (
            select(Run)
            .filter_by(kind=kind, plan_hash=plan_hash(plan), owner_host=this_host())
            .where(col(Run.status) != "done")
            .order_by(col(Run.started_at).desc(), col(Run.id).desc())
        )
        with self.read() as session:
            runs = list(session.scalars(query))
        return next((run for run in runs if run.shown_status != "running"), None)

    def resume_run(self, run_id: str, *, flow_run_id: str | None = None) -> Run:
        """The run, "running" again and owned by this process. Raises BadInput while another process runs it."""
        with self.write() as session:
            run = _existing(session, run_id)
            mine = _this_process()
            is_mine = all(getattr(run, name) == value for name, value in mine.items())
            if run.shown_status == "running" and not is_mine:
                raise BadInput(
                    f"run {run_id} is running in process {run.owner_pid} on {run.owner_host}: wait or stop it"
                )
            again = {**mine, "status": "running", "ended_at": None, "error": None}
            for name, value in {**again, **_given(flow_run_id=flow_run_id)}.items():
                setattr(run, name, value)
        return run

    def finish_run(
        self, run_id: str, status: Status = "done", *, verdict: Verdict | None = None, error: str | None = None
    ) -> Run:
        """Store how the run ended; what is None stays as stored."""
        code = verdict.value if verdict else None
        return self.note_run(run_id, error=error, status=status, ended_at=_now(), verdict=code)

    def note_run(
        self, run_id: str, *, report_path: Path | None = None, error: str | None = None, **columns: Any
    ) -> Run:
        """Store what became known while or after the run ran; None changes nothing."""
        columns["error"] = storable_text(error) if error else None
        columns["report_path"] = str(report_path) if report_path else None
        with self.write() as session:
            run = _existing(session, run_id)
            for name, value in _given(**columns).items():
                setattr(run, name, value)
        return run

    def drop_empty_run(self, run_id: str) -> bool:
        """Delete a run of which only intents are recorded; False where there is more, and it stays."""
        steps = self.steps(run_id)
        done = self.list_evidence(run_id) or self.checks(run_id) or self.decisions(run_id)
        if done or any(step.state != "intent" for step in steps):
            return False
        with self.write() as session:
            session.execute(delete(Step).filter_by(run_id=run_id))
            session.execute(delete(Run).filter_by(id=run_id))
        return True

    def history(
        self, limit: int = 20, *, kind: str | None = None, name: str | None = None, host: str | None = None
    ) -> list[Run]:
        """The latest runs, newest first, narrowed by what is given."""
        query = select(Run).order_by(col(Run.started_at).desc(), col(Run.id).desc()).limit(limit)
        query = query.filter_by(**_given(kind=kind, name=name, owner_host=host))
        with self.read() as session:
            return list(session.scalars(query))

    # evidence

    def put_evidence(
        self,
        run_id: str,
        model_id: str,
        arm: Arm,
        kind: str,
        payload: Any,
        *,
        key: str = "",
        environment: Any = None,
    ) -> None:
        """Store `payload`, in place of what was stored for the same run, model, arm, kind and key.

        Raises SwitchyardError, naming the place, for NaN and infinity: what was not measured is None.
        """
        row: dict[str, Any] = {"run_id": run_id, "model_id": model_id, "arm": arm, "kind": kind, "key": key}
        row |= {
            "payload": pack_json(payload, what=f"evidence {kind} {key}".strip()),
            "environment": redact(environment or {}),
            "recorded_at": _now(),
        }
        self.put(Evidence, [row], on=("run_id", "model_id", "arm", "kind", "key"))

    def get_evidence(self, run_id: str, model_id: str, arm: Arm, kind: str, *, key: str = "") -> Evidence | None:
        """The evidence, or None when it was not recorded."""
        found = self.list_evidence(run_id, model_id=model_id, arm=arm, kind=kind, key=key)
        return found[0] if found else None

    def has_evidence(self, run_id: str, model_id: str, arm: Arm, kind: str, *, key: str = "") -> bool:
        """Whether it was recorded, so that a resumed run can skip it. The payload is not read."""
        query = select(col(Evidence.id)).filter_by(run_id=run_id, model_id=model_id, arm=arm, kind=kind, key=key)
        with self.read() as session:
            return session.scalar(query) is not None

    def list_evidence(
        self,
        run_id: str,
        *,
        model_id: str | None = None,
        arm: Arm | None = None,
        kind: str | None = None,
        key: str | None = None,
    ) -> list[Evidence]:
        """The evidence of a run, narrowed by what is given, in the order in which it was first recorded."""
        wanted = _given(run_id=run_id, model_id=model_id, arm=arm, kind=kind, key=key)
        query = select(Evidence).filter_by(**wanted).order_by(col(Evidence.id))
        with self.read() as session:
            return list(session.scalars(query))

    def evidence_of_runs(
        self, kind: str, *, run_kind: str, name: str, host: str, until: datetime
    ) -> list[tuple[datetime, str, Evidence]]:
        """A kind of evidence of all runs of a plan on a host that began by `until`: begin, plan hash and evidence."""
        query = (
            select(col(Run.started_at), col(Run.plan_hash), Evidence)
            .join(Run, col(Evidence.run_id) == col(Run.id))
            .where(col(Run.kind) == run_kind, col(Run.name) == name, col(Run.owner_host) == host)
            .where(col(Run.started_at) <= until, col(Evidence.kind) == kind)
            .order_by(col(Run.started_at), col(Evidence.id))
        )
        with self.read() as session:
            return [(began, plan, evidence) for began, plan, evidence in session.execute(query)]

    def drop_evidence(self, run_id: str, model_id: str, arm: Arm, kind: str, *, key: str = "") -> None:
        """Delete one piece of evidence, so that a resumed run measures it; none is no error."""
        query = delete(Evidence).filter_by(run_id=run_id, model_id=model_id, arm=arm, kind=kind, key=key)
        with self.write() as session:
            session.execute(query)

    def evidence_environments(self, run_id: str, model_id: str) -> list[dict[str, Any]]:
        """The environment in which each piece of evidence of a model was measured. No payload is read."""
        query = select(col(Evidence.environment)).filter_by(run_id=run_id, model_id=model_id)
        with self.read() as session:
            return list(session.scalars(query))

    # checks

    def put_checks(self, run_id: str, model_id: str, results: Iterable[CheckResult]) -> None:
        """Store each result, in place of one of the same name."""
        moment = _now()
        rows = [
            {
                **result.model_dump(),
                "verdict": result.verdict.value,
                "why": storable_text(result.why),
                "run_id": run_id,
                "model_id": model_id,
                "recorded_at": moment,
            }
            for result in results
        ]
        self.put(Check, rows, on=("run_id", "model_id", "check"))

    def drop_checks(self, run_id: str, model_id: str | None = None) -> None:
        """Delete the verdicts of a run (not its evidence), before all of it is judged again."""
        query = delete(Check).filter_by(**_given(run_id=run_id, model_id=model_id))
        with self.write() as session:
            session.execute(query)

    def checks(self, run_id: str) -> dict[str, list[CheckResult]]:
        """The results of a run by model, each in the order in which it was first recorded."""
        query = select(Check).filter_by(run_id=run_id).order_by(col(Check.id))
        by_model: dict[str, list[CheckResult]] = {}
        with self.read() as session:
            for row in session.scalars(query):
                by_model.setdefault(row.model_id, []).append(row.result)
        return by_model

    # steps and decisions

    def put_step(self, run_id: str, model_id: str, step: str, state: StepState, detail: Any = None) -> None:
        """Store where a step stands, in place of where it stood; it is on the disk when this returns."""
        row = {"run_id": run_id, "model_id": model_id, "step": step, "state": state}
        self.put(Step, [{**row, "detail": detail or {}, "at": _now()}], on=("run_id", "model_id", "step"))

    def steps(self, run_id: str, model_id: str | None = None) -> list[Step]:
        """The steps of a run, or of one model in it, in the order in which they were first begun."""
        query = select(Step).filter_by(**_given(run_id=run_id, model_id=model_id)).order_by(col(Step.id))
        with self.read() as session:
            return list(session.scalars(query))

    def put_decision(self, run_id: str, model_id: str, kind: str, *, who: str, why: str) -> Decision:
        """The decision as recorded; repeated by a resumed run, it stays one row."""
        same = {"run_id": run_id, "model_id": model_id, "kind": kind}
        same |= {"who": storable_text(who), "why": storable_text(why)}
        with self.write() as session:
            found = session.scalar(select(Decision).filter_by(**same))
            decision = found or Decision(id=None, **same, at=_now())
            session.add(decision)
        return decision

    def decisions(self, run_id: str, model_id: str | None = None) -> list[Decision]:
        """What was decided in a run, or about one model in it, oldest first."""
        query = select(Decision).filter_by(**_given(run_id=run_id, model_id=model_id)).order_by(col(Decision.id))
        with self.read() as session:
            return list(session.scalars(query))

    # samples

    def series_writer(self, run_id: str, model_id: str, arm: Arm, *, every: int = 30) -> SeriesWriter:
        """A writer of long series that stores them each time one of them has `every` new points."""
        return SeriesWriter(self, run_id, model_id, arm, every=every)

    def read_samples(self, run_id: str, model_id: str, arm: Arm, series: str) -> Series:
        """The whole series in order of arrival; empty when nothing was recorded."""
        query = (
            select(col(SeriesChunk.packed))
            .filter_by(run_id=run_id, model_id=model_id, arm=arm, series=series)
            .order_by(col(SeriesChunk.chunk))
        )
        with self.read() as session:
            return joined([unpack(packed) for packed in session.scalars(query)])

    # corrections

    def learn_correction(self, engine: str, architecture: str, ratio: float) -> Correction:
        """The correction after one more launch whose measured memory was `ratio` times the estimate."""
        if not (math.isfinite(ratio) and ratio > 0):
            raise NoMeasurement(f"a memory ratio of {ratio} teaches nothing: it must be positive")
        new = {"engine": engine, "architecture": architecture, "ratio": 1.0, "samples": 0, "updated_at": _now()}
        with self.write() as session:
            session.execute(self.insert(Correction).on_conflict_do_nothing(), [new])
            # FOR UPDATE on PostgreSQL; on SQLite the transaction has the lock already
            row = session.get_one(Correction, (engine, architecture), with_for_update=True)
            row.ratio = math.exp((row.samples * math.log(row.ratio) + math.log(ratio)) / (row.samples + 1))
            row.samples += 1
            row.updated_at = _now()
        return row

    def correction(self, engine: str, architecture: str) -> Correction | None:
        """What was learned of an engine and an architecture; None before the first launch."""
        with self.read() as session:
            return session.get(Correction, (engine, architecture))


class SeriesWriter:
    """Appends to the series of one model and arm; a kill loses less than `every` points of each series.

    The last chunk of a series is rewritten as it grows, so that chunks end up long, and few, however often they are
    stored. Points wait in memory until a commit took them: a full disk loses none while the process lives.
    """

    def __init__(self, records: Records, run_id: str, model_id: str, arm: Arm, *, every: int) -> None:
        self._records = records
        self._row = {"run_id": run_id, "model_id": model_id, "arm": arm}
        self._every = max(1, every)
        self._tails: dict[str, _Tail] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def append(self, series: str, t: float, value: float | None) -> None:
        """Add one point: epoch seconds (kept to 1 ms) and the value, None for 'not measured'."""
        if not math.isfinite(t) or (value is not None and not math.isfinite(value)):
            raise SwitchyardError(f"{series} at {t} is {value}: store None for what was not measured")
        with self._lock:
            tail = self._tails.get(series) or self._tails.setdefault(series, _Tail(self._first_chunk(series)))
            tail.points.append((t, value))
            if len(tail.points) - tail.stored >= self._every:
                self._store()

    def flush(self) -> None:
        """Store every point that is not stored yet."""
        with self._lock:
            self._store()

    def _store(self) -> None:
        fresh = {series: tail for series, tail in self._tails.items() if len(tail.points) > tail.stored}
        rows = [row for series, tail in fresh.items() for row in self._rows(series, tail)]
        self._records.put(SeriesChunk, rows, on=("run_id", "model_id", "arm", "series", "chunk"))
        for tail in fresh.values():
            tail.settle()

    def _rows(self, series: str, tail: _Tail) -> list[dict[str, Any]]:
        rows = []
        for offset in range(0, len(tail.points), CHUNK_POINTS):
            points = tail.points[offset : offset + CHUNK_POINTS]
            place = {"series": series, "chunk": tail.chunk + offset // CHUNK_POINTS}
            start = datetime.fromtimestamp(points[0][0], UTC)
            rows.append({**self._row, **place, "start": start, "n": len(points), "packed": pack(points)})
        return rows

    def _first_chunk(self, series: str) -> int:
        """Behind what an earlier process stored of the same series."""
        query = select(func.max(SeriesChunk.chunk)).filter_by(**self._row, series=series)
        with self._records.read() as session:
            last = session.scalar(query)
        return 0 if last is None else last + 1


class _Tail:
    """The chunk of a series that still grows: its number, its points, and how many of them are stored."""

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk
        self.points: list[Point] = []
        self.stored = 0

    def settle(self) -> None:
        """All points are stored: full chunks are let go."""
        full = len(self.points) // CHUNK_POINTS
        self.chunk += full
        self.points = self.points[full * CHUNK_POINTS :]
        self.stored = len(self.points)


def _existing(session: Session, run_id: str) -> Run:
    run = session.get(Run, run_id, with_for_update=True)
    if run is None:
        raise BadInput(f"no run {run_id!r}: `switchyard history` lists them")
    return run


def _given(**named: Any) -> dict[str, Any]:
    """What of `named` is not None."""
    return {name: value for name, value in named.items() if value is not None}


def _now() -> datetime:
    return datetime.now(UTC)


@cache
def _created(pid: int) -> float:
    return float(psutil.Process(pid).create_time())


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"owner_host": this_host(), "owner_pid": pid, "owner_created": _created(pid)}
