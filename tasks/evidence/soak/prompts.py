"""The prompts of the soak: an agent's conversation that grows turn by turn."""

from __future__ import annotations

import random
from typing import Any

from engines.client.record import StreamRecord

ANSWER_TOKENS = 24
CONTEXT_SHARE = 0.6  # a conversation starts afresh beyond this share of the context
FALLBACK_CONTEXT = 2048
TOOL = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "Read a file of the project",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
    },
}
ASKS = (
    "What should we look at first?",
    "Explain that in one sentence.",
    "Which file would you open next, and why?",
    "Summarise what we know so far.",
    "Write a short test for it.",
    "Was sollten wir als Nächstes tun?",
    "List three things that could go wrong.",
)


class Agent:
    """The conversation so far, and what the agent does next: the same for the same seed and answers.

    Each turn has a seed of its own, so that one build of an engine gives the same answers again. A sampled answer may
    meet a bug of the engine (llama-server's "output that does not match the expected format" on tool turns, say).
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._turn = 0
        self.messages: list[dict[str, Any]] = []
        self.restart()

    def restart(self) -> None:
        """A new conversation."""
        name = self._random.choice(("parser", "scheduler", "cache", "router", "importer"))
        self.messages = [{"role": "system", "content": f"You help with the {name} of a small program. Be brief."}]

    def next(self) -> tuple[str, dict[str, Any], int | None, float]:
        """(kind of turn, request body, chunks after which the client leaves, pause before it in seconds)."""
        self._turn += 1
        self.messages.append({"role": "user", "content": self._random.choice(ASKS)})
        sampling = {"temperature": 0.7, "seed": self._random.getrandbits(31)}
        body: dict[str, Any] = {"messages": list(self.messages), "max_tokens": ANSWER_TOKENS, **sampling}
        if self._turn % 7 == 0:
            return "cancelled", body, 3, 0.0
        if self._turn % 5 == 0:
            return "after a pause", body, None, 1.0
        if self._turn % 3 == 0:
            return "tools", {**body, "tools": [TOOL]}, None, 0.0
        return "turn", body, None, 0.0

    def answered(self, record: StreamRecord, context_tokens: int) -> None:
        """Take the answer into the conversation; begin a new one when the context is nearly full or it broke."""
        if record.tool_calls:
            calls = [
                {
                    "id": call["id"] or f"call_{i}",
                    "type": "function",
                    "function": {k: call[k] for k in ("name", "arguments")},
                }
                for i, call in enumerate(record.tool_calls)
            ]
            self.messages.append({"role": "assistant", "content": record.text or "", "tool_calls": calls})
            self.messages += [{"role": "tool", "tool_call_id": c["id"], "content": "file not found"} for c in calls]
        else:
            self.messages.append({"role": "assistant", "content": record.text or "..."})
        used = (record.prompt_tokens or 0) + (record.completion_tokens or 0)
        if not record.ok or used > CONTEXT_SHARE * context_tokens:
            self.restart()
