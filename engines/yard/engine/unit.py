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
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from pydantic import SecretStr

from engines.driver import Driver
from engines.errors import EngineError, EngineRefuses
from engines.mistral_rs.native.frames import in_frames
from engines.openai.call import Call
from engines.openai.dialect import Dialect
from engines.process.cpu_wait import CpuWait, is_stopped
from engines.process.process import KILLED_S, ManagedProcess
from engines.process.serving import (
    CHAT,
    exit_reason,
    free_port,
    last_lines,
    launch,
    one_token,
    refusal_words,
    wait_ready,
)
from engines.process.telemetry import private_bytes, process_tree, vram_bytes
from engines.settings import Serve
from engines.yard.engine.connection import EngineAnswer, EngineConnection, Gone
from engines.yard.engine.health import PATIENCE, Health, Rate, RestartBudget, Transition, stall_limit_s, token_limit_s
from engines.yard.engine.launch_spec import LaunchSpec
from engines.yard.engine.threads import in_thread
from engines.yard.settings import YardSettings

TICK_S = 0.25
SETTLE_S = 0.5
STOP_S = 5.0
ASK_PROGRESS_S = 2.0  # polled faster than once a second, llama-server keeps the requests of clients that left
ASK_TIMEOUT_S = 5.0
MEMORY_EVERY_S = 5.0
STILL_S = 1.0  # from here on the engine's waits for a CPU are counted; a shorter silence is nothing to explain
STOPPED_LOOKS = 2  # in a row: a process that is continued at once was never in trouble
LATE_S = 1.0  # a look that comes so late tells of the yard, not of the engine
PROBE_PAUSE_S = 0.5
DEFAULT_BATCH_TOKENS = 2048
REMEMBERED = 50
SERIES = 240  # 20 minutes of memory, the last 240 first tokens
Told = TypeVar("Told")


