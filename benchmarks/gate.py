"""How often the gate is right: candidates promoted at true slow-downs of 0 to 20%, ours beside three usual judges.

    python -m benchmarks.gate                          simulated noise of three machines
    python -m benchmarks.gate --recorded blocks.json   the same on blocks recorded with one engine as both arms (A/A)

Ideal is 100% at 0 (an equal engine is let through) and at most 5% at 10%, which is the margin. The usual judges see
one start of each engine, all of the incumbent's requests and then all of the candidate's; ours sees blocks of fresh
starts. Row 4 is the gate as it ships: the order of the arms drawn by coin, bounds that spend 5% at 6, 12 and 24
blocks. Row 4b alternates the order, AB BA AB, and takes the bounds tabulated for evenly spaced looks.

Log latency = offset of the start + drift (AR(1), coefficient 0.95 a request) + noise, and 5% of the requests
take twice as long: the noise of a 2-core virtual machine in its measured sizes, the shape fitted by eye.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from engines.errors import BadInput, SwitchyardError
from tasks.verdicts.noninferiority import (
    DEFAULT_LOOKS,
    Metric,
    block_log_ratio,
    judge,
    look_bounds,
    spent_alpha,
)
from tasks.verdicts.statistics import normal_cdf, normal_quantile, t_quantile, wilson
from tasks.verdicts.verdict import Verdict

SLOWDOWNS = (0.0, 0.05, 0.10, 0.20)
MARGIN = 0.10
TABULATED_BOUNDS = (2.961, 2.094, 1.710)
REQUESTS_PER_BLOCK = 20
REQUESTS_SINGLE_START = 120
DRIFT_COEFFICIENT = 0.95
OUTLIER_SHARE = 0.05
OUTLIER_FACTOR = 2.0
CHUNK = 1000


@dataclass(frozen=True)
class Noise:
    """Standard deviations of log latency: between starts, between requests, and of the drift."""

    name: str
    start: float
    request: float
    drift: float


NOISES = (
    Noise("quiet", start=0.02, request=0.05, drift=0.0),
    Noise("this VM", start=0.09, request=0.08, drift=0.06),
    Noise("noisy", start=0.09, request=0.16, drift=0.18),
)


@dataclass
class Row:
    """Counts of one judge on one kind of noise, by true slow-down."""

    judge: str
    noise: str
    runs: int
    promoted: list[int]
    failed: list[int] | None = None  # outright FAIL, for judges that know a third answer
    blocks: float | None = None  # mean number used on an equal engine


@dataclass(frozen=True)
class Sequential:
    """Our gate over many runs at once: log ratios in, promoted and failed out."""

    looks: tuple[int, ...]
    bounds: tuple[float, ...]

    def decide(self, log_ratios: np.ndarray, margin: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Promoted, failed (booleans) and blocks used, of each row of `log_ratios` (runs x blocks)."""
        runs = len(log_ratios)
        promoted, failed = np.zeros(runs, bool), np.zeros(runs, bool)
        used = np.full(runs, self.looks[-1])
        limit = math.log1p(margin)
        for look, bound in zip(self.looks, self.bounds, strict=True):
            seen = log_ratios[:, :look]
            half = t_quantile(normal_cdf(bound), look - 1) * seen.std(axis=1, ddof=1) / math.sqrt(look)
            mean = seen.mean(axis=1)
            open_runs = ~(promoted | failed)
            now_promoted, now_failed = open_runs & (mean + half <= limit), open_runs & (mean - half > limit)
            promoted |= now_promoted
            failed |= now_failed
            used[now_promoted | now_failed] = look
        return promoted, failed, used


def latencies(rng: np.random.Generator, noise: Noise, runs: int, starts: int, requests: int) -> np.ndarray:
    """Latencies of `runs` experiments: runs x starts x requests, one start after the other, typical value 1."""
    shape = (runs, starts, requests)
    log = noise.request * rng.standard_normal(shape) + noise.start * rng.standard_normal((runs, starts, 1))
    log += math.log(OUTLIER_FACTOR) * (rng.random(shape) < OUTLIER_SHARE)
    if noise.drift:
        log += noise.drift * _drift(rng, runs, starts * requests).reshape(shape)
    return np.exp(log)


def _drift(rng: np.random.Generator, runs: int, steps: int) -> np.ndarray:
    """A stationary AR(1) of standard deviation 1 per run, over `steps` requests."""
    shocks = rng.standard_normal((steps, runs))
    shocks[1:] *= math.sqrt(1 - DRIFT_COEFFICIENT**2)
    for step in range(1, steps):
        shocks[step] += DRIFT_COEFFICIENT * shocks[step - 1]
    return shocks.T


