"""The route of one model: which engine takes the next request, and which requests wait for it."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import deque
from dataclasses import dataclass, field

from engines.openai.call import Refusal
from engines.yard.config import ModelConfig
from engines.yard.engine.in_flight import InFlight
from engines.yard.engine.unit import Unit
from engines.yard.state import ModelState


@dataclass(eq=False)
class Waiting:
    """A request that waits for its turn; `turn` gets the engine and its place on it."""

    conversation: str
    path: str
    prompt_tokens: int
    light: bool
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

    def apply(self, model: ModelConfig) -> None:
        """Take over what the plan says of the model."""
        self.incumbent, self.candidate = model.incumbent, model.candidate
        self.load, self.pin = model.load, model.pin

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def serving(self) -> Unit:
        """The engine that new requests go to: the committed one, or the fallback while that is out of order."""
        return self.units[self.fallback or self.state.serving]

    def unit_for(self, conversation: str, path: str) -> Unit:
        """The engine of a conversation: a canary keeps those it has, so that their prompts stay cached.

        None ('') and a path that the canary does not have go to the serving engine.
        """
        canary = self.state.canary
        if canary and conversation and self.fallback is None and _share(conversation) < canary.weight:
            chosen = self.units.get(canary.engine)
            if chosen is not None and chosen.state.serves and chosen.paths.kind(path) != "unlisted":
                return chosen
        return self.serving

    def enter(self, conversation: str, path: str, prompt_tokens: int, *, light: bool = False) -> Waiting:
        """Queue a request; a light one needs no slot. Raises Refusal 429 (too many wait), 503 (no engine can serve)."""
        if self.unservable is not None:
            raise _unservable(self.unservable)
        place = Waiting(conversation, path, prompt_tokens, light)
        self._waiting.append(place)
        self.hand_over()
        if not place.turn.done() and len(self._waiting) > self.max_waiting:
            self._waiting.remove(place)
            why = f"{self.max_waiting} requests wait for {self.model_id} already; try again later"
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
        for place in list(self._waiting):
            unit = self.unit_for(place.conversation, place.path)
            if (unit.has_room or (place.light and unit.accepts)) and not place.turn.done():
                self._waiting.remove(place)
                place.turn.set_result((unit, unit.take(place.prompt_tokens, light=place.light)))


def _unservable(why: str) -> Refusal:
    return Refusal(503, why, code="model_unavailable", retry_after_s=30)


def _share(conversation: str) -> float:
    """A number in [0, 1) that a conversation keeps."""
    digest = hashlib.blake2b(conversation.encode("utf-8", "surrogatepass"), digest_size=7).digest()
    return int.from_bytes(digest) / 2**56
