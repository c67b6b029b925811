"""Records that are locked, broken or of another program: the yard is shown and rolled back all the same, in words."""

import contextlib
import os
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from gguf_files import write_gguf
from switchyard_command import command, json_of
from waiting import until

from engines.process.serving import free_port
from engines.yard.client import YardClient
from tasks.records.store import open_records

ROOT = Path(__file__).parents[2]
RIG = ROOT / "tests" / "rig"
SOON_S = 20  # a third of what it took to wait for the lock twice


@pytest.fixture
def home(home):
    home.mkdir()
    with open_records(home / "switchyard.db") as records:
        run = records.start_run("evaluate", "an earlier one", {})
        records.finish_run(run.id, "done")
    return home


@pytest.fixture
def yard(home, tmp_path):
    """A yard over two fake engines whose model was moved from `old` to `new`."""
    gguf = tmp_path / "model.gguf"
    write_gguf(gguf)
    argv = [
        sys.executable,
        str(RIG / "fake_yard.py"),
        "--home",
        str(home),
        "--port",
        str(free_port()),
    ]
    with (tmp_path / "yard.log").open("wb") as log:
        process = subprocess.Popen(
            [*argv, "--gguf", str(gguf)], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log
        )
    client = YardClient(home)
    until(lambda: process.poll() is not None or client.runs(), "a yard")
    client.order("promote", to="new")
    yield client
    process.terminate()
    process.wait(30)


def locked_whole(database):
    """Nobody else may even read: what `PRAGMA locking_mode` is for, and a restore of a backup."""
    holder = sqlite3.connect(database, isolation_level=None)
    holder.execute("PRAGMA locking_mode=EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    holder.execute("CREATE TABLE other (x)")
    return holder.close


def locked_for_writers(database):
    holder = sqlite3.connect(database, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    return holder.close


def not_a_database(database):
    for name in (database, *database.parent.glob(f"{database.name}-*")):
        name.write_bytes(b"not a database, whoever wrote it " * 100)
    return lambda: None


def a_folder(database):
    for name in database.parent.glob(f"{database.name}*"):
        name.unlink()
    database.mkdir()
    return lambda: None


def of_a_newer_one(database):
    with contextlib.closing(sqlite3.connect(database)) as writer, writer:
        writer.execute("UPDATE switchyard_alembic_version SET version_num = '9999'")
    return lambda: None


OUT_OF_REACH = {
    "locked whole": locked_whole,
    "not a database": not_a_database,
    "a folder": a_folder,
    "of a newer Switchyard": of_a_newer_one,
}


@pytest.fixture(params=OUT_OF_REACH.values(), ids=OUT_OF_REACH)
def out_of_reach(request, home):
    release = request.param(home / "switchyard.db")
    yield
    release()


def test_status_shows_the_yard_and_says_why_no_history(yard, out_of_reach, switchyard):
    done = switchyard("status", timeout_s=SOON_S)
    assert done.returncode == 0, done.stderr
    assert "m → new" in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("records: ")]
    assert "switchyard.db" in line
    assert line.endswith("; history not shown")
    state = json_of(switchyard("status", "--json", timeout_s=SOON_S))
    assert state["yard"]["models"][0]["serving"] == "new"
    assert "switchyard.db" in state["records"]
    assert (state["running"], state["last"]) == ([], None)


def test_status_with_records_says_nothing_of_them(yard, switchyard):
    state = json_of(switchyard("status", "--json"))
    assert state["records"] is None
    assert state["last"]["plan"] == "an earlier one"
    assert "records:" not in switchyard("status").stdout


def test_rollback_acts_and_says_that_it_is_not_recorded(yard, out_of_reach, switchyard):
    done = switchyard("rollback", "--who", "Ada", "--reason", "a test", timeout_s=SOON_S)
    assert yard.status()["models"][0]["serving"] == "old"
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "not recorded" in line]
    assert line.startswith("rolled back, but not recorded: ")
    assert "switchyard.db" in line


def test_rollback_does_not_wait_for_the_lock_before_it_acts(yard, home, environment, tmp_path):
    """Another program is in the middle of a long write: the model is back before that one ends."""
    release = locked_for_writers(home / "switchyard.db")
    with (tmp_path / "said").open("wb") as said:
        rolling = subprocess.Popen(command("rollback"), env=environment, cwd=tmp_path, stdout=said, stderr=said)
    try:
        until(lambda: yard.status()["models"][0]["serving"] == "old", "the rollback", SOON_S)
        assert rolling.poll() is None, "it waits a little for the records, afterwards"
    finally:
        release()
        rolling.wait(60)
    with open_records(home / "switchyard.db") as records:
        recorded = [run.status for run in records.history(kind="rollback")]
    assert recorded == ["done"] or "not recorded" in (tmp_path / "said").read_text()


def test_rollback_is_recorded_where_it_can_be(yard, home, switchyard):
    assert switchyard("rollback", "--who", "Ada").returncode == 0
    with open_records(home / "switchyard.db") as records:
        (run,) = records.history(kind="rollback")
        assert (run.status, run.verdict) == ("done", "PASS")
        assert [(step.step, step.state) for step in records.steps(run.id)] == [("rollback", "done")]
        assert [made.who for made in records.decisions(run.id)] == ["Ada"]


def test_a_rollback_that_is_refused_is_no_run(yard, home, switchyard):
    """There is one way back, and it was gone."""
    assert switchyard("rollback").returncode == 0
    assert switchyard("rollback").returncode == 2
    with open_records(home / "switchyard.db") as records:
        assert [run.status for run in records.history(kind="rollback")] == ["done"]


@pytest.mark.parametrize("arguments", [("history",), ("report",), ("report", "latest", "--json")])
def test_history_and_report_are_one_line(home, out_of_reach, switchyard, arguments):
    done = switchyard(*arguments, timeout_s=SOON_S)
    assert done.returncode in (2, 5)
    assert done.stderr.startswith("error: ")
    assert "switchyard.db" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_a_server_that_never_answers(environment, home, yard, switchyard):
    """PostgreSQL behind a firewall: it accepts the connection and says nothing."""
    pytest.importorskip("psycopg")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://joe:hunter2@127.0.0.1:{silent.getsockname()[1]}/x"
        environment["SWITCHYARD_DATABASE_URL"] = url
        done = switchyard("status", timeout_s=SOON_S)
        assert "m → new" in done.stdout
        assert "history not shown" in done.stdout
        assert "hunter2" not in done.stdout
        assert switchyard("rollback", timeout_s=SOON_S).returncode == 0
        assert switchyard("history", timeout_s=SOON_S).returncode in (2, 5)
