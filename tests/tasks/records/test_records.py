"""The records: what is stored comes back, whatever happens to the process, the file or the schema meanwhile."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import postgresql
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from pydantic import BaseModel, SecretStr
from sqlalchemy import create_engine, text
from stored_series import append_samples, list_series

import tasks.records.store
from engines.errors import BadInput, NoMeasurement, SwitchyardError
from engines.home import home
from engines.home import host as this_host
from tasks.records.payload import REDACTED, pack_json, plan_hash, redact, unpack_json
from tasks.records.schema.upgrade import SCHEMA, VERSION_TABLE, Schema
from tasks.records.series import pack, unpack
from tasks.records.store import CHUNK_POINTS, Records, open_records
from tasks.records.tables import METADATA, Arm
from tasks.verdicts.verdict import CheckResult, Verdict, at_most, not_measured

ROOT = Path(tasks.records.store.__file__).parent.parent


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "switchyard.db"


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """The URL of a database that tests may empty."""
    with postgresql.server("records") as where:
        yield f"postgresql+psycopg://{where}/records"


@pytest.fixture(params=["sqlite", "postgresql"])
def records(request: pytest.FixtureRequest, file: Path) -> Iterator[Records]:
    """Fresh records in either database; PostgreSQL is emptied before."""
    url = file if request.param == "sqlite" else emptied(request.getfixturevalue("postgresql_url"))
    with open_records(url) as opened:
        yield opened


@pytest.fixture
def sqlite_records(file: Path) -> Iterator[Records]:
    with open_records(file) as opened:
        yield opened


def emptied(url: str) -> str:
    """The URL of the test database, in which nothing is left."""
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()
    return url


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A real second process that runs `code`; its arguments are `sys.argv[1:]`."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(*processes: subprocess.Popen[str]) -> list[str]:
    """What each process printed, once all have ended well."""
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return [out for out, _ in outputs]


# the place


def test_home_is_the_named_directory_or_one_under_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty SWITCHYARD_HOME counts as unset."""
    monkeypatch.setenv("SWITCHYARD_HOME", str(tmp_path / "yard"))
    assert home() == tmp_path / "yard"
    monkeypatch.setenv("SWITCHYARD_HOME", "")
    assert home() == Path.home() / ".switchyard"


def test_records_are_created_in_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The directory is made too, for its owner alone."""
    monkeypatch.setenv("SWITCHYARD_HOME", str(tmp_path / "a" / "yard"))
    monkeypatch.delenv("SWITCHYARD_DATABASE_URL", raising=False)
    with open_records() as records:
        assert records.history() == []
    assert (tmp_path / "a" / "yard" / "switchyard.db").is_file()
    assert (tmp_path / "a" / "yard").stat().st_mode & 0o077 == 0


def test_sqlite_is_opened_with_wal_and_foreign_keys(sqlite_records: Records) -> None:
    """The pragmas hold on every connection."""
    with sqlite_records.engine.connect() as connection:
        values = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        ]
    assert values == ["wal", 1, 1, 30_000]


# runs


def test_a_run_keeps_its_plan_its_owner_and_its_end(records: Records) -> None:
    """Times come back in UTC, with their zone."""
    run = records.start_run("evaluate", "nightly", {"limits": {"ttft": 1.1}}, environment={"host": "box"})
    assert run.shown_status == "running"
    records.note_run(run.id, flow_run_id="f-1", environment={"host": "box", "cpu": "x"})
    records.note_run(run.id, report_path=Path("report.html"))
    records.finish_run(run.id, verdict=Verdict.FAIL)
    stored = records.find_run(run.id)
    assert stored.plan == {"limits": {"ttft": 1.1}}
    assert stored.environment == {"host": "box", "cpu": "x"}
    assert (stored.status, stored.verdict, stored.report_path) == ("done", "FAIL", "report.html")
    assert (stored.flow_run_id, stored.owner_pid) == ("f-1", os.getpid())
    assert stored.ended_at is not None
    assert stored.ended_at.tzinfo == UTC
    assert stored.ended_at >= stored.started_at == run.started_at


def test_a_run_is_found_by_id_by_either_end_and_as_the_latest(records: Records) -> None:
    """What fits several runs, or none, is said in one line."""
    first = records.start_run("evaluate", "a", {})
    second = records.start_run("soak", "b", {})
    assert records.find_run().id == second.id
    assert records.find_run("latest", kind="evaluate").id == first.id
    assert records.find_run(first.id[-4:]).id == first.id
    assert [run.id for run in records.history()] == [second.id, first.id]
    assert [run.id for run in records.history(kind="soak")] == [second.id]
    with pytest.raises(BadInput, match="several runs"):
        records.find_run(first.id[:4])
    with pytest.raises(BadInput, match="no run '%'"):
        records.find_run("%")


def test_the_latest_is_this_hosts_own(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another host of the fleet may have begun one since."""
    mine = records.start_run("evaluate", "a", {})
    monkeypatch.setenv("SWITCHYARD_HOST", "another")
    with pytest.raises(BadInput, match="no run is recorded yet for this host"):
        records.find_run("latest")
    other = records.start_run("evaluate", "a", {})
    assert records.find_run("latest").id == other.id
    monkeypatch.delenv("SWITCHYARD_HOST")
    assert records.find_run("latest").id == mine.id
    assert records.find_run(other.id).id == other.id


