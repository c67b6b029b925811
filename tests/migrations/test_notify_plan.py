"""`[notify]` in a plan: what is taken, what is refused in one line, and that no URL is in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engines.environment import of_engine
from engines.errors import BadInput
from migrations.plan import content_hash
from migrations.plan_file import load_plan, plan_to_toml

Write = Callable[[str], Path]
PLAN = """
[incumbent]
engine = "llama.cpp"
[candidate]
engine = "mistral.rs"
[[models]]
id = "small"
gguf = "small.gguf"
"""


def test_it_comes_back_as_it_was_written_enters_no_hash_and_its_url_reaches_no_engine(write: Write) -> None:
    without = content_hash(load_plan(write(PLAN)))
    text = '[notify]\nurl_env = "HOOK"\ncommand = ["/bin/notify", "-x"]\nevents = ["rollback"]\nevery_s = 5.0\n'
    plan = load_plan(write(PLAN + text))
    assert (plan.notify.url_env, plan.notify.command, plan.notify.events) == (
        "HOOK",
        ("/bin/notify", "-x"),
        ("rollback",),
    )
    assert load_plan(write(plan_to_toml(plan))) == plan
    assert content_hash(plan) == without
    assert of_engine({"HOOK": "https://hooks.example/T0/B0"}) == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            'url_env = "https://hooks.example/T0"',
            "notify.url_env (line 10): must be the NAME of an environment variable",
        ),
        ('command = ["notify"]', "'notify' is no absolute path; write /usr/local/bin/notify"),
        ('events = ["incidents"]', "notify.events[0] (line 10): unknown 'incidents'; known: incident, fallback"),
        ("every = 5", "notify.every (line 10): unknown key"),
    ],
)
def test_what_is_wrong_is_one_line(write: Write, text: str, said: str) -> None:
    """A URL in the place of a variable's name is not echoed."""
    with pytest.raises(BadInput) as refused:
        load_plan(write(f"{PLAN}[notify]\n{text}\n"))
    assert said in str(refused.value)
    assert "hooks.example" not in str(refused.value)
    assert "\n" not in str(refused.value)