class InFlight:
    """One request on an engine's process. Times are monotonic seconds; `gap` takes the seconds between chunks."""

    def __init__(
        self, prompt_tokens: int, process: ManagedProcess | None, gap: Callable[[float], None] | None = None
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.process = process
        self.held = False  # its client takes nothing and the buffer is full: the engine is not read, nor judged by it
        self.held_s = 0.0
        self.generates = False  # its outcome says whether the engine still completes anything
        self.failure = ""  # how the engine failed it, the client's own faults apart
        self.sent = self.moved = time.monotonic()
        self.first: float | None = None  # first chunk with content
        self.chunks = 0  # chunks with content, and those after the first of them
        self.prefill_rate: float | None = None  # tokens/s, where the engine's answer tells it
        self._held_at = 0.0
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

    @property
    def gap_s(self) -> float | None:
        """Seconds between chunks, the client's own delays not counted; None before the second one."""
        if self.first is None or self.chunks < 2:
            return None
        return (self.moved - self.first - self.held_s) / (self.chunks - 1)

    def hold(self) -> None:
        """Its client takes nothing, and no more may be kept for it: until `release` the engine is not read."""
        self.held, self._held_at = True, time.monotonic()

    def release(self) -> None:
        """The client takes its answer again: from now on silence is the engine's."""
        self.held, self.moved = False, time.monotonic()
        self.held_s += self.moved - self._held_at


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
        changed: Callable[[Unit], None] = lambda _: None,
        transition: Callable[[Unit, Transition], None] = lambda _, __: None,
        incident: Callable[[Unit, str], None] = lambda _, __: None,
    ) -> None:
        self.spec = spec
        self.driver = driver
        self.state = Health.STOPPED
        self.transitions: deque[Transition] = deque(maxlen=REMEMBERED)
        self.in_flight: set[InFlight] = set()
        self.child: ManagedProcess | None = None
        self._connection: EngineConnection | None = None
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
        self._connect = connect
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
        self._stopped = 0  # looks in a row at which its process was stopped
        self._probe_path = CHAT
        self._token_s = 0.0  # what one token has taken at most, when nothing else was to do
        self._failures: list[str] = []  # of the last requests, since one succeeded
        self._doubted = False  # they are too many: it gets no request until a probe has decided
        self._given_up: ManagedProcess | None = None
        self._silence = _Silence()

    # --- what others ask for

    @property
    def engine(self) -> str:
        """The driver's name."""
        return self.spec.engine

    @property
    def slots(self) -> int:
        """Requests it takes at a time."""
        return self.spec.settings.parallel

    @property
    def connection(self) -> EngineConnection:
        """The way in, once it has served; after its end whoever asks there is told that it is gone."""
        assert self._connection is not None
        return self._connection

    @property
    def why(self) -> str:
        """The evidence for the state it is in."""
        return self.transitions[-1].why if self.transitions else "never started"

    @property
    def given_up(self) -> ManagedProcess | None:
        """A process of it that SIGKILL has not ended yet."""
        return self._given_up if self._given_up is not None and self._given_up.given_up else None

    @property
    def holds_memory(self) -> bool:
        """True while a process of it is there, one that cannot be ended included."""
        return self.child is not None or self.given_up is not None

    def want(self) -> None:
        """Have it up from now on; returns at once. A spent restart budget is given back."""
        self.forgive()
        self._wanted = True
        self._wake.set()
        if self._owner is None:
            self._owner = asyncio.create_task(self._own(), name=f"owner of {self.spec.model_id} on {self.engine}")

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
            await _stopped(child, STOP_S)  # the wait for its first token ends with it
        while self._living and not self._wanted:
            await self._moved.wait()

    async def idle(self) -> None:
        """Return when no request is in flight on it."""
        while self.in_flight:
            await self._moved.wait()

    async def end_of(self, running: InFlight) -> str:
        """Why the process of a request that broke off ended; '' when it lives.

        A broken connection is seen a moment before the end of the process.
        """
        deadline = time.monotonic() + SETTLE_S
        while not _ended(running) and (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._moved.wait(), left)
        return _ended(running)

    # --- requests

    def dialect(self, call: Call) -> Dialect:
        """What brings `call` and its answer to the shapes that clients expect."""
        found, model_id = self.spec.installation, self.spec.model_id
        return self.driver.dialect(found)(call, self.driver.served_name(found, model_id), model_id)

    @property
    def accepts(self) -> bool:
        """True when it serves and is to go on doing so."""
        return self.state.serves and self._wanted

    @property
    def has_room(self) -> bool:
        """True when a request can be handed to it now."""
        return self.accepts and not self._doubted and len(self.in_flight) < self.slots

    def take(self, prompt_tokens: int) -> InFlight:
        """Count a request in; the caller has seen `has_room`."""
        running = InFlight(prompt_tokens, self.child, self.gap)
        self.in_flight.add(running)
        self._cached, self._missed = True, 0
        if self.state is Health.READY:
            self._change(Health.BUSY, "a request is in flight")
        return running

    def give_back(self, running: InFlight) -> None:
        """Count a request out, and learn its speed; safe twice, and after the end of its process."""
        if running not in self.in_flight:
            return
        self.in_flight.discard(running)
        self._learn_outcome(running)
        if running.first is not None:
            self.tokens += running.chunks
            self.ttft_series.append((running.first - running.sent) * 1000)
            if (gap_s := running.gap_s) is not None:
                self.token_gap.learn(gap_s)
        # never learnt from the time to the first token: a prompt that lay in the cache would look 100 times faster
        if running.prefill_rate is not None:
            self.prefill.learn(running.prefill_rate)
        self._progressed = time.monotonic()
        if not self.in_flight:
            self._step_s = 0.0
        if self.state is Health.BUSY and not self.in_flight:
            self._change(Health.READY, "its last request is done")
        else:
            self._announce()

    def _learn_outcome(self, running: InFlight) -> None:
        if not running.generates:
            return
        if not running.failure:
            if running.first is not None:
                self._failures.clear()
            return
        self._failures.append(running.failure)
        if len(self._failures) >= self.settings.failed_requests and not self._doubted:
            self._doubted = True
            self._wake.set()

    # --- the owner

    async def _own(self) -> None:
        """Lives, one after the other, whenever it is wanted."""
        while True:
            if not self._wanted:
                self._wake.clear()
                await self._wake.wait()
                continue
            self._living = True
            hopeless = await self._life()
            self._living = False
            if self.given_up is not None:
                self._wanted, self.out_of_budget = False, True
                self._change(Health.DEAD, _held_by_kernel(self.given_up))
                self._incident(self, self.why)
                continue
            if not self._wanted:
                self._change(Health.STOPPED, "asked to stop")
                continue
            if hopeless:
                self._wanted, self.out_of_budget = False, True
                self._announce()
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

    async def _life(self) -> bool:
        """One process, from its start until it is gone or given up; True when another would end in the same way."""
        grace_s, hopeless = STOP_S, False
        try:
            await self._start()
            if self._wanted:
                state, why = await self._watch()
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
        """Say how its process ends; the incident has its last lines, where `why` does not quote them already."""
        self._deaths += 1
        child = self.child
        if child is not None:
            child.ended_because = why.partition("\n")[0]
        self._change(state, why)
        lines = "" if quoted or child is None else await in_thread(lambda: last_lines(child), name="last lines")
        self._incident(self, why + lines)

    async def _end(self, grace_s: float) -> None:
        child = self.child
        if grace_s == 0 and self._connection is not None:  # whoever waits for an answer of it is told now
            self._connection.close()
        if child is not None:
            child.ended_because = child.ended_because or "it was asked to stop"
            if not await _stopped(child, grace_s):
                self._given_up = child
        if self._connection is not None:
            self._connection.close()
        self.child = None
        self.memory_bytes = self.vram_bytes = self.tokens_per_s = None
        # whoever still holds an answer of it is no request on the next process
        self.in_flight = set()
        self._failures, self._doubted = [], False

    async def _start(self) -> None:
        if self.given_up is not None:
            raise EngineRefuses(f"{_held_by_kernel(self.given_up)}; none is started beside it", engine=self.engine)
        self._change(Health.LOADING, f"starting {self.engine} {self.spec.version}")
        serve = self.spec.serve(free_port(), self._key)
        log = self._home / "logs" / f"yard-{self.engine}-{self.spec.model_id}.log"
        began = time.monotonic()
        try:
            self.child = await in_thread(
                lambda: launch(self.driver, self.spec.installation, serve, state_dir=self._home, log_path=log),
                name=f"launch of {self.engine}",
            )
        except OSError as error:
            raise EngineError(f"{self.engine} cannot be started: {error}", engine=self.engine) from error
        if not self._wanted:
            return
        child = self.child
        seen = await in_thread(
            lambda: wait_ready(
                self.engine,
                serve,
                child,
                served_name=self.driver.served_name(self.spec.installation, self.spec.model_id),
                stall_s=self.settings.load_stall_s,
                progress=self._note_loading,
                ask=in_frames(serve) if self.spec.form == "native" else None,
            ),
            name=f"readiness of {self.engine}",
        )
        self.load_s = time.monotonic() - began
        self._connection = self._connect(self.spec, serve)
        context = seen.get("context_tokens")
        self.context_tokens = context if isinstance(context, int) else serve.settings.context_tokens
        rate = seen.get("prefill_tokens_per_s")
        if isinstance(rate, float) and self.prefill.value is None:
            self.prefill.learn(rate)
        token_s = seen.get("first_token_s")
        self._token_s = token_s if isinstance(token_s, float) else 0.0
        self._probe_path = str(seen.get("first_token_path", CHAT))
        self._counters, self._cached, self._missed, self._counted = (), False, 0, self.tokens
        self._progressed = self._probed = time.monotonic()
        self._asked = self._weighed = 0.0
        self._stopped = 0
        if self._wanted:
            self._change(Health.READY, f"one real token after {self.load_s:.1f} s (pid {self.child.pid})")

    async def _watch(self) -> tuple[Health, str]:
        """How its process ends: dead, wedged or failing with the evidence, or stopped because it was asked to.

        Questions to the engine are asked beside this loop, and its memory is read there: one that hangs must not hide
        its death.
        """
        assert self.child is not None
        child, died = self.child, self._death_of(self.child)
        self._silence = _Silence(child.pid)
        asking: asyncio.Task[None] | None = None
        sampling: asyncio.Task[None] | None = None
        try:
            while True:
                self._wake.clear()
                if not self._wanted:
                    return Health.STOPPED, "asked to stop"
                if died.is_set():
                    return Health.DEAD, f"its process ended: {exit_reason(child)}"
                if (ended := await self._look(child)) is not None:
                    return ended
                if asking is None or asking.done():
                    asking = self._next_question()
                if (sampling is None or sampling.done()) and time.monotonic() - self._weighed > MEMORY_EVERY_S:
                    sampling = asyncio.create_task(self._weigh(child))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), TICK_S)
        finally:
            for task in (asking, sampling):
                if task is not None:
                    task.cancel()

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

    async def _look(self, child: ManagedProcess) -> tuple[Health, str] | None:
        """Wedged or failing, when the evidence at hand says so."""
        self._stopped = self._stopped + 1 if is_stopped(child.pid) else 0
        if self._stopped >= STOPPED_LOOKS:
            return Health.WEDGED, "its process is stopped (state T: SIGSTOP or job control)"
        if self._doubted and len(self._failures) and self._missed >= self.settings.failed_probes:
            return Health.FAILING, (
                f"{len(self._failures)} consecutive requests failed, and {self._missed} one-token probes after them "
                f"({self._failures[-1]})"
            )
        working = self._working()
        if not working:
            if self._missed < self.settings.failed_probes:
                return None
            return Health.FAILING, f"idle; {self._missed} consecutive liveness probes failed"
        moved = max(self._progressed, *(running.moved for running in working))
        limit = max(self._limit_s(running) for running in working)
        still = await self._silence.since(moved, limit)
        if still <= limit:
            return None
        return Health.WEDGED, (
            f"{len(working)} request(s) in flight and no token, no prompt progress for {still:.1f} s "
            f"(limit {limit:.1f} s{self._silence.excused()})"
        )

    def _working(self) -> list[InFlight]:
        """The requests by which the engine is judged: those whose clients take what it sends."""
        return [running for running in self.in_flight if not running.held]

    def _next_question(self) -> asyncio.Task[None] | None:
        """How far it is, when it works in silence; whether it lives, when it has been idle for long."""
        now = time.monotonic()
        if self._doubted and len(self.in_flight) < self.slots:
            return asyncio.create_task(self._ask_after_failures())
        if working := self._working():
            still = now - max(self._progressed, *(running.moved for running in working))
            every = min(ASK_PROGRESS_S, max(self._limit_s(running) for running in working) / 4)
            if still <= every or now - self._asked < every:
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
        now, tokens = time.monotonic(), self.tokens + sum(running.chunks for running in self.in_flight)
        if self._weighed:
            self.tokens_per_s = max(tokens - self._counted, 0) / (now - self._weighed)
        self._weighed, self._counted = now, tokens
        self.memory_bytes, self.vram_bytes = await in_thread(lambda: _memory(child), name="memory of an engine")
        if self.memory_bytes is not None:
            self.memory_series.append(self.memory_bytes)
            self.held_bytes = max(self.held_bytes or 0, self.memory_bytes + (self.vram_bytes or 0))

    def _limit_s(self, running: InFlight) -> float:
        least = self.settings.wedged_after_s
        if running.first is not None:
            return token_limit_s(least_s=least, token_s=self.token_gap.value)
        return stall_limit_s(
            least_s=max(least, PATIENCE * self._step_s),
            prompt_tokens=running.prompt_tokens,
            prefill_rate=self.prefill.value,
            sees_prompt_progress=self.driver.sees_prompt_progress,
            batch_tokens=self.spec.settings.batch_tokens or DEFAULT_BATCH_TOKENS,
        )

    async def _ask_progress(self) -> None:
        with contextlib.suppress(ValueError):
            if not (told := await self._in_time(self._progress(), ASK_TIMEOUT_S)):
                return
            counters = self.driver.progress(told)
            if counters and counters != self._counters:
                now = time.monotonic()
                self._step_s, self._counters, self._progressed = now - self._progressed, counters, now

    async def _ask_for_life(self) -> None:
        # a completion would push the client's prompt out of an engine with a single slot, or queue behind a request
        # whose client takes nothing: its own loop answers instead
        neutral = not self.in_flight and (self.driver.probe_is_neutral or not self._cached)
        alive = not await (self._one_token() if neutral else self._silent())
        if not self._working():  # a client that came meanwhile is the better evidence
            self._missed = 0 if alive else self._missed + 1
            self._wake.set()

    async def _ask_after_failures(self) -> None:
        """Whether it is the engine or the requests: a token of our own decides, a client's cached prompt or not."""
        if failure := await self._one_token():
            self._missed += 1
            self._failures[-1] = failure
            await asyncio.sleep(PROBE_PAUSE_S)
        else:
            self._doubted, self._missed = False, 0
            self._failures.clear()
            self._announce()
        self._wake.set()

    async def _silent(self) -> bool:
        return not await self._in_time(self._progress(), ASK_TIMEOUT_S)

    async def _progress(self) -> bytes:
        """The engine's own count of how far it is; empty when it does not answer."""
        try:
            async with self._get(self.driver.progress_path) as answer:
                told = await answer.read()
                return told if answer.status == 200 else b""
        except Gone:
            return b""

    async def _one_token(self) -> str:
        """'' once it has produced one token, else what went wrong."""
        body = one_token(self._probe_path, self.driver.served_name(self.spec.installation, self.spec.model_id))
        within_s = max(self.settings.wedged_after_s, PATIENCE * self._token_s)
        failure = await self._in_time(self._completion(json.dumps(body).encode()), within_s)
        return f"no answer within {within_s:.0f} s" if failure is None else failure

    async def _completion(self, body: bytes) -> str:
        began = time.monotonic()
        try:
            async with self.connection.ask("POST", self._probe_path, body) as answer:
                told = await answer.read()
            if answer.status != 200:
                return failure_words(answer.status, told)
            if int(json.loads(told)["usage"]["completion_tokens"]) < 1:
                return "an answer without a token"
        except Gone as gone:
            return str(gone)
        except (ValueError, KeyError, TypeError):
            return "an answer that is no completion"
        self._token_s = max(self._token_s, time.monotonic() - began)
        return ""

    async def _in_time(self, asked: Awaitable[Told], within_s: float) -> Told | None:
        """What is told within so long, the engine's waits for a CPU not counted; None when it is late."""
        began, silence = time.monotonic(), _Silence(self._silence.pid)
        task = asyncio.ensure_future(asked)
        try:
            while not task.done():
                await asyncio.wait([task], timeout=TICK_S)
                if not task.done() and await silence.since(began, within_s) > within_s:
                    return None
            return task.result()
        finally:
            task.cancel()

    def _get(self, path: str) -> contextlib.AbstractAsyncContextManager[EngineAnswer]:
        return self.connection.ask("GET", path)

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


