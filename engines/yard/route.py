"""The route of one model: which engine takes the next request, and which requests wait for it."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import deque
from dataclasses import dataclass, field

from engines.yard.engine.in_flight import InFlight
from engines.yard.engine.unit import Unit
from engines.yard.settings import Load
from engines.yard.state import ModelState


class Full(Exception):
    """As many requests wait as may wait."""


class Unservable(Exception):
    """No engine can serve the model now or soon; the text has the reason."""


@dataclass(eq=False)
class Waiting:
    """A request that waits for its turn; `turn` gets the engine and its place on it."""

    conversation: str
    prompt_tokens: int
    light: bool
    turn: asyncio.Future[tuple[Unit, InFlight]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Route:
    """One model's engines, and the requests in front of them.

    Requests are handed over first come, first served, and never more than an engine takes at a time: so a request that
    waits here is lost with no engine, and nothing of ours queues inside one.
    """

    def __init__(self, model_id: str, state: ModelState, units: dict[str, Unit], *, max_waiting: int) -> None:
        self.model_id = model_id
        self.state = state
        self.units = units
        self.fallback: str | None = None
        self.unservable: str | None = None
        self.holding = False
        self.moving: str | None = None  # the move under way, in words
        self.incumbent = self.candidate = state.serving
        self.max_waiting = max_waiting
        self.load: Load = "start"
        self.pin = False
        self.unloaded = False  # not in memory; the next request loads it
        self.used_at = time.monotonic()  # the last request
        self._waiting: deque[Waiting] = deque()

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return len(self._waiting)

    @property
    def serving(self) -> Unit:
        """The engine that new requests go to: the committed one, or the fallback while that is out of order."""
        return self.units[self.fallback or self.state.serving]

    def unit_for(self, conversation: str) -> Unit:
        """The engine of a conversation: a canary keeps those it has, so that their prompts stay cached."""
        canary = self.state.canary
        if canary and self.fallback is None and _share(conversation) < canary.weight:
            chosen = self.units.get(canary.engine)
            if chosen is not None and chosen.state.serves:
                return chosen
        return self.serving

    def enter(self, conversation: str, prompt_tokens: int, *, light: bool = False) -> Waiting:
        """Queue a request; a light one needs an engine, but no slot.

        Raises Full, or Unservable when nothing would ever serve it.
        """
        if self.unservable is not None:
            raise Unservable(self.unservable)
        place = Waiting(conversation, prompt_tokens, light)
        self._waiting.append(place)
        self.hand_over()
        if not place.turn.done() and len(self._waiting) > self.max_waiting:
            self._waiting.remove(place)
            raise Full(f"{self.max_waiting} requests wait for {self.model_id} already")
        return place

    def refuse_waiting(self, why: str) -> None:
        """Fail all requests that wait."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.turn.done():
                place.turn.set_exception(Unservable(why))

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
        for place in list(self._waiting):
            unit = self.unit_for(place.conversation)
            if (unit.has_room or (place.light and unit.accepts)) and not place.turn.done():
                self._waiting.remove(place)
                place.turn.set_result((unit, unit.take(place.prompt_tokens)))


def _share(conversation: str) -> float:
    """A number in [0, 1) that a conversation keeps."""
    digest = hashlib.blake2b(conversation.encode("utf-8", "surrogatepass"), digest_size=7).digest()
    return int.from_bytes(digest) / 2**56
