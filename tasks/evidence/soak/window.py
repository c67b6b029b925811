"""Measure a soak of an engine that serves: windows of an agent's load through the yard's public port, over days.

Each window is evidence of its own, and the rows of all windows hold everything: nothing is kept in memory between two
of them. The yard sees more of an engine's failures than a client does (it holds a request until the engine is back, or
retries it), so a crash is counted by the yard's count of restarts, and the request that broke is part of it.
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
from engines.process.telemetry import MemorySampler, private_bytes
from engines.settings import Endpoint
from engines.yard.client import YardClient, public_address
from tasks.evidence.soak.prompts import FALLBACK_CONTEXT, Agent
from tasks.evidence.soak.segment import (
    DYING_S,
    MEMORY_EVERY_S,
    ask,
    count_answer,
    count_turn,
    empty_segment,
    failure_of,
)

LOOK_EVERY_S = 1.0
POLL_S = 0.1
KEPT = 1000  # times of answers kept of a window: a fast engine must not fill the disk
FULL, WRONG_KEY = 429, (401, 403)
BUSY_S = 1.0
DEATHS = {"dead": "crash", "wedged": "hang", "failing": "hang"}
OnMemory = Callable[[str, float, int | None], None]  # series, epoch seconds, bytes


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a model is served, and by which engine it is meant to be."""

    client: YardClient
    key: SecretStr | None
    model_id: str
    engine: str


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What the yard reports, at one moment, of a model and of the engine that should serve it."""

    address: str
    yard_pid: int
    yard_process: str
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
    """The yard's report, now. Raises SwitchyardError when it does not answer or does not serve the model."""
    status = place.client.status()
    route = next((route for route in status["models"] if route["id"] == place.model_id), None)
    if route is None:
        raise SwitchyardError(f"the yard does not serve {place.model_id} any more")
    missing: dict[str, Any] = {"state": "missing", "pid": None, "since": None, "restarts": 0, "context_tokens": None}
    engine = next((engine for engine in route["engines"] if engine["engine"] == place.engine), missing)
    states = (event for event in status["events"] if event["kind"] == "state")
    ours = (one for one in states if (one["model"], one.get("engine")) == (place.model_id, place.engine))
    return Sight(
        address=public_address(status["address"]),
        yard_pid=status["pid"],
        yard_process=f"{status['pid']}@{status['since']:.0f}",
        committed=route["committed"],
        outage=f"fallback to {route['fallback']}" if route["fallback"] else route["unservable"],
        held=bool(route["holding"] or route["moving"]),
        deaths=tuple(event for event in ours if str(event["what"]).partition(":")[0] in DEATHS),
        **{name: engine[name] for name in missing},
    )


def measure_window(
    place: Place,
    *,
    length_s: float,
    offset_s: float = 0.0,
    before: Mapping[str, Any] | None = None,
    seed: int = 0,
    on_memory: OnMemory = lambda _series, _t, _value: None,
) -> dict[str, Any]:
    """The evidence of `length_s` seconds of an agent's load: a segment, as of `soak.soak`, and what the engine did.

    `offset_s` is the exposure before it, `before` the evidence of the window before (deaths since then count in this
    one). It ends early when the model falls back, is moved by hand, or the yard goes away. Raises SwitchyardError when
    no yard answers at its start, and BadInput when it refuses the key.
    """
    window = _Window(place, look(place), before, offset_s)
    agent = Agent(seed)
    with _YardMemory(window.sight.yard_pid, on_memory) as memory:
        while not window.ended and (left_s := length_s - window.elapsed_s) > 0:
            memory.follow(window.sight)
            kind, body, leave_after, pause_s = agent.next()
            del body["seed"]  # the yard would count it as a field that the user's programs send
            time.sleep(min(pause_s, left_s))
            asked_at = time.time()
            record = ask(window.endpoint, body, leave_after)
            agent.answered(record, window.endpoint.context_tokens or FALLBACK_CONTEXT)
            window.take(record, kind, asked_at)
        if not window.ended:
            memory.follow(window.sight)
        window.settle()
    return {**window.evidence(), **memory.evidence()}


