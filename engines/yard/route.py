"""The route of one model: which engine takes the next request, and which requests wait for it."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from engines.openai.call import NO_CONVERSATION, Refusal
from engines.units import number_of
from engines.yard.config import ModelConfig
from engines.yard.engine.in_flight import InFlight
from engines.yard.engine.unit import Unit
from engines.yard.state import ModelState

REMEMBERED = 10_000  # conversations whose engine is known, the latest ones


@dataclass(eq=False)
class Waiting:
    """A request that waits for its turn; `turn` gets the engine and its place on it."""

    conversation: str
    path: str
    prompt_tokens: int
    light: bool
    over: bool = False  # its conversation is the overflow engine's
    turn: asyncio.Future[tuple[Unit, InFlight]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Route:
    """One model's engines, and the requests in front of them: an engine gets no more than it takes at a time."""

    def __init__(self, model: ModelConfig, state: ModelState, max_waiting: int) -> None:
        self.model_id = model.id
        self.state = state
        self.units: dict[str, Unit] = {}
        self.fallback: str | None = None
        self.unservable: str | None = None
        self.holding = False
        self.moving: str | None = None  # the move under way, in words
        self.max_waiting = max_waiting
        self.apply(model)
        self.unloaded = False  # not in memory; the next request loads it
        self.used_at = time.monotonic()  # the last request
        self._waiting: deque[Waiting] = deque()
        self.overflow_refused = ""  # why the overflow engine gets nothing now, although it is ordered
        self.overflowed = 0  # conversations that went there
        self._over: OrderedDict[bytes, bool] = OrderedDict()  # conversations by key: whether they are on that engine

    def apply(self, model: ModelConfig) -> None:
        """Take over what the plan says of the model."""
        self.incumbent, self.candidate = model.incumbent, model.candidate
        self.load, self.pin, self.overflow_config = model.load, model.pin, model.overflow

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def serving(self) -> Unit:
        """The engine that new requests go to: the committed one, or the fallback while that is out of order."""
        return self.units[self.fallback or self.state.serving]

    @property
    def splits(self) -> bool:
        """Whether its conversations may be on two engines."""
        return self.state.canary is not None or self.overflow_config is not None

    @property
    def overflow(self) -> Unit | None:
        """The engine beside the serving one that is to take what is too much for it, up or not; None: there is none."""
        config = self.overflow_config
        unit = self.units.get(config.engine) if config is not None and self.state.overflow else None
        return None if unit is None or unit is self.serving else unit

    @property
    def open_overflow(self) -> Unit | None:
        """The overflow engine where it takes requests now. While a canary is judged, the load stays as it is."""
        unit = self.overflow
        closed = unit is None or not unit.accepts or self.overflow_refused or self.state.canary is not None
        return None if closed else unit

    def needs(self, unit: Unit) -> bool:
        """Whether the engine stays up after a move."""
        return unit is self.serving or unit is self.overflow

    def unit_for(self, place: Waiting) -> Unit:
        """The engine of a request: a canary, and an overflow engine, keep the conversations that they have.

        A request of none ('') and a path that such an engine does not have go to the serving engine.
        """
        canary, chosen = self.state.canary, self.open_overflow if place.over else None
        if canary and place.conversation and self.fallback is None and _share(place.conversation) < canary.weight:
            chosen = self.units.get(canary.engine)
        if chosen is not None and chosen.state.serves and chosen.paths.kind(place.path) != "unlisted":
            return chosen
        return self.serving

    def _is_over(self, place: Waiting) -> bool:
        """Whether the request goes to the overflow engine: as its conversation did, a new one where too many wait."""
        second, config = self.open_overflow, self.overflow_config
        if config is None or place.light or place.conversation in ("", NO_CONVERSATION):
            return False
        is_over = False
        if second is not None and (known := self._over.get(_key(place.conversation))) is not None:
            is_over = known
        elif second is not None:
            ahead, behind = self._queue(self.serving), self._queue(second)
            waiting = 0 if self.serving.has_room and not ahead else ahead + 1
            is_over = waiting > config.waiting and behind <= ahead and second.paths.kind(place.path) != "unlisted"
            self.overflowed += is_over
        self._remember(place.conversation, is_over)
        return is_over

    def _queue(self, unit: Unit) -> int:
        return sum(self.unit_for(place) is unit for place in self._waiting)

    def _remember(self, conversation: str, over: bool) -> None:
        key = _key(conversation)
        self._over[key] = over
        self._over.move_to_end(key)
        if len(self._over) > REMEMBERED:
            self._over.popitem(last=False)

    def enter(self, conversation: str, path: str, prompt_tokens: int, *, light: bool = False) -> Waiting:
        """Queue a request; a light one needs no slot. Raises Refusal 429 (too many wait), 503 (no engine can serve)."""
        if self.unservable is not None:
            raise _unservable(self.unservable)
        place = Waiting(conversation, path, prompt_tokens, light)
        place.over = self._is_over(place)
        self._waiting.append(place)
        self.hand_over()
        if not place.turn.done() and self._queue(self.unit_for(place)) > self.max_waiting:
            self._waiting.remove(place)
            why = f"{number_of(self.max_waiting, 'request')} wait for {self.model_id} already; try again later"
            raise Refusal(429, why, kind="rate_limit_error", retry_after_s=5)
        return place

    def refuse_waiting(self, why: str) -> None:
        """Fail all requests that wait."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.turn.done():
                place.turn.set_exception(_unservable(why))

    def leave(self, place: Waiting) -> None:
        """Stop waiting; a turn it got meanwhile goes to the next request."""
        if place in self._waiting:
            self._waiting.remove(place)
        elif place.turn.done() and not place.turn.cancelled() and place.turn.exception() is None:
            unit, running = place.turn.result()
            unit.give_back(running)

    def hand_over(self) -> None:
        """Give each waiting request whose engine has room its turn; called after every change."""
        if self.unservable is not None:
            self.refuse_waiting(self.unservable)
            return
        if self.holding:
            return
        is_closed = self.open_overflow is None
        for place in list(self._waiting):
            if place.over and is_closed:  # for good: it need not wait to see whether that comes back
                place.over = False
                self._remember(place.conversation, False)
            unit = self.unit_for(place)
            if (unit.has_room or (place.light and unit.accepts)) and not place.turn.done():
                self._waiting.remove(place)
                place.turn.set_result((unit, unit.take(place.prompt_tokens, light=place.light)))


def _unservable(why: str) -> Refusal:
    return Refusal(503, why, code="model_unavailable", retry_after_s=30)


def _share(conversation: str) -> float:
    """A number in [0, 1) that a conversation keeps."""
    return int.from_bytes(_key(conversation)) / 2**56


def _key(conversation: str) -> bytes:
    return hashlib.blake2b(conversation.encode("utf-8", "surrogatepass"), digest_size=7).digest()