def test_no_runs_yet_is_said(records: Records) -> None:
    """`latest` of nothing is the user's to fix, not a traceback."""
    with pytest.raises(BadInput, match="no run is recorded yet"):
        records.find_run("latest")


START_AND_SAMPLE = """
import sys, time
from tasks.records.store import open_records
records = open_records(sys.argv[1])
run = records.start_run("soak", "long", {"plan": 1})
writer = records.series_writer(run.id, "m", "candidate", every=10)
for t in range(25):
    writer.append("rss_anon_bytes", 1000.0 + t, 5.0 * t)
print(run.id, flush=True)
time.sleep(600)
"""


def test_a_killed_run_keeps_what_it_measured_and_is_shown_as_killed(file: Path) -> None:
    """It can be taken over then, and continues behind its samples."""
    process = python(START_AND_SAMPLE, file)
    assert process.stdout is not None
    run_id = process.stdout.readline().strip()
    with open_records(file) as records:
        assert records.find_run(run_id).shown_status == "running"
        assert records.unfinished({"plan": 1}, kind="soak") is None
        with pytest.raises(BadInput, match="is running in process"):
            records.resume_run(run_id)
        process.kill()
        process.communicate()
        assert records.find_run(run_id).shown_status == "killed"
        left = records.unfinished({"plan": 1}, kind="soak")
        assert left is not None
        assert records.resume_run(left.id).shown_status == "running"
        append_samples(records, run_id, "m", "candidate", "rss_anon_bytes", [(2000.0, None)])
        series = records.read_samples(run_id, "m", "candidate", "rss_anon_bytes")
    assert series.points() == [*((1000.0 + t, 5.0 * t) for t in range(20)), (2000.0, None)]


# evidence and checks


def test_evidence_comes_back_as_it_was_and_is_replaced_by_its_key(records: Records) -> None:
    """A second writing of the same key is the one that counts."""
    run = records.start_run("evaluate", "n", {})
    payload = {"ttft_ms": [1.5, None, 3], "text": "naïve \ud83d \x00 日本", "ok": True}
    incumbent: Arm = "incumbent"
    where = (run.id, "smol", incumbent, "performance.block")
    records.put_evidence(*where, {"old": 1}, key="0")
    records.put_evidence(*where, payload, key="0", environment={"argv": ["x", "--api-key", "s3cret"]})
    records.put_evidence(*where, [1], key="1")
    stored = records.get_evidence(*where, key="0")
    assert stored is not None
    assert stored.payload == payload
    assert stored.environment == {"argv": ["x", "--api-key", REDACTED]}
    assert [row.key for row in records.list_evidence(run.id, kind="performance.block")] == ["0", "1"]
    assert records.has_evidence(*where, key="1")
    assert not records.has_evidence(*where, key="2")
    assert records.get_evidence(run.id, "smol", "candidate", "performance.block", key="0") is None


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_evidence_with_a_number_that_is_none_is_refused_with_its_place(records: Records, number: float) -> None:
    """A NaN would slip through every later comparison."""
    run = records.start_run("evaluate", "n", {})
    with pytest.raises(SwitchyardError, match=r"evidence memory\.rss\[1\] is (nan|inf): store None"):
        records.put_evidence(run.id, "m", "-", "memory", {"rss": [1.0, number]})
    assert records.list_evidence(run.id) == []


