"""The paths of an engine's API: what a request to each does, and how its stream ends."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import quote

from engines.openai.slots import SlotFiles

Kind = Literal["generates", "reads", "changes", "unlisted"]

CHAT = "/v1/chat/completions"
_DONE = re.compile(rb"data(?<=^data): ?\[DONE\]\r?$", re.MULTILINE)  # begins with text: `^` first takes 5 us a chunk
_STOP = re.compile(rb'"stop":\s*true')
_RESPONSE = re.compile(rb'"response\.(?:completed|incomplete|failed)"')
# paths that answer with text, and what the last event of a stream of theirs holds; text in it has its quotes and line
# ends escaped. Each is searched in every chunk.
ENDS: Mapping[str, re.Pattern[bytes]] = {
    CHAT: _DONE,
    "/v1/completions": _DONE,
    "/v1/messages": re.compile(rb'"message_stop"'),
    "/v1/responses": _RESPONSE,
    "/responses": _RESPONSE,
    "/completion": _STOP,
    "/completions": _STOP,
    "/infill": _STOP,
}
COUNTS_TOKENS = f"{CHAT}/input_tokens"
SHORT = {"/chat/completions": CHAT, "/chat/completions/input_tokens": COUNTS_TOKENS}


@dataclass(frozen=True)
class Paths:
    """What one engine takes beside GET.

    `generates` are answered in a slot, `reads` beside the requests in flight. `changes` alter the engine, and are
    refused with the reason. Of these two one that ends with a slash stands for all below it. `same` are other spellings
    of a path, `pages` what a person opens, `polled` what the engine must not be asked for often, `cancels` what a
    client deletes to end its own request. `keyless`: the engine knows itself which of its pages need no key. `kept`: a
    header in lower case that makes the engine finish a stream whose client has left, and where the stream is read by
    its value. `slots`: how its slots are saved to files; None where it cannot, or others do it.
    """

    generates: frozenset[str] = frozenset(ENDS) & {CHAT, "/v1/completions"}
    reads: frozenset[str] = frozenset()
    changes: Mapping[str, str] = field(default_factory=dict)
    same: Mapping[str, str] = field(default_factory=lambda: SHORT)
    pages: frozenset[str] = frozenset()
    polled: frozenset[str] = frozenset()
    cancels: frozenset[str] = frozenset()
    keyless: bool = False
    kept: tuple[str, str] | None = None
    slots: SlotFiles | None = None

    def spelled(self, path: str) -> str:
        return self.same.get(path, path)

    def kept_at(self, headers: Mapping[str, str]) -> str:
        """Where the stream of a request with these headers continues without its client; '' where it ends."""
        if self.kept is None:
            return ""
        name, where = self.kept
        value = next((value for header, value in headers.items() if header.lower() == name), "").strip()
        return where + quote(value, safe="") if value else ""

    def kind(self, path: str) -> Kind:
        """What a request to it that is no GET does."""
        path = self.spelled(path)
        if path in self.generates:
            return "generates"
        if path in self.reads or any(start.endswith("/") and path.startswith(start) for start in self.reads):
            return "reads"
        return "changes" if self.change(path) else "unlisted"

    def has(self, path: str) -> bool:
        return self.kind(path) != "unlisted" or path in self.polled or path in self.pages

    def change(self, path: str) -> str:
        """Why a request that would alter the engine is refused; '' when it alters nothing."""
        below = (why for start, why in self.changes.items() if start.endswith("/") and path.startswith(start))
        return self.changes.get(path) or next(below, "")
