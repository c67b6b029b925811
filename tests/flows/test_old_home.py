"""A home that 268cc56 left behind keeps working: through the command line, with real engines."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import installed
import pytest
import yaml
from old_home import FOLDER, HOST, INSTALLED, OldHome, stored_hash, untouched
from prefect.flows import Flow, load_flow_from_entrypoint
from switchyard_command import command, json_of
from waiting import until

from engines.process.serving import free_port
from engines.yard.client import YardClient
from migrations.plan import content_hash
from migrations.plan_file import build_plan
from tasks.records.payload import plan_hash

WHEELS = ("xllamacpp", "mistralrs", installed.MODEL)
OLD, NEW = "llama.cpp", "mistral.rs"
HOMES = {"used": ".switchyard", "retired": ".switchyard-retired"}
ROOT = Path(__file__).parents[2]
BIN = os.path.dirname(sys.executable)
LOCAL = {"trust_env": False, "verify": False}


@pytest.fixture
def old(tmp_path):
    """The home with the promoted model; no engine is needed to look at it."""
    return OldHome(tmp_path / "old", HOMES["used"], free_port())


@pytest.fixture
def used(tmp_path):
    """The same with its model file."""
    return OldHome(tmp_path / "old", HOMES["used"], free_port(), installed.smollm2(*WHEELS))


@pytest.fixture
def retired(tmp_path):
    """The home in which llama.cpp was retired."""
    return OldHome(tmp_path / "old", HOMES["retired"], free_port(), installed.smollm2(*WHEELS))


def environment(home):
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "SWITCHYARD_"))}
    return {**kept, "SWITCHYARD_HOME": str(home.path), "SWITCHYARD_HOST": HOST, "COLUMNS": "300"}


def switchyard(home, *arguments, **more):
    return subprocess.run(
        command(*arguments),
        env={**environment(home), **more},
        cwd=home.user,
        text=True,
        capture_output=True,
        timeout=600,
        check=False,
    )


@contextlib.contextmanager
def yard(home, argv=None, cwd=None, env=None):
    """The yard of a home, as `switchyard serve` or other words start it, once it serves."""
    log = home.user / "serve.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            argv or command("serve"),
            env=env or environment(home),
            cwd=cwd or home.user,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        until(lambda: process.poll() is not None or health(home) == 200, f"the yard to serve: {log}", deadline_s=180)
        assert process.poll() is None, log.read_text()
        yield YardClient(home.path)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


@pytest.fixture
def prefect(prefect_of_all):
    """The home has nothing of Prefect's: a server that runs is as good as one of the command's own."""
    return {"PREFECT_API_URL": prefect_of_all.url}


def health(home):
    try:
        return httpx.get(f"http://127.0.0.1:{home.port}/health", **LOCAL).status_code
    except httpx.HTTPError:
        return 0


def serving(client):
    (route,) = client.status()["models"]
    return route["serving"]


def stored_checks(home, run_id):
    rows = home.rows('select "check", verdict, value, "limit", why from "check" where run_id = ?', run_id)
    return {name: ((verdict, value, limit), why) for name, verdict, value, limit, why in rows}


REWORDED = (  # as that commit stored it, and what the same numbers read today
    (
        "0.3 min cannot tell a filling cache from a leak: soak",
        "20 s cannot distinguish a filling cache from a leak; soak",
    ),
    ("chunks were stamped up to 1.2 ms late", "it stamped chunks 1.23 ms late"),
    ("in 0.4 min and 3 requests (incumbent: 0 in 0.3 min", "in 21.5 s and 3 requests (incumbent: 0 in 20.8 s"),
    ("; with mapped files 346.3 against 168 MiB", ""),
    ("3 requests failed on the candidate", "3 requests and starts failed on the candidate"),
    ("MB a day (95", "MB/day (95"),
    ("limit 50;", "limit 50 MB/day;"),
    (" ratio", "×"),
    (" %", "%"),
    ("fits: RAM fits", "RAM fits"),
)


def in_new_words(why):
    for before, today in REWORDED:
        why = why.replace(before, today)
    return why


def rounded(why):
    """With each figure to three digits, however it was written."""
    return re.sub(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]\d+)?", lambda n: f"{float(n[0].replace(',', '')):.3g}", why)


# --- what is recorded


def test_status_and_history_show_what_was_there(old):
    done = switchyard(old, "status")
    assert done.returncode == 0, done.stderr
    state = json_of(switchyard(old, "status", "--json"))
    assert (state["records"], state["running"], state["last"]["status"]) == (None, [], "killed")
    runs = json_of(switchyard(old, "history", "--json"))["runs"]
    assert [(run["kind"], run["status"], run["verdict"]) for run in runs] == [
        ("evaluate", "killed", None),
        ("soak", "interrupted", None),
        ("evaluate", "done", "PASS"),
    ]


def test_an_entry_of_a_process_that_is_dead_is_forgotten(old):
    """Its pid may be anybody's by now: nothing is ended for it."""
    entries = list((old.path / "processes").glob("*.json"))
    assert entries
    assert json_of(switchyard(old, "status", "--json"))["ended"] == []
    assert not any(entry.exists() for entry in entries)


