"""Series over the nights: the medians of every evaluation of a plan, the days of its soaks, and what has drifted.

An evaluation stores its own medians as one small piece of evidence; those of all evaluations of a plan on a host, in
order, are the series. What a build or a plan changed begins a series anew, marked and without an alarm.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any

import numpy as np

from engines.units import quantity
from tasks.evidence.soak.judge import DAY_S
from tasks.records.store import Records
from tasks.records.tables import Run
from tasks.verdicts.drift import FIRST, LEAST_SD, Change, Night, alarm_limit, changes, failing

NIGHT = "night"  # evidence of a model: the medians of one evaluation
DRIFT = "drift"  # evidence of a run: the changes that are known after it
ARMS = ("incumbent", "candidate")
ALL_MODELS = "all models"
FAILURES = "failures"
SPEED = "speed"  # the geometric mean of TTFT and TPOT over all models, 1 at first
SOAKED = "soak, "  # before the name of a metric
NEWS_S, SHOWN_S = 2 * DAY_S, 42 * DAY_S
LOOK_BACK = 20  # runs
POOLED = ("ttft_ms", "tpot_ms")
# in a block's evidence: how it is called, and its unit; E2E is the sum of the first two
MEDIANS = {
    "ttft_ms": ("TTFT, median", "ms"),
    "tpot_ms": ("TPOT, median", "ms"),
    "load_s": ("load to first token", "s"),
    "memory_peak_mib": ("peak private memory", "MiB"),
}
SOAK_MEDIANS = {"ttft_ms": ("TTFT, median", "ms"), "decode_tok_s": ("decode, median", "tok/s")}
THROUGHPUT = "throughput_c"


@dataclass(frozen=True)
class NightSeries:
    """One figure of a model on an engine, night by night, and the changes found in it."""

    model_id: str
    arm: str
    engine: str
    metric: str
    nights: tuple[Night, ...]
    changes: tuple[Change, ...] = field(default=())

    @property
    def label(self) -> str:
        """The metric as a reader knows it."""
        return self._known[0]

    @property
    def unit(self) -> str:
        """Of the values."""
        return self._known[1]

    @property
    def _known(self) -> tuple[str, str]:
        metric = self.metric.removeprefix(SOAKED)
        if metric.startswith(THROUGHPUT):
            level = metric.removeprefix(THROUGHPUT).removesuffix("_tok_s")
            return f"throughput, {level} at a time", "tok/s"
        other = {FAILURES: ("failed requests", "requests"), SPEED: ("TTFT and TPOT together", "ratio")}
        label, unit = {**MEDIANS, **SOAK_MEDIANS, **other}[metric]
        return SOAKED * (metric != self.metric) + label, unit

    @property
    def higher_is_better(self) -> bool:
        return self.unit == "tok/s"

    def is_worse(self, change: Change) -> bool:
        """Whether the change is for the worse."""
        return (change.now < change.before) == self.higher_is_better

    def is_current(self, change: Change) -> bool:
        """Whether the build and the plan are still those that changed."""
        last = self.nights[-1]
        return all((one.build, one.plan) == (last.build, last.plan) for one in self.nights if one.at >= change.since)

    def begun_anew(self) -> list[tuple[float, str]]:
        """When another build or plan came, and which."""
        found = []
        for before, night in zip(self.nights, self.nights[1:], strict=False):
            if night.build != before.build:
                found.append((night.at, night.build.partition(" · ")[0]))
            elif night.plan != before.plan:
                found.append((night.at, "another plan"))
        return found

    def words(self, change: Change) -> str:
        """`m, llama.cpp b123: TTFT, median, up 6.1% since 2026-10-18 (1.0% a week), 32.1 ms to 34 ms`."""
        what, since = f"{self.model_id}, {self.engine}: {self.label}", f"since {day_of(change.since)}"
        if change.shape == "failures":
            bad, bad_before = round(change.now * change.nights), round(change.before * change.nights_before)
            return (
                f"{what} in {bad} of {change.nights} nights {since}, in {bad_before} of {change.nights_before} before"
            )
        share = f"{'up' if change.now > change.before else 'down'} {abs(change.now / change.before - 1):.1%}"
        how = f"{abs(change.per_week):.1%} a week" if change.shape == "ramp" else "at once"
        before, now = (quantity(level, self.unit) for level in (change.before, change.now))
        return f"{what}, {share} {since} ({how}), {before} to {now}"


def day_of(at: float) -> str:
    """The day of a moment (s since the epoch) on this host."""
    return f"{datetime.fromtimestamp(at).astimezone():%Y-%m-%d}"


def night_of(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The medians of an evaluation's blocks by arm, and its failed requests; what was not measured is left out."""
    night: dict[str, Any] = {}
    for arm in ARMS:
        counted = [block[arm] for block in blocks if block.get("void") is None]
        names = [*MEDIANS, *sorted({name for one in counted for name in one if name.startswith(THROUGHPUT)})]
        samples = {name: [value for one in counted for value in _listed(one.get(name))] for name in names}
        night[arm] = {name: statistics.median(values) for name, values in samples.items() if values}
        failed = (len(block[arm].get("errors") or ()) + bool(block[arm].get("failed")) for block in blocks)
        night[arm][FAILURES] = sum(failed)
    return night


