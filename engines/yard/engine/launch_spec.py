"""All it takes to start an engine again: kept with every route, so that going back needs no plan and no database."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, SecretStr, field_validator

from engines.driver import Found, Installation
from engines.settings import Serve, Settings


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