@pytest.mark.engine
def test_the_report_of_a_finished_run_has_the_verdicts_that_were_stored(used):
    run_id = used.run_id("done")
    before = stored_checks(used, run_id)
    assert before
    outcome = json_of(switchyard(used, "report", run_id, "--json"))
    again = {c["check"]: c for c in outcome["models"][0]["checks"]}
    assert {name: (c["verdict"], c["value"], c["limit"]) for name, c in again.items()} == {
        name: figures for name, (figures, _) in before.items()
    }
    for name, (_, why) in before.items():  # today the value and the limit follow where they were not said
        assert rounded(again[name]["why"]).startswith(rounded(in_new_words(why))), name
    assert outcome["verdict"] == "PASS"


@pytest.mark.engine
def test_a_broken_off_evaluation_is_resumed_and_keeps_what_it_has(used, prefect):
    run_id = used.run_id("running")
    query = "select arm, kind, key, recorded_at from evidence where run_id = ? and model_id = 'smollm2'"
    before = set(used.rows(query, run_id))
    assert {("both", "preflight"), ("both", "performance")} <= {(arm, kind) for arm, kind, *_ in before}
    done = switchyard(used, "evaluate", used.plan, "--resume", "latest", "--json", **prefect)
    outcome = json_of(done)
    (model,) = outcome["models"]
    open_ = [c["check"] + ": " + c["why"] for c in model["checks"] if c["required"] and c["verdict"] != "PASS"]
    assert (outcome["run_id"], outcome["verdict"], done.returncode) == (run_id, "PASS", 0), "\n".join(open_)
    assert before < set(used.rows(query, run_id))


@pytest.mark.engine
def test_a_finished_evaluation_still_opens_the_gate_of_a_migration(used, prefect):
    """On a yard that has moved nothing yet."""
    shutil.rmtree(used.path / "yard")
    decided = ("--without-canary", "--without-rehearsal", "--who", "Ada", "--reason", "only the gate is asked here")
    try:
        done = switchyard(used, "migrate", used.plan, "--phase", "subprocess", *decided, "--json", **prefect)
        (model,) = json_of(done)["models"]
        gate = next(check for check in model["checks"] if check["check"] == "phase_1.gate")
        assert (gate["verdict"], gate["why"]) == ("PASS", f"run {used.run_id('done')} opened it")
        assert serving(YardClient(used.path)) == NEW
    finally:
        switchyard(used, "stop")
        until(lambda: not YardClient(used.path).runs(), "the yard to stop")


# --- what serves


@pytest.mark.engine
def test_the_yard_serves_the_promoted_engine_soaks_on_and_rolls_back(used, prefect):
    windows = "select key, recorded_at from evidence where kind = 'soak' and arm = 'candidate' and run_id = ?"
    run_id = used.run_id("interrupted", "soak")
    before = set(used.rows(windows, run_id))
    with yard(used) as client:
        assert serving(client) == NEW
        soak = json_of(switchyard(used, "soak", "--window", "4", "--json", **prefect))
        assert soak["models"][0]["windows"] == 3, soak
        assert soak["run_id"] == run_id
        assert before < set(used.rows(windows, run_id))
        done = switchyard(used, "rollback", "--who", "Ada", "--reason", "rehearsed", "--json")
        assert done.returncode == 0, done.stderr
        outcome = json_of(done)
        assert (outcome["from"], outcome["serving"], outcome["token"]["answered"]) == (NEW, OLD, True)


@pytest.mark.engine
def test_the_promoted_engine_serves_although_the_plan_has_it_no_more(used):
    """From its stored launch spec: its module has moved, and the Python that it names is gone."""
    used.plan.write_text(used.plan.read_text().replace(f'engine = "{NEW}"', f'engine = "{OLD}"', 1))
    recipe = used.state["models"]["smollm2"]["recipes"][NEW]
    assert not os.path.exists(recipe["program"][0])
    with yard(used) as client:
        status = client.status()
        assert serving(client) == NEW
        (line,) = [event["what"] for event in status["events"] if event["what"].startswith(f"{NEW} 0")]
        assert line.endswith(f"is started with {sys.executable} now, no longer with {recipe['program'][0]}")