def _listed(found: Any) -> list[float]:
    values = found if isinstance(found, list) else [found]
    return [value for value in values if value is not None and value > 0]


def nights_until(records: Records, run: Run) -> list[NightSeries]:
    """Every series of the run's plan on its host, up to that run, with the changes found in it."""
    series = [*_evaluated(records, run), *_soaked(records, run)]
    series += filter(None, (pooled(series, arm) for arm in ARMS))
    limit = alarm_limit(len(series))
    found = iter(changes([one.nights for one in series if not _counts(one)], limit))
    return [replace(one, changes=tuple(failing(one.nights, limit) if _counts(one) else next(found))) for one in series]


def _counts(series: NightSeries) -> bool:
    return series.metric.endswith(FAILURES)


def _evaluated(records: Records, run: Run) -> list[NightSeries]:
    rows = records.evidence_of_runs(
        NIGHT, run_kind="evaluate", name=run.name, host=run.owner_host, until=run.started_at
    )
    points = []
    for began, _, row in rows:
        seen = row.environment
        builds = {engine["arm"]: _build(engine) for engine in seen["engines"]}
        for arm, values in row.payload.items():
            for metric, value in values.items():
                night = Night(began.timestamp(), value, builds[arm], str(seen["plan_hash"]))
                points.append(((row.model_id, arm, metric), night))
    return _series(points)


