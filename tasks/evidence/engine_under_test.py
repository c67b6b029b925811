"""One side of the comparison: an engine with one model and its settings, that can be brought up as often as needed."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engines import environment
from engines.driver import Driver, Installation
from engines.environment import key_in
from engines.errors import PortTaken, WrongListener
from engines.process import process
from engines.process.device import Device
from engines.process.serving import Served, free_port, serving
from engines.settings import Endpoint, EngineArgs, Serve, Settings
from engines.yard.client import YardClient, wait_until_serving
from engines.yard.engine.launch_spec import LaunchSpec

Arm = Literal["incumbent", "candidate"]
PORTS = 3


class EngineClock:
    """Seconds in which at least one engine was starting, up or ending: what else a run takes is our own cost."""

    def __init__(self) -> None:
        self._lock, self._up, self._since, self._total = threading.Lock(), 0, 0.0, 0.0

    @property
    def seconds(self) -> float:
        """The total so far."""
        with self._lock:
            return self._total + (time.monotonic() - self._since if self._up else 0.0)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """The life of one engine; several at once count once."""
        self._change(1)
        try:
            yield
        finally:
            self._change(-1)

    def _change(self, by: int) -> None:
        with self._lock:
            now = time.monotonic()
            if self._up:
                self._total += now - self._since
            self._up, self._since = self._up + by, now


@dataclass(frozen=True, kw_only=True)
class EngineUnderTest:
    """The incumbent or the candidate, ready to be launched on a fresh port. `home` holds its register and logs."""

    arm: Arm
    driver: Driver
    installation: Installation
    model_id: str
    gguf: Path
    settings: Settings
    own: EngineArgs = field(default_factory=EngineArgs)
    request_defaults: dict[str, Any] = field(default_factory=dict)
    name_there: str = ""  # the model's name at an attached engine, where it is another
    not_given: Sequence[str] = ()  # the incumbent's own flags that it serves without, one line each
    home: Path
    stall_s: float = 120.0
    clock: EngineClock = field(default_factory=EngineClock)

    @property
    def name(self) -> str:
        """Its name in the plan; the driver's is its kind."""
        return self.installation.engine

    @property
    def is_attached(self) -> bool:
        """Whether others run it: it cannot be started afresh, stopped or signalled."""
        return bool(self.installation.url)

    @property
    def _passed_on(self) -> dict[str, Any]:
        return {"own": self.own, "request_defaults": self.request_defaults, "name_there": self.name_there}

    def serve(self) -> Serve:
        """What would be launched now, on a port that is free now; of an attached engine where it answers."""
        settings, url = self.settings, self.installation.url
        if url:
            settings = settings.model_copy(update={"api_key": key_in(self.installation.key_env)})
        return Serve(
            model_id=self.model_id, gguf=self.gguf, port=free_port(), settings=settings, url=url, **self._passed_on
        )

    @contextlib.contextmanager
    def up(self, progress: Callable[[str], None] = lambda _: None) -> Iterator[Served]:
        """The engine, freshly started and ready; ended when the block ends."""
        with self.clock.counted(), contextlib.ExitStack() as block:
            yield self._started(block, progress)

    def _started(self, block: contextlib.ExitStack, progress: Callable[[str], None]) -> Served:
        """On another port where another process was quicker to take the one that was free: no fault of the engine."""
        for _ in range(PORTS - 1):
            with contextlib.suppress(PortTaken, WrongListener):
                return block.enter_context(self._up(progress))
        return block.enter_context(self._up(progress))

    def _up(self, progress: Callable[[str], None]) -> AbstractContextManager[Served]:
        log_path = self.home / "logs" / f"{self.arm}-{self.name}-{self.model_id}.log"
        return serving(
            self.driver,
            self.installation,
            self.serve(),
            state_dir=self.home,
            log_path=log_path,
            stall_s=self.stall_s,
            progress=progress,
        )

    def environment(self) -> dict[str, object]:
        """Engine form, version, argv (it holds no secret) and what it does not support, stored with every result."""
        serve = self.serve()
        return {
            "arm": self.arm,
            "engine": self.name,
            "form": self.installation.form,
            "version": self.installation.version,
            "where": self.installation.where,
            "build": self.installation.build,
            "argv": self.driver.argv(self.installation, serve),
            "unsupported": [*self.driver.unsupported(self.installation, serve), *self.not_given],
            "settings": self.settings.model_dump(mode="json"),
        }


class EngineBehindYard(EngineUnderTest):
    """The same, behind a yard of its own: how a user meets it, and the only way to a native engine.

    Its process is the yard with the engine below it; memory counts both.
    """

    def _its_key(self) -> dict[str, str]:
        """The variable with the key of an attached engine, which the yard needs."""
        key = key_in(self.installation.key_env)
        return {} if key is None else {self.installation.key_env: key.get_secret_value()}

    @contextlib.contextmanager
    def _up(self, progress: Callable[[str], None]) -> Iterator[Served]:
        """The yard and the engine."""
        folder = self.home / "trial" / f"{self.arm}-{self.model_id}"
        process.end_orphans(folder)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        spec = LaunchSpec.of(self.installation, self.model_id, self.gguf, self.settings, **self._passed_on)
        (folder / "launch_spec.json").write_text(spec.model_dump_json(), encoding="utf-8")
        port = free_port()
        files = [str(folder / "launch_spec.json"), str(folder)]
        child = process.start(
            f"yard of {self.name} {self.model_id}",
            [sys.executable, "-m", "engines.yard.single", *files, str(port), "0", str(self.stall_s)],
            state_dir=self.home,
            log_path=folder / "yard.log",
            env={**environment.of_engine(os.environ), **self._its_key(), "SWITCHYARD_HOME": str(folder)},
        )
        try:
            client = YardClient(folder)
            wait_until_serving(
                client, [self.model_id], child.poll, lambda: "\n".join(child.log_tail()), self.stall_s, say=progress
            )
            engine = client.status()["models"][0]["engines"][0]
            endpoint = Endpoint(
                base_url=f"http://127.0.0.1:{port}",
                model_id=self.model_id,
                engine=self.name,
                version=self.installation.version,
                context_tokens=engine["context_tokens"],
            )
            yield Served(endpoint, child, engine["load_s"], Device(**engine["device"]))
        finally:
            child.stop()


def ends_within(served: Served, seconds: float) -> bool:
    """Whether the engine's process ends within `seconds`; waits for it."""
    limit = time.monotonic() + seconds
    while served.process.poll() is None and time.monotonic() < limit:
        time.sleep(0.02)
    return served.process.poll() is not None
