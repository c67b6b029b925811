"""Is the candidate at most a margin worse than the incumbent? Block-paired non-inferiority with three outcomes.

A block is one fresh start of both engines and the same prompts to each; starts differ by more than requests do, so the
block, not the request, is what is counted. For quantile p of a metric, block j gives

    d_j = ln( Q_p(candidate) / Q_p(incumbent) )         sign flipped where higher is better: above 0 is always worse
    L, U = mean d -+ t * s / sqrt(J)                     s: standard deviation of the d_j

A block is a mapping: `index`, `order` ("AB": incumbent first), `incumbent` and `candidate` (samples by name, in the
metric's unit), `foreign_cpu` (by arm, the share that neither engine nor client used), `void` (why it does not count).

PASS iff U <= ln(1 + margin), FAIL iff L > ln(1 + margin), otherwise INCONCLUSIVE: no difference found is not a pass.
Data are judged at planned looks only (6, 12 and 24 blocks); t is Student's quantile with the tail of the look's
O'Brien-Fleming bound, so that looking several times still promotes wrongly about one time in twenty. Promotion needs a
PASS of every metric (intersection-union), which needs no further correction.

Pure: evidence in, verdicts out. The ideas: Kalibera and Jones 2013 (repeat where the variance arises), O'Brien and
Fleming 1979 (looks), Deng et al. 2013 (a covariate that the treatment cannot move).
"""

from __future__ import annotations

import math
import random
import statistics
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from engines.errors import BadInput, NoMeasurement
from engines.units import figure, number_of, quantity
from tasks.verdicts.statistics import normal_cdf, normal_quantile, percentile, t_quantile
from tasks.verdicts.verdict import CheckResult, Verdict, decided, is_near, worst

ALPHA = 0.05
DEFAULT_LOOKS = (6, 12, 24)
CALIBRATION_BLOCKS = 6
POWER = 0.90
CLIENT_ERROR_FACTOR = 3.0
COVARIATE_MIN_BLOCKS = 12
COVARIATE_CONFIDENCE = 0.99
MIN_BLOCKS = 3
HOPELESS_BLOCKS = 1000
FASTEST = 500.0  # times as fast as the incumbent: beyond that a unit is likelier than an engine
_SIMPSON = np.array([1.0, *(4.0, 2.0) * 299, 4.0, 1.0])  # weights of the 601 points over which a density is summed


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What is compared: the `quantile` (0 to 1) of the samples called `name`, allowed to be `margin` (0.10) worse.

    `samples` names the list in the evidence where it differs from `name`: two quantiles of one list are two metrics.
    """

    name: str
    quantile: float
    margin: float
    unit: str
    higher_is_better: bool = False
    samples: str = ""

    def __post_init__(self) -> None:
        if not 0.0 < self.quantile < 1.0:
            raise BadInput(f"{self.name}: quantile {self.quantile} is outside 0 to 1: write p95 as 0.95")
        if not (self.margin > 0.0 and math.isfinite(self.margin)):
            raise BadInput(f"{self.name}: margin {self.margin} must be positive: write 10% as 0.10")

    @property
    def key(self) -> str:
        """The name of the samples in a block's evidence."""
        return self.samples or self.name

    @property
    def limit(self) -> float:
        """ln(1 + margin): the largest mean log ratio that is still allowed."""
        return math.log1p(self.margin)


@dataclass(frozen=True, kw_only=True)
class MetricOutcome:
    """What the gate says about one metric, with the numbers it rests on.

    `ratio` is above 1 where the candidate is worse, whichever direction is better. `ci_low` and `ci_high` are one-sided
    95% bounds of it each, at this look. `blocks_needed` counts the further blocks that would probably turn
    INCONCLUSIVE into PASS; None where none are needed or none would help. `final` is True where the metric cannot be
    judged however many blocks follow.
    """

    metric: Metric
    verdict: Verdict
    ratio: float | None
    ci_low: float | None
    ci_high: float | None
    sd: float | None
    n_blocks: int
    n_void: int
    blocks_needed: int | None
    look: int | None
    why: str
    adjusted: bool = False
    final: bool = False

    def check_result(self) -> CheckResult:
        """The outcome as the check `performance.<name>_ratio`."""
        return CheckResult(
            check=f"performance.{self.metric.name}_ratio",
            verdict=self.verdict,
            value=self.ratio,
            limit=1.0 + self.metric.margin,
            unit="ratio",
            why=self.why,
        )


