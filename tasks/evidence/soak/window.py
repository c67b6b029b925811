"""The soak of an engine that serves: windows of an agent's load through the yard's public port, over days.

Each window is evidence of its own, and the rows of all windows are the whole truth: nothing is kept in memory between
two of them. The yard sees more of an engine's failures than a client does (it holds a request until the engine is back,
or asks again), so a crash is counted by the yard's own count of restarts, and the request that broke is part of it.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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
from tasks.evidence.soak.soak import (
    BUCKETS,
    DAY_S,
    DYING_S,
    FALLBACK_CONTEXT,
    LEAK,
    LEAK_UNIT,
    MEMORY_EVERY_S,
    Agent,
    ask,
    count_answer,
    duration,
    empty_segment,
    judge_slope,
    judge_stability,
    warm_up_s,
)
from tasks.verdicts.statistics import (
    Slope,
    bucket_medians,
    clopper_pearson_lower,
    clopper_pearson_upper,
    newcombe_upper,
    normal_quantile,
    theil_sen,
)
from tasks.verdicts.verdict import CheckResult, Verdict, not_measured

LOOK_EVERY_S = 1.0
POLL_S = 0.1
KEPT = 1000  # times of answers kept of a window: a fast engine must not fill the disk
NO_PSS_S = 1e9  # it walks the page tables of the engine that serves the user
MEDIANS_FOR_SLOPE = 4
# looked at after every window: at 95 % one look in forty would be a false alarm, and an alarm moves traffic
LOOK_CONFIDENCE, END_CONFIDENCE = 0.999, 0.95
SERVED, TTFT_DRIFT, DECODE_DRIFT = "stability.served", "stability.ttft_drift", "stability.decode_drift"
FAILURES, SILENT_EMPTY = "stability.failures", "stability.silent_empty"
# by share, for the incumbent was asked for minutes; and over days, for the drift has bounds
JUDGED_OTHERWISE = (SILENT_EMPTY, "stability.throughput_retention")
YARD_LEAK = "memory.yard_leak_bytes_per_day"
ENDS_IT = (SERVED, FAILURES, TTFT_DRIFT, DECODE_DRIFT)  # failed, these end a soak at once
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


# --- judging ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SoakLimits:
    """The limits of a plan that a soak is held to, by the plan's names."""

    failures_per_day: float
    throughput_retention: float
    ttft_p50_ratio: float
    leak_bytes_per_day: float
    failure_rate_margin: float


def gist(window: Mapping[str, Any]) -> dict[str, Any]:
    """The window with the median in place of each list of times: what a thousand of them are judged by."""
    return {
        **window,
        "ttft_ms": _median(window["ttft_ms"]),
        "decode_tok_s": _median(window["decode_tok_s"]),
        "prompt_tokens": [],
    }


def _median(values: Sequence[float | None]) -> list[float]:
    known = [value for value in values if value is not None]
    return [statistics.median(known)] if known else []


def judge_windows(
    incumbent: Sequence[Mapping[str, Any]],
    windows: Sequence[Mapping[str, Any]],
    *,
    soak_s: float,
    limits: SoakLimits,
    is_over: bool,
) -> list[CheckResult]:
    """Every check on the windows of one model, in order of time; `incumbent` are segments of an evaluation's soak.

    Before the soak `is_over` they are preliminary, and a drift is held to 99.9 % for it is looked at again and again.
    """
    stability = judge_stability(
        incumbent,
        windows,
        soak_s=soak_s,
        failures_per_day=limits.failures_per_day,
        throughput_retention=limits.throughput_retention,
    )
    confidence = END_CONFIDENCE if is_over else LOOK_CONFIDENCE
    return [
        judge_served(windows),
        *(result for result in stability if result.check not in JUDGED_OTHERWISE),
        judge_silent_empty(incumbent, windows, margin=limits.failure_rate_margin),
        *judge_drift(windows, soak_s=soak_s, limits=limits, confidence=confidence),
        judge_leak_of_lives(windows, soak_s=soak_s, limit_bytes_per_day=limits.leak_bytes_per_day),
        judge_yard_leak(windows, limit_bytes_per_day=limits.leak_bytes_per_day),
    ]


def ending(results: Sequence[CheckResult]) -> list[CheckResult]:
    """The failed checks that end a soak before its time."""
    return [r for r in results if r.check in ENDS_IT and r.required and r.verdict is Verdict.FAIL]