def test_evidence_of_no_run_is_refused(records: Records) -> None:
    """An orphan could never be found again."""
    with pytest.raises(SwitchyardError, match="no such run"):
        records.put_evidence("nowhere", "m", "-", "memory", {})


def test_checks_come_back_as_returned_by_model_and_in_order(records: Records) -> None:
    """Judging again replaces a result of the same name and moves nothing."""
    run = records.start_run("evaluate", "n", {})
    first = not_measured("b.leak", "too short", limit=2.0, required=False)
    again = at_most("z.ttft_ratio", 1.05, limit=1.1, unit="ratio")
    records.put_checks(run.id, "smol", [at_most("z.ttft_ratio", 1.5, limit=1.1, unit="ratio"), first])
    records.put_checks(run.id, "smol", [again])
    records.put_checks(run.id, "gemma", [CheckResult(check="c", verdict=Verdict.ERROR, why="\x00")])
    stored = records.checks(run.id)
    assert stored["smol"] == [again, first]
    assert stored["gemma"][0].why == "\ufffd"
    records.drop_checks(run.id, "smol")
    assert list(records.checks(run.id)) == ["gemma"]


# steps and decisions


def test_a_step_stands_where_it_was_put_last(records: Records) -> None:
    """Intent, then done: one row, in the order of the first intent; other models and runs have their own."""
    run, other = records.start_run("migrate", "n", {}), records.start_run("migrate", "n", {})
    records.put_step(run.id, "m", "rehearsal", "intent", {"weight": 0.5})
    records.put_step(run.id, "m", "promote", "intent", {"undo": "llama.cpp"})
    records.put_step(run.id, "m", "rehearsal", "done", {"took_s": 2.5})
    records.put_step(run.id, "n", "rehearsal", "failed")
    records.put_step(other.id, "m", "rehearsal", "intent")
    steps = [(step.step, step.state, step.detail) for step in records.steps(run.id, "m")]
    assert steps == [("rehearsal", "done", {"took_s": 2.5}), ("promote", "intent", {"undo": "llama.cpp"})]
    assert [step.model_id for step in records.steps(run.id)] == ["m", "m", "n"]
    assert records.steps(run.id)[0].at.tzinfo == UTC
    with pytest.raises(SwitchyardError, match="no such run"):
        records.put_step("none", "m", "rehearsal", "intent")


def test_a_decision_is_recorded_once_and_keeps_its_name_and_reason(records: Records) -> None:
    """Said again by the same person for the same reason, it is the same decision; a new reason is a new one."""
    run = records.start_run("migrate", "n", {})
    first = records.put_decision(run.id, "m", "override", who="Ada", why="one box only")
    again = records.put_decision(run.id, "m", "override", who="Ada", why="one box only")
    records.put_decision(run.id, "m", "override", who="Ada", why="tried by hand")
    records.put_decision(run.id, "n", "without-canary", who="Bob", why="nobody uses it")
    assert (first.id, first.at) == (again.id, again.at)
    assert [(made.who, made.why) for made in records.decisions(run.id, "m")] == [
        ("Ada", "one box only"),
        ("Ada", "tried by hand"),
    ]
    assert [made.kind for made in records.decisions(run.id)] == ["override", "override", "without-canary"]


