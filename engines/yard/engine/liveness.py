"""Whether a running engine works: judged by its requests while it has some, by probes while it is idle.

A busy engine that is silent is asked how far it is, an idle one gets a liveness probe. After failed requests in a row a
token of our own decides whether the engine or the requests are at fault.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from engines.deadline import in_thread
from engines.driver import Driver
from engines.process.cpu_wait import is_stopped
from engines.process.readiness import CHAT, is_proof, refusal_words, smallest_request
from engines.units import number_of
from engines.yard.engine.connection import EngineConnection, Gone
from engines.yard.engine.drift import Drift
from engines.yard.engine.health import PATIENCE, Health, stall_limit_s, token_limit_s
from engines.yard.engine.in_flight import InFlight
from engines.yard.engine.launch_spec import LaunchSpec
from engines.yard.engine.silence import Silence, in_time
from engines.yard.engine.stats import EngineStats
from engines.yard.settings import YardSettings

ASK_PROGRESS_S = 2.0  # polled faster than once a second, llama-server keeps the requests of clients that left
ASK_TIMEOUT_S = 5.0
STOPPED_LOOKS = 2  # in a row: a process that is continued at once was never in trouble
PROBE_PAUSE_S = 0.5
DEFAULT_BATCH_TOKENS = 2048


class Liveness:
    """The evidence on one process; `seen` is what its readiness showed. `wake` asks for a verdict at once.

    `holds_prompt` says whether a client's prompt may lie in its cache. `free` is called when it may be given requests
    again that had to wait, `drifted` with an incident's words when its answers changed.
    """

    def __init__(
        self,
        pid: int,
        spec: LaunchSpec,
        driver: Driver,
        settings: YardSettings,
        connection: EngineConnection,
        in_flight: set[InFlight],
        stats: EngineStats,
        seen: Mapping[str, Any],
        *,
        holds_prompt: Callable[[], bool],
        drift: Drift,
        drifted: Callable[[str], None],
        wake: Callable[[], None],
        free: Callable[[], None],
    ) -> None:
        self.settings = settings
        self.probes_slot = False  # by a request of ours: clients wait for a moment
        self.doubted = False  # too many requests failed: it gets none until a probe has decided
        self._pid, self._spec, self._driver, self._connection = pid, spec, driver, connection
        self._in_flight, self._stats = in_flight, stats
        self._wake, self._free, self._holds_prompt = wake, free, holds_prompt
        self.drift, self._drifted = drift, drifted
        self._served_name = spec.served_name(driver)
        self._silence = Silence(pid)
        self._counters: tuple[int, ...] = ()
        self._progressed = self._probed = time.monotonic()
        self._asked = 0.0
        self._step_s = 0.0  # the last step of prompt progress: deep in a long context each takes longer than before
        self._missed = 0  # probes in a row
        self._failures: list[str] = []  # of the last requests, since one succeeded
        self._stopped = 0  # looks in a row at which its process was stopped
        self._probe_path = str(seen.get("first_token_path", CHAT))
        token_s = seen.get("first_token_s")
        self._token_s = token_s if isinstance(token_s, float) else 0.0  # at most, when nothing else was to do

    def request_taken(self) -> None:
        self._missed = 0

    def request_done(self, running: InFlight) -> None:
        self._progressed = time.monotonic()
        if not self._slots_taken():
            self._step_s = 0.0
        if not running.generates:
            return
        if not running.failure:
            if running.first is not None:
                self._failures.clear()
            return
        self._failures.append(running.failure)
        # no process shows the end of an attached engine: what it lost is not retried there before a probe has decided
        enough = 1 if running.lost and self._spec.url else self.settings.failed_requests
        if len(self._failures) >= enough and not self.doubted:
            self.doubted = True
            self._wake()

    async def verdict(self) -> tuple[Health, str] | None:
        """Wedged or failing, on the evidence at hand."""
        self._stopped = self._stopped + 1 if is_stopped(self._pid) else 0
        if self._stopped >= STOPPED_LOOKS:
            return Health.WEDGED, "its process is stopped (state T: SIGSTOP or job control)"
        if self.doubted and self._failures and self._missed >= self.settings.failed_probes:
            return Health.FAILING, (
                f"{number_of(len(self._failures), 'consecutive request')} failed, and "
                f"{number_of(self._missed, 'one-token probe')} after them ({self._failures[-1]})"
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
            f"{number_of(len(working), 'request')} in flight and no token, no prompt progress for {still:.1f} s "
            f"(limit {limit:.1f} s{self._silence.excused()})"
        )

    def next_probe(self) -> asyncio.Task[None] | None:
        """The probe that is due now, under way: it runs beside the loop, so that one that hangs hides no death."""
        now = time.monotonic()
        if self.doubted and len(self._slots_taken()) < self._spec.settings.sequences:
            return asyncio.create_task(self._ask_after_failures())
        if working := self._working():
            still = now - max(self._progressed, *(running.moved for running in working))
            every = min(ASK_PROGRESS_S, max(self._limit_s(running) for running in working) / 4)
            if still <= every or now - self._asked < every:
                return None
            self._asked = now
            return asyncio.create_task(self._ask_progress())
        if self.drift.is_due and self._is_neutral():
            return asyncio.create_task(self._ask_drift())
        every = self.settings.probe_every_s if not self._missed else min(self.settings.probe_every_s, ASK_TIMEOUT_S)
        if now - max(self._progressed, self._probed) < every:
            return None
        self._probed = now
        return asyncio.create_task(self._ask_idle())

    def _slots_taken(self) -> list[InFlight]:
        return [running for running in self._in_flight if not running.light]

    def _working(self) -> list[InFlight]:
        """The requests by which the engine is judged: those whose clients take what it sends."""
        return [running for running in self._slots_taken() if not running.held]

    def _limit_s(self, running: InFlight) -> float:
        least = self.settings.wedged_after_s
        if running.first is not None:
            return token_limit_s(least_s=least, token_s=self._stats.token_gap.value)
        return stall_limit_s(
            least_s=max(least, PATIENCE * self._step_s),
            prompt_tokens=running.prompt_tokens,
            prefill_rate=self._stats.prefill.value,
            sees_prompt_progress=self._driver.sees_prompt_progress,
            batch_tokens=self._spec.settings.batch_tokens or DEFAULT_BATCH_TOKENS,
        )

    async def _ask_progress(self) -> None:
        with contextlib.suppress(ValueError):
            if not (answer := await self._progress()):
                return
            counters = self._driver.progress(answer)
            if counters and counters != self._counters:
                now = time.monotonic()
                self._step_s, self._counters, self._progressed = now - self._progressed, counters, now

    async def _ask_idle(self) -> None:
        neutral = self._is_neutral()  # else its own loop answers
        alive = not await self._one_token() if neutral else await self._progress() is not None
        if not self._working():  # a client that came meanwhile is the better evidence
            self._missed = 0 if alive else self._missed + 1
            self._wake()
        if alive and neutral and self._is_neutral():
            await self._ask_drift()

    def _is_neutral(self) -> bool:
        """Whether a completion of ours is in nobody's way.

        It would push the client's prompt out of an engine with a single slot, or queue behind a request whose client
        takes nothing.
        """
        return not self._slots_taken() and (self._driver.probe_is_neutral or not self._holds_prompt())

    async def _ask_drift(self) -> None:
        if not self.drift.is_possible:
            return
        path, body = await in_thread(self.drift.request, name="header of a model")
        if not self._is_neutral():  # a client came meanwhile
            return

        async def ask() -> tuple[int, bytes]:
            async with self._connection.ask("POST", path, body) as answer:
                return answer.status, await answer.read()

        # a client's prompt that is read before ours would lose its place to it
        self.probes_slot = not self._driver.probe_is_neutral
        try:
            answer = await in_time(self._pid, ask(), max(self.settings.wedged_after_s, PATIENCE * self._token_s))
            if incident := self.drift.take(*(answer or (0, b""))):
                self._drifted(incident)
        except Gone:
            self.drift.no_answer()
        finally:
            self.probes_slot = False
            self._free()

    async def _ask_after_failures(self) -> None:
        """Find out whether the engine or the requests are at fault, a client's cached prompt or not."""
        if failure := await self._one_token():
            self._missed += 1
            self._failures[-1] = failure
            await asyncio.sleep(PROBE_PAUSE_S)
        else:
            self.doubted, self._missed = False, 0
            self._failures.clear()
            self._free()
        self._wake()

    async def _progress(self) -> bytes | None:
        """The engine's own count of how far it is; empty where its version has none, None when it does not answer."""

        async def ask() -> bytes | None:
            with contextlib.suppress(Gone):
                async with self._connection.ask("GET", self._driver.progress_path) as answer:
                    body = await answer.read()
                    return {200: body, 404: b""}.get(answer.status)
            return None

        return await in_time(self._pid, ask(), ASK_TIMEOUT_S)

    async def _one_token(self) -> str:
        """'' once it has produced one token, else what went wrong."""
        body = json.dumps(smallest_request(self._probe_path, self._served_name)).encode()
        within_s = max(self.settings.wedged_after_s, PATIENCE * self._token_s)
        failure = await in_time(self._pid, self._completion(body), within_s)
        return f"no answer within {within_s:.0f} s" if failure is None else failure

    async def _completion(self, body: bytes) -> str:
        began = time.monotonic()
        try:
            async with self._connection.ask("POST", self._probe_path, body) as answer:
                data = await answer.read()
            if answer.status != 200:
                return failure_words(answer.status, data)
            if not is_proof(self._probe_path, json.loads(data)):
                return "an answer without a token"
        except Gone as gone:
            return str(gone)
        except (ValueError, KeyError, TypeError, IndexError):
            return "an answer that is no completion"
        self._token_s = max(self._token_s, time.monotonic() - began)
        return ""


def failure_words(status: int, body: bytes) -> str:
    """`HTTP 500: the error's message` of an error answer's bytes, in one line."""
    with contextlib.suppress(ValueError):
        return refusal_words(status, json.loads(body))
    return f"HTTP {status}"