def block_samples(rng: np.random.Generator, noise: Noise, runs: int, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Incumbent's and candidate's latencies (runs x blocks x requests) of equal engines, in the order AB BA AB ..."""
    starts = latencies(rng, noise, runs, 2 * blocks, REQUESTS_PER_BLOCK).reshape(runs, blocks, 2, REQUESTS_PER_BLOCK)
    starts[:, 1::2] = starts[:, 1::2, ::-1]
    return starts[:, :, 0], starts[:, :, 1]


def single_run_threshold(incumbent: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Promoted where the ratio of the means is at most 1 + margin."""
    promoted: np.ndarray = candidate.mean(axis=1) / incumbent.mean(axis=1) <= 1 + MARGIN
    return promoted


def welch(incumbent: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Promoted unless the candidate is slower and Welch's t-test says so with p < 0.05 (two-sided)."""
    n, m = incumbent.shape[1], candidate.shape[1]
    a, b = incumbent.var(axis=1, ddof=1) / n, candidate.var(axis=1, ddof=1) / m
    df = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (m - 1))
    t = (candidate.mean(axis=1) - incumbent.mean(axis=1)) / np.sqrt(a + b)
    promoted: np.ndarray = t < np.array([t_quantile(0.975, math.floor(each)) for each in df])
    return promoted


def kayenta_like(incumbent: np.ndarray, candidate: np.ndarray, allowed_increase: float = 1.0) -> np.ndarray:
    """Promoted unless "High" as Kayenta's NetflixACAJudge has it.

    High: the lower end of Mann-Whitney's 98% interval of the shift is over 0.25 times the shift, and the ratio of the
    means is at least `allowed_increase` (Kayenta's default is 1.0).
    """
    n, m = incumbent.shape[1], candidate.shape[1]
    spread = normal_quantile(0.99) * math.sqrt(n * m * (n + m + 1) / 12)
    low_rank, middle = max(0, math.floor(n * m / 2 - spread)), n * m // 2
    promoted = np.empty(len(incumbent), bool)
    for run, (a, b) in enumerate(zip(incumbent, candidate, strict=True)):
        shifts = np.partition((b[:, None] - a[None, :]).ravel(), (low_rank, middle))
        high = shifts[low_rank] > 0.25 * abs(shifts[middle]) and b.mean() / a.mean() >= allowed_increase
        promoted[run] = not high
    return promoted


USUAL_JUDGES: dict[str, tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], int]] = {
    "1 one run, mean ratio <= 1.10": (single_run_threshold, 1),
    "2 Welch t-test, p < 0.05": (welch, 1),
    # 14 400 differences a run: a tenth of the runs
    "3 Kayenta-like": (kayenta_like, 10),
    "3b same, allowedIncrease 1.1": (partial(kayenta_like, allowed_increase=1.1), 10),
}


def simulate(runs: int, seed: int, noises: Sequence[Noise] = NOISES) -> Iterator[Row]:
    """Rows of every judge on every kind of noise, `runs` simulated migrations each."""
    for number, noise in enumerate(noises):
        rng = np.random.default_rng([seed, number])
        arms = latencies(rng, noise, runs, 2, REQUESTS_SINGLE_START)
        yield from usual_rows(noise.name, arms[:, 0], arms[:, 1])
        log_ratios = [_median_log_ratios(rng, noise, part) for part in _chunks(runs)]
        yield from gate_rows(noise.name, np.concatenate(log_ratios), MARGIN)


def usual_rows(noise: str, incumbent: np.ndarray, candidate: np.ndarray) -> Iterator[Row]:
    """One row per usual judge, on one start of each engine."""
    for name, (judged, every) in USUAL_JUDGES.items():
        a, b = incumbent[::every], candidate[::every]
        yield Row(name, noise, len(a), [int(judged(a, b * (1 + slow)).sum()) for slow in SLOWDOWNS])


def gate_rows(noise: str, log_ratios: np.ndarray, margin: float) -> Iterator[Row]:
    """Our gate in both forms (see the top), on log ratios of equal engines whose arms alternate."""
    coins = np.random.default_rng(len(log_ratios)).choice((-1.0, 1.0), log_ratios.shape)
    forms = (
        ("4 Switchyard", look_bounds(DEFAULT_LOOKS), log_ratios * coins),
        ("4b ABBA, tabulated bounds", TABULATED_BOUNDS, log_ratios),
    )
    for name, bounds, equal in forms:
        gate = Sequential(DEFAULT_LOOKS, bounds)
        answers = [gate.decide(equal + math.log1p(slow), margin) for slow in SLOWDOWNS]
        yield Row(
            name,
            noise,
            len(equal),
            promoted=[int(promoted.sum()) for promoted, _, _ in answers],
            failed=[int(failed.sum()) for _, failed, _ in answers],
            blocks=float(answers[0][2].mean()),
        )