class _Silence:
    """How long an engine has been silent by its own doing.

    What does not count: time in which its threads waited for a CPU, and time in which the yard itself did not look.
    """

    def __init__(self, pid: int = 0) -> None:
        self.pid = pid
        self._waits = CpuWait(lambda: process_tree(pid))
        self._from: float | None = None
        self._marked = False
        self._looked = time.monotonic()
        self._unseen_s = self._waited_s = 0.0

    async def since(self, moved: float, limit_s: float) -> float:
        """Seconds since `moved` that count; looked at closely only where they matter."""
        now = time.monotonic()
        late_s = now - self._looked - TICK_S
        self._looked = now
        if moved != self._from:
            self._from, self._marked = moved, False
            self._unseen_s = self._waited_s = 0.0
        still_s = now - moved
        if late_s > LATE_S:
            self._unseen_s += min(late_s, still_s)
        if still_s < min(STILL_S, limit_s / 4):
            return still_s
        if not self._marked:
            self._marked = True
            await in_thread(self._waits.mark, name="waits for a CPU")
        elif still_s > limit_s:
            self._waited_s = await in_thread(self._waits.since_mark_s, name="waits for a CPU")
        return still_s - max(self._waited_s, self._unseen_s)

    def excused(self) -> str:
        """What was not counted, in words."""
        return f", {self._waited_s:.1f} s of waiting for a CPU not counted" if self._waited_s > STILL_S else ""


async def _stopped(child: ManagedProcess, grace_s: float) -> bool:
    """True when the process is gone; False when SIGKILL has not ended it."""
    with contextlib.suppress(TimeoutError):
        await in_thread(lambda: child.stop(grace_s=grace_s), name="end of an engine", within_s=grace_s + 3 * KILLED_S)
    return not child.given_up and child.poll() is not None


def _ended(running: InFlight) -> str:
    return "" if running.process is None else running.process.ended_because


def _held_by_kernel(child: ManagedProcess) -> str:
    return (
        f"given up: SIGKILL does not end its process (pid {child.pid}), the kernel holds it; its memory stays taken. "
        "See `dmesg` for the driver or file system that it waits for"
    )


def failure_words(status: int, body: bytes) -> str:
    """`HTTP 500: what it said` of an error answer's bytes, in one line."""
    with contextlib.suppress(ValueError):
        return refusal_words(status, json.loads(body))
    return f"HTTP {status}"


def _memory(child: ManagedProcess) -> tuple[int | None, int | None]:
    """Private memory (with swap) and GPU memory of the process tree, in bytes; None for what is not measured."""
    pids = [member.pid for member in child.tree()]
    return private_bytes(pids), vram_bytes(pids)