@dataclass(frozen=True, kw_only=True)
class LookDecision:
    """Whether to stop measuring at this look; `verdict` is the worst of the outcomes."""

    stop: bool
    verdict: Verdict
    why: str
    outcomes: list[MetricOutcome] = field(default_factory=list)


@dataclass(frozen=True)
class _Estimate:
    """Mean log ratio, its standard error and degrees of freedom, after the covariate where it is used."""

    mean: float
    error: float
    df: int
    sd: float
    adjusted: bool = False


def judge(
    metric: Metric,
    blocks: Sequence[Mapping[str, Any]],
    looks: Sequence[int] = DEFAULT_LOOKS,
    *,
    client_error: float | None = None,
    bounds: Sequence[float] | None = None,
) -> MetricOutcome:
    """The verdict on `metric` at the latest look that the valid blocks reach; `bounds` as of `look_bounds`, one a look.

    Blocks past that look wait for the next one: judging at unplanned moments would promote wrongly more often.
    `client_error` is the measuring client's own p99 error in the metric's unit; a margin smaller than three times that
    is not judged. A valid block without samples of the metric makes it INCONCLUSIVE: dropping it would let a candidate
    that did not answer pass on the blocks where it did. Raises BadInput on malformed evidence or looks, and on samples
    that are not positive numbers.
    """
    bounds = bounds or look_bounds(tuple(looks))
    valid, discarded = _valid(blocks)
    reached = max((look for look in looks if look <= len(valid)), default=None)
    used = valid[:reached]
    facts: dict[str, Any] = {"metric": metric, "n_blocks": len(used), "n_void": len(discarded), "look": reached}
    try:
        levels = [_levels(metric, block) for block in used]
    except NoMeasurement as error:
        return _undecided(facts, f"not measured: {error}", final=True)
    if len(levels) < 2:
        needed = looks[0] - len(valid)
        seen = number_of(len(valid), "valid block")
        why = f"{seen} measured{_discard_note(discarded)}; the first look needs {looks[0]}"
        return _undecided(facts, why, blocks_needed=needed)
    bound = bounds[list(looks).index(reached)] if reached else bounds[0]
    estimate = _estimate([_harm(metric, *level) for level in levels], [_foreign_difference(block) for block in used])
    margin_of_error = t_quantile(normal_cdf(bound), estimate.df) * estimate.error
    low, high = estimate.mean - margin_of_error, estimate.mean + margin_of_error
    numbers: dict[str, Any] = {
        "ratio": math.exp(estimate.mean),
        "ci_low": _finite_exp(low),
        "ci_high": _finite_exp(high),
        "sd": estimate.sd,
        "adjusted": estimate.adjusted,
    }
    level_a, level_b = (statistics.median(arm) for arm in zip(*levels, strict=True))
    says = _says(metric, estimate, low, high, level_a, level_b) + f", over {number_of(len(used), 'block')}"
    says += _discard_note(discarded) + ("; adjusted for foreign CPU load" if estimate.adjusted else "")
    if client_error is not None and metric.margin * level_a < CLIENT_ERROR_FACTOR * client_error:
        why = f"{_too_fine(metric, level_a, client_error)}; seen: {says}"
        return _undecided(facts, why, final=reached is not None, **numbers)
    if estimate.mean < -math.log(FASTEST):
        why = f"{says}: more than {FASTEST:g} times better is no engine's; look for a time in another unit"
        return _undecided(facts, why, final=reached is not None, **numbers)
    limit = f"limit {_limit(metric)}"
    if reached is None:
        needed = looks[0] - len(valid)
        why = f"{says}: too few to judge, the first look needs {number_of(looks[0], 'block')}; {limit}"
        return _undecided(facts, why, blocks_needed=needed, **numbers)
    verdict = decided(fails=low > metric.limit, passes=high <= metric.limit)
    if verdict is not Verdict.INCONCLUSIVE:
        return MetricOutcome(**facts, **numbers, verdict=verdict, blocks_needed=None, why=f"{says}; {limit}")
    further = _blocks_needed(metric, estimate, len(valid), [look for look in looks if look > reached])
    return _undecided(facts, f"{says}: {_what_would_settle(metric, further)}", blocks_needed=further, **numbers)


