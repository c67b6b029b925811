"""Open the database at the newest schema, whatever state it is found in, or say in one line why not.

The pragmas below are the only SQL that SQLite alone understands.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, DisconnectionError, NoSuchModuleError, OperationalError
from sqlalchemy.pool import ConnectionPoolEntry, NullPool

from engines.errors import BadInput, SwitchyardError
from engines.home import database_url, home

VERSION_TABLE = "switchyard_alembic_version"
BUSY_TIMEOUT_S = 30.0

# Alembic keeps its context in module globals: one upgrade at a time in a process
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Schema:
    """The directory of the Alembic scripts and the revision that this code reads and writes."""

    scripts: Path
    head: str


SCHEMA = Schema(scripts=Path(__file__).parent, head="0003")


def database(where: str | Path | None) -> URL:
    """The address of the records: a URL, a path, or None for `$SWITCHYARD_DATABASE_URL` or `home()/switchyard.db`."""
    where = where or database_url() or home() / "switchyard.db"
    if isinstance(where, Path) or "://" not in where:
        return URL.create("sqlite", database=str(Path(where).expanduser().absolute()))
    try:
        url = make_url(where)
    except ArgumentError as problem:
        raise BadInput(
            "the database URL cannot be read: use sqlite:///PATH or postgresql://USER@HOST/NAME"
        ) from problem
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise BadInput(f"{shown(url)}: records live in SQLite or PostgreSQL, not in {url.get_backend_name()}")
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise BadInput(f"{shown(url)}: records need a file; use sqlite:///PATH")
    return url


def absolute(url: URL) -> str:
    """`url` with its password, and with the whole path of a file: it means the same from any working directory."""
    if url.get_backend_name() == "sqlite":
        url = url.set(database=str(Path(str(url.database)).absolute()))
    return url.render_as_string(hide_password=False)


def shown(url: URL) -> str:
    """The address for a message: the path of a file, a URL without its password."""
    return str(url.database) if url.get_backend_name() == "sqlite" else url.render_as_string(hide_password=True)


def open_database(url: URL, schema: Schema = SCHEMA, *, wait_s: float = BUSY_TIMEOUT_S) -> Engine:
    """An engine on the database at `url`, created or upgraded in place to `schema.head`.

    Each wait for another program's lock, or for the connection to a server, ends after `wait_s` seconds. Before an
    upgrade the old SQLite file is copied to `NAME.bak-REVISION`. Raises BadInput where the user can fix it
    (unreachable, not a database, of another program, of a newer Switchyard) and never replaces what it found.
    """
    with explained(url):
        if url.get_backend_name() == "sqlite":
            _make_directory(Path(str(url.database)).parent)
        engine = _engine(url, wait_s=wait_s)
        try:
            with engine.connect() as connection:
                found = _revision(connection)
            if found != schema.head:
                _upgrade(url, schema, wait_s)
        except BaseException:
            engine.dispose()
            raise
    return engine


@contextlib.contextmanager
def explained(url: URL) -> Iterator[None]:
    """Turns what a database driver raises into one clear line of ours."""
    try:
        yield
    except DBAPIError as problem:
        raise _explanation(url, problem) from problem


def _engine(url: URL, *, wait_s: float, foreign_keys: bool = True, pooled: bool = True) -> Engine:
    sqlite = url.get_backend_name() == "sqlite"
    options: dict[str, Any] = {} if pooled else {"poolclass": NullPool}
    if sqlite:
        options["connect_args"] = {"timeout": wait_s}
    else:
        options["pool_pre_ping"] = pooled
        options["connect_args"] = {"connect_timeout": max(2, math.ceil(wait_s))}  # libpq takes 1 for 2
    try:
        engine = create_engine(url, **options)
    except (ModuleNotFoundError, NoSuchModuleError) as problem:
        raise BadInput(
            f"{shown(url)}: no driver for {url.drivername}: pip install 'psycopg[binary]' for PostgreSQL"
        ) from problem
    if sqlite:
        _set_pragmas(engine, foreign_keys, wait_s)
    _stay_in_process(engine)
    return engine


def _stay_in_process(engine: Engine) -> None:
    """A forked child opens connections of its own: sharing its parent's corrupts SQLite and confuses PostgreSQL."""

    @event.listens_for(engine, "connect")
    def note(_connection: object, record: ConnectionPoolEntry) -> None:
        record.info["pid"] = os.getpid()

    @event.listens_for(engine, "checkout")
    def compare(_connection: object, record: Any, proxy: Any) -> None:
        if record.info["pid"] != os.getpid():
            record.dbapi_connection = proxy.dbapi_connection = None
            raise DisconnectionError("opened before the fork")


