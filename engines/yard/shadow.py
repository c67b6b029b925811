"""Copies of live requests for the candidate: its answers are compared with those that users got, and shown to nobody.

A copy is sent after the user has the whole answer, one at a time, once the yard has been quiet for a moment; the next
request of a user ends it at once, and it is retried later. `shadow_when = "slot"` minds the candidate's own requests
only. While the candidate is a canary with a single slot nothing is sent: a copy would push the user's prompt out of its
cache. What cannot wait is dropped and counted.

Where a request draws its tokens (a temperature above 0, or none given, which leaves it to the engine) two answers
differ by themselves: those are counted apart and their texts not compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from engines.errors import BadInput
from engines.openai.call import Call, Refusal
from engines.yard.answer import ChatAnswer, compare, is_sampled, no_answer, read_answer, size_of
from engines.yard.capture import Lines
from engines.yard.engine.connection import Gone
from engines.yard.engine.unit import Unit
from engines.yard.route import Route
from engines.yard.yard import Yard

CHAT = "/v1/chat/completions"
POLL_S = 0.1
QUIET_S = 0.5  # an agent's next request comes right after its last answer
TRIES = 3
RECORDED_BYTES = 2 * 2**20
PAIRS = 200
JUDGE_SHARE = 20  # the judge waits this many times what it took, so that it holds a twentieth of a core at most


class RecordedAnswer:
    """The bytes of an answer as they are sent; one that grows too long is given up."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0

    def add(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size <= RECORDED_BYTES:
            self._pieces.append(piece)

    @property
    def whole(self) -> bytes | None:
        """All of it; None when it was too long."""
        return b"".join(self._pieces) if self._size <= RECORDED_BYTES else None


@dataclass(eq=False)
class Copy:
    """A request that waits for the candidate, with the user's answer."""

    model_id: str
    call: Call
    answer: ChatAnswer
    tries: int = 0


@dataclass
class Tally:
    """Counts and pairs of the copies of one model's requests."""

    share: float
    to: str | None = None
    counts: Counter[str] = field(default_factory=Counter)
    divergences: deque[int] = field(default_factory=lambda: deque(maxlen=PAIRS))
    pairs: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=PAIRS))
    judged: dict[str, Any] = field(default_factory=dict)
    unjudged: bool = False


