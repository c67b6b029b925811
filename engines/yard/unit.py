"""One engine with one model under supervision: started, watched, restarted, stopped, by one task that owns it all.

Others ask for an outcome (`ready`, `stop`) and never act on a state they read: the state moves while one looks.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from pydantic import SecretStr

from engines.driver import Driver
from engines.errors import EngineError
from engines.process import ManagedProcess
from engines.serving import exit_reason, free_port, in_frames, launch, wait_ready
from engines.settings import Serve
from engines.telemetry import private_bytes, vram_bytes
from engines.yard.door import Answer, Door, Gone
from engines.yard.health import PATIENCE, Health, Rate, RestartBudget, Transition, stall_limit_s, token_limit_s
from engines.yard.recipe import Recipe
from engines.yard.settings import YardSettings

TICK_S = 0.25
SETTLE_S = 0.5
STOP_S = 5.0
ASK_PROGRESS_S = 2.0  # polled faster than once a second, llama-server keeps the requests of clients that left
ASK_TIMEOUT_S = 5.0
MEMORY_EVERY_S = 5.0
DEFAULT_BATCH_TOKENS = 2048
REMEMBERED = 50
SERIES = 240  # 20 minutes of memory, the last 240 first tokens


class Flight:
    """One request on an engine. Times are monotonic seconds; `gap` takes the seconds between successive chunks."""

    def __init__(self, prompt_tokens: int, gap: Callable[[float], None] | None = None) -> None:
        self.prompt_tokens = prompt_tokens
        self.sent = self.moved = time.monotonic()
        self.first: float | None = None  # first chunk with content
        self.chunks = 0  # chunks with content, and those after the first of them
        self.prefill_rate: float | None = None  # tokens/s, where the engine's answer tells it
        self._gap = gap

    def chunk(self, *, content: bool) -> None:
        """A piece of the answer arrived; `content` once it holds anything to show (all pieces behind it count)."""
        now = time.monotonic()
        if self.first is not None:
            self.chunks += 1
            if self._gap is not None:
                self._gap(now - self.moved)
        elif content:
            self.first, self.chunks = now, 1
        self.moved = now


class Unit:
    """An engine with its model. `changed` is called, in the event loop, after every change that may free a request."""

    def __init__(
        self,
        recipe: Recipe,
        driver: Driver,
        settings: YardSettings,
        *,
        home: Path,
        key: SecretStr | None,
        open_door: Callable[[Recipe, Serve], Door],
        changed: Callable[[Unit], None] = lambda _: None,
        transition: Callable[[Unit, Transition], None] = lambda _, __: None,
        incident: Callable[[Unit, str], None] = lambda _, __: None,
    ) -> None:
        self.recipe = recipe
        self.driver = driver
        self.state = Health.STOPPED
        self.transitions: deque[Transition] = deque(maxlen=REMEMBERED)
        self.flights: set[Flight] = set()
        self.child: ManagedProcess | None = None
        self._door: Door | None = None
        self.context_tokens: int | None = None
        self.load_s: float | None = None
        self.loading = ""
        self.restarts = 0
        self.out_of_budget = False
        self.memory_bytes: int | None = None
        self.vram_bytes: int | None = None
        self.held_bytes: int | None = None  # the most that was seen of both together; remembered after its end
        self.memory_series: deque[int] = deque(maxlen=SERIES)
        self.ttft_series: deque[float] = deque(maxlen=SERIES)
        self.tokens = 0
        self.tokens_per_s: float | None = None
        self.gap: Callable[[float], None] | None = None
        self.prefill = Rate()
        self.token_gap = Rate()
        self.settings = settings
        self._home = home
        self._key = key
        self._open_door = open_door
        self._changed = changed
        self._transition = transition
        self._incident = incident
        self._budget = RestartBudget(settings.restarts, settings.restart_window_s)
        self._wanted = self._living = False
        self._wake = asyncio.Event()
        self._moved = asyncio.Event()  # replaced at each change of state: whoever waits holds the current one
        self._owner: asyncio.Task[None] | None = None
        self._counters: tuple[int, ...] = ()
        self._progressed = time.monotonic()
        self._step_s = 0.0  # the last step of prompt progress: deep in a long context each takes longer than before
        self._asked = self._probed = self._weighed = 0.0
        self._missed = self._counted = self._deaths = 0
        self._cached = False  # a client's prompt may lie in the engine's cache

    # --- what others ask for

    @property
    def engine(self) -> str:
        """The driver's name."""
        return self.recipe.engine

    @property
    def slots(self) -> int:
        """Requests it takes at a time."""
        return self.recipe.settings.parallel

    @property
    def door(self) -> Door:
        """The way in, once it has served; after its end whoever asks there is told that it is gone."""
        assert self._door is not None
        return self._door

    @property
    def why(self) -> str:
        """The evidence for the state it is in."""
        return self.transitions[-1].why if self.transitions else "never started"

    def want(self) -> None:
        """Have it up from now on; returns at once. A spent restart budget is given back."""
        self.forgive()
        self._wanted = True
        self._wake.set()
        if self._owner is None:
            self._owner = asyncio.create_task(self._own(), name=f"owner of {self.recipe.model_id} on {self.engine}")

    def forgive(self) -> None:
        """Give it its restarts back."""
        self._budget.reset()
        self.out_of_budget = False

    async def ready(self, within_s: float | None = None, *, first_try: bool = False) -> None:
        """Return once it serves. Raises EngineError with its last evidence when it cannot, or not in time.

        `first_try` gives up when it ends or stalls once; otherwise it may use its restarts.
        """
        self.want()
        deaths = self._deaths
        deadline = None if within_s is None else time.monotonic() + within_s
        while not self.state.serves:
            given_up = first_try and self._deaths > deaths
            if self.out_of_budget or not self._wanted or given_up:
                raise EngineError(f"{self.engine} does not come up: {self.why}", engine=self.engine)
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise EngineError(
                    f"{self.engine} was not ready within {within_s:.0f} s: {self.why}", engine=self.engine
                )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._moved.wait(), left)

    async def stop(self) -> None:
        """End it and return when its process is gone; safe twice."""
        self._wanted = False
        self._wake.set()
        child = self.child
        if self.state is Health.LOADING and child is not None:
            await asyncio.to_thread(child.stop)  # the wait for its first token ends with it
        while self._living and not self._wanted:
            await self._moved.wait()

    async def idle(self) -> None:
        """Return when no request is in flight on it."""
        while self.flights:
            await self._moved.wait()

    async def settle(self) -> None:
        """Return once its death would be known: a broken connection is seen a moment before the end of the process."""
        deadline = time.monotonic() + SETTLE_S
        while self.state.serves and (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._moved.wait(), left)

    # --- requests

    @property
    def accepts(self) -> bool:
        """True when it serves and is to go on doing so."""
        return self.state.serves and self._wanted

    @property
    def has_room(self) -> bool:
        """True when a request can be handed to it now."""
        return self.accepts and len(self.flights) < self.slots

    def take(self, prompt_tokens: int) -> Flight:
        """Count a request in; the caller has seen `has_room`."""
        flight = Flight(prompt_tokens, self.gap)
        self.flights.add(flight)
        self._cached, self._missed = True, 0
        if self.state is Health.READY:
            self._change(Health.BUSY, "a request is in flight")
        return flight

    def give_back(self, flight: Flight) -> None:
        """Count a request out, and learn its speed."""
        self.flights.discard(flight)
        if flight.first is not None:
            self.tokens += flight.chunks
            self.ttft_series.append((flight.first - flight.sent) * 1000)
            if flight.chunks > 1:
                self.token_gap.learn((flight.moved - flight.first) / (flight.chunks - 1))
        # never learnt from the time to the first token: a prompt that lay in the cache would look 100 times faster
        if flight.prefill_rate is not None:
            self.prefill.learn(flight.prefill_rate)
        self._progressed = time.monotonic()
        if not self.flights:
            self._step_s = 0.0
        if self.state is Health.BUSY and not self.flights:
            self._change(Health.READY, "its last request is done")
        else:
            self._announce()

    # --- the owner

    async def _own(self) -> None:
        """Lives, one after the other, whenever it is wanted."""
        while True:
            if not self._wanted:
                self._wake.clear()
                await self._wake.wait()
                continue
            self._living = True
            await self._life()
            self._living = False
            if not self._wanted:
                self._change(Health.STOPPED, "asked to stop")
                continue
            pause = self._budget.spend(time.monotonic())
            if pause is None:
                self._wanted, self.out_of_budget = False, True
                self._incident(self, f"out of restarts ({self.settings.restarts}): {self.why}")
                self._announce()
                continue
            self.restarts += 1
            self._announce()
            await self._pause(pause)

    async def _life(self) -> None:
        """One process, from its start until it is gone."""
        grace_s = STOP_S
        try:
            await self._start()
            if self._wanted:
                state, why = await self._watch()
                if state is not Health.STOPPED:
                    grace_s = 0  # it had its chance
                    self._deaths += 1
                    self._change(state, why)
                    self._incident(self, why)
        except Exception as error:  # a bug of ours must end in a restart, not in an engine that nobody watches
            grace_s = 0
            if self._wanted:
                what = str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
                self._deaths += 1
                self._change(Health.DEAD, what)
                self._incident(self, what)
        finally:
            if self.child is not None:
                await asyncio.to_thread(self.child.stop, grace_s=grace_s)
            if self._door is not None:
                self._door.close()
            self.child = None
            self.memory_bytes = self.vram_bytes = self.tokens_per_s = None

    async def _start(self) -> None:
        self._change(Health.LOADING, f"starting {self.engine} {self.recipe.version}")
        serve = self.recipe.serve(free_port(), self._key)
        log = self._home / "logs" / f"yard-{self.engine}-{self.recipe.model_id}.log"
        began = time.monotonic()
        try:
            self.child = await asyncio.to_thread(
                launch, self.driver, self.recipe.installation, serve, state_dir=self._home, log_path=log
            )
        except OSError as error:
            raise EngineError(f"{self.engine} cannot be started: {error}", engine=self.engine) from error
        if not self._wanted:
            return
        seen = await asyncio.to_thread(
            wait_ready,
            self.engine,
            serve,
            self.child,
            served_name=self.driver.served_name(self.recipe.installation, self.recipe.model_id),
            stall_s=self.settings.load_stall_s,
            progress=self._note_loading,
            ask=in_frames(serve) if self.recipe.form == "native" else None,
        )
        self.load_s = time.monotonic() - began
        self._door = self._open_door(self.recipe, serve)
        context = seen.get("context_tokens")
        self.context_tokens = context if isinstance(context, int) else serve.settings.context_tokens
        rate = seen.get("prefill_tokens_per_s")
        if isinstance(rate, float) and self.prefill.value is None:
            self.prefill.learn(rate)
        self._counters, self._cached, self._missed, self._counted = (), False, 0, self.tokens
        self._progressed = self._probed = time.monotonic()
        self._asked = self._weighed = 0.0
        if self._wanted:
            self._change(Health.READY, f"one real token after {self.load_s:.1f} s (pid {self.child.pid})")

    async def _watch(self) -> tuple[Health, str]:
        """How its life ended: dead, wedged or failing with the evidence, or stopped because it was asked to.

        Questions to the engine are asked beside this loop: one that hangs must not hide its death.
        """
        assert self.child is not None
        child, died = self.child, self._death_of(self.child)
        asking: asyncio.Task[None] | None = None
        try:
            while True:
                self._wake.clear()
                if not self._wanted:
                    return Health.STOPPED, "asked to stop"
                if died.is_set():
                    return Health.DEAD, f"its process ended: {exit_reason(child)}"
                if (ended := self._look()) is not None:
                    return ended
                if asking is None or asking.done():
                    asking = self._next_question()
                if time.monotonic() - self._weighed > MEMORY_EVERY_S:
                    await self._weigh(child)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), TICK_S)
        finally:
            if asking is not None:
                asking.cancel()

    def _death_of(self, child: ManagedProcess) -> asyncio.Event:
        """Set, and the owner woken, as soon as the process has ended."""
        loop, died = asyncio.get_running_loop(), asyncio.Event()

        def wait_for_death() -> None:
            child.wait()
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(died.set)
                loop.call_soon_threadsafe(self._wake.set)

        threading.Thread(target=wait_for_death, name=f"death of {child.name}", daemon=True).start()
        return died

    def _look(self) -> tuple[Health, str] | None:
        """Wedged or failing, when the evidence at hand says so."""
        if not self.flights:
            if self._missed < self.settings.failed_probes:
                return None
            return Health.FAILING, f"idle, and {self._missed} questions for a sign of life in a row were not answered"
        still, limit = self._stillness_s()
        if still <= limit:
            return None
        return Health.WEDGED, (
            f"{len(self.flights)} request(s) in flight and no token, no prompt progress for {still:.1f} s "
            f"(limit {limit:.1f} s)"
        )

    def _stillness_s(self) -> tuple[float, float]:
        """Seconds without any progress while it works, and how many the work at hand explains."""
        moved = max(self._progressed, *(flight.moved for flight in self.flights))
        return time.monotonic() - moved, max(self._limit_s(flight) for flight in self.flights)

    def _next_question(self) -> asyncio.Task[None] | None:
        """How far it is, when it works in silence; whether it lives, when it has been idle for long."""
        now = time.monotonic()
        if self.flights:
            still, limit = self._stillness_s()
            if still <= min(ASK_PROGRESS_S, limit / 4) or now - self._asked < min(ASK_PROGRESS_S, limit / 4):
                return None
            self._asked = now
            return asyncio.create_task(self._ask_progress())
        every = self.settings.probe_every_s if not self._missed else min(self.settings.probe_every_s, ASK_TIMEOUT_S)
        if now - max(self._progressed, self._probed) < every:
            return None
        self._probed = now
        return asyncio.create_task(self._ask_for_life())

    async def _weigh(self, child: ManagedProcess) -> None:
        """Memory of the process tree, and tokens/s since the last time (in flight included)."""
        now, tokens = time.monotonic(), self.tokens + sum(flight.chunks for flight in self.flights)
        if self._weighed:
            self.tokens_per_s = max(tokens - self._counted, 0) / (now - self._weighed)
        self._weighed, self._counted = now, tokens
        self.memory_bytes, self.vram_bytes = await asyncio.to_thread(_memory, child)
        if self.memory_bytes is not None:
            self.memory_series.append(self.memory_bytes)
            self.held_bytes = max(self.held_bytes or 0, self.memory_bytes + (self.vram_bytes or 0))

    def _limit_s(self, flight: Flight) -> float:
        least = self.settings.wedged_after_s
        if flight.first is not None:
            return token_limit_s(least_s=least, token_s=self.token_gap.value)
        return stall_limit_s(
            least_s=max(least, PATIENCE * self._step_s),
            prompt_tokens=flight.prompt_tokens,
            prefill_rate=self.prefill.value,
            sees_prompt_progress=self.driver.sees_prompt_progress,
            batch_tokens=self.recipe.settings.batch_tokens or DEFAULT_BATCH_TOKENS,
        )

    async def _ask_progress(self) -> None:
        with contextlib.suppress(Gone, ValueError):
            async with self._get(self.driver.progress_path) as answer:
                counters = self.driver.progress(await answer.read()) if answer.status == 200 else ()
            if counters and counters != self._counters:
                now = time.monotonic()
                self._step_s, self._counters, self._progressed = now - self._progressed, counters, now

    async def _ask_for_life(self) -> None:
        # a completion would push the client's prompt out of an engine with a single slot: its own loop answers instead
        neutral = self.driver.probe_is_neutral or not self._cached
        alive = await (self._one_token() if neutral else self._answers())
        if not self.flights:  # a client that came meanwhile is the better evidence
            self._missed = 0 if alive else self._missed + 1
            self._wake.set()

    async def _answers(self) -> bool:
        try:
            async with self._get(self.driver.progress_path) as answer:
                await answer.read()
                return answer.status == 200
        except Gone:
            return False

    async def _one_token(self) -> bool:
        body = {
            "model": self.driver.served_name(self.recipe.installation, self.recipe.model_id),
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 1,
            "temperature": 0,
        }
        try:
            data, within_s = json.dumps(body).encode(), self.settings.wedged_after_s
            async with self.door.ask("POST", "/v1/chat/completions", data, timeout_s=within_s) as answer:
                told = json.loads(await answer.read())
                return answer.status == 200 and int(told["usage"]["completion_tokens"]) >= 1
        except (Gone, ValueError, KeyError, TypeError):
            return False

    def _get(self, path: str) -> contextlib.AbstractAsyncContextManager[Answer]:
        return self.door.ask("GET", path, timeout_s=ASK_TIMEOUT_S)

    async def _pause(self, seconds: float) -> None:
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), seconds)

    def _note_loading(self, what: str) -> None:
        self.loading = what

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


def _memory(child: ManagedProcess) -> tuple[int | None, int | None]:
    """Private memory (with swap) and GPU memory of the process tree, in bytes; None for what is not measured."""
    pids = [member.pid for member in child.tree()]
    return private_bytes(pids), vram_bytes(pids)
