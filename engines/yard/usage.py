"""Which paths and request fields clients really use: names and counts only, bounded, kept over restarts."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from engines.whole_file import write_whole

MOST_PATHS = 64
MOST_FIELDS = 256
MOST_OF_ONE = 64  # fields of one request
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,47}")
PATH = re.compile(r"(/[A-Za-z0-9_.-]{0,40}){1,6}")
SAVE_S = 60.0


class Usage:
    """Counts of the yard of a home, in a file there. A name that is no plain one is not counted; names seen once give
    way to new ones where there are too many, so that nobody fills the place of those in use.
    """

    def __init__(self, home: Path) -> None:
        self._file = home / "yard" / "usage.json"
        self.paths: dict[str, int] = {}
        self.fields: dict[str, int] = {}
        self._changed = False
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            stored = json.loads(self._file.read_bytes())
            self.paths = _counts(stored["paths"], PATH, MOST_PATHS)
            self.fields = _counts(stored["fields"], NAME, MOST_FIELDS)

    def note(self, path: str, fields: Iterable[str] = ()) -> None:
        """Count one request that an engine answered."""
        self._changed = True
        _count(self.paths, path, PATH, MOST_PATHS)
        for name in islice(fields, MOST_OF_ONE):
            _count(self.fields, name, NAME, MOST_FIELDS)

    def save(self) -> None:
        """Write what was counted since the last time; the counts are no reason to fail when that cannot be."""
        if not self._changed:
            return
        self._changed = False
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_whole(self._file, json.dumps({"paths": self.paths, "fields": self.fields}))

    def ignored(self, fields: Collection[str]) -> dict[str, int]:
        """Those of `fields` that clients send, the most frequent first."""
        used = {name: n for name, n in self.fields.items() if name in fields}
        return dict(sorted(used.items(), key=lambda item: (-item[1], item[0])))

    def status(self) -> dict[str, Any]:
        return {"paths": dict(self.paths), "fields": dict(self.fields)}


def _count(counts: dict[str, int], name: str, form: re.Pattern[str], most: int) -> None:
    if name not in counts:
        if not form.fullmatch(name):
            return
        if len(counts) >= most:
            once = next((known for known, n in counts.items() if n == 1), None)
            if once is None:
                return
            del counts[once]
    counts[name] = counts.get(name, 0) + 1


def _counts(stored: Mapping[str, Any], form: re.Pattern[str], most: int) -> dict[str, int]:
    found = {name: n for name, n in stored.items() if form.fullmatch(name) and type(n) is int and n > 0}
    return dict(list(found.items())[:most])
