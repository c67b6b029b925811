"""Launch an engine, wait until it gives one real token, and stop it whatever happens."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from engines import environment
from engines.driver import Driver, Installation
from engines.errors import EngineNotEnded, PortTaken
from engines.openai.dialect import Dialect
from engines.process import process
from engines.process.attached import AttachedEngine
from engines.process.device import Device, weights_on
from engines.process.process import ManagedProcess
from engines.process.readiness import listener_on, wait_ready
from engines.settings import Endpoint, Serve
from engines.signals import signals_held


@dataclass
class Served:
    """One engine that serves: where, by which process, and how long it took to its first token."""

    endpoint: Endpoint
    process: ManagedProcess
    load_s: float
    device: Device | None = None  # where its weights are; None where nobody asked


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(
    driver: Driver,
    installation: Installation,
    serve: Serve,
    *,
    state_dir: Path,
    log_path: Path,
    stall_s: float = 120.0,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Served]:
    """The engine, ready; ended when the block ends.

    Ready means: our own child listens on the port and has produced one token. Loading may take as long as it likes
    while it makes progress (log lines, memory, disk reads); it fails after `stall_s` without any.
    Raises PortTaken, EngineExited, EngineStalled, EngineRefuses, WrongListener; EngineNotEnded when the block has ended
    and SIGKILL does not end the engine.
    """
    started_ns = time.monotonic_ns()
    child = launch(driver, installation, serve, state_dir=state_dir, log_path=log_path)
    try:
        name = serve.name_there or driver.served_name(installation, serve.model_id)
        seen = wait_ready(installation.engine, serve, child, served_name=name, stall_s=stall_s, progress=progress)
        load_s = (time.monotonic_ns() - started_ns) / 1e9
        reported, dialect = seen.get("context_tokens"), driver.dialect(installation)
        context = reported if isinstance(reported, int) else serve.settings.context_tokens
        endpoint = Endpoint(
            base_url=serve.base_url,
            model_id=name,
            engine=installation.engine,
            version=installation.version,
            context_tokens=context,
            api_key=serve.settings.api_key,
            request_defaults=serve.request_defaults,
            speaks=None if dialect is Dialect else partial(dialect, context_tokens=context),
        )
        yield Served(
            endpoint, child, load_s, weights_on(child) if serve.settings.gpu_layers and not serve.url else None
        )
    finally:
        with signals_held():  # a second Ctrl-C must not leave it behind
            ended = child.stop() is not None
        if not ended:
            name = installation.engine
            why = f"SIGKILL does not end {name} (pid {child.pid}): the kernel holds it and its memory (`dmesg`)"
            raise EngineNotEnded(why, engine=name)


def launch(
    driver: Driver, installation: Installation, serve: Serve, *, state_dir: Path, log_path: Path
) -> ManagedProcess:
    """The engine's process, just started, or what stands for an attached one. Raises PortTaken."""
    if installation.url:
        return AttachedEngine(f"{installation.engine} at {installation.url}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((serve.host, serve.port))
        except OSError as error:
            holder = listener_on(serve.port) or "another process"
            why = f"port {serve.port} is taken by {holder}; stop it or choose another port"
            raise PortTaken(why, engine=installation.engine) from error
    argv = driver.argv(installation, serve)
    env = driver.environment(installation, serve, environment.of_engine(os.environ))
    return process.start(
        f"{installation.engine} {serve.model_id}", argv, state_dir=state_dir, log_path=log_path, env=env
    )