def judge_served(windows: Sequence[Mapping[str, Any]]) -> CheckResult:
    """FAIL when the yard had to put another engine, or none, in the place of the one that is soaked."""
    if not windows:
        return not_measured(SERVED, "no window yet")
    out = [window["outage"] for window in windows if window["outage"]]
    if out:
        return CheckResult(check=SERVED, verdict=Verdict.FAIL, why=f"it could not be kept up: {out[-1]}")
    return CheckResult(check=SERVED, verdict=Verdict.PASS, why=f"it served in all {len(windows)} windows")


def judge_silent_empty(
    incumbent: Sequence[Mapping[str, Any]], windows: Sequence[Mapping[str, Any]], *, margin: float
) -> CheckResult:
    """The share of answers without a token over the incumbent's. Shares, for the two were not asked equally long.

    PASS without any, or when the 95 % upper bound of the difference is within `margin`; FAIL when the lower bound is
    beyond it.
    """
    (k, n), (k_theirs, n_theirs) = _empties(windows), _empties(incumbent)
    if not n:
        return not_measured(SILENT_EMPTY, "no request was answered", limit=margin, unit="share")
    upper = newcombe_upper(k, n, k_theirs, n_theirs) if n_theirs else clopper_pearson_upper(k, n)
    lower = clopper_pearson_lower(k, n) - (k_theirs / n_theirs if n_theirs else 0.0)
    verdict = Verdict.PASS if k == 0 or upper <= margin else Verdict.FAIL if lower > margin else Verdict.INCONCLUSIVE
    why = f"{k} of {n} answers were a 200 without a token (incumbent: {k_theirs} of {n_theirs}); under {upper:.2%} more"
    return CheckResult(check=SILENT_EMPTY, verdict=verdict, value=upper, limit=margin, unit="share", why=why)


