"""The home that a user of 268cc56 has: `tests/homes/268cc56/home.tar.xz`, unpacked as if it had been made right here.

Written by that commit's own code (`make.sh` beside it). Where the paths and the port of its user stand in it, those of
the test are put; nothing else is changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import tarfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "homes" / "268cc56"
HOST = "box"  # the machine it was made on
USER, INSTALLED, PORT = "/home/ada", "/opt/switchyard", "18099"
TEXT = ("run.plan_json", "run.circumstances", "run.report_path", "evidence.circumstances", "step.detail", "run.error")


class OldHome:
    """One of the two homes in the archive, its plan, and what the old code has recorded in it."""

    def __init__(self, folder: Path, name: str, port: int, model: Path | None = None) -> None:
        with tarfile.open(FOLDER / "home.tar.xz") as archive:
            archive.extractall(folder, filter="data")
        self.user = folder / "ada"
        self.path = self.user / name
        self.plan = self.user / "switchyard.toml"
        self.port = port
        # an installation that is gone, wherever this test runs
        self._words = {USER: str(self.user), INSTALLED: str(folder / "gone"), PORT: str(port)}
        if model is not None:
            (self.user / "models").mkdir()
            (self.user / "models" / "smollm2.gguf").symlink_to(model)
        for file in [file for file in self.user.rglob("*") if file.is_file()]:
            if file.suffix != ".db" and not file.is_symlink():
                file.write_text(self._here(file.read_text(encoding="utf-8")), encoding="utf-8")
        if (self.path / "switchyard.db").is_file():
            self._rewrite_records()

    def rows(self, query: str, *given: object) -> list[tuple[Any, ...]]:
        """What is recorded, by SQL."""
        with contextlib.closing(sqlite3.connect(self.path / "switchyard.db")) as db:
            return db.execute(query, given).fetchall()

    def run_id(self, status: str, kind: str = "evaluate") -> str:
        """The only run of this kind that ended so."""
        ((run_id,),) = self.rows("select id from run where status = ? and kind = ?", status, kind)
        return str(run_id)

    @property
    def state(self) -> dict[str, Any]:
        """`state.json` as it is on the disk."""
        found: dict[str, Any] = json.loads((self.path / "yard" / "state.json").read_text())
        return found

    def _here(self, text: str) -> str:
        for there, here in self._words.items():
            text = text.replace(there, here)
        return text

    def _rewrite_records(self) -> None:
        with contextlib.closing(sqlite3.connect(self.path / "switchyard.db")) as db, db:
            for column in TEXT:
                table, name = column.split(".")
                for row, text in db.execute(f"select rowid, {name} from {table} where {name} is not null").fetchall():
                    db.execute(f"update {table} set {name} = ? where rowid = ?", (self._here(text), row))
            for row, plan in db.execute("select rowid, plan_json from run").fetchall():
                db.execute("update run set plan_hash = ? where rowid = ?", (stored_hash(json.loads(plan)), row))


def stored_hash(plan: Any) -> str:
    """`run.plan_hash` as 268cc56 computed it: of the plan's JSON, here without a secret to leave out."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def untouched(folder: Path) -> sqlite3.Connection:
    """The records as they are in the archive."""
    with tarfile.open(FOLDER / "home.tar.xz") as archive:
        archive.extract("ada/.switchyard/switchyard.db", folder, filter="data")
    return sqlite3.connect(folder / "ada" / ".switchyard" / "switchyard.db")