def _median_log_ratios(rng: np.random.Generator, noise: Noise, runs: int) -> np.ndarray:
    incumbent, candidate = block_samples(rng, noise, runs, DEFAULT_LOOKS[-1])
    ratios: np.ndarray = np.log(np.median(candidate, axis=2) / np.median(incumbent, axis=2))
    return ratios


def _chunks(runs: int) -> Iterator[int]:
    for start in range(0, runs, CHUNK):
        yield min(CHUNK, runs - start)


def confirm_against_judge(seed: int, runs: int = 20) -> None:
    """Raises AssertionError unless the vectorised gate answers as `judge` does, look by look."""
    rng = np.random.default_rng(seed)
    metric = Metric(name="e2e", quantile=0.5, margin=MARGIN, unit="ms")
    gate = Sequential(DEFAULT_LOOKS, look_bounds(DEFAULT_LOOKS))
    for run in range(runs):
        incumbent, candidate = block_samples(rng, NOISES[run % 3], 1, DEFAULT_LOOKS[-1])
        blocks = [
            _block(index, a.tolist(), (b * (1 + SLOWDOWNS[run % 4])).tolist(), metric.name)
            for index, (a, b) in enumerate(zip(incumbent[0], candidate[0], strict=True))
        ]
        log_ratios = np.array([[block_log_ratio(metric, block) for block in blocks]])
        promoted, failed, used = (answer[0] for answer in gate.decide(log_ratios, MARGIN))
        verdict = judge(metric, blocks[: int(used)]).verdict
        expected = Verdict.PASS if promoted else Verdict.FAIL if failed else Verdict.INCONCLUSIVE
        assert verdict is expected, f"simulation says {expected}, judge says {verdict} (run {run}, seed {seed})"


def _block(index: int, incumbent: list[float], candidate: list[float], name: str) -> dict[str, Any]:
    order = "BA" if index % 2 else "AB"
    arms = {"incumbent": {name: incumbent}, "candidate": {name: candidate}}
    return {"index": index, "order": order, **arms, "foreign_cpu": {}, "void": None}


def recorded(path: Path, metrics: Sequence[Metric], runs: int, seed: int) -> Iterator[Row]:
    """Rows from real A/A blocks, drawn with replacement, their arms swapped at random, then slowed down.

    The usual judges get the samples of two different starts.
    """
    blocks = [block for block in _load(path) if block.get("void") is None]
    if len(blocks) < 6:
        raise BadInput(f"{path}: {len(blocks)} valid blocks; resampling fewer than 6 shows nothing")
    rng = np.random.default_rng(seed)
    for metric in metrics or _metrics_in(blocks):
        log_ratios = np.array([block_log_ratio(metric, block) for block in blocks])
        shape = (runs, DEFAULT_LOOKS[-1])
        # both arms are the same engine: which one is called candidate carries no information
        drawn = rng.choice(log_ratios, shape) * rng.choice((-1.0, 1.0), shape)
        yield from gate_rows(metric.name, drawn, metric.margin)
        if not metric.higher_is_better:
            yield from usual_rows(metric.name, *_two_starts(rng, blocks, metric, runs))


def _two_starts(
    rng: np.random.Generator, blocks: Sequence[dict[str, Any]], metric: Metric, runs: int
) -> tuple[np.ndarray, np.ndarray]:
    """Samples of two different starts per run, cut to the shortest list."""
    starts = [block[arm][metric.key] for block in blocks for arm in ("incumbent", "candidate")]
    shortest = min(len(samples) for samples in starts)
    table = np.array([samples[:shortest] for samples in starts])
    first = rng.integers(len(starts), size=runs)
    second = (first + rng.integers(1, len(starts), size=runs)) % len(starts)
    return table[first], table[second]


def _load(path: Path) -> list[dict[str, Any]]:
    try:
        blocks = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(blocks, list):
        raise BadInput(f"{path}: expected a list of blocks")
    if any(not isinstance(block, dict) or not {"index", "incumbent", "candidate"} <= set(block) for block in blocks):
        raise BadInput(f"{path}: every block needs index, incumbent and candidate")
    return blocks


def _metrics_in(blocks: Sequence[dict[str, Any]]) -> list[Metric]:
    return [Metric(name=name, quantile=0.5, margin=MARGIN, unit="") for name in blocks[0]["incumbent"]]


