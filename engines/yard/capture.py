"""Requests kept for a later replay, when the plan asks for it: one JSON line each, redacted, bounded, off the hot path.

A line is the body of a chat request as `load_transcripts` of the parity check reads it, without what
`engines.redaction` lists (strictly: commit ids and inline images included) and without the fields of WHO. Names and
addresses in the text stay: the file is its owner's alone (0600).
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines.redaction import redacted

WHO = frozenset({"user", "safety_identifier", "prompt_cache_key", "conversation", "metadata"})
LARGEST = 2 * 2**20
QUEUED = 16 * 2**20
TRY_AGAIN_S = 60.0
CLOSE_S = 2.0


def replayable(body: dict[str, Any]) -> bool:
    """True for a chat request that the parity check can put to an engine again."""
    messages, tools = body.get("messages"), body.get("tools")
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        return False
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    asks = any(message["role"] != "system" for message in messages)
    return asks and (tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)))


class Lines:
    """A JSONL file that a thread of its own writes, mode 0600, never larger than its bound.

    At half of the bound it becomes `NAME.1` and a new one begins, so the latest lines are kept. What cannot be written
    is counted in `lost`; `problem`, called from the thread, gets the reason once until a line is written again.
    """

    def __init__(self, path: Path, limit_bytes: int, problem: Callable[[str], None] = lambda _: None) -> None:
        self.path = path
        self.written = self.lost = 0
        self._half = limit_bytes // 2
        self._problem = problem
        self._queue: queue.SimpleQueue[tuple[Any, int] | None] = queue.SimpleQueue()
        self._queued = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._silent_until = 0.0
        self._in_trouble = self._closed = False

    def put(self, line: Any, size: int) -> None:
        """Have `line`, of about `size` bytes, redacted and written; returns at once."""
        with self._lock:
            if self._closed or size > min(LARGEST, self._half) or self._queued + size > QUEUED:
                self.lost += 1
                return
            self._queued += size
        self._queue.put((line, size))
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"writer of {self.path.name}", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Write what waits, for two seconds at most."""
        with self._lock:
            self._closed = True
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            line, size = item
            try:
                if time.monotonic() >= self._silent_until:
                    self._write(json.dumps(redacted(line, strict=True)).encode() + b"\n")
                    self.written += 1
                    self._in_trouble = False
                else:
                    self.lost += 1
            except (OSError, ValueError, RecursionError, TypeError) as error:
                self.lost += 1
                if isinstance(error, OSError):
                    self._silent_until = time.monotonic() + TRY_AGAIN_S
                if not self._in_trouble:
                    self._in_trouble = True
                    self._problem(f"{self.path} cannot be written: {getattr(error, 'strerror', None) or error}")
            finally:
                with self._lock:
                    self._queued -= size

    def _write(self, data: bytes) -> None:
        # never through a link that somebody else laid
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        file = os.open(self.path, flags, 0o600)
        try:
            size = os.fstat(file).st_size
            if size and size + len(data) > self._half:
                os.replace(self.path, self.path.with_name(self.path.name + ".1"))
                os.close(file)
                file, size = os.open(self.path, flags, 0o600), 0
            os.fchmod(file, 0o600)
            if os.write(file, data) < len(data):
                os.ftruncate(file, size)  # half a line would spoil the whole file for its readers
                raise OSError(28, "no space left on the device")
        finally:
            os.close(file)


class RequestCapture:
    def __init__(self, path: Path | None, limit_bytes: int, problem: Callable[[str], None] = lambda _: None) -> None:
        self._lines = None if path is None else Lines(path, limit_bytes, problem)

    def take(self, path: str, body: dict[str, Any], size: int) -> None:
        """Keep the body of an answered request; nothing where capture is off or it cannot be replayed."""
        if self._lines is not None and path == "/v1/chat/completions" and replayable(body):
            self._lines.put({key: value for key, value in body.items() if key not in WHO}, size)

    def status(self) -> dict[str, Any] | None:
        """Where to, how many, how many not; None when off."""
        lines = self._lines
        return None if lines is None else {"path": str(lines.path), "written": lines.written, "lost": lines.lost}

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
        return False
    content = message.get("content")
    parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
    return parts or isinstance(content, str | None)
