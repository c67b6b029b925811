"""Series over the nights, from the records: what is in them, what begins them anew, and what is said."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stored_nights import store_nights

from engines.home import host
from tasks.evidence.nights import (
    ALL_MODELS,
    DRIFT,
    SPEED,
    NightSeries,
    drift_found,
    known_drift,
    night_of,
    nights_until,
    pooled,
)
from tasks.records.store import Records, open_records
from tasks.records.tables import Run
from tasks.verdicts.drift import Change, Night

PLAN = {"name": "trial", "incumbent": {"engine": "llama.cpp"}, "candidate": {"engine": "mistral.rs"}}
UNTIL = datetime(2026, 11, 28, 3, tzinfo=UTC)
DAY_S = 86_400


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    with open_records(tmp_path / "switchyard.db") as opened:
        yield opened


def figures(n_nights: int, seed: int, *, slower_from: int | None = None) -> list[dict[str, float]]:
    noise = np.exp(0.03 * np.random.default_rng(seed).standard_normal((n_nights, 2)))
    if slower_from is not None:
        noise[slower_from:, 0] *= 1.2
    return [{"ttft_ms": 50 * a, "tpot_ms": 10 * b, "memory_peak_mib": 900.0, "failures": 0} for a, b in noise.tolist()]


def latest(records: Records, ids: list[str]) -> Run:
    return records.find_run(ids[-1])


def by_metric(series: list[NightSeries]) -> dict[tuple[str, str], NightSeries]:
    return {(one.arm, one.metric): one for one in series}


def test_a_night_has_the_medians_of_what_counts():
    """Not of discarded blocks; their failures count, for they are the engine's too."""
    arm = {"ttft_ms": [1.0, 2.0, 30.0], "tpot_ms": [], "load_s": 2.5, "throughput_c4_tok_s": [9.0], "errors": []}
    late = {**arm, "ttft_ms": [99.0], "errors": ["timeout", "http"]}
    dead = {"failed": "it exited", "machine": {}, "records": []}
    blocks = [
        {"void": None, "incumbent": arm, "candidate": arm},
        {"void": "the candidate did not come up", "incumbent": late, "candidate": dead},
    ]
    night = night_of(blocks)
    assert night["incumbent"] == {"ttft_ms": 2.0, "load_s": 2.5, "throughput_c4_tok_s": 9.0, "failures": 2}
    assert night["candidate"]["failures"] == 1


def test_a_step_is_found_in_its_series_alone(records):
    ids = store_nights(
        records, PLAN, {"incumbent": figures(60, 1), "candidate": figures(60, 2, slower_from=52)}, until=UNTIL
    )
    series = by_metric(nights_until(records, latest(records, ids)))
    (change,) = series["candidate", "ttft_ms"].changes
    assert change.shape == "step"
    assert series["candidate", "ttft_ms"].is_worse(change)
    assert not any(one.changes for key, one in series.items() if key[0] == "incumbent" or key[1] == "tpot_ms")
    assert series["candidate", SPEED].model_id == ALL_MODELS
    assert series["candidate", SPEED].nights[0].value == pytest.approx(1.0, rel=0.1)
    # a report of an earlier night shows what was known by then
    early = by_metric(nights_until(records, records.find_run(ids[50])))
    assert len(early["candidate", "ttft_ms"].nights) == 51
    assert not early["candidate", "ttft_ms"].changes


def test_another_version_is_marked_and_no_drift(records):
    versions = {"incumbent": ["1"] * 60, "candidate": ["0.9.5"] * 30 + ["0.9.6"] * 30}
    ids = store_nights(
        records,
        PLAN,
        {"incumbent": figures(60, 1), "candidate": figures(60, 2, slower_from=30)},
        versions=versions,
        until=UNTIL,
    )
    series = by_metric(nights_until(records, latest(records, ids)))
    assert not any(one.changes for one in series.values())
    assert [what for _, what in series["candidate", "ttft_ms"].begun_anew()] == ["mistral.rs 0.9.6"]
    assert series["incumbent", "ttft_ms"].begun_anew() == []


def test_a_change_is_news_once(records):
    """New on the night that shows it, known on the next, and shown by `status` as long as the build runs."""
    ids = store_nights(
        records, PLAN, {"incumbent": figures(60, 1), "candidate": figures(60, 2, slower_from=52)}, until=UNTIL
    )
    said = []
    for run_id in ids[50:]:
        run = records.find_run(run_id)
        found = drift_found(records, run, nights_until(records, run))
        records.put_evidence(run_id, "-", "-", DRIFT, {"changes": found})
        said.append([one["what"] for one in found if one["is_new"]])
    news = [line for lines in said for line in lines]
    assert sorted(line.partition(",")[0] for line in news) == [ALL_MODELS, "m"]
    line = next(line for line in news if "TTFT, median" in line)
    assert line.startswith("m, mistral.rs 1: TTFT, median, up ")
    assert "since 2026-11-" in line
    assert said[-1] == []
    shown = known_drift(records, host())
    assert {one["what"] for one in shown} == set(news)
    assert all(one["run_id"] == ids[-1] for one in shown)