def decision_reached(
    metrics: Sequence[Metric],
    blocks: Sequence[Mapping[str, Any]],
    looks: Sequence[int] = DEFAULT_LOOKS,
    *,
    client_errors: Mapping[str, float] | None = None,
) -> LookDecision:
    """Whether the measuring loop may stop after `blocks`, and what is known then.

    It stops where any metric FAILs (the gate can no longer open), where all PASS, where a metric cannot be judged
    however many blocks follow, and after the last look. Between looks it continues.
    """
    if not metrics:
        raise BadInput("no metric to judge: a plan names at least one")
    errors = client_errors or {}
    outcomes = [judge(metric, blocks, looks, client_error=errors.get(metric.name)) for metric in metrics]
    verdict = worst(outcome.verdict for outcome in outcomes)
    n_valid = len(_valid(blocks)[0])
    failed = [outcome.metric.name for outcome in outcomes if outcome.verdict is Verdict.FAIL]
    unmeasurable = [outcome.metric.name for outcome in outcomes if outcome.final]
    following = min((look for look in looks if look > n_valid), default=None)
    stop = True
    if failed:
        why = f"{', '.join(failed)} failed: the gate can no longer open"
    elif verdict is Verdict.PASS:
        why = f"every metric passed at the look at {outcomes[0].look} blocks"
    elif unmeasurable:
        why = f"{', '.join(unmeasurable)} cannot be judged, and more blocks would not change that"
    elif following is None:
        why = f"undecided after the last look, at {number_of(looks[-1], 'block')}"
    else:
        stop, why = False, f"undecided after {number_of(n_valid, 'valid block')}: on to the look at {following}"
    return LookDecision(stop=stop, verdict=verdict, why=why, outcomes=outcomes)


def judge_calibration(
    metrics: Sequence[Metric],
    blocks: Sequence[Mapping[str, Any]],
    looks: Sequence[int] = DEFAULT_LOOKS,
    *,
    client_errors: Mapping[str, float] | None = None,
) -> list[CheckResult]:
    """Per metric, whether this machine can judge at all: `blocks` hold the incumbent as both arms (A/A), 6 or more.

    `calibration.<name>` compares the block standard deviation of the log ratio with the largest that gives an equal
    engine a 90% chance to pass at the last look. FAIL: one of two equal arms was found more than the margin slower,
    so the bench is biased. INCONCLUSIVE: the noise is too large, the blocks too few, or the client too coarse.
    """
    errors = client_errors or {}
    return [_calibrate(metric, blocks, tuple(looks), errors.get(metric.name)) for metric in metrics]


def block_log_ratio(metric: Metric, block: Mapping[str, Any]) -> float:
    """d of one block: ln of the ratio of the arms' quantiles, above 0 where the candidate is worse.

    Raises NoMeasurement where an arm has no samples, BadInput where one is not a positive number.
    """
    return _harm(metric, *_levels(metric, block))


