"""One side of the comparison: an engine with one model and its settings, that can be brought up as often as needed."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engines import process
from engines.driver import Driver, Installation
from engines.errors import EngineError, SwitchyardError
from engines.process import ManagedProcess
from engines.serving import Served, free_port, serving
from engines.settings import Endpoint, Serve, Settings
from engines.yard.client import YardClient
from engines.yard.recipe import Recipe

Arm = Literal["incumbent", "candidate"]
POLL_S = 0.1


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


class YardContender(Contender):
    """The same, behind a yard of its own: how a user meets it, and the only way to a native engine.

    Its process is the yard with the engine below it; memory counts both.
    """

    @contextlib.contextmanager
    def _behind_a_yard(self, progress: Callable[[str], None]) -> Iterator[Served]:
        folder = self.home / "trial" / f"{self.arm}-{self.model_id}"
        process.end_orphans(folder)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        recipe = Recipe.of(self.installation, self.model_id, self.gguf, self.settings)
        (folder / "recipe.json").write_text(recipe.model_dump_json(), encoding="utf-8")
        port = free_port()
        child = process.start(
            f"yard of {self.driver.name} {self.model_id}",
            [sys.executable, "-m", "engines.yard.single", str(folder / "recipe.json"), str(folder), str(port)],
            state_dir=self.home,
            log_path=folder / "yard.log",
            env={**os.environ, "SWITCHYARD_HOME": str(folder)},
        )
        try:
            engine = self._wait(YardClient(folder), child, progress)
            endpoint = Endpoint(
                base_url=f"http://127.0.0.1:{port}",
                model_id=self.model_id,
                engine=self.driver.name,
                version=self.installation.version,
                context_tokens=engine["context_tokens"],
            )
            losses = self.driver.losses(self.installation, self.serve())
            yield Served(endpoint, child, self.installation, engine["argv"], losses, engine["load_s"])
        finally:
            child.stop()

    def up(self, progress: Callable[[str], None] = lambda _: None) -> AbstractContextManager[Served]:
        """The yard and the engine, freshly started and ready; ended when the block ends."""
        return self._behind_a_yard(progress)

    def _wait(self, client: YardClient, child: ManagedProcess, progress: Callable[[str], None]) -> dict[str, Any]:
        """The engine as its yard tells of it, once it serves: the yard itself sees when loading stalls."""
        progress(f"loading {self.gguf.name} behind a yard")
        until = time.monotonic() + self.stall_s
        while True:
            if child.poll() is not None:
                raise EngineError(f"the yard of {self.driver.name} ended: {_last_line(child)}", engine=self.driver.name)
            route = _route(client)
            if route is not None:
                if route["unservable"]:
                    raise EngineError(str(route["unservable"]), engine=self.driver.name)
                engine: dict[str, Any] = route["engines"][0]
                if engine["state"] in ("ready", "busy"):
                    return engine
                until = time.monotonic() + self.stall_s
            if time.monotonic() > until:
                raise EngineError(f"the yard of {self.driver.name} does not answer: {_last_line(child)}")
            time.sleep(POLL_S)


def _last_line(child: ManagedProcess) -> str:
    return (child.log_tail() or ("it said nothing",))[-1]


def _route(client: YardClient) -> dict[str, Any] | None:
    try:
        route: dict[str, Any] = client.status()["models"][0]
    except SwitchyardError:  # it is not there yet
        return None
    return route