class _Window:
    """A window so far. Each event is counted once, however many requests it broke."""

    def __init__(self, place: Place, sight: Sight, before: Mapping[str, Any] | None, offset_s: float) -> None:
        self._place = place
        self._offset_s = offset_s
        self._began, self._began_at = time.monotonic(), time.time()
        self._looked = time.monotonic()
        self._pending: list[dict[str, Any]] = []  # failed requests that may turn out to be part of a death
        self._segment = {**empty_segment(), "broken_by_outage": 0, "refused": 0}
        self._unsettled = False
        self._reported = 0.0  # until when the deaths that the yard reports are counted
        self.sight = sight
        self.ended = ""
        self._count_since(before)
        self._end_if_replaced(sight)

    @property
    def elapsed_s(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self._began

    @property
    def endpoint(self) -> Endpoint:
        """The public port, as the user's programs reach it."""
        sight, place = self.sight, self._place
        return Endpoint(
            base_url=sight.address,
            model_id=place.model_id,
            engine=place.engine,
            context_tokens=sight.context_tokens,
            api_key=place.key,
        )

    def take(self, record: StreamRecord, kind: str, asked_at: float) -> None:
        """Count one request that was sent at `asked_at`, epoch seconds."""
        if self._refused(record):
            return
        segment = self._segment
        count_turn(segment, kind)
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
        self._pending.append(failure_of(record, kind, self._at_s(asked_at)))

    def _refused(self, record: StreamRecord) -> bool:
        """Turned away by the yard before any engine saw it: the model was busy, or the key is wrong."""
        if record.status in WRONG_KEY:
            raise BadInput(f"the yard refused the soak's key: {record.error}; see api_key_env in the plan")
        if record.status == FULL:
            self._segment["refused"] += 1
            time.sleep(BUSY_S)
        return record.status == FULL

    def settle(self) -> None:
        """Wait up to DYING_S for a death in progress: a lost connection is seen before it."""
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
        for name, digits in (("ttft_ms", 2), ("decode_tok_s", 2), ("prompt_tokens", None)):
            values, n = segment[name], len(segment[name])
            thinned = values if n <= KEPT else [values[i * n // KEPT] for i in range(KEPT)]
            segment[name] = [None if value is None else round(value, digits) for value in thinned]
        return {
            **segment,
            "exposure_s": exposure_s,
            "started_at": self._began_at,
            "ended_at": time.time(),
            "ended": self.ended,
            "outage": self.sight.outage if self.sight.committed == self._place.engine else None,
            "yard_life": self.sight.yard_process,
            "restarts_seen": self.sight.restarts,
            "unsettled": self._unsettled,
        }

    def _count_since(self, before: Mapping[str, Any] | None) -> None:
        """Count the deaths between two windows too: the user's own requests met them."""
        if before is None:
            self._reported = self._began_at
            return
        self._reported = float(before["ended_at"])
        same = before["yard_life"] == self.sight.yard_process and before["restarts_seen"] <= self.sight.restarts
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
        if sight.yard_process != self.sight.yard_process:
            self._end("the yard was restarted")
        else:
            self._died(sight.restarts - self.sight.restarts, sight)
            self._end_if_replaced(sight)
        self.sight = sight

    def _end_if_replaced(self, sight: Sight) -> None:
        if sight.committed != self._place.engine:
            self._end(f"{sight.committed} has replaced {self._place.engine}")
        elif sight.outage is not None:
            self._died(1, sight, otherwise=sight.outage)
            self._end(sight.outage)

    def _end(self, why: str) -> None:
        # a request that failed because the yard went, or the route was moved, is no failure of the engine
        self._segment["broken_by_outage"] += len(self._pending)
        self._pending.clear()
        self.ended = why

    def _died(self, deaths: int, sight: Sight, otherwise: str = "the yard restarted it") -> None:
        """Count `deaths` more, each with the yard's reason where it still has one."""
        if deaths <= 0:
            return
        reported = [event for event in sight.deaths if event["at"] > self._reported][-deaths:]
        for event in (*([None] * (deaths - len(reported))), *reported):
            state, _, why = str(event["what"]).partition(": ") if event else ("dead", "", otherwise)
            at = event["at"] if event else time.time()
            self._segment["failures"].append({"at_s": self._at_s(at), "type": DEATHS[state], "error": why})
            self._reported = max(self._reported, at)
        self._segment["restarts"] += deaths
        self._segment["broken_by_outage"] += len(self._pending)
        self._pending.clear()

    def _flush(self) -> None:
        """Count what is pending as failures of their own: the engine is up."""
        self._segment["failures"] += self._pending
        self._pending = []

    def _at_s(self, at: float) -> float:
        return round(self._offset_s + at - self._began_at, 2)


@dataclass
class _Process:
    """One process whose memory is sampled."""

    name: str
    began: float
    ended: float
    bytes: list[int] = field(default_factory=list)


class _YardMemory:
    """Memory of whichever process serves, and of the yard itself, every second."""

    def __init__(self, yard_pid: int, on_memory: OnMemory) -> None:
        self._yard_pid = yard_pid
        self._on_memory = on_memory
        self._processes: list[_Process] = []
        self._yard: list[int] = []
        self._pid: int | None = None
        self._sampler: MemorySampler | None = None

    def __enter__(self) -> _YardMemory:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(*((Exception,) if kind else ())):
            self._stop()

    def follow(self, sight: Sight) -> None:
        """Sample the process that serves from now on."""
        if sight.pid == self._pid:
            return
        self._stop()
        self._pid = sight.pid
        if sight.pid is not None:
            now = time.time()
            process = _Process(f"{sight.pid}@{_created(sight.pid)}", now, now)
            self._processes.append(process)
            self._sampler = MemorySampler(
                sight.pid, MEMORY_EVERY_S, on_sample=lambda memory_bytes: self._take(process, memory_bytes)
            )
            self._sampler.start()

    def evidence(self) -> dict[str, Any]:
        """The processes in turn, each with the median of its memory, and the median of the yard's own."""
        lives = [
            {
                "life": process.name,
                "from": process.began,
                "until": process.ended,
                "samples": len(process.bytes),
                "memory_bytes": statistics.median(process.bytes) if process.bytes else None,
            }
            for process in self._processes
        ]
        return {"lives": lives, "yard_memory_bytes": statistics.median(self._yard) if self._yard else None}

    def _take(self, process: _Process, memory_bytes: int | None) -> None:
        now = time.time()
        self._on_memory("memory_bytes", now, memory_bytes)
        if memory_bytes is not None:
            process.bytes.append(memory_bytes)
            process.ended = now
        # the sampler counts whole trees, and the engines are the yard's children
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