def _metric(text: str) -> Metric:
    """`name:quantile:margin[:higher]`, as "ttft_ms:0.5:0.1"."""
    name, quantile, margin, *direction = text.split(":")
    higher = direction == ["higher"]
    try:
        return Metric(name=name, quantile=float(quantile), margin=float(margin), unit="", higher_is_better=higher)
    except BadInput as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def show(console: Console, rows: Sequence[Row], noise_title: str) -> None:
    """One table: share promoted by true slow-down, wrong promotions, and equal engines that were blocked."""
    table = Table(title="Candidates promoted, %, by true slow-down", title_justify="left")
    for title in (noise_title, "judge"):
        table.add_column(title, no_wrap=True)
    for title in (*(f"{100 * slow:g}%" for slow in SLOWDOWNS), "A/A shut", "wrong, 10%", "wrong, 20%"):
        table.add_column(title, justify="right")
    for title in ("A/A FAIL", "blocks", "runs"):
        table.add_column(title, justify="right")
    for before, row in zip((None, *rows), rows, strict=False):
        shares = [100 * count / row.runs for count in row.promoted]
        if before and before.noise != row.noise:
            table.add_section()
        table.add_row(
            "" if before and before.noise == row.noise else row.noise,
            row.judge,
            *(f"{share:.1f}" for share in shares),
            f"{100 - shares[0]:.1f}",
            _with_interval(row.promoted[2], row.runs),
            _with_interval(row.promoted[3], row.runs),
            "-" if row.failed is None else f"{100 * row.failed[0] / row.runs:.2f}",
            "-" if row.blocks is None else f"{row.blocks:.1f}",
            str(row.runs),
        )
    console.print(table)


def _with_interval(count: int, runs: int, decimals: int = 1) -> str:
    low, high = wilson(count, runs)
    return f"{100 * count / runs:.{decimals}f} ({100 * low:.{decimals}f}-{100 * high:.{decimals}f})"


def reach(console: Console, row: Row) -> bool:
    """Prints the numbers to reach beside those of `row`; True when all are reached."""
    assert row.failed is not None
    claims = (
        ("equal engine promoted", row.promoted[0], ">=", 94.0),
        ("equal engine called FAIL", row.failed[0], "<=", 1.0),
        ("10% slower promoted", row.promoted[2], "<=", 5.0),
        ("20% slower promoted", row.promoted[3], "<=", 0.5),
    )
    table = Table(title=f"To reach on noise like {row.noise!r}: {row.judge}", title_justify="left")
    for title in ("what", "reach", "measured (95% interval of the simulation)", ""):
        table.add_column(title)
    all_reached = True
    for what, count, sign, limit in claims:
        low, high = (100 * end for end in wilson(count, row.runs))
        share = 100 * count / row.runs
        reached = share >= limit if sign == ">=" else share <= limit
        within = high >= limit if sign == ">=" else low <= limit
        all_reached &= within
        answer = "reached" if reached else "reached within the simulation's error" if within else "NOT reached"
        table.add_row(what, f"{sign} {limit:g}%", _with_interval(count, row.runs, decimals=2), answer)
    console.print(table)
    return all_reached


def main() -> int:
    """Exit code 0 when the numbers to reach are reached (or blocks were recorded), 1 when not, 2 on bad input."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=20_000, help="simulated migrations per judge and noise")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--recorded", type=Path, help="JSON list of blocks of one engine against itself")
    parser.add_argument(
        "--metric", type=_metric, action="append", default=[], help="name:quantile:margin[:higher], with --recorded"
    )
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 150)
    started = time.monotonic()
    try:
        confirm_against_judge(options.seed)
        if options.recorded:
            rows = list(recorded(options.recorded, options.metric, options.runs, options.seed))
        else:
            rows = list(simulate(options.runs, options.seed))
    except SwitchyardError as error:
        print(error, file=sys.stderr)
        return 2
    show(console, rows, "metric" if options.recorded else "noise")
    if options.recorded:
        return 0
    spent = [100 * spent_alpha(DEFAULT_LOOKS, bounds) for bounds in (look_bounds(DEFAULT_LOOKS), TABULATED_BOUNDS)]
    console.print(f"Error spent by the looks on independent blocks: {spent[0]:.2f}% in row 4, {spent[1]:.2f}% in 4b.")
    ours, variant = (row for row in rows if row.noise == "this VM" and row.judge.startswith("4"))
    all_reached = reach(console, ours)
    reach(console, variant)
    console.print(f"{time.monotonic() - started:.0f} s")
    return 0 if all_reached else 1


if __name__ == "__main__":
    sys.exit(main())
