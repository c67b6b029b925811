"""The one `switchyard up` of a home, as other programs of that home find it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from engines.process.process import Identity

UP_FILE = "up.json"


@dataclass(frozen=True)
class Up:
    """The one `switchyard up` of a home: its process, and where its Prefect answers."""

    pid: int
    create_time: float
    api_url: str

    def process(self) -> psutil.Process | None:
        """That very process; None once it has ended."""
        return Identity(self.pid, self.create_time).process()


def running_up(home: Path) -> Up | None:
    """The `switchyard up` of this home; None when none runs."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        up = Up(**json.loads((home / UP_FILE).read_text()))
        return up if up.process() is not None else None
    return None


@contextlib.contextmanager
def declared_up(home: Path, api_url: str) -> Iterator[None]:
    """While the block runs other commands of this home find this process, and report to its Prefect."""
    me, file = Identity.of(os.getpid()), home / UP_FILE
    file.write_text(json.dumps(asdict(Up(me.pid, me.create_time, api_url))))
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