def _soaked(records: Records, run: Run) -> list[NightSeries]:
    """The days of the candidate's soaks that are over: medians of its windows, and their failures."""
    rows = records.evidence_of_runs("soak", run_kind="soak", name=run.name, host=run.owner_host, until=run.started_at)
    days: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    today = run.started_at.timestamp() // DAY_S
    for _, plan, row in rows:
        window = row.payload
        if row.arm == "candidate" and "started_at" in window and (day := window["started_at"] // DAY_S) < today:
            days.setdefault((day, row.model_id, _build(row.environment["engines"][0]), plan), []).append(window)
    points = []
    for (day, model_id, build, plan), windows in sorted(days.items()):
        at = (day + 0.5) * DAY_S
        for name in SOAK_MEDIANS:
            medians = [statistics.median(values) for one in windows if (values := _listed(one[name]))]
            if medians:
                night = Night(at, statistics.median(medians), build, plan)
                points.append(((model_id, "candidate", SOAKED + name), night))
        failed = float(sum(len(one["failures"]) for one in windows))
        points.append(((model_id, "candidate", SOAKED + FAILURES), Night(at, failed, build, plan)))
    return _series(points)


def _build(engine: Mapping[str, Any]) -> str:
    build = str(engine.get("build") or "")
    return f"{engine['engine']} {engine['version']}" + (f" · {build[:12]}" if build else "")


def _series(points: Iterable[tuple[tuple[str, str, str], Night]]) -> list[NightSeries]:
    by_key: dict[tuple[str, str, str], list[Night]] = {}
    for key, night in points:
        by_key.setdefault(key, []).append(night)
    return [
        NightSeries(model_id, arm, nights[-1].build.partition(" · ")[0], metric, tuple(nights))
        for (model_id, arm, metric), nights in sorted(by_key.items())
    ]


def pooled(series: Sequence[NightSeries], arm: str) -> NightSeries | None:
    """TTFT and TPOT of all models on one engine as one series: what drifts with the engine shows in it first.

    The geometric mean, over nights that have all of them, weighted by how steady each was in its first nights; None
    where there is one series or none.
    """
    parts = [one for one in series if one.arm == arm and one.metric in POOLED]
    if len(parts) < 2:
        return None
    by_night = [{night.at: night for night in one.nights} for one in parts]
    spans: list[list[list[Night]]] = []  # nights of one build and plan
    for at in sorted(set(by_night[0]).intersection(*by_night[1:])):
        here = [one[at] for one in by_night]
        if not spans or (here[0].build, here[0].plan) != (spans[-1][-1][0].build, spans[-1][-1][0].plan):
            spans.append([])
        spans[-1].append(here)
    nights = [night for span in spans for night in _means(span)]
    return NightSeries(ALL_MODELS, arm, parts[0].engine, SPEED, tuple(nights)) if nights else None


def _means(span: Sequence[Sequence[Night]]) -> list[Night]:
    logs = np.log([[night.value for night in here] for here in span])
    first = logs[:FIRST]  # nothing is judged before; later nights do not change what they weigh
    spread = 1.4826 * np.median(np.abs(first - np.median(first, axis=0)), axis=0)
    weights = np.maximum(spread, 2 * LEAST_SD) ** -2.0
    means = logs @ weights / weights.sum()
    means = np.exp(means - np.median(means[:FIRST]))  # the first nights are 1
    return [replace(here[0], value=float(mean)) for here, mean in zip(span, means, strict=True)]


def drift_found(records: Records, run: Run, series: Sequence[NightSeries]) -> list[dict[str, Any]]:
    """Every change as plain JSON, the newest first; `is_new` is one that no earlier run of the plan has on record.

    What came to light days ago is no news: more series may show an old change that fewer did not.
    """
    rows = records.evidence_of_runs(
        DRIFT, run_kind="evaluate", name=run.name, host=run.owner_host, until=run.started_at
    )
    known = {_key(one) for _, _, row in rows if row.run_id != run.id for one in row.payload["changes"]}
    recent = run.started_at.timestamp() - NEWS_S
    found = [
        {
            "model": one.model_id,
            "arm": one.arm,
            "engine": one.engine,
            "metric": one.metric,
            "unit": one.unit,
            **asdict(change),
            "is_worse": one.is_worse(change),
            "is_current": one.is_current(change),
            "what": one.words(change),
        }
        for one in series
        for change in one.changes
    ]
    newest_first = sorted(found, key=lambda one: -one["found"])
    return [{**one, "is_new": one["found"] > recent and _key(one) not in known} for one in newest_first]


def known_drift(records: Records, host: str) -> list[dict[str, Any]]:
    """Changes for the worse in the last weeks of what still runs, by the latest evaluation on this host."""
    for run in records.history(LOOK_BACK, kind="evaluate", host=host):
        if (stored := records.get_evidence(run.id, "-", "-", DRIFT)) is not None:
            since = run.started_at.timestamp() - SHOWN_S
            changes = [one for one in stored.payload["changes"] if one["is_worse"] and one["is_current"]]
            return [{**one, "run_id": run.id} for one in changes if one["found"] > since]
    return []


def _key(change: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(change[name] for name in ("model", "arm", "metric", "found"))