@pytest.mark.engine
def test_an_engine_that_is_nowhere_is_an_incident_and_the_other_serves(used):
    """Another version is not the engine that was promoted: nothing is started in its place unasked."""
    used.plan.write_text(used.plan.read_text().replace(f'engine = "{NEW}"', f'engine = "{OLD}"', 1))
    state = used.state
    state["models"]["smollm2"]["recipes"][NEW]["version"] = "0.0.1"
    (used.path / "yard" / "state.json").write_text(json.dumps(state))
    with yard(used) as client:
        assert serving(client) == OLD
        said = [incident["what"] for incident in client.status()["incidents"]]
        assert any("which is gone" in what and "is version" in what for what in said), said
        assert client.status()["models"][0]["committed"] == NEW


@pytest.mark.engine
@pytest.mark.parametrize("running", [False, True])
def test_a_retired_engine_comes_back_and_serves(retired, running):
    assert OLD in retired.state["retired"]
    if not running:
        done = switchyard(retired, "restore", OLD)
        assert done.returncode == 0, done.stderr
    with yard(retired) as client:
        if running:
            done = switchyard(retired, "restore", OLD)
            assert done.returncode == 0, done.stderr
        done = switchyard(retired, "rollback", "--json")
        assert done.returncode == 0, done.stderr
        assert json_of(done)["token"]["answered"]
        assert serving(client) == OLD
    assert retired.state["retired"] == {}


# --- what an older version reads


@pytest.mark.engine
def test_an_older_version_can_read_what_this_one_writes(used):
    """The same keys, and modules under their old names: 268cc56 refuses a state with a key that it does not know."""
    before = used.state
    with yard(used):
        assert switchyard(used, "rollback").returncode == 0
        assert switchyard(used, "promote", "--to", NEW, "--yes").returncode == 0
    after = used.state
    assert shape(after) == shape(before)
    for engine, recipe in after["models"]["smollm2"]["recipes"].items():
        assert recipe["program"][1:] == before["models"]["smollm2"]["recipes"][engine]["program"][1:]
        assert recipe["settings"].keys() == before["models"]["smollm2"]["recipes"][engine]["settings"].keys()


def shape(value):
    """The keys of nested JSON, with the kind of each value."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in sorted(value.items())}
    return type(value).__name__


# --- hashes


def test_a_plan_of_268cc56_has_both_its_hashes_still(tmp_path):
    """Else a finished evaluation would not count any more, and a broken-off one could not be resumed."""
    model = installed.smollm2()
    db = untouched(tmp_path)
    runs = db.execute("select plan_json, plan_hash from run").fetchall()
    assert len({stored for _, stored in runs}) == 1
    for text, stored in runs:
        parsed = json.loads(text)
        assert plan_hash(parsed) == stored_hash(parsed) == stored
        assert plan_hash(build_plan(parsed).model_dump(mode="json")) == stored, "a field was added that is not left out"
        (stored_model,) = parsed["models"]
        here = build_plan({**parsed, "models": [{**stored_model, "gguf": str(model)}]})
        meant = [json.loads(row[0]).get("plan_hash") for row in db.execute("select circumstances from evidence")]
        assert {content_hash(here)} == {found for found in meant if found}
    db.close()


# --- how it is started


@pytest.mark.engine
def test_an_installed_unit_starts_the_yard(used):
    """As systemd would: its words, its folder and its environment, with the paths of this installation."""
    lines = (FOLDER / "switchyard.service").read_text().splitlines()
    parsed = [line.partition("=")[::2] for line in lines if "=" in line and not line.startswith("#")]

    def here(text):
        for there, now in ((f"{INSTALLED}/.venv/bin", BIN), (INSTALLED, str(ROOT)), ("/home/ada", str(used.user))):
            text = text.replace(there, now)
        return text

    unit = {name: here(value) for name, value in parsed if name != "Environment"}
    given = dict(here(value).split("=", 1) for name, value in parsed if name == "Environment")
    assert shlex.split(unit["ExecStart"])[1:4] == ["-m", "flows.cli", "serve"]
    kept = {"SWITCHYARD_HOST": HOST, "HOME": str(used.user)}
    with yard(used, shlex.split(unit["ExecStart"]), unit["WorkingDirectory"], {**kept, **given}) as client:
        assert serving(client) == NEW


ENTRYPOINTS = [one["entrypoint"] for one in yaml.safe_load((FOLDER / "prefect.yaml").read_text())["deployments"]]


@pytest.mark.parametrize("entrypoint", ENTRYPOINTS)
def test_a_deployed_entrypoint_is_a_flow_still(entrypoint):
    """Those of today's prefect.yaml are in test_prefect_yaml.py."""
    assert isinstance(load_flow_from_entrypoint(entrypoint), Flow)
