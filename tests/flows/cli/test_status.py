"""`switchyard status`: what it shows of a yard, and that looking disturbs nothing."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from gguf_files import write_gguf
from rich.console import Console
from switchyard_command import command, json_of
from waiting import until

from engines.errors import SwitchyardError
from engines.process.serving import free_port
from engines.yard.client import YardClient
from flows.cli.app import COMMANDS
from flows.cli.output import run_table
from flows.cli.status import next_of_run, watch_yard, yard_view

ROOT = Path(__file__).parents[3]
RIG = ROOT / "tests" / "rig"
NOW = 1_800_000_000.0
ENGINE = {
    "engine": "old",
    "version": "b1",
    "form": "binary",
    "state": "ready",
    "why": "one real token after 1.5 s (pid 7)",
    "since": NOW - 120,
    "loading": "",
    "pid": 7,
    "memory_bytes": 300 * 2**20,
    "vram_bytes": None,
    "ttft_ms_series": [41.0],
    "tokens_per_s": 12.5,
    "in_flight": 2,
    "restarts": 1,
}
STOPPED = ENGINE | {
    "engine": "new",
    "state": "stopped",
    "why": "never started",
    "since": None,
    "pid": None,
    "memory_bytes": None,
    "ttft_ms_series": [],
    "tokens_per_s": None,
    "in_flight": 0,
    "restarts": 0,
}
MODEL = {
    "id": "m",
    "serving": "old",
    "committed": "old",
    "selected": "auto",
    "fallback": None,
    "undo": None,
    "canary": None,
    "waiting": 3,
    "holding": False,
    "moving": None,
    "unservable": None,
    "engines": [ENGINE, STOPPED],
}


def status_of(*incidents, **changed):
    return {
        "pid": 1,
        "since": NOW - 3600,
        "address": "http://127.0.0.1:8080",
        "models": [MODEL | changed],
        "incidents": list(incidents),
        "events": [],
    }


def incident(seconds_ago, what="its process ended", **more):
    return {"at": NOW - seconds_ago, "model": "m", "what": what, **more}


def printed(renderable, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()


def seen(*incidents, width=80, **changed):
    return printed(yard_view(status_of(*incidents, **changed), now=NOW), width)


def test_everything_about_route_and_engines_fits_80_columns():
    text = seen()
    for words in (
        "http://127.0.0.1:8080",
        "pid 1, up 1 h",
        "m → old",
        "3 waiting",
        "●  old",
        "ready",
        "12.5",
        "41 ms",
        "300.0 MiB",
        "one real token after 1.5 s (pid 7), 2 min ago",
        "b1, binary, pid 7",
        "never started",
        "no incident in the last day",
    ):
        assert words in text, text
    assert max(map(len, text.splitlines())) <= 80


def test_what_was_not_measured_is_not_a_number():
    blind = ENGINE | {"memory_bytes": None, "tokens_per_s": None, "ttft_ms_series": []}
    text = seen(engines=[blind], width=120)
    assert text.count("not measured") == 3
    assert "None" not in text


def test_memory_of_the_gpu_is_shown_where_there_is_one():
    assert "GPU 2.00 GiB" in seen(engines=[ENGINE | {"vram_bytes": 2**31}])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"fallback": "new", "serving": "new"}, "Fallback: old is out of order, new serves"),
        ({"canary": {"engine": "new", "weight": 0.25}}, "Canary: new answers 25% of the conversations"),
        ({"undo": "new"}, "way back: new"),
        ({"moving": "promote to new"}, "Under way: promote to new"),
        ({"serving": None, "engines": [], "unservable": "no engine"}, "Not served: no engine"),
    ],
)
def test_what_is_out_of_the_ordinary_is_said(changed, words):
    assert words in seen(**changed)


def test_incidents_of_the_last_day_come_latest_first_and_older_ones_are_left_out():
    text = seen(incident(90_000, "long ago"), incident(60, "hung"), incident(5, "died", engine="old"))
    assert "long ago" not in text
    assert "incidents of the last day: 2" in text
    assert text.index("died") < text.index("hung")


def test_text_from_engines_cannot_write_to_the_terminal():
    hostile = "[red]x[/red] \x1b]0;title\x07\nsecond line"
    text = seen(incident(5, hostile), engines=[ENGINE | {"why": hostile, "version": hostile}])
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[red]x[/red]" in text


class Client:
    """A yard that is there, goes away, and comes back."""

    def __init__(self):
        self.asked = 0

    def status(self):
        self.asked += 1
        if self.asked == 2:
            raise SwitchyardError("no yard runs here")
        return status_of()


def test_watching_goes_on_when_the_yard_goes_away_and_ends_with_ctrl_c():
    client, out = Client(), Console(file=io.StringIO(), width=80)

    def pause(seconds):
        assert seconds == 1.0
        if client.asked == 3:
            raise KeyboardInterrupt

    watch_yard(client, out, pause=pause)
    assert client.asked == 3
    assert "m → old" in out.file.getvalue()


def test_history_keeps_the_run_id_whole_on_80_columns():
    run = {"run_id": "20261122-141645-8c27", "started_at": "2026-11-22T14:16:45+00:00", "took_s": 519.0}
    run |= {"kind": "evaluate", "plan": "llama.cpp-to-mistral.rs-on-the-big-box"}
    run |= {"status": "interrupted", "verdict": "INCONCLUSIVE", "host": "a-box-with-a-long-name.example.org"}
    text = printed(run_table([run]))
    for whole in ("20261122-141645-8c27", "11-22 14:16", "8.7 min", "interrupted", "INCONCLUSIVE", "a-bo", "eval"):
        assert whole in text
    assert len(text.splitlines()) == 2


@pytest.mark.parametrize(
    ("kind", "status", "command"),
    [
        ("evaluate", "killed", "switchyard evaluate --resume 1-a"),
        ("evaluate", "done", "switchyard report 1-a"),
        ("whole", "interrupted", "switchyard migrate"),
        ("migrate", "failed", "switchyard migrate --phase subprocess"),
        ("migrate-native", "killed", "switchyard migrate --phase native"),
        ("soak", "interrupted", "switchyard soak"),
        ("deprecate", "failed", "switchyard retire"),
        ("rollback", "failed", "switchyard rollback"),
        ("migrate", "done", None),
        ("soak", "running", None),
    ],
)
def test_what_status_advises_fits_the_kind_of_run(kind, status, command):
    run = {"run_id": "1-a", "kind": kind, "plan": "p", "status": status}
    assert next_of_run(run) == command
    assert command is None or command.split()[1] in COMMANDS


@pytest.fixture
def yard(home, tmp_path):
    """A running yard over fake engines, in the home of the `switchyard` fixture."""
    write_gguf(tmp_path / "model.gguf")
    home.mkdir()
    port = free_port()
    argv = [sys.executable, str(RIG / "fake_yard.py"), "--home", str(home), "--port", str(port)]
    argv += ["--gguf", str(tmp_path / "model.gguf")]
    log = home / "yard.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=output, stderr=subprocess.STDOUT
        )
    until(lambda: process.poll() is not None or answers(port), "a yard that serves")
    assert process.poll() is None, log.read_text()
    yield YardClient(home)
    process.send_signal(signal.SIGTERM)
    process.wait(30)


def answers(port):
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False, verify=False).status_code == 200
    except httpx.HTTPError:
        return False


def test_without_a_yard_status_says_how_to_start_one(switchyard):
    assert json_of(switchyard("status", "--json"))["yard"] is None
    assert "switchyard serve" in switchyard("status").stdout


def test_looking_ends_none_of_the_yards_engines(switchyard, yard, home):
    """Their register entries name a living owner, the yard: `status` and `history` clean up after dead ones only."""
    before = yard.status()["models"][0]["engines"]
    entries = sorted((home / "processes").glob("*.json"))
    assert entries
    told = json_of(switchyard("status", "--json"))
    assert told["ended"] == []
    assert told["yard"]["models"][0]["engines"][0]["pid"] == before[0]["pid"]
    text = switchyard("status").stdout
    assert "m → old" in text
    assert text.count(f"pid {before[0]['pid']}") <= 2  # in the yard's part, not once more among evaluations
    switchyard("history")
    after = yard.status()["models"][0]["engines"]
    assert [(e["pid"], e["state"], e["restarts"]) for e in after] == [
        (e["pid"], e["state"], e["restarts"]) for e in before
    ]
    assert sorted((home / "processes").glob("*.json")) == entries


def test_watch_shows_the_yard_on_a_terminal_and_ctrl_c_leaves_cleanly(yard, environment, tmp_path):
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        command("status", "--watch"), env=environment, cwd=tmp_path, stdout=terminal, stderr=terminal, stdin=terminal
    )
    os.close(terminal)
    said = b""
    end = time.monotonic() + 60
    while b"one real token" not in said:
        assert time.monotonic() < end, said
        said += os.read(master, 65536)
    process.send_signal(signal.SIGINT)
    rest = drained(master)
    assert process.wait(30) == 0, said + rest
    assert b"Traceback" not in said + rest
    assert b"\x1b[?25h" in rest, rest[-300:]  # the cursor is back


def drained(master):
    """All that comes until the other side is closed."""
    said = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:
            piece = b""
        if not piece:
            os.close(master)
            return said
        said += piece


def test_watch_and_json_together_are_refused(switchyard):
    done = switchyard("status", "--watch", "--json")
    assert done.returncode == 2
    assert "--watch" in done.stderr


def test_status_json_is_one_document(switchyard, yard):
    assert json.loads(switchyard("status", "--json").stdout)["yard"]["address"].startswith("http://127.0.0.1:")
