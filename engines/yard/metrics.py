"""`/metrics`: what the yard counts, for Prometheus. Gauges are read from the yard when it is asked."""

from __future__ import annotations

import functools
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from weakref import WeakKeyDictionary

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from engines.yard.engine.health import Health
from engines.yard.engine.in_flight import InFlight
from engines.yard.engine.unit import Unit
from engines.yard.route import Route

TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180, 600)
GAP_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)


@dataclass(frozen=True)
class LiveSample:
    """One live request that an engine answered. Times in ms, as the yard saw them; None where there is none."""

    at: float
    engine: str
    conversation: str
    prompt_tokens: int
    ok: bool
    error: str | None
    empty: bool
    ttft_ms: float | None
    tpot_ms: float | None
    cached_share: float | None = None  # of the prompt, where the engine reports it


class Gaps(Collector):
    """The histogram of gaps between chunks: each chunk counts, which takes the library's own 1.6 us, this 0.1."""

    def __init__(self) -> None:
        self._counted: dict[tuple[str, str], tuple[list[int], list[float]]] = {}

    def of(self, model: str, engine: str) -> Callable[[float], None]:
        counts, total_s = self._counted.setdefault((model, engine), ([0] * (len(GAP_S) + 1), [0.0]))

        def count(gap_s: float) -> None:
            counts[bisect_left(GAP_S, gap_s)] += 1
            total_s[0] += gap_s

        return count

    def collect(self) -> Iterator[HistogramMetricFamily]:
        about = "switchyard_itl_seconds", "Gap between content chunks."
        family = HistogramMetricFamily(*about, labels=["model", "engine"])
        for labels, (counts, total_s) in self._counted.items():
            up_to = zip((*map(floatToGoString, GAP_S), "+Inf"), accumulate(counts), strict=True)
            family.add_metric(labels, [*up_to], sum_value=total_s[0])
        yield family


