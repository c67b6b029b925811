"""The evaluation for real: two engines, a model, a verdict; and what is left when it is interrupted or killed."""

import os
import signal
import sqlite3
import subprocess
from pathlib import Path

import installed
import pytest
from gguf_files import changed_copy
from processes import of_home
from switchyard_command import command, json_of
from waiting import until

pytestmark = pytest.mark.engine

installed.require(*installed.BOTH)

MARGIN = 8.0  # so wide that only a broken comparison fails it: this test is not about speed


@pytest.fixture
def plan(tmp_path):
    """llama.cpp against itself, as small as a whole evaluation can be that still proves parity."""
    return written_plan(tmp_path, parity_prompts=8, parity_tokens=16)


@pytest.fixture
def quick_plan(tmp_path):
    """The same with one prompt: its verdict means nothing, its stages come fast."""
    return written_plan(tmp_path, parity_prompts=1, parity_tokens=4)


def written_plan(folder, *, parity_prompts, parity_tokens):
    path = folder / "plan.toml"
    path.write_text(f"""
name = "same engine"
[incumbent]
engine = "llama.cpp"
form = "binary"
[candidate]
name = "again"
engine = "llama.cpp"
form = "binary"
[settings]
context_tokens = 1024
host_cache_mib = 0
threads = 1
[[models]]
id = "smollm2"
gguf = "{installed.smollm2()}"
[measure]
requests_per_block = 1
warmup_min = 0
warmup_max = 1
looks = [3]
calibration_blocks = 0
max_tokens = 4
parity_prompts = {parity_prompts}
parity_tokens = {parity_tokens}
soak_s = 2
every_behaviour = false
[client]
requires = ["chat_answer", "stream_shape", "stop_string", "max_tokens", "error_body"]
[limits]
ttft_p50_ratio = {MARGIN}
ttft_p95_ratio = {MARGIN}
tpot_p50_ratio = {MARGIN}
e2e_p50_ratio = {MARGIN}
memory_peak_ratio = {MARGIN}
recover_s = 60
kill_detect_s = 60
hang_detect_s = 60
foreign_cpu = 1.0
""")
    return path