def test_environment_are_read_without_the_payloads(records: Records) -> None:
    """Of one model, all of them: a run that was resumed may have measured under several."""
    run = records.start_run("evaluate", "n", {})
    for key, digest in (("1", "a"), ("2", "b")):
        records.put_evidence(run.id, "m", "both", "performance", {}, key=key, environment={"model_digest": digest})
    records.put_evidence(run.id, "n", "both", "performance", {}, environment={"model_digest": "c"})
    assert records.evidence_environments(run.id, "m") == [{"model_digest": "a"}, {"model_digest": "b"}]


# samples


@pytest.mark.parametrize(
    "values",
    [
        [0.0, 1.0, -5.0, 2.0**52],
        [0.1, 1e300, -2.5e-310, 7.0],
        [1.0, None, 3.0],
        [None],
        [-0.0, 0.0],
        [2.0**60, 1.0],
    ],
)
def test_packed_points_lose_nothing(values: list[float | None]) -> None:
    """Whole numbers, fractions, tiny and huge ones, gaps and the sign of zero; times are kept to 1 ms."""
    points = [(1_795_000_000.123 + index * 1.001, value) for index, value in enumerate(values)]
    back = unpack(pack(points)).points()
    assert [repr(value) for _, value in back] == [repr(value) for _, value in points]
    assert [t for t, _ in back] == pytest.approx([t for t, _ in points], abs=0.0005)


def test_samples_are_stored_as_they_come_and_in_few_chunks(records: Records) -> None:
    """Storing every 50 points still ends in full chunks; reading gives all of them in order."""
    run = records.start_run("soak", "n", {})
    total = CHUNK_POINTS + 75
    with records.series_writer(run.id, "m", "candidate", every=50) as writer:
        for index in range(total):
            writer.append("rss_anon_bytes", float(index), float(index * 3))
        assert len(records.read_samples(run.id, "m", "candidate", "rss_anon_bytes")) == CHUNK_POINTS + 50
    series = records.read_samples(run.id, "m", "candidate", "rss_anon_bytes")
    assert series.points() == [(float(index), float(index * 3)) for index in range(total)]
    assert list_series(records, run.id) == [("m", "candidate", "rss_anon_bytes", total)]
    with records.engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM sample")).scalar() == 2


def test_a_series_that_was_not_recorded_is_empty(records: Records) -> None:
    """Empty, not zero."""
    assert len(records.read_samples("none", "m", "-", "rss")) == 0


def test_an_infinite_sample_is_refused(records: Records) -> None:
    """None is the word for 'not measured'."""
    run = records.start_run("soak", "n", {})
    with pytest.raises(SwitchyardError, match="store None"):
        records.series_writer(run.id, "m", "-").append("rss", 0.0, math.inf)


# corrections


def test_a_correction_is_the_geometric_mean_of_its_launches(records: Records) -> None:
    """Half and double cancel out."""
    assert records.correction("llama.cpp", "llama") is None
    records.learn_correction("llama.cpp", "llama", 0.5)
    learned = records.learn_correction("llama.cpp", "llama", 2.0)
    assert learned.samples == 2
    assert learned.ratio == pytest.approx(1.0)
    with pytest.raises(NoMeasurement):
        records.learn_correction("llama.cpp", "llama", 0.0)


# secrets


class Settings(BaseModel):
    key: SecretStr
    at: datetime
    file: Path


