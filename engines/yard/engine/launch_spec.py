"""Launch spec of an engine: all it takes to start it again, so that going back needs no plan and no database."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    SerializerFunctionWrapHandler,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)

from engines.driver import Driver, Found, Installation
from engines.environment import key_in
from engines.errors import EngineNotFound
from engines.settings import EngineArgs, Serve, Settings

# Modules that engines run in: the name under which each is stored, which is that of the first version that stored it,
# and its present name. A later version finds what is stored under the present name, and an earlier one can still start
# what a later one has stored. A move of a module edits the right-hand side; left-hand sides never change.
MODULES = {
    "engines.hosts.llama_cpp": "engines.llama_cpp.host",
    "engines.hosts.mistral_rs": "engines.mistral_rs.host",
    "engines.native.worker": "engines.mistral_rs.native.worker",
}
STORED_NAMES = {present: stored for stored, present in MODULES.items()}
NOT_KEPT = ("gone", "note")  # of an installation: for messages before a start


class LaunchSpec(BaseModel):
    """One engine as installed here, with one model and its settings. It holds no secret."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: str  # its name on routes and in records
    kind: str = ""  # which driver it has; where it is not stored, the name is the kind
    form: Found
    program: tuple[str, ...]
    version: str
    flags: tuple[str, ...] = ()
    libraries: Path | None = None
    where: str = ""
    model_id: str
    gguf: Path
    settings: Settings = Settings()
    own: EngineArgs = EngineArgs()
    request_defaults: dict[str, Any] = {}
    build: str = Field("", exclude=True)  # as found by this process: what is stored may be another by now
    not_given: tuple[str, ...] = ()  # the incumbent's own flags that it serves without, one line each
    url: str = ""  # of an engine that is attached
    key_env: str = ""  # the variable with the key that it wants
    name_there: str = ""  # the model's name at it, where that is another

    @model_serializer(mode="wrap")
    def _without_unused(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # an older version reads a spec without them
        later = ("own", "request_defaults", "not_given", "url", "key_env", "name_there")
        unused = {"kind"} if self.kind == self.engine else set()
        return {key: value for key, value in dump(self).items() if key not in unused and (value or key not in later)}

    @model_validator(mode="before")
    @classmethod
    def _with_kind(cls, data: Any) -> Any:
        return {**data, "kind": data.get("kind") or data.get("engine", "")} if isinstance(data, dict) else data

    @field_validator("program")
    @classmethod
    def _under_present_name(cls, program: tuple[str, ...]) -> tuple[str, ...]:
        return _renamed(program, MODULES)

    @field_serializer("program")
    def _under_stored_name(self, program: tuple[str, ...]) -> tuple[str, ...]:
        return _renamed(program, STORED_NAMES)

    @field_validator("settings")
    @classmethod
    def _keyless(cls, settings: Settings) -> Settings:
        return settings.model_copy(update={"api_key": None})

    @classmethod
    def of(cls, found: Installation, model_id: str, gguf: Path, settings: Settings, **passed_on: Any) -> LaunchSpec:
        """The spec of an engine that was found here; `passed_on`: `own`, `request_defaults` and `not_given`."""
        as_found = {**vars(found), "flags": tuple(sorted(found.flags))}
        for name in NOT_KEPT:
            del as_found[name]
        return cls(**as_found, model_id=model_id, gguf=gguf, settings=settings, **passed_on)

    @property
    def installation(self) -> Installation:
        as_found = {one.name: getattr(self, one.name) for one in fields(Installation) if one.name not in NOT_KEPT}
        return Installation(**{**as_found, "flags": frozenset(self.flags)})

    def serve(self, port: int, key: SecretStr | None) -> Serve:
        """What a driver needs to build the command: on loopback, with the yard's own key.

        Of an attached engine where it answers, with the key that it wants; raises BadInput where that is not set.
        Without a key it is only described.
        """
        if self.url and key is not None:
            key = key_in(self.key_env)
        settings = self.settings.model_copy(update={"api_key": key})
        where = {"url": self.url, "name_there": self.name_there}
        return Serve(model_id=self.model_id, gguf=self.gguf, port=port, settings=settings, own=self.own, **where)

    def served_name(self, driver: Driver) -> str:
        """The name by which the engine knows the model."""
        return self.name_there or driver.served_name(self.installation, self.model_id)


def relocated(spec: LaunchSpec, driver: Driver) -> tuple[LaunchSpec, str]:
    """The spec as this machine can start it now, and a line for the event log where that is not what was stored.

    A stored program can be gone: a removed build, or the Python environment of an earlier installation. The same
    version of the engine is then looked for where engines are found. One in a wheel runs our own code, so it runs in
    our own Python wherever that has the same wheel: another environment may hold another Switchyard. Blocks while it
    asks a binary for its version.
    """
    if spec.form == "attached":
        return spec, ""
    program = spec.program[0]
    is_ours = spec.form != "binary" and os.path.dirname(program) == os.path.dirname(sys.executable)
    is_there = os.access(program, os.X_OK)
    if is_there and (is_ours or spec.form == "binary"):
        return spec, ""
    what = f"{spec.engine} {spec.version} was started with {program}, which is gone"
    try:
        found = driver.find("auto" if spec.form == "native" else spec.form)
    except EngineNotFound as error:
        return spec, "" if is_there else f"{what}, and is not found elsewhere: {error}"
    if found.version != spec.version:
        how = "name it as an engine of the plan to use that"
        return spec, "" if is_there else f"{what}; {found.where} is version {found.version}: {how}"
    passed_on = {name: getattr(spec, name) for name in ("own", "request_defaults", "not_given")}
    moved = LaunchSpec.of(found, spec.model_id, spec.gguf, spec.settings, **passed_on)
    moved = moved.model_copy(update={"engine": spec.engine})
    return moved, f"{spec.engine} {spec.version} is started with {found.program[0]} now, no longer with {program}"


def _renamed(program: tuple[str, ...], names: Mapping[str, str]) -> tuple[str, ...]:
    """`program` with the module after `-m` under its other name."""
    before = ("", *program)
    return tuple(names.get(word, word) if last == "-m" else word for last, word in zip(before, program, strict=False))