def started(environment, tmp_path, *arguments):
    """The command in a session of its own, as a terminal would run it."""
    log = (tmp_path / "run.log").open("wb")
    return subprocess.Popen(
        command(*arguments), env=environment, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def evidence(home, model="%"):
    """(arm, kind, key) -> when it was recorded, as far as the records have it."""
    if not (home / "switchyard.db").exists():
        return {}
    with sqlite3.connect(f"file:{home / 'switchyard.db'}?mode=ro", uri=True) as db:
        try:
            rows = db.execute(
                "select arm, kind, key, recorded_at from evidence where model_id != '-' and model_id like ?", (model,)
            ).fetchall()
        except sqlite3.OperationalError:  # the tables are being made
            return {}
    return {(arm, kind, key): when for arm, kind, key, when in rows}


@pytest.mark.usefixtures("prefect")
def test_the_same_engine_as_both_opens_the_gate(switchyard, plan, home):
    done = switchyard("evaluate", plan, "--json")
    outcome = json_of(done)
    whys = [f"{c['check']}: {c['why']}" for c in outcome["models"][0]["checks"] if c["verdict"] != "PASS"]
    assert (done.returncode, outcome["verdict"]) == (0, "PASS"), whys
    assert of_home(home) == []
    assert Path(outcome["report"]).read_text(encoding="utf-8").startswith("<!doctype html>")

    checks = {check["check"]: check for check in outcome["models"][0]["checks"]}
    assert "weights, 1 thread, CPU)" in checks["performance.ttft_p50_ratio"]["why"]

    again = json_of(switchyard("report", outcome["run_id"], "--json"))
    assert again["models"] == outcome["models"], "the verdicts are not a function of the records"
    (run,) = json_of(switchyard("history", "--json"))["runs"]
    assert (run["run_id"], run["verdict"], run["status"]) == (outcome["run_id"], "PASS", "done")
    stored = sqlite3.connect(home / "switchyard.db").execute('select "check", verdict, value from "check"').fetchall()
    shown = [(c["check"], c["verdict"], c["value"]) for c in outcome["models"][0]["checks"]]
    assert sorted(stored, key=str) == sorted(shown, key=str)


@pytest.mark.usefixtures("prefect_database")
def test_a_killed_run_leaves_nothing_and_resumes_where_it_stopped(switchyard, environment, tmp_path, quick_plan, home):
    """SIGKILL while blocks are measured; any later command cleans up; what is recorded is not measured again."""
    run = started(environment, tmp_path, "evaluate", quick_plan)
    until(lambda: ("both", "performance", "00000") in evidence(home), "a block", deadline_s=180)
    run.kill()
    run.wait()
    before = evidence(home)
    state = json_of(switchyard("status", "--json"))
    assert state["last"]["status"] == "killed"
    assert of_home(home) == []

    outcome = json_of(switchyard("evaluate", "--resume", "latest", "--json"))
    assert outcome["run_id"] == state["last"]["run_id"]
    after = evidence(home)
    assert {key: after[key] for key in before} == before
    assert len(after) > len(before)


@pytest.mark.usefixtures("prefect")
def test_models_that_their_headers_turn_down_fail_alone(switchyard, environment, tmp_path, home):
    """A pre-tokenizer that llama.cpp knows and mistral.rs does not, and a tensor too few. The next is measured.

    A request field that clients of the yard send and mistral.rs does not act on is a finding, and holds no gate.
    """
    (home / "yard").mkdir(parents=True)
    (home / "yard" / "usage.json").write_text('{"paths": {}, "fields": {"mirostat": 7, "max_tokens": 9}}')
    refused = changed_copy(installed.smollm2(), tmp_path / "refact.gguf", values={"tokenizer.ggml.pre": "refact"})
    broken = changed_copy(installed.smollm2(), tmp_path / "broken.gguf", without_tensor="blk.5.ffn_up.weight")
    plan = written_plan(tmp_path, parity_prompts=1, parity_tokens=4)
    text = plan.read_text().replace(
        'name = "again"\nengine = "llama.cpp"\nform = "binary"\n[settings]', 'engine = "mistral.rs"\n[settings]'
    )
    first = text.index("[[models]]")
    before = "".join(f'[[models]]\nid = "{path.stem}"\ngguf = "{path}"\n' for path in (refused, broken))
    plan.write_text(text[:first] + before + text[first:])
    run = started(environment, tmp_path, "evaluate", plan)
    until(lambda: any(arm == "candidate" for arm, _, _ in evidence(home, "smollm2")), "the third model", deadline_s=180)
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait(timeout=60) == 130
    outcome = json_of(switchyard("report", "--json"))
    checks = {m["model"]: {c["check"]: c for c in m["checks"]} for m in outcome["models"]}
    for model, words in (("refact", "tokenizer.ggml.pre"), ("broken", "blk.5.ffn_up")):
        assert checks[model]["preflight.loads"]["verdict"] == "FAIL"
        assert words in checks[model]["preflight.loads"]["why"]
        assert not any(check.startswith("launch.") for check in checks[model])
    found = checks["smollm2"]["compatibility.fields_in_use"]
    assert (found["verdict"], found["value"], found["required"]) == ("FAIL", 1, False)
    assert "clients send mirostat (7 requests)" in found["why"]


STAGES = {
    "Prefect starts": lambda home: list((home / "processes").glob("*.json")),
    "first evidence": lambda home: evidence(home),
}


@pytest.mark.parametrize(
    ("stage", "number"),
    [(stage, signal.SIGTERM if stage == "first evidence" else signal.SIGINT) for stage in STAGES],
)
def test_an_interrupt_ends_everything(environment, tmp_path, quick_plan, home, stage, number):
    run = started(environment, tmp_path, "evaluate", quick_plan)
    until(lambda: STAGES[stage](home) or run.poll() is not None, stage, deadline_s=180)
    os.killpg(run.pid, number)
    code = run.wait(timeout=60)
    said = (tmp_path / "run.log").read_text()
    assert code == 130, said
    assert "Traceback" not in said
    until(lambda: of_home(home) == [], "every process to be gone")
