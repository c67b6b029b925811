"""The one `switchyard up` of a home: how other commands find it, and its Prefect."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

from engines.process.process import Identity


@dataclass(frozen=True)
class Up:
    """The process that holds everything up, and where its Prefect answers."""

    pid: int
    create_time: float
    api_url: str

    def lives(self) -> bool:
        """Whether that very process still runs."""
        return Identity(self.pid, self.create_time).process() is not None


def up_file(folder: Path) -> Path:
    """Where a running `switchyard up` says so."""
    return folder / "up.json"


def found(folder: Path) -> Up | None:
    """The `switchyard up` of this home; None when none runs."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        told = Up(**json.loads(up_file(folder).read_text()))
        if told.lives():
            return told
    return None