def window(day: int, hour: int, ttft: float, failures: int = 0) -> dict[str, Any]:
    return {
        "started_at": float(day * DAY_S + hour * 3600),
        "ttft_ms": [ttft, ttft, None],
        "decode_tok_s": [20.0],
        "failures": [{"at_s": 1.0, "type": "crash"}] * failures,
    }


def test_days_of_a_soak_are_nights_of_the_candidate(records):
    """Windows of a day make one figure, and the day that is not over none."""
    today = int(UNTIL.timestamp() // DAY_S)
    engine = {"arm": "candidate", "engine": "mistral.rs", "version": "1", "form": "wheel", "argv": []}
    run = records.start_run("soak", "trial", PLAN)
    for number, (day, hour) in enumerate((day, hour) for day in range(today - 20, today + 1) for hour in (0, 1)):
        slower = 30.0 if day >= today - 5 else 0.0
        records.put_evidence(
            run.id, "m", "candidate", "soak", window(day, hour, 100.0 + slower, failures=slower > 0),
            key=f"{number:05d}", environment={"engines": [engine]},
        )  # fmt: skip
    records.finish_run(run.id)
    with records.write() as session:
        session.get_one(Run, run.id).started_at = UNTIL
    ids = store_nights(records, PLAN, {"candidate": figures(1, 1)}, until=UNTIL)
    with records.write() as session:
        session.get_one(Run, ids[-1]).started_at = UNTIL
    series = by_metric(nights_until(records, latest(records, ids)))
    days = series["candidate", "soak, ttft_ms"]
    assert [night.value for night in days.nights] == [100.0] * 15 + [130.0] * 5
    (change,) = days.changes
    assert "soak, TTFT, median, up 30.0% since" in days.words(change)
    assert not series["candidate", "soak, decode_tok_s"].changes


def test_all_models_together_show_what_each_hides():
    """The mean of TTFT and TPOT of three models is steadier than each; nights that lack one are left out."""
    rng = np.random.default_rng(3)
    parts = []
    for number in range(6):
        logs = 0.035 * rng.standard_normal(60)
        nights = tuple(Night(at * DAY_S, (5 + 40 * number) * float(np.exp(y)), "1") for at, y in enumerate(logs))
        kept = nights if number else nights[:40] + nights[41:]
        parts.append(NightSeries(f"m{number // 2}", "candidate", "e 1", ("ttft_ms", "tpot_ms")[number % 2], kept))
    mean = pooled(parts, "candidate")
    assert mean is not None
    assert len(mean.nights) == 59
    logs = np.log([night.value for night in mean.nights])
    assert logs.std() < 0.025
    assert np.median(logs[:14]) == pytest.approx(0.0, abs=1e-9)
    assert pooled(parts[:1], "candidate") is None
    assert pooled(parts, "incumbent") is None


def test_words_say_what_how_much_and_since_when():
    series = NightSeries("m", "candidate", "mistral.rs 0.9.5", "ttft_ms", ())
    common: dict[str, Any] = {"since": 0.0, "found": 41 * DAY_S, "nights_before": 60, "z": 5.0, "limit": 4.2}
    ramp = Change(shape="ramp", before=32.1, now=34.0, nights=42, **common)
    assert "up 5.9% since 19" in series.words(ramp)
    assert "(1.0% a week), 32.1 ms to 34 ms" in series.words(ramp)
    step = Change(shape="step", before=34.0, now=32.0, nights=5, **common)
    assert "down 5.9% since" in series.words(step)
    assert "(at once)" in series.words(step)
    assert not series.is_worse(step)
    failed = Change(shape="failures", before=1 / 60, now=1.0, nights=4, **common)
    words = NightSeries("m", "candidate", "mistral.rs 0.9.5", "failures", ()).words(failed)
    assert "failed requests in 4 of 4 nights since" in words
    assert words.endswith("in 1 of 60 before")
    faster = NightSeries("m", "candidate", "mistral.rs 0.9.5", "throughput_c4_tok_s", ())
    assert faster.higher_is_better
    assert faster.label == "throughput, 4 at a time"