def _empties(segments: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    return sum(one["silent_empty"] for one in segments), sum(one["requests"] for one in segments)


def judge_drift(
    windows: Sequence[Mapping[str, Any]], *, soak_s: float, limits: SoakLimits, confidence: float
) -> list[CheckResult]:
    """TTFT and decode speed at the end of the soak over its beginning: Theil-Sen on the logarithms of the medians.

    FAIL when the whole interval lies beyond the limit, PASS when it lies within. Not before a day has gone by: other
    traffic has its hours, and a morning looks like a drift. Required of soaks of a day and longer.
    """
    required = soak_s >= DAY_S
    return [
        _judge_drift(TTFT_DRIFT, "ttft_ms", windows, required, confidence, most=limits.ttft_p50_ratio),
        _judge_drift(DECODE_DRIFT, "decode_tok_s", windows, required, confidence, least=limits.throughput_retention),
    ]


def _judge_drift(
    check: str,
    name: str,
    windows: Sequence[Mapping[str, Any]],
    required: bool,
    confidence: float,
    *,
    most: float = math.inf,
    least: float = 0.0,
) -> CheckResult:
    limit = most if least == 0.0 else least
    known = [(_middle(one), math.log(one[name][0])) for one in windows if one[name] and one[name][0] > 0]
    span_s = known[-1][0] - known[0][0] if known else 0.0
    if span_s < DAY_S:
        why = f"{duration(span_s)} of windows so far; a day is needed to tell a drift from the hours of other traffic"
        return not_measured(check, why, limit=limit, unit="ratio", required=required)
    times, medians = bucket_medians([t for t, _ in known], [value for _, value in known], span_s / BUCKETS / 2)
    slope = theil_sen(times, medians, confidence)
    ratio, *bounds = (_ratio(rate, span_s) for rate in (slope.estimate, slope.low, slope.high))
    low, high = bounds
    verdict = Verdict.INCONCLUSIVE
    if high < least or low > most:
        verdict = Verdict.FAIL
    elif least <= low and high <= most:
        verdict = Verdict.PASS
    why = (
        f"{ratio:.1%} of its beginning after {duration(span_s)} ({confidence:.1%} between {low:.1%} and {high:.1%}), "
        f"by the medians of {len(known)} windows"
    )
    return CheckResult(check=check, verdict=verdict, value=ratio, limit=limit, unit="ratio", why=why, required=required)


def _ratio(rate: float, span_s: float) -> float:
    """exp(rate x span); an unbounded slope, or an absurd one, has no bound."""
    return math.exp(rate * span_s) if rate * span_s < 700 else math.inf


def judge_leak_of_lives(
    windows: Sequence[Mapping[str, Any]], *, soak_s: float, limit_bytes_per_day: float
) -> CheckResult:
    """The slope of the engine's memory by `judge_leak`'s rule, over slopes within the life of one process.

    By wall time, not by exposure: the limit is in bytes a day of uptime, the process serves between the windows too,
    and what it grew by then would otherwise be squeezed into the minutes of the windows. A restart sets memory back: a
    line across it would be neither the leak nor its cure, so no pair of points from two lives counts.
    """
    required = soak_s >= DAY_S
    lives: dict[str, list[tuple[float, float]]] = {}
    for life in (life for window in windows for life in window["lives"] if life["memory_bytes"] is not None):
        lives.setdefault(life["life"], []).append(((life["from"] + life["until"]) / 2, life["memory_bytes"]))
    if not lives:
        why = "no memory was sampled during the soak"
        return not_measured(LEAK, why, limit=limit_bytes_per_day, unit=LEAK_UNIT, required=required)
    return _judge_lives(list(lives.values()), soak_s=soak_s, limit_bytes_per_day=limit_bytes_per_day)


def _judge_lives(
    lives: Sequence[Sequence[tuple[float, float]]], *, soak_s: float, limit_bytes_per_day: float
) -> CheckResult:
    first, last = min(life[0][0] for life in lives), max(life[-1][0] for life in lives)
    span_s = last - first
    warm = [[point for point in life if point[0] - life[0][0] >= warm_up_s(min(soak_s, span_s))] for life in lives]
    width_s = max(span_s / BUCKETS / 2, 1.0)
    parts = [bucket_medians([t for t, _ in life], [v for _, v in life], width_s) for life in warm if life]
    usable = [part for part in parts if len(part[0]) > 1]
    n_points = sum(len(times) for times, _ in usable)
    if n_points < MEDIANS_FOR_SLOPE:
        why = (
            f"{n_points} medians of memory in {len(lives)} lives of the engine after the warm-up of each; at least "
            f"{MEDIANS_FOR_SLOPE} are needed for a slope"
        )
        required = soak_s >= DAY_S
        return not_measured(LEAK, why, limit=limit_bytes_per_day, unit=LEAK_UNIT, required=required)
    slope = slope_within(usable)
    # what a day cannot tell, the first hours of a long soak cannot either
    result = judge_slope(slope, soak_s=min(soak_s, span_s), limit_bytes_per_day=limit_bytes_per_day)
    why = f"{result.why}; within {len(usable)} of {len(lives)} lives of the engine"
    return result.model_copy(update={"why": why, "required": soak_s >= DAY_S})


def slope_within(parts: Sequence[tuple[Sequence[float], Sequence[float]]], confidence: float = 0.95) -> Slope:
    """The median of the slopes of all pairs within a part, and Sen's interval from the sum of Kendall's variances.

    The slope of Hirsch, Slack and Smith (1982), whose parts are seasons. The x of a part differ from one another.
    """
    slopes = sorted(
        (y2 - y1) / (x2 - x1)
        for xs, ys in parts
        for i, (x1, y1) in enumerate(zip(xs, ys, strict=True))
        for x2, y2 in zip(xs[:i], ys[:i], strict=True)
    )
    sizes = [len(xs) for xs, _ in parts]
    variance = sum(n * (n - 1) * (2 * n + 5) for n in sizes) / 18.0
    low_rank = math.floor((len(slopes) - normal_quantile((1 + confidence) / 2) * math.sqrt(variance)) / 2.0) - 1
    bounded = low_rank >= 0
    return Slope(
        estimate=statistics.median(slopes),
        low=slopes[low_rank] if bounded else -math.inf,
        high=slopes[len(slopes) - 1 - low_rank] if bounded else math.inf,
        n_points=sum(sizes),
    )


def judge_yard_leak(windows: Sequence[Mapping[str, Any]], *, limit_bytes_per_day: float) -> CheckResult:
    """The same of the yard's own memory; reported, for the candidate is not to blame."""
    lives: dict[str, list[tuple[float, float]]] = {}
    for window in windows:
        if window["yard_memory_bytes"] is not None:
            lives.setdefault(window["yard_life"], []).append((_middle(window), window["yard_memory_bytes"]))
    if not lives:
        why = "the yard's memory was not sampled"
        return not_measured(YARD_LEAK, why, limit=limit_bytes_per_day, unit=LEAK_UNIT, required=False)
    judged = _judge_lives(list(lives.values()), soak_s=DAY_S, limit_bytes_per_day=limit_bytes_per_day)
    why = judged.why.replace("of the engine", "of the yard")
    return judged.model_copy(update={"check": YARD_LEAK, "why": why, "required": False})


def _middle(window: Mapping[str, Any]) -> float:
    return float((window["started_at"] + window["ended_at"]) / 2)
