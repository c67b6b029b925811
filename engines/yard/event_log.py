"""What happened, in order: transitions, moves and incidents, one JSON line each, in memory and in a bounded file."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines.notify import Event
from engines.redaction import redacted, redacted_text

FILE_BYTES = 4 * 1024 * 1024
REMEMBERED = 200


class EventLog:
    """`events.jsonl` and its predecessor `events.jsonl.1`. A full disk loses lines, never the yard."""

    def __init__(
        self,
        folder: Path,
        log: logging.Logger,
        incident: Callable[[], None] = lambda: None,
        notify: Callable[[Event, str, str, str], None] = lambda *_: None,
    ) -> None:
        self._path = folder / "events.jsonl"
        self._log, self._incident, self._notify = log, incident, notify
        self.recent: deque[dict[str, Any]] = deque(maxlen=REMEMBERED)
        self.incidents: deque[dict[str, Any]] = deque(maxlen=REMEMBERED)

    def note(self, kind: str, model: str, what: str, *, notify: Event | None = None, **more: Any) -> None:
        """Remember, write and log one event; `kind` is state, move, canary, incident or yard.

        People are notified of incidents, and of what is to be known as `notify`.
        """
        what, more = redacted_text(what), redacted(more)  # an engine's words are in it
        event = {"at": time.time(), "kind": kind, "model": model, "what": what, **more}
        self.recent.append(event)
        if kind == "incident":
            self.incidents.append(event)
            self._incident()
            notify = notify or "incident"
        if notify is not None:
            self._notify(notify, model, what, str(more.get("engine", "")))
        engine = f" {more['engine']}" if "engine" in more else ""
        level = logging.WARNING if kind == "incident" else logging.INFO
        self._log.log(level, "%s%s: %s", model, engine, what)
        with contextlib.suppress(OSError):
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event, default=str) + "\n")
                size = file.tell()
            if size > FILE_BYTES:
                os.replace(self._path, self._path.with_name(self._path.name + ".1"))
