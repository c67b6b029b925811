"""Prompts for comparing engines: the shipped set, or the user's own transcripts.

The soak has prompts of its own, in soak/prompts.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from engines.errors import BadInput
from engines.openai.call import why_no_json

SHIPPED = "prompts.jsonl"
LINE_FORM = 'each line is one JSON object: {"messages": [{"role": "user", "content": "..."}], "tools": [...]}'
TOOL_FORM = '{"type": "function", "function": {"name": "...", "parameters": {...}}} is the form of a chat request'


class Message(BaseModel):
    """One turn; keys beyond role and content (`tool_calls`, `tool_call_id`, `name`) are sent on as they are."""

    model_config = ConfigDict(frozen=True, extra="allow")

    role: str = Field(min_length=1)
    content: str | list[dict[str, Any]] | None = None


class Prompt(BaseModel):
    """One conversation that ends where the engine has to answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    group: str = "transcript"
    messages: list[Message] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None

    @field_validator("tools")
    @classmethod
    def _functions_have_names(cls, tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        """A name beside `type`, as other APIs have it, is not what a chat request offers."""
        for number, tool in enumerate(tools or (), 1):
            function = tool.get("function")
            named = isinstance(function, dict) and isinstance(function.get("name"), str)
            if not named and ("function" in tool or tool.get("type", "function") == "function"):
                raise ValueError(f"tool {number} has no name: {TOOL_FORM}")
        return tools

    @property
    def body(self) -> dict[str, Any]:
        """`messages` and, where there are any, `tools`: the part of a chat request that the prompt decides."""
        body: dict[str, Any] = {"messages": [message.model_dump(exclude_unset=True) for message in self.messages]}
        return body | {"tools": self.tools} if self.tools else body

    @property
    def text(self) -> str:
        """The text of all turns, joined by newlines."""
        return "\n".join(message.content for message in self.messages if isinstance(message.content, str))


def load_prompts(limit: int | None = None) -> list[Prompt]:
    """The first `limit` shipped prompts (all by default); they are ordered so that a prefix is diverse too."""
    if limit is not None and limit < 1:
        raise BadInput(f"prompts: a limit of {limit} leaves nothing to compare; use 1 or more")
    lines = Path(__file__).with_name(SHIPPED).read_text(encoding="utf-8").split("\n")
    prompts = [Prompt.model_validate_json(line) for line in lines if line]
    return prompts[:limit]


def load_transcripts(path: Path) -> list[Prompt]:
    """The conversations of the JSONL file `path`, each cut before its last assistant turns; ids are `line-N`.

    A line is `{"messages": [...], "tools"?: [...]}`; the body of an OpenAI chat request is one too (its other
    keys are not used). Blank lines are skipped. Raises BadInput with file, line and the form that is wanted.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read as UTF-8 text ({error}); give a JSONL file") from error
    prompts = [_transcript(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise BadInput(f"{path}: no transcripts in it; {LINE_FORM}")
    return prompts


def _transcript(path: Path, number: int, line: str) -> Prompt:
    """The prompt on one line; `number` counts from 1."""
    where = f"{path}:{number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not JSON ({why_no_json(error)}); {LINE_FORM}") from error
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise BadInput(f'{where}: no list "messages"; {LINE_FORM}')
    messages = row["messages"]
    while messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    if not any(isinstance(message, dict) and message.get("role") != "system" for message in messages):
        raise BadInput(f"{where}: nothing to answer before the assistant's turn; add a user message")
    try:
        return Prompt(id=f"line-{number}", messages=messages, tools=row.get("tools") or None)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise BadInput(f"{where}: {key}: {first['msg'].removeprefix('Value error, ')}; {LINE_FORM}") from error
