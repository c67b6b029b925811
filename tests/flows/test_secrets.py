"""Keys in an engine's own words: nothing that Switchyard keeps, prints or serves has them; digests stay."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
import zlib
from pathlib import Path

import httpx
import pytest
from gguf_files import write_gguf
from real_yard import LOCAL
from waiting import until

from engines.process.serving import free_port
from engines.yard.client import YardClient
from tasks.records.store import open_records
from tasks.verdicts.verdict import CheckResult, Verdict

ROOT = Path(__file__).parents[2]
RIG = ROOT / "tests" / "rig"
DIGEST = hashlib.sha256(b"a model").hexdigest()
KEYS = {
    "OpenAI": "sk-proj-AbCdEf0123456789AbCdEf0123456789",
    "GitHub": "ghp_AbCdEf0123456789AbCdEf0123456789AbCd",
    "Hugging Face": "hf_AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh",
    "AWS": "AKIAIOSFODNN7EXAMPLE",
    "bearer": "Zm9vYmFyYmF6cXV4MDEyMzQ1Njc4OQ",
    "password": "correct-horse-9",
    "argv": "argv-key-of-ann",
    "variable": "variable-key-of-ann",
    "URL": "url-password-of-ann",
}
SAID = (
    f"cannot load model {DIGEST}: key {KEYS['OpenAI']} refused by https://x/?token={KEYS['GitHub']}; "
    f'{{"error": "bad {KEYS["Hugging Face"]}", "password": "{KEYS["password"]}"}} AKIA: {KEYS["AWS"]} '
    f"Authorization: Bearer {KEYS['bearer']} --api-key {KEYS['argv']} HF_TOKEN={KEYS['variable']} "
    f"postgresql://ann:{KEYS['URL']}@db/x"
)


def assert_clean(what, text):
    for kind, key in KEYS.items():
        assert key not in text, f"{what} has the {kind} key"


def files_of(home):
    """Every file below `home` with its text, whatever it is."""
    for path in sorted(home.rglob("*")):
        if path.is_file():
            yield path, path.read_bytes().decode("utf-8", "replace")


@pytest.fixture
def box(tmp_path):
    """A yard in front of an engine that prints keys, and answers every request with them."""
    home, port, gguf = tmp_path / "home", free_port(), tmp_path / "model.gguf"
    write_gguf(gguf)
    argv = [sys.executable, str(RIG / "fake_yard.py"), "--home", str(home), "--port", str(port)]
    habits = ["--old", shlex.join(["--quotes", SAID]), "--new", shlex.join(["--quotes", SAID, "--exit-code", "1"])]
    log = tmp_path / "yard.log"
    with log.open("wb") as output:
        yard = subprocess.Popen(
            [*argv, *habits, "--gguf", str(gguf)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=output,
            stderr=output,
        )
    client = YardClient(home)
    until(lambda: yard.poll() is not None or client.runs(), "a yard")
    until(lambda: httpx.get(f"http://127.0.0.1:{port}/health", **LOCAL).status_code == 200, "an engine")
    yield home, port, log
    yard.terminate()
    yard.wait(30)


def test_an_engine_that_quotes_keys(box, switchyard):
    home, port, log = box
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
    for _ in range(3):
        for stream in (False, True):
            httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json={**body, "stream": stream}, **LOCAL)
    for arguments in (
        ("promote", "--to", "new", "--yes"),
        ("status",),
        ("status", "--json"),
        ("rollback",),
        ("history",),
    ):
        done = switchyard(*arguments)
        assert_clean(f"switchyard {' '.join(arguments)}", done.stdout + done.stderr)
    failed = YardClient(home).samples("m")
    assert_clean("the samples", json.dumps(failed))
    for path in ("/yard", "/health", "/metrics"):
        assert_clean(path, httpx.get(f"http://127.0.0.1:{port}{path}", **LOCAL).text)
    assert_clean("the yard's log", log.read_text())
    for path, text in files_of(home):
        assert_clean(path, text)
    logs = "".join(text for path, text in files_of(home) if path.suffix == ".log")
    assert f"cannot load model {DIGEST}: key [redacted]" in logs


def test_whatever_is_recorded(tmp_path, home, switchyard):
    """Each way into the records, the compressed ones opened again; the write-ahead log is looked at as well."""
    with open_records(home / "switchyard.db") as records:
        plan = {"name": "p", "model_digest": DIGEST, "said": SAID}
        run = records.start_run("evaluate", SAID, plan, environment={"argv": ["serve", "--api-key", KEYS["argv"]]})
        records.put_evidence(
            run.id, "m", "candidate", "answers", {"error": SAID, "digest": DIGEST, "deep": [{"x": SAID}]}
        )
        records.put_checks(run.id, "m", [CheckResult(check="parity.x", verdict=Verdict.FAIL, why=SAID)])
        records.put_step(run.id, "m", "promote", "failed", {"why": SAID})
        records.put_decision(run.id, "m", "override", who="Ada", why=SAID)
        records.note_run(run.id, error=SAID, environment={"why": SAID})
        records.finish_run(run.id, "failed", error=SAID)
        (evidence,) = records.list_evidence(run.id)
        assert_clean("evidence", zlib.decompress(evidence.packed).decode())
        assert evidence.payload["digest"] == DIGEST
        assert DIGEST in evidence.payload["error"]
        assert records.find_run(run.id).plan["model_digest"] == DIGEST
        for path, text in files_of(home):
            assert_clean(path, text)
    done = switchyard("history", "--json")
    assert_clean("history", done.stdout)
    assert DIGEST in done.stdout


def test_what_an_older_switchyard_stored_is_not_shown(home, switchyard):
    """It is in the file, and stays there; it is not printed again."""
    with open_records(home / "switchyard.db") as records:
        run = records.start_run("evaluate", "p", {})
        records.finish_run(run.id, "failed", error="x")
        with records.engine.begin() as connection:
            connection.exec_driver_sql("UPDATE run SET error = ?, name = ?", (SAID, KEYS["OpenAI"]))
    for arguments in (("history",), ("history", "--json"), ("status",), ("status", "--json")):
        done = switchyard(*arguments)
        assert done.returncode == 0
        assert_clean(" ".join(arguments), done.stdout + done.stderr)


@pytest.mark.parametrize("where", ["plan", "command"])
def test_what_the_user_typed_is_not_printed_back(where, tmp_path, switchyard):
    if where == "command":
        write_gguf(tmp_path / "m.gguf")
        line = f"llama-server -m {tmp_path / 'm.gguf'} --api-key {KEYS['argv']} --unheard-of {KEYS['OpenAI']}"
        done = switchyard("init", "--from-command", line, "--output", tmp_path / "plan.toml")
        assert done.returncode == 0, done.stderr
        assert_clean("the plan", (tmp_path / "plan.toml").read_text())
    else:
        (tmp_path / "plan.toml").write_text(f'api_key = "{KEYS["OpenAI"]}"\n')
        done = switchyard("evaluate", tmp_path / "plan.toml")
        assert done.returncode == 2
    assert_clean("init", done.stdout + done.stderr)
