"""A second engine in a plan: what is taken, what is refused in one line, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engines.errors import BadInput
from migrations.plan import OverflowPlan, content_hash
from migrations.plan_file import load_plan, plan_to_toml
from migrations.upgrade import _model

Write = Callable[[str], Path]
PLAN = """
[incumbent]
engine = "llama.cpp"
[candidate]
name = "crowd"
engine = "mistral.rs"
[settings]
context_tokens = 2048
parallel = 2
[[models]]
id = "small"
gguf = "small.gguf"
"""
OVERFLOW = """
[models.overflow]
engine = "crowd"
waiting = 3
"""


def test_it_comes_back_as_it_was_written_and_enters_no_hash(write: Write) -> None:
    """Who takes the overflow is no evidence about the engines."""
    without = content_hash(load_plan(write(PLAN)))
    plan = load_plan(write(PLAN + OVERFLOW + "parallel = 8\n"))
    assert plan.models[0].overflow == OverflowPlan(engine="crowd", waiting=3, parallel=8)
    assert load_plan(write(plan_to_toml(plan))) == plan
    assert content_hash(plan) == without


def test_more_sequences_there_keep_their_context_and_leave_the_first_engine_alone(write: Write) -> None:
    """A kind stands for the only engine of that kind, as elsewhere in a plan."""
    text = PLAN + OVERFLOW.replace("crowd", "mistral.rs")
    plan = load_plan(write(text + "parallel = 8\n"))
    served = plan.settings_on("small", "crowd")
    assert (served.parallel, served.context_tokens) == (8, 8 * 1024)
    assert plan.settings_on("small", "llama.cpp") == plan.settings_for("small")
    alike = load_plan(write(text))
    assert alike.settings_on("small", "crowd") == alike.settings_for("small")


@pytest.mark.parametrize(
    ("added", "said"),
    [
        (OVERFLOW.replace("crowd", "vllm"), "'vllm' is not one of two engines: llama.cpp and crowd"),
        (OVERFLOW.replace("3", "-1"), "models[0].overflow.waiting (line 16): -1 is below 0; write 0 or more"),
        (
            OVERFLOW.replace("waiting = 3", ""),
            "models[0].overflow.waiting (line 14): is missing: requests that may wait",
        ),
        (OVERFLOW + "parallel = 0", "overflow.parallel (line 17): 0 is below 1"),
        (OVERFLOW + "slots = 4", "overflow.slots (line 17): unknown key; known: engine, waiting, parallel"),
        ('engine = "crowd"' + OVERFLOW, "crowd serves it already; name the other one"),
    ],
)
def test_what_is_wrong_is_one_line(write: Write, added: str, said: str) -> None:
    """The key, and what to write."""
    with pytest.raises(BadInput) as caught:
        load_plan(write(PLAN + added))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_upgrade_measures_without_it(write: Write) -> None:
    """Its plan has two builds of one engine; the second engine is none of them."""
    plan = load_plan(write(PLAN + OVERFLOW))
    assert _model(plan, plan.models[0], "llama.cpp", "llama.cpp@new").overflow is None
