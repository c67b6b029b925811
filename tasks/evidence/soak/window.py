"""The soak of an engine that serves: windows of an agent's load through the yard's public port, over days.

Each window is evidence of its own, and the rows of all windows are the whole truth: nothing is kept in memory between
two of them. The yard sees more of an engine's failures than a client does (it holds a request until the engine is back,
or asks again), so a crash is counted by the yard's own count of restarts, and the request that broke is part of it.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil
from pydantic import SecretStr

from engines.client.record import StreamRecord
from engines.errors import BadInput, SwitchyardError
from engines.process.telemetry import Sampler, private_bytes
from engines.settings import Endpoint
from engines.yard.client import YardClient, public_address
from tasks.evidence.rehearsal import engine_of
from tasks.evidence.soak.prompts import FALLBACK_CONTEXT, Agent
from tasks.evidence.soak.segment import DYING_S, MEMORY_EVERY_S, ask, count_answer, empty_segment

LOOK_EVERY_S = 1.0
POLL_S = 0.1
KEPT = 1000  # times of answers kept of a window: a fast engine must not fill the disk
NO_PSS_S = 1e9  # it walks the page tables of the engine that serves the user
FULL, WRONG_KEY = 429, (401, 403)
BUSY_S = 1.0
DEATHS = {"dead": "crash", "wedged": "hang", "failing": "hang"}
OnMemory = Callable[[str, float, int | None], None]  # series, epoch seconds, bytes


# --- what the yard tells ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a model is served, and by which engine it is meant to be."""

    client: YardClient
    key: SecretStr | None
    model_id: str
    engine: str


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What the yard tells, at one moment, of a model and of the engine that should serve it."""

    address: str
    yard_pid: int
    yard_life: str
    committed: str
    outage: str | None  # why another engine serves, or none
    held: bool  # its requests wait: it is being moved or drained
    state: str
    pid: int | None
    since: float | None  # of its last change of health
    restarts: int
    context_tokens: int | None
    deaths: tuple[Mapping[str, Any], ...] = ()

    @property
    def serves(self) -> bool:
        """True when a request can be handed to the engine now."""
        return self.state in ("ready", "busy") and not self.held

    @property
    def dying(self) -> bool:
        """True until the yard has decided what follows on a death."""
        return self.state in DEATHS and self.outage is None


def look(place: Place) -> Sight:
    """The yard's own words. Raises SwitchyardError when it does not answer, or has no such model or engine."""
    status = place.client.status()
    route = next((route for route in status["models"] if route["id"] == place.model_id), None)
    if route is None:
        raise SwitchyardError(f"the yard does not serve {place.model_id} any more")
    outage = f"fallback to {route['fallback']}" if route["fallback"] else route["unservable"]
    engine = engine_of(route, place.engine) if _has(route, place.engine) else None
    told = engine or {"state": "missing", "pid": None, "since": None, "restarts": 0, "context_tokens": None}
    return Sight(
        address=public_address(status["address"]),
        yard_pid=status["pid"],
        yard_life=f"{status['pid']}@{status['since']:.0f}",
        committed=route["committed"],
        outage=outage,
        held=bool(route["holding"] or route["moving"]),
        deaths=tuple(event for event in status["events"] if _is_death(event, place)),
        **{name: told[name] for name in ("state", "pid", "since", "restarts", "context_tokens")},
    )


def _has(route: Mapping[str, Any], name: str) -> bool:
    return any(engine["engine"] == name for engine in route["engines"])


def _is_death(event: Mapping[str, Any], place: Place) -> bool:
    ours = event["kind"] == "state" and (event["model"], event.get("engine")) == (place.model_id, place.engine)
    return ours and str(event["what"]).partition(":")[0] in DEATHS


# --- one window ------------------------------------------------------------------------------------------------------


def measure_window(
    place: Place,
    *,
    length_s: float,
    offset_s: float = 0.0,
    before: Mapping[str, Any] | None = None,
    seed: int = 0,
    on_memory: OnMemory = lambda _series, _t, _value: None,
) -> dict[str, Any]:
    """The evidence of `length_s` seconds of an agent's load, as `soak.soak` has segments, and how the engine lived.

    `offset_s` is the exposure before it, `before` the evidence of the window before (deaths since then count in this
    one). It ends early when the model falls back, is moved by hand, or the yard goes away. Raises SwitchyardError when
    no yard answers at its start, and BadInput when it refuses the key.
    """
    window = _Window(place, look(place), before, offset_s)
    agent = Agent(seed)
    with _Scales(window.sight.yard_pid, on_memory) as scales:
        while not window.ended and (left_s := length_s - window.elapsed_s) > 0:
            scales.follow(window.sight)
            kind, body, leave_after, pause_s = agent.next()
            time.sleep(min(pause_s, left_s))
            asked_at = time.time()
            record = ask(window.endpoint, body, leave_after)
            agent.answered(record, window.endpoint.context_tokens or FALLBACK_CONTEXT)
            window.take(record, kind, asked_at)
        if not window.ended:
            scales.follow(window.sight)
        window.settle()
    return {**window.evidence(), "lives": scales.lives(), "yard_memory_bytes": scales.yard_bytes()}