def test_redact_hides_secrets_and_nothing_else() -> None:
    """Counts of tokens stay; an unset key stays None."""
    value = {
        "api_key": "k",
        "headers": {"Authorization": "Bearer abc", "X-Api-Key": "k", "Accept": "json"},
        "token": "t",
        "hf_token": None,
        "prompt_tokens": 7,
        "settings": Settings(key=SecretStr("s3cret"), at=datetime(2026, 1, 1, tzinfo=UTC), file=Path("a")),
        "argv": ("serve", "--api-key", "k", "--hf-token=k", "--token-source", "literal:k", "--port", "1"),
        "said": "sent Bearer 0123456789abcdef0 to postgresql://me:pw@host/db",
    }
    assert redact(value) == {
        "api_key": REDACTED,
        "headers": {"Authorization": REDACTED, "X-Api-Key": REDACTED, "Accept": "json"},
        "token": REDACTED,
        "hf_token": None,
        "prompt_tokens": 7,
        "settings": {"key": REDACTED, "at": "2026-01-01T00:00:00+00:00", "file": "a"},
        "argv": [
            *("serve", "--api-key", REDACTED, f"--hf-token={REDACTED}"),
            *("--token-source", f"literal:{REDACTED}", "--port", "1"),
        ],
        "said": f"sent Bearer {REDACTED} to postgresql://me:{REDACTED}@host/db",
    }


def test_a_token_in_evidence_is_a_word() -> None:
    """Logprobs name each token; a bearer of news is no bearer token."""
    payload = {"content": [{"token": " Paris", "logprob": -0.1, "bytes": [32]}], "text": "the bearer of news"}
    assert unpack_json(pack_json(payload)) == payload


def test_what_has_no_json_form_is_refused_with_its_place() -> None:
    """A set of bytes stored as its repr could never be judged again."""
    with pytest.raises(SwitchyardError, match=r"payload\.raw\[0\]: a bytes has no JSON form"):
        pack_json({"raw": [b"x"]})


def test_a_plan_has_the_same_hash_in_any_order_and_with_any_key() -> None:
    """A resumed run recognises its plan."""
    assert plan_hash({"a": 1, "api_key": "x", "b": 2}) == plan_hash({"b": 2, "a": 1, "api_key": "y"})
    assert plan_hash({"a": 1}) != plan_hash({"a": 2})


def test_the_hash_of_a_stored_plan_is_as_it_was() -> None:
    """Computed by the first version: an unfinished run is found by it. Paths of a model cache are no secrets."""
    snapshot = "models--a--sk-b/snapshots/0123456789abcdef0123456789abcdef01234567"
    plan = {
        "name": "home",
        "api_key_env": "SWITCHYARD_API_KEY",
        "note": "sent Bearer 0123456789abcdef0 to postgresql://me:pw@host/db",
        "models": [
            {
                "id": "m",
                "gguf": f"/home/ann/.cache/huggingface/hub/{snapshot}/m.gguf",
                "aliases": ["gpt-4o", "local/model"],
            }
        ],
        "settings": {"context_tokens": 4096, "tokenizer_json": None, "api_key": None},
        "limits": {"ttft_p50_ratio": 1.1},
        "accepted_losses": ["seed"],
        "client": {"requires": ["max_tokens", "stop_string"]},
        "sampling": {"max_tokens": 64},
        "api_key": "x",
    }
    assert plan_hash(plan) == "1738e6faffcb74f569d9243190c0144e7182ba6d03a7785cd3e84f56c087ceb6"
    assert redact(plan)["models"] == plan["models"]


# several processes

WRITE_ROWS = """
import sys
from tasks.records.store import open_records
with open_records(sys.argv[1]) as records:
    run = records.start_run("evaluate", sys.argv[2], {})
    for index in range(300):
        records.put_evidence(run.id, "m", "candidate", "performance.block", {"i": index}, key=str(index))
        records.learn_correction("e", "a", 1.0)
    print(run.id)
"""

FORK = """
import os, sys
from tasks.records.store import open_records
records = open_records(sys.argv[1])
run = records.start_run("evaluate", "n", {})
child = os.fork()
for index in range(50):
    records.put_evidence(run.id, "m", "-", "memory", index, key=f"{child == 0}-{index}")
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(len(records.list_evidence(run.id)))
"""


def test_two_processes_write_at_once_and_nothing_is_lost(file: Path) -> None:
    """Both also open a database that is not there yet, at the same time."""
    runs = [out.strip() for out in ended(python(WRITE_ROWS, file, "a"), python(WRITE_ROWS, file, "b"))]
    with open_records(file) as records:
        for run_id in runs:
            assert [row.payload["i"] for row in records.list_evidence(run_id)] == list(range(300))
        correction = records.correction("e", "a")
        assert correction is not None
        assert correction.samples == 600
        with records.engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"


