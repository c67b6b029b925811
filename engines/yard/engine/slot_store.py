"""Saved slots of engines on the disk, and whether restoring them was ever of use. They hold what users wrote.

A record `KEY.json` names the files `KEY-N.slot` of one stop; files without a record are nobody's. `KEY` is all that a
slot depends on, so that another model, build or cache never gets it. Whoever takes a record removes it first: what
breaks an engine breaks it once. All of it is for its owner alone, within a budget, the oldest given up first.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from engines.errors import SwitchyardError
from engines.whole_file import write_whole

LEAST_TOKENS = 64  # a shorter prompt is read again as fast
MIB = 2**20
PROOFS = 64  # remembered


class NoRoom(SwitchyardError):
    """The disk has less free than the budget: nothing is saved."""


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True)


class SavedSlot(_Stored):
    """One slot's file, its length in bytes as it was written."""

    slot: int
    file: str
    tokens: int
    n_bytes: int


class Turn(_Stored):
    """The last request of a conversation: tokens of its prompt, and whether the one before it lay in the cache."""

    prompt_tokens: int
    was_cached: bool


class SavedSlots(_Stored):
    """What one stop has left; `turns` by conversation, the last one last, under names that do not hold its text."""

    at: float
    model: str
    engine: str
    slots: tuple[SavedSlot, ...]
    turns: dict[str, Turn] = {}


class Proof(_Stored):
    """Whether a restored slot was of use to the next request, as that showed."""

    works: bool
    why: str
    at: float


class SlotStore:
    """A yard's saved slots. Blocks: call it in a thread. `budget_mib` is asked each time; 0 keeps nothing."""

    def __init__(self, folder: Path, budget_mib: Callable[[], int]) -> None:
        self.folder = folder
        self.budget_mib = budget_mib
        self._proofs: dict[str, Proof] | None = None
        self._open: set[str] = set()  # keys whose files an engine writes or reads now
        self._one = threading.RLock()

    def begin(self, key: str, slots: Sequence[int]) -> dict[int, str]:
        """The names of empty files, by slot, for an engine to write: ours alone from their first byte.

        Raises OSError, and NoRoom where a budget's worth is not free.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.drop(keys={key})
        with self._one:
            self._open.add(key)
        if shutil.disk_usage(self.folder).free < self.budget_mib() * MIB:
            raise NoRoom(f"less than yard.prompt_cache_mib ({self.budget_mib()} MiB) is free in {self.folder}")
        names = {slot: f"{key}-{slot}.slot" for slot in slots}
        for name in names.values():
            os.close(os.open(self.folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        return names

    def commit(self, key: str, *, model: str, engine: str, tokens: dict[int, int], turns: dict[str, Turn]) -> int:
        """Record what was written, and return its tokens; `tokens` has those of each slot. What is short goes."""
        kept = []
        for slot, n_tokens in tokens.items():
            file = self.folder / f"{key}-{slot}.slot"
            if n_tokens >= LEAST_TOKENS and (n_bytes := file.stat().st_size):
                kept.append(SavedSlot(slot=slot, file=file.name, tokens=n_tokens, n_bytes=n_bytes))
        if kept:
            saved = SavedSlots(at=time.time(), model=model, engine=engine, slots=tuple(kept), turns=turns)
            write_whole(self.folder / f"{key}.json", saved.model_dump_json())
        self._close(key)
        return sum(one.tokens for one in kept) if (self.folder / f"{key}.json").exists() else 0

    def take(self, key: str) -> SavedSlots | None:
        """What was saved, which nobody else gets now; its files are the caller's to `forget`. None where one is cut."""
        record = self.folder / f"{key}.json"
        if (saved := _read(record)) is None:
            return None
        with self._one:
            self._open.add(key)
            record.unlink()
        whole = all(_size(self.folder / one.file) == one.n_bytes for one in saved.slots)
        if not whole:
            self.forget(key)
        return saved if whole else None

    def forget(self, key: str) -> None:
        """Remove the files of what was taken."""
        self._close(key)

    def drop(self, *, engines: Collection[str] = (), models: Collection[str] = (), keys: Collection[str] = ()) -> None:
        """Remove what was saved of these engines, of these models and under these keys."""
        for record in self.folder.glob("*.json"):
            if record.stem in keys or ((saved := _read(record)) and (saved.engine in engines or saved.model in models)):
                record.unlink(missing_ok=True)
        self.sweep()

    def sweep(self) -> None:
        """Remove files without a record, and the oldest records until the rest is within the budget."""
        with self._one:
            left, kept = self.budget_mib() * MIB, set[str]()
            found = [(_read(record), record) for record in self.folder.glob("*.json")]
            for saved, record in sorted(found, key=lambda one: -one[0].at if one[0] else 0):
                left -= sum(one.n_bytes for one in saved.slots) if saved else 0
                if saved and left >= 0:
                    kept |= {one.file for one in saved.slots}
                else:
                    record.unlink(missing_ok=True)
            for file in self.folder.glob("*.slot"):
                if file.name not in kept and file.stem.rpartition("-")[0] not in self._open:
                    file.unlink(missing_ok=True)

    def _close(self, key: str) -> None:
        with self._one:
            self._open.discard(key)
        self.sweep()

    def proof(self, key: str) -> Proof | None:
        """What is known of this key; None before a request showed it."""
        return self._known().get(key)

    def prove(self, key: str, *, works: bool, why: str) -> None:
        """Remember what a request showed. A disk that does not take it loses it with the end of the yard."""
        known = self._known()
        known.pop(key, None)
        known[key] = Proof(works=works, why=why, at=time.time())
        for oldest in list(known)[:-PROOFS]:
            del known[oldest]
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_whole(
                self.folder / "proofs", json.dumps({name: one.model_dump() for name, one in self._known().items()})
            )

    def _known(self) -> dict[str, Proof]:
        if self._proofs is None:
            self._proofs = {}
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stored = json.loads((self.folder / "proofs").read_bytes())
                self._proofs = {key: Proof.model_validate(one) for key, one in stored.items()}
        return self._proofs


def _read(record: Path) -> SavedSlots | None:
    try:
        return SavedSlots.model_validate_json(record.read_bytes())
    except (OSError, ValidationError):
        return None


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return -1
