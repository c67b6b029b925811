"""Text of a generation held back or cut: at stop strings, and where it may be the markup of a tool call."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import replace

from engines.mistral_rs.native.requests import Json
from engines.mistral_rs.native.responses import Piece

_MARKUP = ("<tool", "<|tool", "<function", "<|python_tag|>", "[TOOL_CALLS]", "<｜tool")


class TokenPlaces:
    """Finds where in the text each token begins, from pieces of one token each.

    An engine shows a code point with its last token; the tokens before it in the same code point come with no text.
    """

    def __init__(self) -> None:
        self._shown_bytes = 0
        self._unshown = b""

    def place(self, piece: Piece) -> Piece:
        start = -1 if piece.reasoning else self._shown_bytes + len(self._unshown)
        self._unshown += b"".join(bytes(entry["bytes"]) for entry in piece.logprobs)
        self._shown_bytes += len(piece.content.encode())
        with contextlib.suppress(UnicodeDecodeError):
            if not piece.content:
                self._unshown.decode()  # whole, yet not shown: a control token
            self._unshown = b""
        return replace(piece, starts=(start,) * len(piece.logprobs))


class StopCutter:
    """Ends the pieces of a generation before the first stop string to be complete, however the text is split.

    Of two that are complete at the same character the longer counts. Text that may be the beginning of a stop string
    is held back; a log-probability is sent with the first text that its token is part of.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._unsent = ""
        self._sent_bytes = 0
        self._held: list[tuple[int, Json]] = []

    def pass_on(self, piece: Piece) -> Piece:
        """The piece with what may be sent by now; its finish is "stop" when a stop string was found."""
        text = self._unsent + piece.content
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        over, cut_at = bool(piece.finish) and not found, len(text)
        if found:
            cut_at = min(found)[1]
        elif not over:
            ends = (size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
            cut_at -= max(ends, default=0)
        text, self._unsent = text[:cut_at], text[cut_at:]
        self._sent_bytes += len(text.encode())
        entries = [*self._held, *zip(piece.starts, piece.logprobs, strict=True)]
        sent = [entry for entry in entries if over or entry[0] < self._sent_bytes]
        self._held = entries[len(sent) :]
        piece = replace(
            piece,
            content=text,
            starts=tuple(start for start, _ in sent),
            logprobs=tuple(logprob for _, logprob in sent),
        )
        return replace(piece, finish="stop", tool_calls=()) if found else piece


class ToolTextGate:
    """Holds text back that may be a tool call's markup, until it is known to be one or not.

    The engine parses calls only at the end and lets their markup through as text before (mistral.rs#2455).
    """

    def __init__(self) -> None:
        self._held = ""
        self._begun = False

    def pass_on(self, text: str) -> str:
        """What of the held text and *text* is certainly no markup."""
        text, self._held = self._held + text, ""
        if not self._begun and text.lstrip()[:1] in ("", "{", "["):
            self._held = text
            return ""
        self._begun = True
        # where the first markup begins, or a tail that may become one; the text's end if there is none
        found = [at for mark in _MARKUP if (at := text.find(mark)) >= 0]
        tails = [len(text) - size for mark in _MARKUP for size in range(1, len(mark)) if text.endswith(mark[:size])]
        at = min([*found, *tails, len(text)])
        self._held = text[at:]
        return text[:at]

    def rest(self) -> str:
        """The text still held, for a generation that turned out to hold no call."""
        rest, self._held = self._held, ""
        return rest


_FORCED = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(.*)', re.DOTALL)


def forced_call(text: str, call_id: str) -> Json | None:
    """The tool call that grammar-forced *text* holds, arguments as a JSON string; None if it ends before them."""
    try:
        parsed = json.loads(text)
        name, arguments = parsed["name"], json.dumps(parsed["arguments"], ensure_ascii=False, separators=(",", ":"))
    except (ValueError, KeyError, TypeError, RecursionError):
        # cut by the token limit, or nested without an end: the arguments so far, as OpenAI's API has it
        match = _FORCED.match(text)
        if match is None:
            return None
        name, arguments = json.loads(match[1], strict=False), match[2]
    return {"index": 0, "id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
