"""Progress of long work: one line per finished step, and a live line for what happens inside it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from contextvars import ContextVar

from rich.console import Console
from rich.status import Status

from engines.redaction import redacted_text

logger = logging.getLogger("switchyard")
logger.setLevel(logging.INFO)  # Prefect forwards it, but leaves its level unset, which drops INFO


class Progress:
    """Steps as log lines: what a run under a Prefect server shows in its log."""

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """One step, said at its start and, with its time, at its end."""
        title, started = redacted_text(title), time.monotonic()
        logger.info("%s ...", title)
        yield
        logger.info("%s: %s", title, _took(started))

    def say(self, text: str) -> None:
        """A detail inside the step."""
        logger.info("  %s", redacted_text(text))

    def note(self, text: str) -> None:
        """A line that stays: in a step, or between two."""
        logger.warning("%s", redacted_text(text))


class ConsoleProgress(Progress):
    """Steps on a terminal: finished ones stay, the running one moves. Elsewhere, one line per finished step."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = None
        self._title = ""
        self._started = time.monotonic()

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """One step; a line with a tick and its time when it ends, a cross when it breaks off."""
        self._title, started = redacted_text(title), time.monotonic()
        title = self._title
        self._status = self._console.status(title, spinner="dots") if self._console.is_terminal else None
        if self._status:
            self._status.start()
        mark = "[red]✗[/red]"
        try:
            yield
            mark = "[green]✓[/green]"
        finally:
            if self._status:
                self._status.stop()
                self._status = None
            elapsed = f"{time.monotonic() - self._started:5.0f} s"
            self._console.print(f"{elapsed} {mark} {title} [dim]{_took(started)}[/dim]", highlight=False)

    def say(self, text: str) -> None:
        """A detail of the running step, on its live line."""
        if self._status:
            self._status.update(f"{self._title} [dim]{redacted_text(text)}[/dim]")

    def note(self, text: str) -> None:
        """A line that stays: above the running step, or below the step it is about."""
        self._console.print(f"          {redacted_text(text)}", highlight=False, markup=False, soft_wrap=True)


progress: ContextVar[Progress] = ContextVar("progress", default=Progress())  # noqa: B039


def _took(started: float) -> str:
    return f"{time.monotonic() - started:.1f} s"