def _set_pragmas(engine: Engine, foreign_keys: bool, wait_s: float) -> None:
    @event.listens_for(engine, "connect")
    def pragmas(connection: sqlite3.Connection, _record: object) -> None:
        # the driver starts no transactions by itself: it would start none before DDL
        connection.isolation_level = None
        _use_wal(connection, wait_s)
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute(f"PRAGMA foreign_keys={'ON' if foreign_keys else 'OFF'}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # a writer takes its lock at once: one that read first is refused ("locked") without any waiting
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _use_wal(connection: sqlite3.Connection, wait_s: float) -> None:
    """Turn WAL on once per file; SQLite's busy timeout does not cover the switch, so it is retried."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as problem:
            if "locked" not in str(problem) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _make_directory(directory: Path) -> None:
    try:
        # transcripts and plans are private to the user
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as problem:
        raise BadInput(
            f"{directory}: cannot create the directory for the records ({problem.strerror}): "
            "set SWITCHYARD_HOME to one that is writable"
        ) from problem


def _revision(connection: Connection) -> str | None:
    """The schema revision of the database; None for one that is empty or not ours."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    row = connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).first()
    return row[0] if row else None


def _upgrade(url: URL, schema: Schema, wait_s: float) -> None:
    # foreign keys off: on SQLite a table is changed by dropping its old copy, and the drop would cascade
    engine = _engine(url, wait_s=wait_s, foreign_keys=False, pooled=False).execution_options(writes=True)
    try:
        with _ONE_AT_A_TIME, _quiet_alembic(), engine.begin() as connection:
            # read again under the lock: another process may just have done it
            found = _revision(connection)
            if found != schema.head:
                _refuse_foreign(url, connection, found, schema)
                if found is not None and url.get_backend_name() == "sqlite":
                    _back_up(Path(str(url.database)), found)
                _run_scripts(connection, schema)
    except DBAPIError:
        # PostgreSQL: two first openings collide on CREATE TABLE; the loser finds the work done
        with engine.connect() as connection:
            if _revision(connection) != schema.head:
                raise
    finally:
        engine.dispose()


def _refuse_foreign(url: URL, connection: Connection, found: str | None, schema: Schema) -> None:
    """Raise BadInput for a database of another program, or of a newer Switchyard."""
    if found is None:
        tables = inspect(connection).get_table_names()
        if set(tables) - {VERSION_TABLE}:
            raise BadInput(
                f"{shown(url)}: holds tables of another program ({', '.join(sorted(tables)[:3])}): "
                "give Switchyard a database of its own"
            )
        return
    from alembic.script import ScriptDirectory

    known = {script.revision for script in ScriptDirectory(str(schema.scripts)).walk_revisions()}
    if found not in known:
        raise BadInput(
            f"{shown(url)}: written by a newer Switchyard (revision {found}, this one knows up to {schema.head}): "
            "update Switchyard, or set SWITCHYARD_HOME to another directory"
        )


def _back_up(file: Path, revision: str) -> None:
    """Copy the committed state of the SQLite `file` to `FILE.bak-REVISION`, whole or not at all."""
    final = file.with_name(f"{file.name}.bak-{revision}")
    partial = file.with_name(f"{final.name}.{os.getpid()}.tmp")
    try:
        with contextlib.closing(sqlite3.connect(file)) as source, contextlib.closing(sqlite3.connect(partial)) as copy:
            source.backup(copy)
        partial.replace(final)
    except (OSError, sqlite3.Error) as problem:
        raise SwitchyardError(
            f"{final}: no backup before the upgrade ({problem}): the records stay as they were"
        ) from (problem)
    finally:
        partial.unlink(missing_ok=True)


def _run_scripts(connection: Connection, schema: Schema) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config(stdout=io.StringIO())
    # a percent sign in a path would be read as interpolation
    config.set_main_option("script_location", str(schema.scripts).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, schema.head)


@contextlib.contextmanager
def _quiet_alembic() -> Iterator[None]:
    logger = logging.getLogger("alembic")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def _explanation(url: URL, problem: DBAPIError) -> SwitchyardError:
    name = shown(url)
    reason = str(problem.orig).strip().splitlines()[0] if str(problem.orig).strip() else type(problem.orig).__name__
    for words, kind, advice in _ADVICE:
        if any(word in reason for word in words):
            return kind(f"{name}: {reason}: {advice}")
    if isinstance(problem, OperationalError) and url.get_backend_name() == "postgresql":
        return BadInput(f"{name}: cannot use PostgreSQL ({reason}): check that it runs and that the URL is right")
    return SwitchyardError(f"{name}: the database refused: {reason}")


_LEFT = "it was left as it is; move it aside, or put back a .bak- copy beside it, and try again"
_WRITABLE = "check that the file and its directory are writable, or set SWITCHYARD_HOME to another directory"
_LOCKED = "another program holds the lock: wait for that one or end it, then try again"
_ADVICE: tuple[tuple[tuple[str, ...], type[SwitchyardError], str], ...] = (
    (("not a database", "malformed"), BadInput, _LEFT),
    (("disk is full",), SwitchyardError, "free some space; what was recorded before is kept"),
    (("unable to open", "readonly database", "attempt to write a readonly"), BadInput, _WRITABLE),
    (("database is locked", "database table is locked"), SwitchyardError, _LOCKED),
    (("FOREIGN KEY", "foreign key"), SwitchyardError, "no such run; start it before anything is recorded for it"),
    (("disk I/O error",), SwitchyardError, "check the disk; what was recorded before is kept"),
)
