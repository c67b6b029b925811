"""All it takes to start an engine again: kept with every route, so that going back needs no plan and no database."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, SecretStr, field_serializer, field_validator

from engines.driver import Found, Installation
from engines.settings import Serve, Settings

# Modules that engines run in, by the names under which they are stored: those of the first version that stored any.
# A later version finds them under their present names, and an earlier one still starts what a later one has stored.
MODULES = {
    "engines.hosts.llama_cpp": "engines.llama_cpp.host",
    "engines.hosts.mistral_rs": "engines.mistral_rs.host",
    "engines.native.worker": "engines.mistral_rs.native.worker",
}
STORED_NAMES = {present: stored for stored, present in MODULES.items()}


class Recipe(BaseModel):
    """One engine as installed here, with one model and its settings. It holds no secret."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: str
    form: Found
    program: tuple[str, ...]
    version: str
    flags: tuple[str, ...] = ()
    libraries: Path | None = None
    where: str = ""
    model_id: str
    gguf: Path
    settings: Settings = Settings()

    @field_validator("program")
    @classmethod
    def _under_present_names(cls, program: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(MODULES.get(word, word) for word in program)

    @field_serializer("program")
    def _under_stored_names(self, program: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(STORED_NAMES.get(word, word) for word in program)

    @field_validator("settings")
    @classmethod
    def _keyless(cls, settings: Settings) -> Settings:
        return settings.model_copy(update={"api_key": None})

    @classmethod
    def of(cls, found: Installation, model_id: str, gguf: Path, settings: Settings) -> Recipe:
        """The recipe of an engine that was found on this machine."""
        return cls(
            engine=found.engine,
            form=found.form,
            program=found.program,
            version=found.version,
            flags=tuple(sorted(found.flags)),
            libraries=found.libraries,
            where=found.where,
            model_id=model_id,
            gguf=gguf,
            settings=settings,
        )

    @property
    def installation(self) -> Installation:
        """The engine as it was found."""
        return Installation(
            engine=self.engine,
            form=self.form,
            program=self.program,
            version=self.version,
            flags=frozenset(self.flags),
            libraries=self.libraries,
            where=self.where,
        )

    def serve(self, port: int, key: SecretStr | None) -> Serve:
        """What a driver needs to build the command: on loopback, with the yard's own key."""
        settings = self.settings.model_copy(update={"api_key": key})
        return Serve(model_id=self.model_id, gguf=self.gguf, port=port, settings=settings)
