"""The prompts with tools: 200 shipped ones (one tool needed, one of several, or none) and the user's transcripts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tasks.evidence.prompts import Prompt

OWN = "transcript"  # the group of the user's prompts; the shipped ones are in those below
NEEDED = {"one": "one tool, needed", "several": "one of several needed", "none": "none needed", OWN: "own transcripts"}


def load_tool_prompts() -> list[Prompt]:
    """The shipped prompts, in an order in which every prefix has all three groups."""
    tools = json.loads(_shipped("tools.json"))
    rows = [json.loads(line) for line in _shipped("prompts.jsonl").split("\n") if line]
    return [
        Prompt.model_validate(row | {"tools": [_offered(name, tools[name]) for name in row["tools"]]}) for row in rows
    ]


def chosen_prompts(own: Sequence[Prompt], n: int) -> list[Prompt]:
    """`n` shipped prompts and at most `n` of the user's `own` that offer tools, in turns."""
    with_tools = [prompt for prompt in own if prompt.tools][:n]
    pairs = zip_longest(load_tool_prompts()[:n], with_tools)
    return [prompt for pair in pairs for prompt in pair if prompt is not None]


def tool_looks(n_prompts: int) -> tuple[int, ...]:
    """After how many prompts the numbers are looked at: thirds of them, or once where they are few."""
    thirds = (round(n_prompts / 3), round(2 * n_prompts / 3), n_prompts)
    return thirds if n_prompts >= 30 else (max(n_prompts, 3),)


def _shipped(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _offered(name: str, tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **tool}}
