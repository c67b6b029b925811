"""What the yard must not forget: which engine serves which model, and how to go back. One small file, no database.

Written before an act and never half: a new file beside the old one, flushed to the disk, then renamed over it. A yard
killed at any line finds the last route that was committed.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engines.errors import SwitchyardError
from engines.yard.recipe import Recipe


class Canary(BaseModel):
    """A share of conversations that another engine answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: str
    weight: float = Field(gt=0, lt=1)
    since: float | None = None  # when it was ordered; only requests from then on count


class ModelState(BaseModel):
    """The route of one model. `undo` is the engine that served before the last move; None when nothing was moved."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    serving: str
    undo: str | None = None
    canary: Canary | None = None
    selected: str = "auto"
    recipes: dict[str, Recipe] = {}
    moved_at: float | None = None


class YardState(BaseModel):
    """All routes, by model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    models: dict[str, ModelState] = {}

    def with_model(self, model_id: str, route: ModelState) -> YardState:
        """The same, with one route changed."""
        return self.model_copy(update={"models": {**self.models, model_id: route}})


class StateFile:
    """`state.json` in the yard's folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "state.json"

    def load(self) -> tuple[YardState, str | None]:
        """The state, empty where there is none; and what was wrong with a file that had to be set aside."""
        try:
            return YardState.model_validate_json(self.path.read_bytes()), None
        except FileNotFoundError:
            return YardState(), None
        except (ValidationError, ValueError) as error:
            aside = self.path.with_name(f"state.unreadable-{time.time_ns()}.json")
            os.replace(self.path, aside)
            return YardState(), f"{self.path} could not be read and was set aside as {aside.name}: {_first_line(error)}"
        except OSError as error:
            raise SwitchyardError(f"{self.path} cannot be read: {error.strerror}") from error

    def save(self, state: YardState) -> None:
        """On the disk when this returns. Raises SwitchyardError and leaves the old one when it cannot be written."""
        partial = self.path.with_suffix(".part")
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(json.dumps(state.model_dump(mode="json"), indent=1))
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path)
            _sync(self.path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise SwitchyardError(f"{self.path} cannot be written ({error.strerror}); nothing was changed") from error


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
