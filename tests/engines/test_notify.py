"""Notifications: what is sent, what is kept back, and that nothing waits for it or learns a secret from it."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import runs
from waiting import until
from webhook import webhook

from engines import notify as notifications
from engines.errors import BadInput
from engines.notify import Notifier, NotifySettings, notify

LOG = logging.getLogger("switchyard.test")


@pytest.fixture(name="webhook")
def _webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What a webhook has got; its path, a secret, is in HOOK_URL."""
    with webhook() as (url, taken):
        monkeypatch.setenv("HOOK_URL", f"{url}/s3cret")
        yield taken


def command(tmp_path: Path, text: str) -> NotifySettings:
    """Settings with a Python program of this text as the command."""
    program = tmp_path / "program.py"
    program.write_text(text)
    return NotifySettings(command=(sys.executable, "-I", str(program), str(tmp_path / "out")))


def test_a_webhook_gets_the_event_as_json(webhook: list[dict[str, Any]]) -> None:
    """Without secrets, also where an engine's words hold one."""
    notify(NotifySettings(url_env="HOOK_URL"), "fallback", "m", "api_key=abcdefgh12345678 was refused", "llama.cpp")
    (message,) = webhook
    assert (message["event"], message["model"], message["engine"]) == ("fallback", "m", "llama.cpp")
    assert message["what"] == "api_key=[redacted] was refused"
    assert message["text"].endswith(f"m (llama.cpp): fallback: {message['what']}")
    assert "abcdefgh12345678" not in json.dumps(message)


@pytest.mark.parametrize(("path", "said"), [("/full", "HTTP 500"), ("/moved", "HTTP 307"), (":1/s3cret", "URLError")])
def test_what_is_not_taken_is_one_line_without_the_url(
    webhook: list[dict[str, Any]], path: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """And goes nowhere else: a redirect is not followed."""
    monkeypatch.setenv("HOOK_URL", os.environ["HOOK_URL"].replace("/s3cret", path))
    with caplog.at_level(logging.DEBUG):
        notify(NotifySettings(url_env="HOOK_URL"), "incident", "m", "it died")
    assert said in caplog.text
    assert "127.0.0.1" not in caplog.text
    assert len(webhook) <= 1


def test_of_many_the_latest_is_sent_with_their_number(webhook: list[dict[str, Any]]) -> None:
    """Of each kind and model by itself."""
    notifier = Notifier(NotifySettings(url_env="HOOK_URL", every_s=0.3), LOG)
    notifier.note("incident", "m", "number 0")
    until(lambda: len(webhook) == 1, "the first one")
    for number in range(1, 6):
        notifier.note("incident", "m", f"number {number}")
    notifier.note("incident", "other", "number 0")
    notifier.flush()
    assert [(one["model"], one["what"], one["repeated"]) for one in webhook] == [
        ("m", "number 0", 0),
        ("other", "number 0", 0),
        ("m", "number 5", 4),
    ]


def test_only_what_is_asked_for_is_sent(webhook: list[dict[str, Any]]) -> None:
    notify(NotifySettings(url_env="HOOK_URL", events=("rollback",)), "incident", "m", "it died")
    notify(NotifySettings(), "incident", "m", "it died")
    assert webhook == []


def test_a_command_gets_it_on_standard_input_and_nothing_else_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
    monkeypatch.setenv("SWITCHYARD_HOME", "/elsewhere")
    text = (
        "import json, os, sys\n"
        "seen = [json.load(sys.stdin), dict(os.environ), os.getpgid(0), os.getpid()]\n"
        "json.dump(seen, open(sys.argv[1], 'w'))\n"
    )
    notify(command(tmp_path, text), "candidate ready", "m", "ready at 50%")
    message, environment, group, pid = json.loads((tmp_path / "out").read_text())
    assert (message["event"], message["what"]) == ("candidate ready", "ready at 50%")
    assert set(environment) <= {"PATH", "HOME", "LANG", "LC_CTYPE"}
    assert group == pid


def test_one_that_hangs_is_killed_with_its_children_and_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(notifications, "LIMIT_S", 5.0)  # two Pythons start in it on a busy machine
    text = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open(sys.argv[1] + '.part', 'w').write(f'{os.getpid()} {child.pid}')\n"
        "os.rename(sys.argv[1] + '.part', sys.argv[1])\n"
        "time.sleep(600)\n"
    )
    notifier = Notifier(command(tmp_path, text).model_copy(update={"every_s": 3600}), LOG)
    began = time.monotonic()
    for _ in range(1000):
        notifier.note("incident", "m", "it died " * 1000)
    assert time.monotonic() - began < 5, "a thousand events are noted while the first one hangs"
    until((tmp_path / "out").is_file, "the command to run")
    both = [int(pid) for pid in (tmp_path / "out").read_text().split()]
    until(lambda: not any(map(runs, both)), "both to be gone")
    until(lambda: "did not end within 5 s and was killed" in caplog.text, "a line about it")


@pytest.mark.parametrize(
    ("value", "said"), [(None, "HOOK_URL is not set"), ("s3cret", "holds no URL that begins with")]
)
def test_a_variable_without_a_url_is_one_line(value: str | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOOK_URL", raising=False)
    if value is not None:
        monkeypatch.setenv("HOOK_URL", value)
    with pytest.raises(BadInput, match=said) as refused:
        Notifier(NotifySettings(url_env="HOOK_URL"), LOG)
    assert "s3cret" not in str(refused.value)


def test_prefect_takes_none_where_up_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setenv("SWITCHYARD_HOME", str(tmp_path))
    notify(NotifySettings(prefect_block="slack-webhook/team"), "incident", "m", "it died")
    (line,) = caplog.messages
    assert line == "a notification (incident) was not taken by the Prefect server: `switchyard up` does not run"
