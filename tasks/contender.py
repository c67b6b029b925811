"""One side of the comparison: an engine with one model and its settings, that can be brought up as often as needed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engines.driver import Driver, Installation
from engines.serving import Served, free_port, serving
from engines.settings import Serve, Settings

Arm = Literal["incumbent", "candidate"]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """The incumbent or the candidate, ready to be launched on a fresh port. `home` holds its register and logs."""

    arm: Arm
    driver: Driver
    installation: Installation
    model_id: str
    gguf: Path
    settings: Settings
    home: Path
    stall_s: float = 120.0

    def serve(self) -> Serve:
        """What would be launched now, on a port that is free now."""
        return Serve(model_id=self.model_id, gguf=self.gguf, port=free_port(), settings=self.settings)

    def up(self, progress: Callable[[str], None] = lambda _: None) -> AbstractContextManager[Served]:
        """The engine, freshly started and ready; ended when the block ends."""
        log_path = self.home / "logs" / f"{self.arm}-{self.driver.name}-{self.model_id}.log"
        return serving(
            self.driver,
            self.installation,
            self.serve(),
            state_dir=self.home,
            log_path=log_path,
            stall_s=self.stall_s,
            progress=progress,
        )

    def circumstances(self) -> dict[str, object]:
        """Engine form, version, argv (it holds no secret) and losses, stored with every result."""
        serve = self.serve()
        return {
            "arm": self.arm,
            "engine": self.driver.name,
            "form": self.installation.form,
            "version": self.installation.version,
            "where": self.installation.where,
            "argv": self.driver.argv(self.installation, serve),
            "losses": self.driver.losses(self.installation, serve),
            "settings": self.settings.model_dump(mode="json"),
        }
