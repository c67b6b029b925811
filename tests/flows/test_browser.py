"""A person migrates a model and rolls it back from Prefect's own pages, in a real browser, on real engines."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

import httpx
import installed
import pytest
from processes import of_home
from real_yard import HELLO, LOCAL
from waiting import until

from engines.model.digest import model_digest
from engines.registry import driver
from engines.yard.client import YardClient
from migrations.plan import content_hash
from migrations.plan_file import load_plan
from tasks.records.store import open_records
from tasks.verdicts.verdict import CheckResult, Verdict

pytest.importorskip("playwright", reason="needs a browser's driver: pip install playwright")

pytestmark = pytest.mark.engine

PICTURES = Path(__file__).parents[2] / "docs" / "screenshots.py"
installed.require(*installed.BOTH)
OLD, NEW, MODEL = "llama.cpp", "mistral.rs", "smollm2"


def loaded() -> ModuleType:
    """The script that makes the pictures: it drives the same pages."""
    spec = importlib.util.spec_from_file_location("screenshots", PICTURES)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["screenshots"] = module
    spec.loader.exec_module(module)
    return module


def evaluated(plan_path: Path, home: Path) -> None:
    """On record: an evaluation that did not settle it, so that a person is asked."""
    plan, version = load_plan(plan_path), driver(NEW).find("hosted", None).version
    under = {
        "plan_hash": content_hash(plan),
        "model_digest": model_digest(plan.models[0].gguf),
        "engines": [{"arm": "candidate", "version": version}],
    }
    home.mkdir()
    with open_records(home / "switchyard.db") as records:
        run = records.start_run("evaluate", plan.name, plan.model_dump(mode="json"))
        records.put_evidence(run.id, MODEL, "both", "performance", {}, environment=under)
        unsure = CheckResult(check="performance.x", verdict=Verdict.INCONCLUSIVE, why="more blocks would settle it")
        records.put_checks(run.id, MODEL, [unsure])
        records.finish_run(run.id, "done", verdict=Verdict.INCONCLUSIVE)


def answered(port: int) -> str:
    """A completion from the public port."""
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 8}
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60, **LOCAL)
    answer.raise_for_status()
    return answer.json()["choices"][0]["message"]["content"]


def test_a_model_is_migrated_and_rolled_back_in_the_browser(tmp_path: Path) -> None:
    """Form, question, answer, PASS, the way back by its button; nothing leaves this host, every decision is a row."""
    from playwright.sync_api import sync_playwright

    shown = loaded()
    if (program := shown.chromium()) is None:
        pytest.skip("needs a browser: apt install chromium, or put google-chrome on the PATH")
    up = shown.Up(tmp_path)
    yard = YardClient(up.home)
    evaluated(up.plan, up.home)
    with up.running() as process, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        pages = shown.Pages(browser, up)

        asked = pages.migrate("Ada", "nobody else uses it now", "without_canary", "without_rehearsal")
        assert (asked["state_type"], asked["state_name"]) == ("PAUSED", "Suspended")
        assert yard.status()["models"][0]["serving"] == OLD

        ended = pages.answer(asked, "yes", "Grace", "I have seen the report")
        assert (ended["id"], ended["state_name"]) == (asked["id"], "PASS"), ended["state"]
        assert yard.status()["models"][0]["serving"] == NEW
        assert answered(up.port)

        back = pages.roll_back()
        assert (back["state_name"], yard.status()["models"][0]["serving"]) == ("PASS", OLD), back["state"]
        assert "one real token" in back["state"]["message"]
        assert answered(up.port)

        hosts = {urlsplit(url).hostname for url in pages.asked if not url.startswith(("data:", "blob:", "about:"))}
        assert hosts == {"127.0.0.1"}
        browser.close()

        down = up.command("down")
        assert (down.returncode, down.stdout) == (0, "all is down\n"), down.stderr
        assert process.wait(60) == 130
    until(lambda: not of_home(up.home), "every process to be gone")
    with open_records(up.home / "switchyard.db") as records:
        runs = records.history()
        made = {(run.kind, made.kind, made.who, made.why) for run in runs for made in records.decisions(run.id)}
    both = ("Ada, approved by Grace", "nobody else uses it now; I have seen the report")
    assert made == {
        ("whole", "subprocess", "Grace", "I have seen the report"),
        ("migrate", "override", *both),
        ("migrate", "without-canary", *both),
        ("migrate", "without-rehearsal", *both),
    }
    assert {run.kind: run.status for run in runs} == dict.fromkeys(("evaluate", "whole", "migrate", "rollback"), "done")