class Shadow:
    def __init__(self, yard: Yard) -> None:
        self._yard = yard
        self._tallies: dict[str, Tally] = {}
        self._queue: deque[Copy] = deque()
        self._arrived = asyncio.Event()
        self._asking: asyncio.Task[ChatAnswer] | None = None
        self._asked: tuple[Copy, Unit] | None = None
        self._busy_at = time.monotonic()
        self._judge_from = 0.0
        self._random = random.Random()
        self._pairs: Lines | None = None

    # --- what the gateway calls: cheap, and it never raises

    def recorder(self, route: Route, call: Call) -> RecordedAnswer | None:
        """A recorder of the answer where this request is to be copied; None for most requests."""
        tally = self._tally(route)
        if call.path != CHAT or tally.share <= 0 or self._random.random() >= tally.share:
            return None
        if self._unit(route) is None:
            return None
        if len(self._queue) >= self._yard.settings.shadow_waiting:
            self._count(route, "dropped")
            return None
        return RecordedAnswer()

    def offer(self, route: Route, unit: Unit, call: Call, recorded: RecordedAnswer) -> None:
        """Queue a copy for the candidate: the user has the whole answer of `unit`."""
        if unit is not self._unit(route) and (data := recorded.whole) is not None:
            self._queue.append(Copy(route.model_id, call, read_answer(data, stream=call.stream)))
            self._arrived.set()

    def make_way(self, route: Route) -> None:
        """End a copy that could be in the way of a user's request, which has come now."""
        self._busy_at = time.monotonic()
        if self._asking is None or self._asked is None:
            return
        copy, unit = self._asked
        in_its_slot = copy.model_id == route.model_id and not unit.has_room
        if self._yard.settings.shadow_when == "idle" or in_its_slot:
            self._asking.cancel()

    # --- orders

    def set_share(self, route: Route, to: str | None, share: float) -> None:
        """Copy this share of the route's requests to `to` (the candidate) from now on. Raises BadInput."""
        if not 0 <= share <= 1:
            raise BadInput(f"share {share} must lie between 0 and 1")
        self._tallies[route.model_id] = Tally(share, to)

    def goes_to(self, route: Route, engine: str) -> bool:
        """Whether the engine gets copies of the route's requests."""
        tally = self._tally(route)
        return tally.share > 0 and (tally.to or route.candidate) == engine

    def status(self, route: Route) -> dict[str, Any] | None:
        """Share, counts and verdict; None where nothing is or was copied."""
        tally = self._tally(route)
        if tally.share <= 0 and not tally.counts:
            return None
        engine = tally.to or route.candidate
        return {
            "engine": engine,
            "share": tally.share,
            "up": self._unit(route) is not None,
            "waiting": sum(copy.model_id == route.model_id for copy in self._queue),
            "counts": dict(tally.counts),
            "median_divergence": median(tally.divergences) if tally.divergences else None,
            **tally.judged,
        }

    # --- the loop

    async def run(self) -> None:
        """Send copies while the yard is quiet; until cancelled."""
        settings = self._yard.settings
        if settings.shadow_pairs is not None:
            path, limit = self._yard.folder / settings.shadow_pairs, settings.capture_mib * 2**20
            self._pairs = Lines(path, limit, self._yard.note_problem)
        try:
            while True:
                if self._queue:
                    await asyncio.sleep(POLL_S)
                else:
                    self._arrived.clear()
                    within_s = 1.0 if any(tally.unjudged for tally in self._tallies.values()) else None
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(within_s):
                            await self._arrived.wait()
                if self._queue and self._quiet():
                    await self._next()
                await self._judge()
        finally:
            if self._asking is not None:
                self._asking.cancel()
            if self._pairs is not None:
                await asyncio.to_thread(self._pairs.close)

    def _quiet(self) -> bool:
        """True when the first copy may be sent; a copy that has nowhere to go any more is dropped."""
        copy = self._queue[0]
        route = self._yard.routes.get(copy.model_id)
        unit = None if route is None else self._unit(route)
        if route is None or unit is None:
            self._queue.popleft()
            if route is not None:
                self._count(route, "dropped")
            return False
        if self._in_the_way(route, unit):
            self._busy_at = time.monotonic()
        return time.monotonic() - self._busy_at >= QUIET_S

    def _in_the_way(self, route: Route, unit: Unit) -> bool:
        """True when a copy on this engine could slow a user's request now."""
        canary = route.state.canary
        if route.moving or route.holding or self._yard.stopping:
            return True
        if canary is not None and canary.engine == unit.engine and unit.slots == 1:
            return True
        ours = self._asked is not None
        if self._yard.settings.shadow_when == "slot":
            return route.waiting > 0 or len(unit.in_flight) > ours
        routes = self._yard.routes.values()
        in_flight = sum(len(one.in_flight) for other in routes for one in other.units.values())
        return in_flight > ours or any(other.waiting for other in routes)

    async def _next(self) -> None:
        """Send one copy, to its end or until a user needs the engine."""
        copy = self._queue.popleft()
        route = self._yard.routes[copy.model_id]
        unit = self._unit(route)
        if unit is None or not unit.has_room:
            self._queue.appendleft(copy)
            return
        self._asked = copy, unit
        self._asking = asyncio.create_task(self._ask(unit, copy.call))
        try:
            while not self._asking.done():
                await asyncio.wait([self._asking], timeout=POLL_S)
                if not self._asking.done() and self._in_the_way(route, unit):
                    self._asking.cancel()
            if not self._asking.cancelled():
                self._compare(route, unit, copy, self._asking.result())
                return
            copy.tries += 1
            self._busy_at = time.monotonic()
            self._count(route, "aborted")
            if copy.tries < TRIES:
                self._queue.appendleft(copy)
            else:
                self._count(route, "dropped")
        finally:
            self._asking.cancel()
            self._asking = self._asked = None

    async def _ask(self, unit: Unit, call: Call) -> ChatAnswer:
        running = unit.take(call.prompt_tokens)
        try:
            dialect = unit.dialect(call)
            async with unit.connection.ask("POST", call.path, dialect.request()) as upstream:
                if not call.stream or upstream.status != 200:
                    status, data = dialect.whole(upstream.status, await upstream.read())
                    running.chunk(content=True)
                    return read_answer(data, stream=False, status=status)
                recorded = RecordedAnswer()
                async for chunk in upstream.pieces():
                    running.chunk(content=running.first is None)
                    recorded.add(dialect.event(chunk))
                recorded.add(dialect.rest())
            if dialect.early_error is not None:
                return read_answer(dialect.early_error[1], stream=False, status=dialect.early_error[0])
            return read_answer(recorded.whole or b"", stream=True) | ({"error": dialect.error} if dialect.error else {})
        except Refusal as refusal:
            return no_answer(str(refusal))
        except Gone as gone:
            return no_answer(str(gone))
        finally:
            unit.give_back(running)

    def _compare(self, route: Route, unit: Unit, copy: Copy, candidate: ChatAnswer) -> None:
        tally = self._tally(route)
        sampled = is_sampled(copy.call.body)
        found = compare(copy.answer, candidate, sampled=sampled)
        for outcome in found["outcomes"]:
            self._count(route, outcome)
        if found["diverged_at"] is not None:
            tally.divergences.append(found["diverged_at"])
        pair = {
            "at": time.time(),
            "model": route.model_id,
            "engines": {"incumbent": route.serving.engine, "candidate": unit.engine},
            "sampled": sampled,
            "incumbent": copy.answer,
            "candidate": candidate,
        }
        tally.pairs.append(pair)
        tally.unjudged = True
        if self._pairs is not None:
            self._pairs.put(
                {**pair, "body": copy.call.body}, len(copy.call.raw) + size_of(copy.answer) + size_of(candidate)
            )

    async def _judge(self) -> None:
        """Have the parity checks judge the pairs; in a thread, while nothing waits, and not all the time."""
        judge, began = self._yard.judge_shadow, time.monotonic()
        tally = next((tally for tally in self._tallies.values() if tally.unjudged), None)
        if judge is None or tally is None or self._queue or began < self._judge_from:
            return
        tally.unjudged = False
        try:
            tally.judged = dict(await asyncio.to_thread(judge, list(tally.pairs)))
        except Exception as error:
            tally.judged = {"verdict": "ERROR", "why": f"{type(error).__name__}: {error}"}
            self._yard.events.note("incident", "-", f"the judge of the shadow failed: {tally.judged['why']}")
        self._judge_from = time.monotonic() + JUDGE_SHARE * (time.monotonic() - began)

    def _count(self, route: Route, outcome: str) -> None:
        tally = self._tally(route)
        tally.counts[outcome] += 1
        self._yard.metrics.shadowed.labels(route.model_id, tally.to or route.candidate, outcome).inc()

    def _tally(self, route: Route) -> Tally:
        found = self._tallies.get(route.model_id)
        if found is None:
            found = self._tallies[route.model_id] = Tally(self._yard.settings.shadow_share)
        return found

    def _unit(self, route: Route) -> Unit | None:
        """The engine that copies go to: up, and not the one that users are served by."""
        unit = route.units.get(self._tally(route).to or route.candidate)
        return unit if unit is not None and unit.accepts and unit is not route.serving else None