def test_many_first_openings_at_once_make_one_schema(file: Path) -> None:
    """Whoever comes second finds the tables made, and waits rather than fails."""
    code = "import sys; from tasks.records.store import open_records; print(open_records(sys.argv[1]).history())"
    assert ended(*(python(code, file) for _ in range(6))) == ["[]\n"] * 6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_writes_on_connections_of_its_own(file: Path) -> None:
    """A SQLite connection carried over a fork corrupts the file."""
    assert ended(python(FORK, file)) == ["100\n"]


# schema versions


def test_the_code_and_the_scripts_name_the_same_revision() -> None:
    """The constant spares a start-up the import of Alembic."""
    assert ScriptDirectory(str(SCHEMA.scripts)).get_current_head() == SCHEMA.head


def test_the_scripts_build_the_tables_that_the_code_uses(records: Records) -> None:
    """Alembic finds no difference; an autogenerated revision would be empty."""
    with records.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        assert compare_metadata(context, METADATA) == []


def test_opening_what_is_up_to_date_imports_no_alembic_and_prints_nothing(file: Path) -> None:
    """Alembic costs more than all the rest of an opening."""
    code = (
        "import logging, sys; logging.basicConfig(level=0, stream=sys.stdout)\n"
        "from tasks.records.store import open_records\n"
        "open_records(sys.argv[1]); print('alembic' in sys.modules)"
    )
    quiet = [line for _ in range(2) for line in ended(python(code, file))]
    assert quiet == ["True\n", "False\n"]


NEXT = """
import sqlalchemy as sa
from alembic import op

revision = "9000"
down_revision = "{head}"


def upgrade():
    with op.batch_alter_table("run", recreate="always") as run:
        run.add_column(sa.Column("note", sa.String(), nullable=False, server_default="none"))
    {more}
"""


@pytest.fixture
def next_schema(tmp_path: Path) -> Callable[[str], Schema]:
    """Makes the schema of a later Switchyard, whose one revision more rebuilds the table that all others point at."""

    def make(more: str = "") -> Schema:
        scripts = tmp_path / "schema"
        shutil.copytree(SCHEMA.scripts, scripts, ignore=shutil.ignore_patterns("__pycache__"))
        (scripts / "versions" / "r9000_next.py").write_text(NEXT.format(head=SCHEMA.head, more=more))
        return Schema(scripts=scripts, head="9000")

    return make


def dump(file: Path) -> dict[str, list[dict[str, object]]]:
    """Every row of every table of ours."""
    rows: dict[str, list[dict[str, object]]] = {}
    with create_engine(f"sqlite:///{file}").connect() as connection:
        for table in METADATA.tables:
            rows[table] = [dict(row._mapping) for row in connection.execute(text(f'SELECT * FROM "{table}"'))]
    return rows


def fill(file: Path) -> None:
    with open_records(file) as records:
        run = records.start_run("evaluate", "n", {"a": 1})
        records.put_evidence(run.id, "m", "candidate", "memory", {"x": 1})
        records.put_checks(run.id, "m", [at_most("c", 1.0, limit=2.0, unit="s")])
        append_samples(records, run.id, "m", "-", "rss", [(1.0, 2.0)])
        records.learn_correction("e", "a", 1.5)
        records.put_step(run.id, "m", "promote", "intent", {"undo": "llama.cpp"})
        records.put_decision(run.id, "m", "override", who="Ada", why="a test")


