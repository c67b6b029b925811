"""One engine with one model under supervision: started, watched, restarted, stopped, by one task that owns it all.

Others ask for an outcome (`ready`, `stop`) and never act on a state they read: the state moves while one looks.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from engines.deadline import in_thread
from engines.driver import Driver
from engines.errors import EngineError, EngineRefuses
from engines.mistral_rs.native.frames import in_frames
from engines.openai.call import GENERATING, Call
from engines.openai.dialect import Dialect
from engines.process.device import Device, weights_on
from engines.process.process import KILLED_S, ManagedProcess
from engines.process.readiness import PROOFS, exit_reason, last_lines, wait_ready
from engines.process.serving import free_port, launch
from engines.settings import Serve
from engines.yard.engine.connection import EngineConnection
from engines.yard.engine.drift import Drift
from engines.yard.engine.health import Health, RestartBudget, Transition
from engines.yard.engine.in_flight import InFlight
from engines.yard.engine.incident import keep_evidence
from engines.yard.engine.launch_spec import LaunchSpec
from engines.yard.engine.liveness import Liveness
from engines.yard.engine.prompt_cache import SAVE_S, PromptCache, RestoreBroke
from engines.yard.engine.silence import TICK_S
from engines.yard.engine.slot_store import SlotStore
from engines.yard.engine.stats import EngineStats
from engines.yard.settings import YardSettings

SETTLE_S = 0.5
STOP_S = 5.0
MEMORY_EVERY_S = 5.0
REMEMBERED = 50


class Unit:
    """An engine with its model. `changed` is called, in the event loop, after every change that may free a request."""

    def __init__(
        self,
        spec: LaunchSpec,
        driver: Driver,
        settings: YardSettings,
        *,
        home: Path,
        key: SecretStr | None,
        connect: Callable[[LaunchSpec, Serve], EngineConnection],
        store: SlotStore | None = None,
        note: Callable[[str, str], None] = lambda _, __: None,
        changed: Callable[[Unit], None] = lambda _: None,
        transition: Callable[[Unit, Transition], None] = lambda _, __: None,
        incident: Callable[[Unit, str], None] = lambda _, __: None,
    ) -> None:
        self.spec = spec
        self.driver = driver
        self.engine = spec.engine
        found = spec.installation
        self.paths = driver.paths(found, spec.own)
        self.slots = spec.settings.sequences  # requests it takes at a time
        self.state = Health.STOPPED
        self.transitions: deque[Transition] = deque(maxlen=REMEMBERED)
        self.in_flight: set[InFlight] = set()
        self.child: ManagedProcess | None = None
        self.context_tokens: int | None = None
        self.load_s: float | None = None
        self.loading = ""  # how far the start is
        self.device = Device("unknown", "it has not served yet")
        self.restarts = 0
        self.budget = RestartBudget(settings.restarts, settings.restart_window_s)
        self.stats = EngineStats()
        self.gap: Callable[[float], None] | None = None
        self.prompts = PromptCache(spec, self.paths.slots, store, note)
        self._dialect, self._served_name = driver.dialect(found), spec.served_name(driver)
        self._settings = settings
        self._home, self._key, self._connect = home, key, connect
        self._changed, self._transition, self._incident = changed, transition, incident
        self._connection: EngineConnection | None = None
        self._liveness: Liveness | None = None
        self._wanted = self._process_runs = self._leaves = False
        self._restores = True
        self._wake = asyncio.Event()
        self._moved = asyncio.Event()  # replaced at each change of state: whoever waits holds the current one
        self._owner: asyncio.Task[None] | None = None
        self._ends = 0  # of its processes that nobody asked for
        self._given_up: ManagedProcess | None = None

    # --- what others ask for

    @property
    def connection(self) -> EngineConnection:
        """The way to the engine, once it has served; after its end every question there raises Gone."""
        assert self._connection is not None
        return self._connection

    @property
    def why(self) -> str:
        return self.transitions[-1].why if self.transitions else "never started"

    @property
    def given_up(self) -> ManagedProcess | None:
        """A process of it that SIGKILL has not ended yet."""
        return self._given_up if self._given_up is not None and self._given_up.given_up else None

    def apply(self, settings: YardSettings) -> None:
        """Take over other limits; those of restarts hold from the next start of the yard."""
        self._settings = settings
        if self._liveness is not None:
            self._liveness.settings = settings

    def want(self, *, restores: bool = True) -> None:
        """Have it up from now on; returns at once. A spent restart budget is given back.

        Without `restores` it starts with an empty cache: nothing delays it.
        """
        self.budget.reset()
        self._wanted, self._leaves, self._restores = True, False, restores
        self._wake.set()
        if self._owner is None:
            self._owner = asyncio.create_task(self._supervise(), name=f"{self.spec.model_id} on {self.engine}")

    async def ready(self, within_s: float | None = None, *, first_try: bool = False) -> None:
        """Return once it serves. Raises EngineError with its last evidence when it cannot, or not in time.

        `first_try` gives up when it ends or stalls once; otherwise it may use its restarts.
        """
        self.want()
        ends = self._ends
        deadline = None if within_s is None else time.monotonic() + within_s
        while not self.state.serves:
            given_up = first_try and self._ends > ends
            if self.budget.exhausted or not self._wanted or given_up:
                raise EngineError(f"{self.engine} does not come up: {self.why}", engine=self.engine)
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise EngineError(
                    f"{self.engine} was not ready within {within_s:.0f} s: {self.why}", engine=self.engine
                )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._moved.wait()

    async def stop(self, *, save_s: float = SAVE_S) -> None:
        """End it and return when its process is gone; safe twice. Its prompts are saved before, for so long at most."""
        if self.accepts and save_s > 0:
            self._leaves = True
            await self.prompts.save(self.connection, save_s)
            if not self._leaves:  # wanted again
                return
        self._wanted = self._leaves = False
        self._wake.set()
        child = self.child
        if self.state is Health.LOADING and child is not None:
            await _stopped(child, STOP_S)  # the wait for its first token ends with it
        while self._process_runs and not self._wanted:
            await self._moved.wait()

    async def restore_prompts(self) -> None:
        """Bring saved prompts into its slots, where no probe takes their place. Raises RestoreBroke."""
        await self.prompts.restore(self.connection)

    async def idle(self) -> None:
        while self.in_flight:
            await self._moved.wait()

    async def end_of(self, running: InFlight) -> str:
        """Why the process of a request that broke off ended; '' when it still runs."""
        deadline = time.monotonic() + SETTLE_S  # a broken connection is seen a moment before the end of the process
        while not running.process_ended and (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._moved.wait()
        return running.process_ended

    # --- requests

    @property
    def ignores(self) -> frozenset[str]:
        """Fields of requests that this engine does not act on."""
        return self._dialect.ignores

    def dialect(self, call: Call) -> Dialect:
        """What brings `call` and its answer to the shapes that clients expect."""
        if self.spec.request_defaults and call.path in GENERATING:
            call = call.with_defaults(self.spec.request_defaults)
        return self._dialect(call, self._served_name, self.spec.model_id, context_tokens=self.context_tokens)

    @property
    def accepts(self) -> bool:
        """True when it serves, and nobody has asked it to stop."""
        return self.state.serves and self._wanted and not self._leaves

    @property
    def has_room(self) -> bool:
        liveness = self._liveness
        waits = liveness is not None and (liveness.doubted or liveness.probes_slot)
        return self.accepts and not waits and self.slots_taken < self.slots

    @property
    def slots_taken(self) -> int:
        return sum(not running.light for running in self.in_flight)

    def take(self, prompt_tokens: int, *, light: bool = False) -> InFlight:
        """Count a request in; the caller has seen `has_room`, or `accepts` for a light one."""
        running = InFlight(prompt_tokens, self.child, self.gap, light=light)
        self.in_flight.add(running)
        if light:
            return running
        self.prompts.taken()
        if self._liveness is not None:
            self._liveness.request_taken()
        if self.state is Health.READY:
            self._change(Health.BUSY, "a request is in flight")
        return running

    def give_back(self, running: InFlight) -> None:
        """Count a request out, and learn its speed; safe twice, and after the end of its process."""
        if running not in self.in_flight:
            return
        self.in_flight.discard(running)
        self.stats.learn(running)
        if self._liveness is not None and not running.light:
            self._liveness.request_done(running)
        if self.state is Health.BUSY and not self.slots_taken:
            self._change(Health.READY, "its last request is done")
        else:
            self._announce()

    @property
    def drift(self) -> str:
        """Whether its process answers as earlier ones did, in words; '' while none serves."""
        return "" if self._liveness is None else self._liveness.drift.words

    # --- the owner

    async def _supervise(self) -> None:
        while True:
            if not self._wanted:
                self._wake.clear()
                await self._wake.wait()
                continue
            self._process_runs = True
            hopeless = await self._run_process()
            self._process_runs = False
            if self.given_up is not None:
                self._wanted, self.budget.exhausted = False, True
                self._change(Health.DEAD, _held_by_kernel(self.given_up))
                self._incident(self, self.why)
            elif not self._wanted:
                self._change(Health.STOPPED, "asked to stop")
            elif hopeless or (pause := self.budget.spend(time.monotonic())) is None:
                self._wanted, self.budget.exhausted = False, True
                if not hopeless:
                    self._incident(self, f"out of restarts ({self._settings.restarts}): {self.why}")
                self._announce()
            else:
                self.restarts += 1
                self._announce()
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._wake.wait()

    async def _run_process(self) -> bool:
        """One process, from its start until it is gone or given up; True when another would end in the same way."""
        grace_s, hopeless = STOP_S, False
        try:
            liveness = await self._start()
            if liveness is not None:
                state, why = await self._watch(liveness)
                if state is not Health.STOPPED:
                    grace_s = 0  # it had its chance
                    await self._note_end(state, why)
        except Exception as error:  # a bug of ours must end in a restart, not in an engine that nobody watches
            grace_s = 0
            if self._wanted:
                what = str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
                hopeless = isinstance(error, EngineRefuses)
                await self._note_end(Health.DEAD, what, quoted=isinstance(error, EngineError))
        finally:
            await self._end(grace_s)
        return hopeless

    async def _note_end(self, state: Health, why: str, *, quoted: bool = False) -> None:
        """Note how its process ends; the incident has its last lines, where `why` does not quote them already.

        Of one that is to be killed the evidence is kept first.
        """
        self._ends += 1
        self._restores = False  # its clients wait
        child, kept = self.child, ""
        if child is not None and state in (Health.WEDGED, Health.FAILING) and not self.spec.url:
            about = self.spec, self.driver, child, self.connection, self.in_flight, self.stats
            if incident := await keep_evidence(self._home, *about, why):
                kept = f" (evidence: `switchyard incident {incident}`)"
        if child is not None:
            child.ended_because = why.partition("\n")[0]
        self._change(state, why)
        lines = "" if quoted or child is None else await in_thread(lambda: last_lines(child), name="last lines")
        self._incident(self, why + kept + lines)

    async def _end(self, grace_s: float) -> None:
        child = self.child
        if grace_s == 0 and self._connection is not None:  # whoever waits for an answer of it learns it now
            self._connection.close()
        if child is not None:
            child.ended_because = child.ended_because or "it was asked to stop"
            if not await _stopped(child, grace_s):
                self._given_up = child
        if self._connection is not None:
            self._connection.close()
        self.child = self._liveness = None
        self.stats.forget_process()
        self.in_flight = set()  # whoever still holds an answer of it is no request on the next process

    async def _start(self) -> Liveness | None:
        """A process that has produced one token; None when it is not wanted any more."""
        if self.given_up is not None:
            raise EngineRefuses(f"{_held_by_kernel(self.given_up)}; none is started beside it", engine=self.engine)
        where = self.spec.url
        self._change(Health.LOADING, f"{'asking' if where else 'starting'} {self.engine} {where or self.spec.version}")
        serve, found = self.prompts.prepare(self.spec.serve(free_port(), self._key)), self.spec.installation
        log = self._home / "logs" / f"yard-{self.engine}-{self.spec.model_id}.log"
        began = time.monotonic()
        try:
            self.child = child = await in_thread(
                lambda: launch(self.driver, found, serve, state_dir=self._home, log_path=log),
                name=f"launch of {self.engine}",
            )
        except OSError as error:
            raise EngineError(f"{self.engine} cannot be started: {error}", engine=self.engine) from error
        if not self._wanted:
            return None
        seen: Mapping[str, Any] = await in_thread(
            lambda: wait_ready(
                self.engine,
                serve,
                child,
                served_name=self.spec.served_name(self.driver),
                other_server=self.driver.own_args.other_server(self.spec.own) or "",
                stall_s=self._settings.load_stall_s,
                progress=partial(setattr, self, "loading"),
                ask=in_frames(serve) if self.spec.form == "native" else None,
            ),
            name=f"readiness of {self.engine}",
        )
        self.load_s = time.monotonic() - began
        self._connection = self._connect(self.spec, serve)
        context, rate = seen.get("context_tokens"), seen.get("prefill_tokens_per_s")
        self.context_tokens = context if isinstance(context, int) else serve.settings.context_tokens
        if isinstance(rate, float) and self.stats.prefill.value is None:
            self.stats.prefill.learn(rate)
        self._liveness = Liveness(
            child.pid,
            self.spec,
            self.driver,
            self._settings,
            self._connection,
            self.in_flight,
            self.stats,
            seen,
            holds_prompt=lambda: self.prompts.used,
            drift=Drift(self.spec, self._home, self.spec.served_name(self.driver)),
            drifted=partial(self._incident, self),
            wake=self._wake.set,
            free=self._announce,
        )
        if self._restores:
            try:
                await self.restore_prompts()
            except RestoreBroke:
                await self._end(0)
                return await self._start()
        if not self._wanted:
            return None
        who = where or f"pid {child.pid}"
        self._change(Health.READY, f"{PROOFS[str(seen['first_token_path'])]} after {self.load_s:.1f} s ({who})")
        if not where:
            self.device = await in_thread(lambda: weights_on(child), name=f"device of {self.engine}")
            if (layers := serve.settings.gpu_layers) and self.device.where == "cpu":
                self._incident(self, f"gpu_layers is {layers}, but it computes on the CPU: {self.device.why}")
        return self._liveness

    async def _watch(self, liveness: Liveness) -> tuple[Health, str]:
        """How its process ends: dead, wedged or failing with the evidence, or stopped because it was asked to."""
        child = self.child
        assert child is not None
        died = asyncio.create_task(in_thread(child.wait, name=f"death of {child.name}"))
        died.add_done_callback(lambda _: self._wake.set())
        asking: asyncio.Task[None] | None = None
        sampling: asyncio.Task[None] | None = None
        try:
            while True:
                self._wake.clear()
                if not self._wanted:
                    return Health.STOPPED, "asked to stop"
                if died.done():
                    return Health.DEAD, f"its process ended: {exit_reason(child)}"
                if (verdict := await liveness.verdict()) is not None:
                    return verdict
                if asking is None or asking.done():
                    asking = liveness.next_probe()
                due = time.monotonic() - self.stats.sampled_at > MEMORY_EVERY_S
                if due and (sampling is None or sampling.done()):
                    sampling = asyncio.create_task(self.stats.sample(child, self.in_flight))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TICK_S):
                        await self._wake.wait()
        finally:
            for task in (died, asking, sampling):
                if task is not None:
                    task.cancel()

    def _change(self, state: Health, why: str) -> None:
        # requests that come and go are no event: only what changes its health is remembered
        if {self.state, state} != {Health.READY, Health.BUSY}:
            self.transitions.append(Transition(time.time(), state, why))
            self._transition(self, self.transitions[-1])
        self.state = state
        self._announce()

    def _announce(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()
        self._changed(self)


async def _stopped(child: ManagedProcess, grace_s: float) -> bool:
    """True when the process is gone; False when SIGKILL has not ended it."""
    with contextlib.suppress(TimeoutError):
        await in_thread(lambda: child.stop(grace_s=grace_s), name="end of an engine", within_s=grace_s + 3 * KILLED_S)
    return not child.given_up and child.poll() is not None


def _held_by_kernel(child: ManagedProcess) -> str:
    return (
        f"given up: SIGKILL does not end its process (pid {child.pid}), the kernel holds it; its memory stays taken. "
        "See `dmesg` for the driver or file system that it waits for"
    )
