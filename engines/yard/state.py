"""The yard's stored state: which engine serves which model, and how to go back. One small file, no database.

Written before an act and never half: a new file beside the old one, flushed to the disk, then renamed over it. A yard
killed at any line finds the last route that was committed.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from engines.errors import BadInput, SwitchyardError
from engines.yard.engine.launch_spec import LaunchSpec


class _Stored(BaseModel):
    # `specs` is stored as "recipes", the name that the first versions gave it: both ways over an update need it
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Canary(_Stored):
    """A share of conversations that another engine answers."""

    engine: str
    weight: float = Field(gt=0, lt=1)
    since: float | None = None  # when it was ordered; only requests from then on count


class ModelState(_Stored):
    """The route of one model. `undo` is the engine that served before the last move; None when nothing was moved."""

    serving: str
    undo: str | None = None
    canary: Canary | None = None
    selected: str = "auto"
    specs: dict[str, LaunchSpec] = Field({}, alias="recipes")
    moved_at: float | None = None
    overflow: bool = True  # False: ordered off, whatever the plan says

    @model_serializer(mode="wrap")
    def _without_unused(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # an older version reads a state without it
        return {key: value for key, value in dump(self).items() if key != "overflow" or not value}


class Retired(_Stored):
    """An engine that may not be started any more, and all it takes to have it back: its specs, by model."""

    at: float  # s since the epoch
    who: str
    why: str
    archive: str = ""
    specs: dict[str, LaunchSpec] = Field({}, alias="recipes")
    undo: tuple[str, ...] = ()  # models whose way back it was

    def line(self, engine: str) -> str:
        day = time.strftime("%Y-%m-%d", time.localtime(self.at))
        return f"{engine} was retired on {day} by {self.who} ({self.why}); `switchyard restore {engine}` brings it back"


class YardState(_Stored):
    """All routes, by model, and the engines that are retired."""

    version: int = 1
    models: dict[str, ModelState] = {}
    retired: dict[str, Retired] = {}

    def needs(self, engine: str) -> list[str]:
        """Who still needs an engine, one line each."""
        lines = []
        for model_id, route in self.models.items():
            if route.serving == engine:
                lines.append(f"{model_id} is served by {engine}")
            if route.canary is not None and route.canary.engine == engine:
                lines.append(f"{model_id} has a canary on {engine}")
        return lines

    def retire(self, engine: str, *, at: float, who: str, why: str, archive: str) -> YardState:
        """The same, with the engine out of every route. Raises BadInput while one still needs it."""
        if engine in self.retired:
            raise BadInput(f"{self.retired[engine].line(engine)}; there is nothing left to retire")
        if needs := self.needs(engine):
            raise BadInput(f"{engine} is still needed: {'; '.join(needs)}")
        specs = {model_id: route.specs[engine] for model_id, route in self.models.items() if engine in route.specs}
        undo = tuple(model_id for model_id, route in self.models.items() if route.undo == engine)
        gone = Retired(at=at, who=who, why=why, archive=archive, specs=specs, undo=undo)
        models = {model_id: _without(route, engine) for model_id, route in self.models.items()}
        return self.model_copy(update={"models": models, "retired": {**self.retired, engine: gone}})

    def restore(self, engine: str) -> YardState:
        """The same, with the engine where it was. Raises BadInput when it is not retired."""
        if engine not in self.retired:
            known = ", ".join(self.retired) or "none"
            raise BadInput(f"{engine} is not retired; retired: {known}")
        back, models = self.retired[engine], dict(self.models)
        for model_id, spec in back.specs.items():
            if (route := models.get(model_id)) is not None:
                undo = engine if model_id in back.undo and route.undo is None else route.undo
                specs = {**route.specs, engine: spec}
                models[model_id] = route.model_copy(update={"specs": specs, "undo": undo})
        retired = {name: gone for name, gone in self.retired.items() if name != engine}
        return self.model_copy(update={"models": models, "retired": retired})

    def renamed(self, names: Mapping[str, str]) -> YardState:
        """The same, with engines under their present names: `names` has them by those that are stored.

        A name that is stored as well is another engine's: an old build beside a newer one.
        """
        stored = {engine for route in self.models.values() for engine in (route.serving, *route.specs)}
        names = {old: new for old, new in names.items() if new not in stored | set(self.retired)}

        def now(name: str) -> str:
            return names.get(name, name)

        def specs_now(specs: Mapping[str, LaunchSpec]) -> dict[str, LaunchSpec]:
            return {now(name): spec.model_copy(update={"engine": now(spec.engine)}) for name, spec in specs.items()}

        def route_now(route: ModelState) -> ModelState:
            canary = route.canary and route.canary.model_copy(update={"engine": now(route.canary.engine)})
            engines = {"serving": now(route.serving), "selected": now(route.selected), "canary": canary}
            undo = route.undo and now(route.undo)
            return route.model_copy(update={**engines, "undo": undo, "specs": specs_now(route.specs)})

        gone = {now(e): one.model_copy(update={"specs": specs_now(one.specs)}) for e, one in self.retired.items()}
        routes = {model_id: route_now(route) for model_id, route in self.models.items()}
        return self.model_copy(update={"models": routes, "retired": gone})

    def text(self) -> str:
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=1)

    def with_model(self, model_id: str, route: ModelState) -> YardState:
        return self.model_copy(update={"models": {**self.models, model_id: route}})


def _without(route: ModelState, engine: str) -> ModelState:
    specs = {name: spec for name, spec in route.specs.items() if name != engine}
    undo = None if route.undo == engine else route.undo
    selected = "auto" if route.selected == engine else route.selected
    return route.model_copy(update={"specs": specs, "undo": undo, "selected": selected})


class Unreadable(SwitchyardError):
    """The state file holds something else than a state."""


class StateFile:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "state.json"

    def read(self) -> YardState:
        """The state as stored, empty where there is none. Raises SwitchyardError, and leaves the file where it is."""
        try:
            return YardState.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return YardState()
        except OSError as error:
            raise SwitchyardError(f"{self.path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise Unreadable(f"{self.path} could not be read: {str(error).splitlines()[0]}") from error

    def load(self) -> tuple[YardState, str | None]:
        """The state, empty where there is none; and what was wrong with a file that had to be set aside."""
        try:
            return self.read(), None
        except Unreadable as error:
            aside = self.path.with_name(f"state.unreadable-{time.time_ns()}.json")
            os.replace(self.path, aside)
            return YardState(), f"{error}; it was set aside as {aside.name}"

    def save(self, state: YardState) -> None:
        """On the disk when this returns. Raises SwitchyardError and leaves the old one when it cannot be written."""
        partial = self.path.with_suffix(".part")
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(state.text())
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path)
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise SwitchyardError(f"{self.path} cannot be written ({error.strerror}); nothing was changed") from error