class _Window:
    """What a window has come to so far. Each event is counted once, however many requests it broke."""

    def __init__(self, place: Place, sight: Sight, before: Mapping[str, Any] | None, offset_s: float) -> None:
        self._place = place
        self._offset_s = offset_s
        self._began, self._began_at = time.monotonic(), time.time()
        self._looked = time.monotonic()
        self._pending: list[dict[str, Any]] = []  # failed requests that may turn out to be part of a death
        self._segment = {**empty_segment(), "broken_by_outage": 0, "refused": 0}
        self._unsettled = False
        self._told = 0.0  # until when the yard's words on deaths are used up
        self.sight = sight
        self.ended = ""
        self._since_the_last(before)
        self._heed(sight)

    @property
    def elapsed_s(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self._began

    @property
    def endpoint(self) -> Endpoint:
        """The public port, as the programs of the user have it."""
        sight, place = self.sight, self._place
        return Endpoint(
            base_url=sight.address,
            model_id=place.model_id,
            engine=place.engine,
            context_tokens=sight.context_tokens,
            api_key=place.key,
        )

    def take(self, record: StreamRecord, kind: str, asked_at: float) -> None:
        """One request that was sent at `asked_at`, epoch seconds."""
        if self._refused(record):
            return
        segment = self._segment
        segment["requests"] += 1
        segment["kinds"][kind] = segment["kinds"].get(kind, 0) + 1
        if not record.ok or self._pending or time.monotonic() - self._looked > LOOK_EVERY_S:
            self._look()
        if record.ok:
            self._flush()
            count_answer(segment, record, kind, self._at_s(time.time()))
            return
        went_down = self.sight.since is not None and self.sight.since >= asked_at
        if self.ended or went_down or not self.sight.serves:
            # the engine went away, or was not there yet: its death is what is counted
            segment["broken_by_outage"] += 1
            return
        failure = {"at_s": self._at_s(asked_at), "type": record.error_type, "error": record.error, "turn": kind}
        self._pending.append(failure)

    def _refused(self, record: StreamRecord) -> bool:
        """Turned away by the yard, before any engine saw it: others had the model, or we are not let in."""
        if record.status in WRONG_KEY:
            raise BadInput(f"the yard refused the soak's key: {record.error}; see api_key_env in the plan")
        if record.status == FULL:
            self._segment["refused"] += 1
            time.sleep(BUSY_S)
        return record.status == FULL

    def settle(self) -> None:
        """Wait, for a moment, for the end of what is under way: a lost connection is seen before the death."""
        deadline = time.monotonic() + (DYING_S if self._pending or self.sight.dying else 0.0)
        while (self._pending or self.sight.dying) and not self.ended and time.monotonic() < deadline:
            time.sleep(POLL_S)
            self._look()
        if not self.ended:
            self._look()
        self._unsettled = bool(self._pending) or self.sight.dying
        self._flush()

    def evidence(self) -> dict[str, Any]:
        """Plain JSON."""
        segment = self._segment
        exposure_s = self.elapsed_s if segment["requests"] else 0.0
        for name, digits in (("ttft_ms", 2), ("decode_tok_s", 2), ("prompt_tokens", 0)):
            segment[name] = [_rounded(value, digits) for value in _thinned(segment[name])]
        return {
            **segment,
            "exposure_s": exposure_s,
            "started_at": self._began_at,
            "ended_at": time.time(),
            "ended": self.ended,
            "outage": self.sight.outage if self._is_ours(self.sight) else None,
            "yard_life": self.sight.yard_life,
            "restarts_seen": self.sight.restarts,
            "unsettled": self._unsettled,
        }

    def _since_the_last(self, before: Mapping[str, Any] | None) -> None:
        """Deaths between two windows count as well: the user's own requests met them."""
        if before is None:
            self._told = self._began_at
            return
        self._told = float(before["ended_at"])
        same = before["yard_life"] == self.sight.yard_life and before["restarts_seen"] <= self.sight.restarts
        deaths = self.sight.restarts - (before["restarts_seen"] if same else 0)
        # a failure that the window before had no death for, and counted by itself
        self._died(deaths - (1 if before["unsettled"] and deaths else 0), self.sight)

    def _look(self) -> None:
        self._looked = time.monotonic()
        try:
            sight = look(self._place)
        except SwitchyardError as error:
            self._end(str(error))
            return
        if sight.yard_life != self.sight.yard_life:
            self._end("the yard was started anew")
        else:
            self._died(sight.restarts - self.sight.restarts, sight)
            self._heed(sight)
        self.sight = sight

    def _heed(self, sight: Sight) -> None:
        """An engine that is out of restarts, or of this machine, is replaced by another one: that ends the window."""
        if not self._is_ours(sight):
            self._end(f"{sight.committed} was put in the place of {self._place.engine}")
        elif sight.outage is not None:
            self._died(1, sight, otherwise=sight.outage)
            self._end(sight.outage)

    def _is_ours(self, sight: Sight) -> bool:
        return sight.committed == self._place.engine

    def _end(self, why: str) -> None:
        # a request that failed because the yard went, or the route was moved, is no failure of the engine
        self._segment["broken_by_outage"] += len(self._pending)
        self._pending.clear()
        self.ended = why

    def _died(self, deaths: int, sight: Sight, otherwise: str = "the yard restarted it") -> None:
        """So many more deaths, each with the yard's own words about it where it still has them."""
        if deaths <= 0:
            return
        told = [event for event in sight.deaths if event["at"] > self._told][-deaths:]
        for event in (*([None] * (deaths - len(told))), *told):
            state, _, why = str(event["what"]).partition(": ") if event else ("dead", "", otherwise)
            at = event["at"] if event else time.time()
            self._segment["failures"].append({"at_s": self._at_s(at), "type": DEATHS[state], "error": why})
            self._told = max(self._told, at)
        self._segment["restarts"] += deaths
        self._segment["broken_by_outage"] += len(self._pending)
        self._pending.clear()

    def _flush(self) -> None:
        """The engine lives: what failed has failed by itself."""
        self._segment["failures"] += self._pending
        self._pending = []

    def _at_s(self, at: float) -> float:
        return round(self._offset_s + at - self._began_at, 2)


@dataclass
class _Life:
    """One process under the scales."""

    life: str
    began: float
    ended: float
    seen: list[int] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        middle = statistics.median(self.seen) if self.seen else None
        times = {"from": self.began, "until": self.ended}
        return {"life": self.life, **times, "samples": len(self.seen), "memory_bytes": middle}


class _Scales:
    """Memory of whichever process serves, and of the yard itself, every second."""

    def __init__(self, yard_pid: int, on_memory: OnMemory) -> None:
        self._yard_pid = yard_pid
        self._on_memory = on_memory
        self._lives: list[_Life] = []
        self._yard: list[int] = []
        self._pid: int | None = None
        self._sampler: Sampler | None = None

    def __enter__(self) -> _Scales:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(*((Exception,) if kind else ())):
            self._stop()

    def follow(self, sight: Sight) -> None:
        """Weigh the process that serves from now on."""
        if sight.pid == self._pid:
            return
        self._stop()
        self._pid = sight.pid
        if sight.pid is not None:
            now = time.time()
            life = _Life(f"{sight.pid}@{_created(sight.pid)}", now, now)
            self._lives.append(life)
            self._sampler = Sampler(
                sight.pid,
                MEMORY_EVERY_S,
                on_sample=lambda sample: self._weigh(life, sample["memory_bytes"]),
                pss_every_s=NO_PSS_S,
            )
            self._sampler.start()

    def lives(self) -> list[dict[str, Any]]:
        """The processes in turn, each with the median of its memory."""
        return [life.told() for life in self._lives]

    def yard_bytes(self) -> float | None:
        """The median of the yard's own memory, without its engines."""
        return statistics.median(self._yard) if self._yard else None

    def _weigh(self, life: _Life, memory_bytes: int | None) -> None:
        now = time.time()
        self._on_memory("memory_bytes", now, memory_bytes)
        if memory_bytes is not None:
            life.seen.append(memory_bytes)
            life.ended = now
        # a Sampler weighs whole trees, and the engines are the yard's children
        own = private_bytes([self._yard_pid])
        self._on_memory("yard_memory_bytes", now, own)
        if own is not None:
            self._yard.append(own)

    def _stop(self) -> None:
        sampler, self._sampler, self._pid = self._sampler, None, None
        if sampler is not None:
            sampler.stop()


def _created(pid: int) -> int:
    # the kernel hands pids out again
    try:
        return int(psutil.Process(pid).create_time())
    except psutil.Error:
        return 0


def _thinned(values: list[Any]) -> list[Any]:
    """At most KEPT of them, evenly spaced."""
    return values if len(values) <= KEPT else [values[i * len(values) // KEPT] for i in range(KEPT)]


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits or None)