class Metrics:
    """One registry for one yard. `refused` counts by status, `shadowed` by model, engine and outcome."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        counter = partial(Counter, namespace="switchyard", registry=self._registry)
        gauge = partial(Gauge, namespace="switchyard", registry=self._registry)
        histogram = partial(Histogram, namespace="switchyard", registry=self._registry)
        by_engine = ["model", "engine"]
        by_outcome = [*by_engine, "outcome"]
        self._requests = counter("requests", "Requests that an engine answered, by outcome.", by_outcome)
        self._chunks = counter("tokens", "Content chunks passed on; an engine's chunk is a token, mostly.", by_engine)
        self.lost = counter("requests_lost", "Requests an engine took with it before its first byte.", by_engine)
        self.shadowed = counter("shadow", "Copies of requests, by their outcome.", by_outcome)
        self.refused = counter("refused", "Requests the yard refused, by status.", ["status"])
        self.not_passed = counter("not_passed", "Requests to paths that are not passed on, by kind.", ["kind"])
        self.clients_cut = counter("clients_cut", "Clients that took nothing of their answer, or held up others.")
        self._restarts = counter("engine_restarts", "Restarts of an engine since the yard began.", by_engine)
        self._overflowed = counter("overflow_conversations", "Conversations the overflow engine took.", ["model"])
        self._seen: WeakKeyDictionary[Unit | Route, int] = WeakKeyDictionary()  # what a counter has of it already
        self.left = counter("disconnects", "Clients that left before the end of their answer.", ["model"])
        self._state = gauge("engine_state", "1 for the state the engine is in.", [*by_engine, "state"])
        self._memory = gauge("engine_memory_bytes", "Private memory of the engine, swap included.", by_engine)
        self._vram = gauge("engine_vram_bytes", "GPU memory of the engine's processes.", by_engine)
        self._gpu = gauge("engine_on_gpu", "1 for weights on a GPU, 0 on the CPU; absent where unknown.", by_engine)
        self._in_flight = gauge("engine_in_flight", "Requests on the engine now.", by_engine)
        self._weight = gauge("route_weight", "Share of conversations the engine gets.", by_engine)
        self._overflow = gauge("overflow", "1 while a second engine takes conversations of the model.", by_engine)
        self._waiting = gauge("waiting", "Requests that wait for their turn.", ["model"])
        self._fallback = gauge("fallback", "1 while the committed engine is out of order.", ["model"])
        self.incidents = counter("incidents", "Incidents since the yard began.")
        self._ttft = histogram("ttft_seconds", "Arrival to first content chunk.", by_engine, buckets=TTFT_S)
        self._engine_ttft = histogram("engine_ttft_seconds", "The engine's part of it.", by_engine, buckets=TTFT_S)
        self._queue = histogram("queue_seconds", "Arrival to the turn on an engine.", ["model"], buckets=TTFT_S)
        self._whole = histogram("request_seconds", "Arrival to the end of the answer.", by_engine, buckets=TTFT_S)
        self._child = functools.cache(lambda family, *labels: family.labels(*labels))  # the library's own takes 2 us
        self._gaps = Gaps()
        self._registry.register(self._gaps)

    def gap(self, model: str, engine: str) -> Callable[[float], None]:
        return self._gaps.of(model, engine)

    def served(self, model: str, sample: LiveSample, running: InFlight, arrived: float, *, client_error: bool) -> None:
        """Count an answered request that arrived at `arrived` (monotonic)."""
        failed = "client_error" if client_error else "error"
        outcome = failed if not sample.ok else "empty" if sample.empty else "ok"
        child = self._child
        child(self._requests, model, sample.engine, outcome).inc()
        child(self._chunks, model, sample.engine).inc(running.chunks)
        child(self._queue, model).observe(running.sent - arrived)
        child(self._whole, model, sample.engine).observe(time.monotonic() - arrived)
        if sample.ttft_ms is not None and running.first is not None:
            child(self._ttft, model, sample.engine).observe(running.first - arrived)
            child(self._engine_ttft, model, sample.engine).observe(sample.ttft_ms / 1000)

    def text(self, routes: Iterable[Route]) -> bytes:
        by_unit = (self._state, self._memory, self._vram, self._gpu, self._in_flight, self._weight)
        for gauge in (*by_unit, self._waiting, self._fallback, self._overflow):
            gauge.clear()  # what is gone, or not measured, is absent: neither 0 nor its last value
        for route in routes:
            self._waiting.labels(route.model_id).set(route.waiting)
            self._fallback.labels(route.model_id).set(route.fallback is not None)
            if route.overflow is not None:
                takes = route.open_overflow is not None
                self._overflow.labels(route.model_id, route.overflow.engine).set(takes)
                self._overflowed.labels(route.model_id).inc(self._news(route, route.overflowed))
            canary = route.state.canary
            for unit in route.units.values():
                labels = (route.model_id, unit.engine)
                of_canary = canary.weight if canary and canary.engine == unit.engine else 0.0
                rest = 1.0 - (canary.weight if canary else 0.0)
                self._weight.labels(*labels).set(rest if unit is route.serving else of_canary)
                self._in_flight.labels(*labels).set(len(unit.in_flight))
                self._restarts.labels(*labels).inc(self._news(unit, unit.restarts))
                for state in Health:
                    self._state.labels(*labels, str(state)).set(state is unit.state)
                if unit.device.where != "unknown":
                    self._gpu.labels(*labels).set(unit.device.where == "gpu")
                if unit.stats.memory_bytes is not None:
                    self._memory.labels(*labels).set(unit.stats.memory_bytes)
                if unit.stats.vram_bytes is not None:
                    self._vram.labels(*labels).set(unit.stats.vram_bytes)
        return generate_latest(self._registry)

    def _news(self, counted: Unit | Route, now: int) -> int:
        """By how much a count has grown since it was asked for last."""
        before, self._seen[counted] = self._seen.get(counted, 0), now
        return now - before