def block_orders(n_blocks: int, seed: int) -> list[str]:
    """The order of the arms in each block, "AB" (incumbent first) or "BA", a coin per block from the plan's seed.

    Not ABBA: under a drift that lasts longer than one arm, neighbouring starts of the same arm share it, the log ratios
    of neighbouring blocks rise and fall together, and the standard error comes out too small (`benchmarks/gate.py`).
    """
    coin = random.Random(seed)
    return [coin.choice(("AB", "BA")) for _ in range(n_blocks)]


@lru_cache(maxsize=256)
def look_bounds(looks: tuple[int, ...], alpha: float = ALPHA) -> tuple[float, ...]:
    """The one-sided z bound of each look: O'Brien-Fleming, C * sqrt(last / look), with the C that spends `alpha`.

    (6, 12, 24) gets 3.358, 2.374, 1.679 and a single look 1.645. The tabulated 2.961, 2.094, 1.710 (Jennison and
    Turnbull 2000, table 2.3) are for evenly spaced looks and would spend 5.3% here. The schedule belongs to the plan:
    a run that ends early is judged with the looks it was planned with, never with a schedule chosen afterwards.
    """
    if not looks or any(look != int(look) or look < MIN_BLOCKS for look in looks):
        raise BadInput(f"looks {looks} must be whole numbers of blocks, {MIN_BLOCKS} or more")
    if list(looks) != sorted(set(looks)):
        raise BadInput(f"looks {looks} must rise, each above the one before")
    low, high = normal_quantile(1 - alpha), 8.0
    for _ in range(40):
        constant = (low + high) / 2
        spends_too_much = spent_alpha(looks, _obrien_fleming(looks, constant)) > alpha
        low, high = (constant, high) if spends_too_much else (low, constant)
    return _obrien_fleming(looks, high)


def spent_alpha(looks: Sequence[int], bounds: Sequence[float]) -> float:
    """Chance that a mean exactly at the limit crosses one of the `bounds` at its look (normal, known variance).

    Armitage, McPherson and Rowe 1969: the density of the score that has not crossed is carried from look to look.
    """
    shares = [look / looks[-1] for look in looks]
    crossings = [bound * math.sqrt(share) for bound, share in zip(bounds, shares, strict=True)]
    first = math.sqrt(shares[0])
    spent = 1.0 - normal_cdf(bounds[0])
    grid = np.linspace(-8.0, crossings[0], 601)
    density = np.exp(-0.5 * (grid / first) ** 2) / (first * math.sqrt(2 * math.pi))
    for before, share, crossing in zip(shares, shares[1:], crossings[1:], strict=False):
        step = math.sqrt(share - before)
        mass = density * (_SIMPSON * (grid[1] - grid[0]) / 3.0)
        spent += sum(m * (1.0 - normal_cdf((crossing - x) / step)) for m, x in zip(mass, grid, strict=True))
        following = np.linspace(-8.0, crossing, 601)
        kernel = np.exp(-0.5 * ((following[:, None] - grid[None, :]) / step) ** 2) / (step * math.sqrt(2 * math.pi))
        grid, density = following, kernel @ mass
    return float(spent)


def pass_chance(sd: float, margin: float, n_blocks: int, *, alpha: float = ALPHA) -> float:
    """Chance that an equal engine passes one look at `n_blocks`, block standard deviation `sd` of the log ratio.

    P(mean + t * S / sqrt(J) <= ln(1 + margin)) for a mean of 0: the noncentral t, integrated over S numerically.
    """
    df = n_blocks - 1
    reach = 10.0 / math.sqrt(2 * df)
    spread = np.linspace(max(1e-6, 1.0 - reach), 1.0 + reach, 801)  # S over its true value
    log_density = (df - 1) * np.log(spread) - df * spread**2 / 2
    weight = np.exp(log_density - log_density.max())
    shift = math.log1p(margin) * math.sqrt(n_blocks) / sd
    t = t_quantile(1 - alpha, df)
    passing = np.array([normal_cdf(shift - t * s) for s in spread])
    return float((passing * weight).sum() / weight.sum())


