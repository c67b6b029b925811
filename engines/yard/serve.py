"""The yard as a process: opens the public port and the control socket, handles signals, closes everything.

SIGTERM and Ctrl-C drain and stop within `stop_s`, a second one at once; SIGHUP reloads the plan.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from aiohttp import web

from engines.driver import Driver
from engines.errors import PortTaken, SwitchyardError
from engines.process.process import stop_all
from engines.process.readiness import listener_on
from engines.redaction import RedactingFormatter
from engines.yard.canary_analysis import CanaryAnalysis
from engines.yard.client import socket_path
from engines.yard.config import YardConfig
from engines.yard.memory_budget import MemoryBudget
from engines.yard.moves import Moves
from engines.yard.overflow import Overflow
from engines.yard.ports.control import Control, listening
from engines.yard.ports.gateway import Gateway
from engines.yard.ports.status import Status
from engines.yard.shadow import Shadow
from engines.yard.systemd import Systemd
from engines.yard.yard import Yard

try:
    import uvloop
except ImportError:  # not built for Windows
    uvloop = None  # type: ignore[assignment, unused-ignore]

THREADS = 64  # each engine that loads or stops holds one
CLOSE_S = 2.0


def run(
    read_config: Callable[..., YardConfig],
    *,
    home: Path,
    opened: Callable[[Yard], None] = lambda _: None,
    drivers: Mapping[str, Driver] | None = None,
) -> None:
    """Serve until stopped. `read_config` is called at each reload too, with the path of the plan where an order named
    one; `opened` is called once the port is ours.

    Raises BadInput (a second yard, an address without a key), PortTaken.
    """
    yard = Yard(read_config(), home=home, drivers=drivers)
    with yard.alone(), asyncio.Runner(loop_factory=uvloop.new_event_loop if uvloop else None) as runner:
        runner.get_loop().set_default_executor(ThreadPoolExecutor(THREADS))
        runner.run(_serve(yard, read_config, opened))


async def _serve(yard: Yard, read_config: Callable[..., YardConfig], opened: Callable[[Yard], None]) -> None:
    stop = asyncio.Event()
    shadow, memory_budget = Shadow(yard), MemoryBudget(yard)
    moves, overflow = Moves(yard, shadow, memory_budget), Overflow(yard, shadow, memory_budget)
    status = Status(yard, shadow, overflow)
    systemd, reporting = Systemd(), None
    reloads: set[asyncio.Task[object]] = set()
    background: list[asyncio.Task[None]] = []

    named: list[Path] = []  # the plan of the last order that named one and was carried out

    async def reload(plan: str | None = None) -> str:
        asked = [Path(plan)] if plan else list(named)
        done = await moves.reload(await asyncio.to_thread(read_config, *asked))
        named[:] = asked
        return done

    async def reload_and_log() -> None:
        try:
            yard.log.info(await reload())
        except SwitchyardError as error:
            yard.log.warning("the new plan is refused, the old one stays: %s", error)

    def on_hangup() -> None:
        task = asyncio.create_task(reload_and_log())
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    def on_stop() -> None:
        if stop.is_set():
            yard.log.warning("stopping at once")
            stop_all()
            raise SystemExit(130)
        yard.log.info("stopping; requests in flight have %.0f s", yard.settings.stop_s)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_stop)
    loop.add_signal_handler(signal.SIGHUP, on_hangup)
    gateway = Gateway(yard, shadow, memory_budget, status)
    public = gateway.server(logging.getLogger("switchyard.yard.http"))
    control = web.AppRunner(
        Control(yard, moves, memory_budget, overflow, status, stop=stop.set, reload=reload).application(),
        access_log=None,
    )
    try:
        await control.setup()
        await yard.open()
        host, port = yard.settings.host, yard.settings.port
        try:
            await public.listen(host, port)
        except OSError as error:
            holder = listener_on(port) or "another process"
            why = f"port {port} is taken by {holder}: stop it first (the yard takes its place)"
            raise PortTaken(f"{why}, or set yard.port in the plan") from error
        await web.SockSite(control, listening(socket_path(yard.home)), shutdown_timeout=CLOSE_S).start()
        systemd.tell("READY=1")
        reporting = asyncio.create_task(systemd.run(yard.routes.values()))
        opened(yard)  # what engines do not support is reported before one is launched
        for route in yard.routes.values():
            memory_budget.admit(route)
        for loop_of in (CanaryAnalysis(yard, moves).run, shadow.run, memory_budget.run, overflow.run, yard.keep_usage):
            background.append(asyncio.create_task(loop_of()))
        background.append(asyncio.create_task(gateway.watch_clients(public)))
        gc.freeze()  # the collector looks at new objects only: a full walk stopped all streams for 0.2 s
        await stop.wait()
    finally:
        systemd.tell("STOPPING=1")
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        began = loop.time()
        await yard.stop()
        await gateway.deliver(yard.settings.stop_s - (loop.time() - began))
        await public.close(CLOSE_S)
        await control.cleanup()
        with contextlib.suppress(OSError):
            socket_path(yard.home).unlink()
        if reporting is not None:  # to the end: a watchdog counts while the last requests are served
            reporting.cancel()


def log_to_terminal(level: int = logging.INFO) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("switchyard")
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False
