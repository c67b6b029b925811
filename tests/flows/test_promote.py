"""`switchyard promote` over a yard of played engines: what the evidence says, and who decides against it."""

from __future__ import annotations

import os
import pty
import subprocess
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from played import plan_of
from rich.console import Console
from switchyard_command import command, json_of
from waiting import until

from engines.model.digest import model_digest
from engines.process.serving import free_port
from engines.yard.client import YardClient
from flows.rollout import approval
from flows.rollout.approval import Question
from migrations.plan import content_hash
from migrations.plan_file import load_plan
from tasks.records.store import open_records
from tasks.verdicts.verdict import CheckResult, Verdict, at_most

Switchyard = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A plan over the played engines."""
    path = plan_of(tmp_path, "m", tail=f"[yard]\nport = {free_port()}\n")
    path.write_text(path.read_text().replace('load = "demand"', 'load = "demand"\naliases = ["other"]'))
    return path


def evaluated(home: Path, verdict: Verdict, yard: YardClient) -> None:
    """An evaluation of just this plan, file and version on record."""
    plan = load_plan(Path((home / "yard" / "plan").read_text().strip()))
    (route,) = yard.status()["models"]
    version = next(e["version"] for e in route["engines"] if e["engine"] == "mistral.rs")
    with open_records(home / "switchyard.db") as records:
        run = records.start_run("evaluate", plan.name, plan.model_dump(mode="json"))
        under: dict[str, Any] = {"plan_hash": content_hash(plan), "model_digest": model_digest(plan.models[0].gguf)}
        under["engines"] = [{"arm": "candidate", "version": version}]
        records.put_evidence(run.id, "m", "both", "performance", {}, environment=under)
        result = at_most("parity.mean_kld", 0.5 if verdict is Verdict.FAIL else 0.001, limit=0.005, unit="nats")
        records.put_checks(run.id, "m", [result])
        records.finish_run(run.id, "done", verdict=verdict)


def serving(yard: YardClient) -> str:
    return str(yard.status()["models"][0]["committed"])


@pytest.mark.parametrize("name", ["m", "other", None])
def test_without_a_terminal_a_model_without_evidence_needs_yes(
    switchyard: Switchyard, yard: YardClient, name: Any
) -> None:
    """By each of its names, or by none where it is the only one."""
    named = [name] if name else []
    done = switchyard("promote", *named)
    assert (done.returncode, serving(yard)) == (3, "llama.cpp"), done.stderr
    assert "evidence on m from llama.cpp to mistral.rs: INCONCLUSIVE: it was never evaluated" in done.stderr
    assert "add --yes" in done.stdout
    assert json_of(switchyard("promote", *named, "--json"))["done"] is None
    assert switchyard("promote", *named, "--yes").returncode == 0
    assert serving(yard) == "mistral.rs"
    back = switchyard("promote", *named, "--to", "llama.cpp")
    assert (back.returncode, serving(yard)) == (0, "llama.cpp"), back.stderr


@pytest.mark.parametrize("order", [("use", "mistral.rs"), ("canary", "--weight", "0.2")])
def test_a_share_and_a_choice_by_hand_ask_as_well(switchyard: Switchyard, yard: YardClient, order: Any) -> None:
    """The way back is free."""

    def taken() -> bool:
        (route,) = yard.status()["models"]
        return route["serving"] == "mistral.rs" or bool(route["canary"])

    done = switchyard(*order)
    assert (done.returncode, taken()) == (3, False), done.stderr
    assert "it was never evaluated" in done.stderr
    assert switchyard(*order, "--yes").returncode == 0
    assert taken()
    back = ("use", "llama.cpp") if order[0] == "use" else ("canary", "--weight", "0")
    assert (switchyard(*back).returncode, taken()) == (0, False)


@pytest.mark.parametrize(("verdict", "code"), [(Verdict.PASS, 0), (Verdict.FAIL, 3)])
def test_it_says_what_the_evidence_says(
    switchyard: Switchyard, home: Path, yard: YardClient, verdict: Verdict, code: int
) -> None:
    evaluated(home, verdict, yard)
    done = switchyard("promote")
    assert done.returncode == code, done.stderr
    assert f"evidence on m from llama.cpp to mistral.rs: {verdict}: run " in done.stderr
    assert ("parity.mean_kld: 0.5 nats, limit 0.005 nats" in done.stderr) is (code == 3)


def test_fields_that_clients_send_and_the_target_ignores_are_named(switchyard: Switchyard, yard: YardClient) -> None:
    """Names and counts only; what the incumbent ignores as well is no loss, and the way back asks nothing."""
    chat = {"messages": [{"role": "user", "content": "private words"}], "max_tokens": 2, "mirostat": 2}
    for more in ({"temperature": 0}, {"n_probs": 1}):
        until(lambda: _asked(yard, {**chat, **more}), "an answer")  # noqa: B023
    done = switchyard("promote", "--yes")
    assert done.returncode == 0, done.stderr
    told = "clients send fields that the target does not act on: mirostat (2 requests), n_probs (1 request)"
    assert told in " ".join(done.stderr.split())
    assert "temperature" not in done.stderr + done.stdout
    assert "private" not in done.stderr + done.stdout
    back = switchyard("promote", "--to", "llama.cpp")
    assert (back.returncode, "mirostat" in back.stderr) == (0, False)


def _asked(yard: YardClient, body: dict[str, Any]) -> bool:
    url = f"{yard.status()['address']}/v1/chat/completions"
    return httpx.post(url, json=body, timeout=30, trust_env=False).status_code == 200


@pytest.mark.parametrize(("answer", "moved"), [("yes", True), ("no", False), ("", False)])
def test_on_a_terminal_it_asks(environment: dict[str, str], yard: YardClient, answer: str, moved: bool) -> None:
    """In whole words."""
    master, slave = pty.openpty()
    process = subprocess.Popen(command("promote"), env=environment, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    seen = b""
    while b"all the same?" not in seen:
        seen += os.read(master, 4096)
    os.write(master, f"{answer}\n".encode())
    try:
        while os.read(master, 4096):
            pass
    except OSError:  # the other end is closed
        pass
    assert process.wait(60) == (0 if moved else 3), seen
    assert serving(yard) == ("mistral.rs" if moved else "llama.cpp")


def test_an_approval_shows_what_is_open_first_and_asks_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for an area that passed; anything but yes and no repeats the question."""
    checks = [
        CheckResult(check="parity.a", verdict=Verdict.PASS, why="fine"),
        CheckResult(check="parity.b", verdict=Verdict.PASS, why="fine"),
        CheckResult(check="memory.peak_ratio", verdict=Verdict.PASS, why="fine"),
        CheckResult(check="memory.leak", verdict=Verdict.INCONCLUSIVE, why="too short"),
        CheckResult(check="performance.x", verdict=Verdict.FAIL, why="slower"),
    ]
    question = Question("subprocess", "m", "Move m from a to b", Verdict.FAIL, checks)
    shown = [
        "m: FAIL",
        "  FAIL         performance.x: slower",
        "  INCONCLUSIVE memory.leak: too short",
        "  PASS         parity: 2 of 2 required checks",
    ]
    form = question.markdown().splitlines()
    assert [line for line in form if line.startswith("- ")] == [
        "- **FAIL** performance.x: slower",
        "- **INCONCLUSIVE** memory.leak: too short",
        "- **PASS** parity: 2 of 2 required checks",
    ]
    assert form[-1] == "## Move m from a to b?"

    said = StringIO()
    given = iter(["perhaps", "Y", "Ada", "change 42"])
    monkeypatch.setattr(approval.sys, "stdin", type("T", (), {"isatty": lambda _: True})())
    monkeypatch.setattr(approval.sys, "stderr", type("T", (), {"isatty": lambda _: True})())
    monkeypatch.setattr(approval, "Console", lambda **_: Console(file=said, width=100, color_system=None))
    monkeypatch.setattr("rich.console.Console.input", lambda self, prompt, **_: self.print(prompt) or next(given))
    answer = approval.on_terminal(question)
    assert answer == approval.Approval(True, "Ada", "change 42")
    lines = said.getvalue().splitlines()
    assert lines[1:5] == shown
    assert lines[5].startswith("Move m from a to b? [yes/no] (no)")
    assert "Answer yes or no" in said.getvalue()


def test_a_rollback_that_is_refused_is_no_run(switchyard: Switchyard, yard: YardClient) -> None:
    """Whoever asked for it: nothing was done."""
    assert serving(yard) == "llama.cpp"
    done = switchyard("rollback", "--who", "Ada", "--reason", "slow")
    assert (done.returncode, "nothing to roll back" in done.stderr) == (2, True), done.stderr
    assert json_of(switchyard("history", "--json"))["runs"] == []