def blocks_for_power(sd: float, margin: float, *, power: float = POWER, alpha: float = ALPHA) -> int:
    """Blocks that give an equal engine the chance `power` to pass, judged once; at least 3."""
    if sd <= 0:
        return MIN_BLOCKS
    high = MIN_BLOCKS
    while pass_chance(sd, margin, high, alpha=alpha) < power:
        high *= 2
    numbers = range(max(MIN_BLOCKS, high // 2), high)
    return numbers.start + bisect_left(numbers, True, key=lambda n: pass_chance(sd, margin, n, alpha=alpha) >= power)


def _calibrate(
    metric: Metric, blocks: Sequence[Mapping[str, Any]], looks: tuple[int, ...], client_error: float | None
) -> CheckResult:
    valid, discarded = _valid(blocks)
    alpha = 1.0 - normal_cdf(look_bounds(looks)[-1])
    largest = _largest_sd(metric.margin, looks[-1], alpha)
    facts: dict[str, Any] = {"check": f"calibration.{metric.name}", "limit": largest, "unit": "ln ratio"}
    if len(valid) < CALIBRATION_BLOCKS:
        seen = f"{number_of(len(valid), 'valid block')}{_discard_note(discarded)}"
        why = f"{seen} of the incumbent against itself; {CALIBRATION_BLOCKS} are needed"
        return CheckResult(**facts, verdict=Verdict.INCONCLUSIVE, why=why)
    outcome = judge(metric, valid, (len(valid),), client_error=client_error)
    if outcome.sd is None or outcome.ci_low is None or outcome.ci_high is None or outcome.ratio is None:
        return CheckResult(**facts, verdict=Verdict.INCONCLUSIVE, why=outcome.why)
    facts["value"] = outcome.sd
    # the arms are the same engine, so a bias may show on either side
    away = max(outcome.ci_low, 1.0 / outcome.ci_high)
    seen = number_of(outcome.n_blocks, "block") + _discard_note(discarded)
    if away > 1 + metric.margin:
        why = (
            f"the incumbent differs from itself by {max(outcome.ratio, 1 / outcome.ratio):.2f}x "
            f"(at least {away:.2f}x, 95% sure) over {seen}: the bench favours one arm; "
            "look for what else runs, and at the order of the arms"
        )
        return CheckResult(**facts, verdict=Verdict.FAIL, why=why)
    if outcome.final:
        return CheckResult(**facts, verdict=Verdict.INCONCLUSIVE, why=outcome.why)
    percent = f"{100 * (math.exp(outcome.sd) - 1):.1f}%"
    if outcome.sd > largest:
        needed = blocks_for_power(outcome.sd, metric.margin, alpha=alpha)
        # the chance depends on ln(1 + margin) / sd only, so one solution scales to every sd
        per_sd = math.log1p(0.10) / _largest_sd(0.10, looks[-1], alpha)
        reachable = math.ceil(100 * math.expm1(per_sd * outcome.sd))
        why = (
            f"the incumbent against itself varies by {percent} from block to block: an equal engine needs {needed} "
            f"blocks for a 90% chance to pass a {100 * metric.margin:g}% margin, the plan has {looks[-1]}; quiet the "
            "machine, or plan more blocks"
        )
        why += f", or allow {reachable}%" if is_near(1 + reachable / 100, 1 + metric.margin) else ""
        return CheckResult(**facts, verdict=Verdict.INCONCLUSIVE, why=why)
    why = (
        f"the incumbent against itself varies by {percent} from block to block over {seen}: quiet "
        f"enough to judge a {100 * metric.margin:g}% margin within {number_of(looks[-1], 'block')}"
    )
    return CheckResult(**facts, verdict=Verdict.PASS, why=why)


def _largest_sd(margin: float, n_blocks: int, alpha: float) -> float:
    """The block standard deviation at which `n_blocks` give an equal engine the chance POWER to pass."""
    low, high = 0.0, 10.0 * math.log1p(margin) * math.sqrt(n_blocks)
    for _ in range(40):
        middle = (low + high) / 2
        enough = pass_chance(middle, margin, n_blocks, alpha=alpha) >= POWER
        low, high = (middle, high) if enough else (low, middle)
    return low


def _valid(blocks: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[str]]:
    """The blocks that count, by index, and why the others were discarded."""
    missing = [name for name in ("index", "incumbent", "candidate") if any(name not in block for block in blocks)]
    if missing:
        raise BadInput(
            f"a block lacks {', '.join(missing)}: it needs index, order, incumbent, candidate, foreign_cpu, void"
        )
    indices = [block["index"] for block in blocks]
    if len(set(indices)) != len(indices):
        twice = sorted({index for index in indices if indices.count(index) > 1})
        raise BadInput(f"block {twice[0]} occurs twice: each block is counted once")
    counted = sorted((block for block in blocks if block.get("void") is None), key=lambda block: block["index"])
    return counted, [str(block["void"]) for block in blocks if block.get("void") is not None]


def _levels(metric: Metric, block: Mapping[str, Any]) -> tuple[float, float]:
    """The metric's quantile of the incumbent's and of the candidate's samples in one block."""
    return _level(metric, block, "incumbent"), _level(metric, block, "candidate")


def _level(metric: Metric, block: Mapping[str, Any], arm: str) -> float:
    where = f"block {block['index']}, {arm}, {metric.key}"
    samples = block[arm].get(metric.key) or []
    if not samples:
        raise NoMeasurement(f"{where}: no samples")
    if bad := [sample for sample in samples if sample is None or not (math.isfinite(sample) and sample > 0)]:
        raise BadInput(f"{where}: {bad[0]} is not a positive number; a request without a measurement has no sample")
    return percentile(samples, metric.quantile)


def _harm(metric: Metric, incumbent: float, candidate: float) -> float:
    log_ratio = math.log(candidate / incumbent)
    return -log_ratio if metric.higher_is_better else log_ratio


def _foreign_difference(block: Mapping[str, Any]) -> float | None:
    """Candidate's foreign CPU share minus incumbent's, None where either was not measured."""
    shares = block.get("foreign_cpu") or {}
    incumbent, candidate = shares.get("incumbent"), shares.get("candidate")
    return None if incumbent is None or candidate is None else candidate - incumbent


def _estimate(log_ratios: Sequence[float], foreign: Sequence[float | None]) -> _Estimate:
    """The mean log ratio and its standard error, adjusted for foreign CPU load where that is safe and helps."""
    n = len(log_ratios)
    sd = statistics.stdev(log_ratios)
    plain = _Estimate(statistics.fmean(log_ratios), sd / math.sqrt(n), n - 1, sd)
    known = [share for share in foreign if share is not None]
    if n < COVARIATE_MIN_BLOCKS or len(known) < n:
        return plain
    return _adjusted(log_ratios, known) or plain


def _adjusted(log_ratios: Sequence[float], foreign: Sequence[float]) -> _Estimate | None:
    """d at equal foreign load: the intercept of d = a + theta * x. None where it must not be used.

    Centred at x = 0, where both arms meet the same load, not at the mean of x: the centred form leaves the mean of d
    as it was and only shrinks its error, so another process that hit one arm would be taken for that arm's own speed.
    Used only from 12 blocks on, where load slows (theta above 0, one-sided 99%), taking it out leaves less variance,
    and load did not follow the candidate (mean x above 0, 97.5%): it may be the candidate's own. Load that
    followed the incumbent is taken out, since it flatters the candidate.
    """
    n = len(log_ratios)
    mean_x, mean_d = statistics.fmean(foreign), statistics.fmean(log_ratios)
    sum_xx = sum((x - mean_x) ** 2 for x in foreign)
    if sum_xx <= 0:
        return None
    theta = sum((x - mean_x) * (d - mean_d) for x, d in zip(foreign, log_ratios, strict=True)) / sum_xx
    rest = [d - mean_d - theta * (x - mean_x) for x, d in zip(foreign, log_ratios, strict=True)]
    sd = math.sqrt(sum(r * r for r in rest) / (n - 2))
    slows = theta > t_quantile(COVARIATE_CONFIDENCE, n - 2) * sd / math.sqrt(sum_xx)
    follows_candidate = mean_x > t_quantile(0.975, n - 1) * math.sqrt(sum_xx / (n - 1) / n)
    error = sd * math.sqrt(1 / n + mean_x**2 / sum_xx)
    if not slows or follows_candidate or sd >= statistics.stdev(log_ratios):
        return None
    return _Estimate(mean_d - theta * mean_x, error, n - 2, sd, adjusted=True)


def _blocks_needed(metric: Metric, estimate: _Estimate, n_valid: int, looks_left: Sequence[int]) -> int | None:
    """Further blocks for a 90% chance to pass if the ratio stays as it is; None where it is at or over the limit.

    J = ((1.645 + 1.282) * s / (ln(1 + margin) - d))^2 in all, and never fewer than the next look asks for.
    """
    room = metric.limit - estimate.mean
    if room <= 0:
        return None
    z = normal_quantile(1 - ALPHA) + normal_quantile(POWER)
    total = math.ceil((z * estimate.sd / room) ** 2)
    return max(total, looks_left[0] if looks_left else n_valid + 1) - n_valid


def _what_would_settle(metric: Metric, further: int | None) -> str:
    limit = f"the limit {_limit(metric)} lies between"
    if further is None:
        return f"{limit}, and the candidate as measured is over it"
    if further > HOPELESS_BLOCKS:
        return f"{limit}, and the candidate as measured is too close to it to be settled by measuring more"
    return f"{limit}; about {number_of(further, 'more block')} would settle it if the ratio stays"


def _says(metric: Metric, estimate: _Estimate, low: float, high: float, level_a: float, level_b: float) -> str:
    """What was seen, in words: how many times worse, from which values, and how sure that is."""
    ratio = math.exp(estimate.mean)
    if metric.higher_is_better:
        pair = f"incumbent {ratio:.2f}x the candidate ({figure(level_a)} against {quantity(level_b, metric.unit)})"
    else:
        pair = f"candidate {ratio:.2f}x the incumbent ({figure(level_b)} against {quantity(level_a, metric.unit)})"
    return f"{pair}, {_times(low)} to {_times(high)} with 95% confidence on each side"


def _limit(metric: Metric) -> str:
    return quantity(1 + metric.margin, "ratio")


def _times(log_ratio: float) -> str:
    ratio = _finite_exp(log_ratio)
    return "any" if ratio is None else f"{ratio:.2f}x"


def _too_fine(metric: Metric, level: float, client_error: float) -> str:
    return (
        f"a margin of {100 * metric.margin:g}% of {quantity(level, metric.unit)} is under {CLIENT_ERROR_FACTOR:g} "
        f"times the measuring client's own error ({quantity(client_error, metric.unit)}, p99): measure longer work"
    )


def _undecided(facts: Mapping[str, Any], why: str, **numbers: Any) -> MetricOutcome:
    nothing: dict[str, Any] = {"ratio": None, "ci_low": None, "ci_high": None, "sd": None, "blocks_needed": None}
    return MetricOutcome(**facts, **(nothing | numbers), verdict=Verdict.INCONCLUSIVE, why=why)


def _obrien_fleming(looks: Sequence[int], constant: float) -> tuple[float, ...]:
    return tuple(constant * math.sqrt(looks[-1] / look) for look in looks)


def _finite_exp(log_ratio: float) -> float | None:
    """The ratio, None where it is too large for a float: two wild blocks bound nothing."""
    return math.exp(log_ratio) if log_ratio < 700 else None


def _discard_note(reasons: Sequence[str]) -> str:
    """How many blocks were discarded, and the latest cause; nothing without any."""
    return f" ({len(reasons)} discarded and not counted, the last because {reasons[-1]})" if reasons else ""