def test_an_older_database_is_upgraded_without_loss_and_backed_up(
    file: Path, next_schema: Callable[[str], Schema]
) -> None:
    """Rebuilding `run` must not cascade into the rows that belong to runs."""
    fill(file)
    before = dump(file)
    with open_records(file, schema=next_schema("")) as records:
        assert records.find_run().name == "n"
    after = dump(file)
    assert [row.pop("note") for row in after["run"]] == ["none"]
    assert after == before
    assert all(before.values())
    backup = file.with_name(f"switchyard.db.bak-{SCHEMA.head}")
    assert dump(backup) == before
    assert not list(file.parent.glob("*.tmp"))


FIRST_PLAN = {
    "name": "n",
    "accepted_losses": ["seed"],
    "sampling": {"max_void_blocks": 3, "looks": [3]},
    "limits": {"top1_lower": 0.9},
}
FIRST_ENVIRONMENT = {"model_digest": "d", "engines": [{"arm": "candidate", "losses": ["seed: ignored"]}]}


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_the_first_schema_is_upgraded_without_loss(database: str, file: Path, request: pytest.FixtureRequest) -> None:
    """Rows of the first Switchyard: they are found by the same hash, under the names of today."""
    where = file if database == "sqlite" else emptied(request.getfixturevalue("postgresql_url"))
    with open_records(where, schema=Schema(scripts=SCHEMA.scripts, head="0001")) as first, first.engine.begin() as rows:
        hashed = hashlib.sha256(json.dumps(FIRST_PLAN, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        told = {"plan": json.dumps(FIRST_PLAN), "hash": hashed, "at": datetime(2026, 11, 1, tzinfo=UTC)}
        told |= {
            "here": this_host(),
            "env": json.dumps(FIRST_ENVIRONMENT),
            "machine": '{"host": "box"}',
            "payload": pack_json({"x": 1}),
        }
        columns = "id, kind, name, plan_json, plan_hash, started_at, status, owner_host, owner_pid, owner_created"
        rows.execute(
            text(
                f"INSERT INTO run ({columns}, circumstances) VALUES "
                "('r', 'evaluate', 'n', :plan, :hash, :at, 'failed', :here, 1, 1.0, :machine)"
            ),
            told,
        )
        columns = "run_id, model_id, arm, kind, key, payload, circumstances, recorded_at"
        rows.execute(
            text(f"INSERT INTO evidence ({columns}) VALUES ('r', 'm', 'both', 'memory', '', :payload, :env, :at)"), told
        )
    with open_records(where) as records:
        run = records.find_run()
        assert run.plan == {
            "name": "n",
            "accepted_unsupported": ["seed"],
            "measure": {"max_discarded_blocks": 3, "looks": [3]},
            "limits": {"top1_lower_bound": 0.9},
        }
        assert records.unfinished(run.plan) == run
        environment = {"model_digest": "d", "engines": [{"arm": "candidate", "unsupported": ["seed: ignored"]}]}
        assert run.environment == {"host": "box"}
        assert [(row.payload, row.environment) for row in records.list_evidence("r")] == [({"x": 1}, environment)]
        assert records.steps("r") == []
        records.put_step("r", "m", "yard", "done")
        records.put_decision("r", "m", "override", who="Ada", why="a test")
    assert file.with_name("switchyard.db.bak-0001").is_file() == (database == "sqlite")


def test_an_upgrade_that_fails_changes_nothing(file: Path, next_schema: Callable[[str], Schema]) -> None:
    """Half an upgrade would be neither the old schema nor the new."""
    fill(file)
    before = dump(file)
    with pytest.raises(SwitchyardError, match="no such table"):
        open_records(file, schema=next_schema("op.execute('DELETE FROM run'); op.execute('DROP TABLE missing')"))
    assert dump(file) == before
    with open_records(file) as records:
        assert records.find_run().name == "n"


def test_a_database_of_a_newer_switchyard_is_refused_and_kept(file: Path, next_schema: Callable[[str], Schema]) -> None:
    """An old program must not write into what it does not know."""
    fill(file)
    open_records(file, schema=next_schema("")).close()
    before = dump(file)
    with pytest.raises(BadInput, match=r"newer Switchyard \(revision 9000"):
        open_records(file)
    assert dump(file) == before


def test_upgrading_leaves_logging_alone(file: Path) -> None:
    """Alembic's usual env.py reconfigures the root logger and silences the program's own."""
    root, mine = logging.getLogger(), logging.getLogger("switchyard.before")
    state = (root.level, list(root.handlers), mine.disabled)
    open_records(file).close()
    assert (root.level, list(root.handlers), mine.disabled) == state


# what goes wrong


def one_line(problem: pytest.ExceptionInfo[SwitchyardError]) -> str:
    said = str(problem.value)
    assert "\n" not in said
    return said


def test_a_file_that_is_no_database_is_named_and_left_alone(file: Path) -> None:
    """Also one that began as a database and is damaged."""
    file.write_bytes(b"these are notes, not a database\n" * 100)
    with pytest.raises(BadInput, match="not a database") as problem:
        open_records(file)
    assert str(file) in one_line(problem)
    assert file.read_bytes().startswith(b"these are notes")


def test_a_damaged_database_is_named_and_left_alone(file: Path) -> None:
    """Nothing is repaired, renamed or begun anew by itself."""
    fill(file)
    whole = file.read_bytes()
    broken = whole[:4096] + b"\xff" * (len(whole) - 4096)
    file.write_bytes(broken)
    with pytest.raises(SwitchyardError, match="malformed") as problem, open_records(file) as records:
        records.find_run()
    assert str(file) in one_line(problem)
    assert file.read_bytes() == broken


def test_another_programs_database_is_refused(file: Path) -> None:
    """Prefect's, say, of which ours must never become a part."""
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE flow_run (id INTEGER)")
    with pytest.raises(BadInput, match="another program"):
        open_records(file)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """A file stands where the directory should be."""
    (tmp_path / "yard").write_text("")
    with pytest.raises(BadInput, match="SWITCHYARD_HOME") as problem:
        open_records(tmp_path / "yard" / "switchyard.db")
    assert str(tmp_path / "yard") in one_line(problem)


def test_a_directory_in_place_of_the_file_is_named(file: Path) -> None:
    """SQLite only says that it is unable to open it."""
    file.mkdir()
    with pytest.raises(BadInput, match="unable to open"):
        open_records(file)


def test_an_unwritable_directory_is_named(tmp_path: Path) -> None:
    """The advice is to choose another."""
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere: run the tests as an ordinary user")
    tmp_path.chmod(0o500)
    with pytest.raises(BadInput, match="writable"):
        open_records(tmp_path / "switchyard.db")


def test_a_full_disk_is_one_line_and_loses_nothing(sqlite_records: Records) -> None:
    """Samples wait in memory until there is space; rows stored before stay."""
    run = sqlite_records.start_run("soak", "n", {})
    writer = sqlite_records.series_writer(run.id, "m", "-", every=10)
    limit_pages(sqlite_records, 1)
    taken: list[float] = []

    def sample_until_full() -> None:
        for index in range(20_000):
            taken.append(math.sin(index * index))
            writer.append("noise", float(index), taken[-1])

    with pytest.raises(SwitchyardError, match="free some space") as problem:
        sample_until_full()
    one_line(problem)
    assert sqlite_records.find_run(run.id).name == "n"
    limit_pages(sqlite_records, 100_000)
    writer.flush()
    assert sqlite_records.read_samples(run.id, "m", "-", "noise").values.tolist() == taken


def limit_pages(records: Records, pages: int) -> None:
    """Makes SQLite say "disk is full" at `pages`, or at the present size of the file where that is larger."""
    with records.engine.connect() as connection:
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://me:pw@host/db", "SQLite or PostgreSQL"),
        ("sqlite://", "need a file"),
        ("://", "cannot be read"),
        ("postgresql+nosuchdriver://me:pw@host/db", "no driver"),
    ],
)
def test_a_bad_url_is_refused_without_its_password(url: str, said: str) -> None:
    """The line goes into logs."""
    with pytest.raises(BadInput, match=said) as problem:
        open_records(url)
    assert "pw" not in one_line(problem)
