"""The first look at a pair of engines: a few pairs of requests, enough to see a candidate that is hopelessly slow.

Both engines are up where both fit into memory, and answer the same prompt in turns, so that whatever else the machine
does slows both. A FAIL here must not be overturned by the blocks of `tasks.evidence.performance`, which restart the
engines: the whole interval has to lie beyond the limit by more than a restart changes. Where the mean does and the
interval does not, as on a busy machine, more pairs are asked once.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engines.client.load import measure
from engines.settings import Endpoint
from engines.units import figure, number_of
from tasks.evidence.engine_under_test import Arm
from tasks.evidence.performance import Workload, body, prompt
from tasks.verdicts.limits import Limits
from tasks.verdicts.statistics import t_quantile
from tasks.verdicts.verdict import CheckResult, Verdict, not_measured

CHECK = "performance.first_look"
PAIRS = 5
MORE_PAIRS = 10
TOKENS = 8
CONFIDENCE = {PAIRS: 0.999, MORE_PAIRS: 0.9999}  # the second look adds little to what the first may err
# a process keeps its speed for as long as it lives: restarts of one engine differed by up to 30% on a busy machine
RESTARTS = 1.5
METRICS = (("ttft_ms", "ttft_p50_ratio"), ("tpot_ms", "tpot_p50_ratio"), ("e2e_ms", "e2e_p50_ratio"))
CANNOT_PROVE = (
    "speed within a factor of 1.5 of the limits: 5 requests to one process of each engine, no restarts",
    "answers: 3 prompts show garbage, not a few per cent of other tokens",
    "the API: one behaviour of each group of those required",
    "tool calls: how often a tool is called, and whether the arguments are valid, is not asked",
    "memory, stability and faults: nothing was soaked, killed or weighed",
)
Ask = Callable[[int], dict[str, Any]]  # the record of a request, by its number


def whole_or_first(evidence: Callable[[Arm, str], Any], kind: str) -> list[Any]:
    """Both engines' parity evidence of a kind (incumbent first), or that of a first look where one of them has none."""
    arms: tuple[Arm, Arm] = ("incumbent", "candidate")
    whole, first = ([evidence(arm, f"parity.{name}") for arm in arms] for name in (kind, f"first_{kind}"))
    return first if None in whole else whole


def timed_request(endpoint: Endpoint, workload: Workload, extra: Mapping[str, object], number: int) -> dict[str, Any]:
    """One request's times in ms (None where it has none), its error and its raw record; `number` chooses the prompt."""
    asked = body(prompt(workload.prompt_words, f"First look {number}", workload.seed), TOKENS, extra)
    (record,) = measure(endpoint, [asked], keep_text=False)
    times = {name: record.measured(name) if record.ok else None for name, _ in METRICS}
    return {**times, "error": record.error_type, "record": record.to_dict()}


def measure_pairs(incumbent: Ask, candidate: Ask, limits: Limits, *, in_turns: bool) -> list[dict[str, Any]]:
    """Pairs of records after one warm-up each, `PAIRS` of them: one engine after the other, or pair by pair `in_turns`.

    In turns `MORE_PAIRS`, where the first ones leave open whether the candidate is beyond a limit.
    """
    asks = {"incumbent": incumbent, "candidate": candidate}
    if not in_turns:
        alone = {arm: [ask(number) for number in range(PAIRS + 1)][1:] for arm, ask in asks.items()}
        return [dict(zip(alone, pair, strict=True)) for pair in zip(*alone.values(), strict=True)]
    for ask in asks.values():
        ask(0)
    pairs: list[dict[str, Any]] = []
    for number in range(1, MORE_PAIRS + 1):
        if len(pairs) == PAIRS and not _left_open(pairs, limits):
            break
        order = list(asks)[:: 1 if number % 2 else -1]
        pairs.append({arm: asks[arm](number) for arm in order})
    return pairs


def judge_pairs(pairs: Sequence[Mapping[str, Any]], limits: Limits) -> CheckResult:
    """FAIL where a ratio is beyond its limit for certain; else a figure that does not hold the gate."""
    said = []
    for ratio in (found := _ratios(pairs, limits)):
        what = f"{ratio.name.removesuffix('_ms').upper()} {figure(ratio.mean)}x"
        bound = f" (at least {figure(ratio.low)}x; limit {figure(ratio.limit)}x)"
        said.append(what + bound * ratio.beyond)
    if not said:
        return not_measured(CHECK, "too few of its requests were answered", required=False)
    why = f"candidate against incumbent over {number_of(len(pairs), 'pair')} of requests: {', '.join(said)}"
    if any(ratio.beyond for ratio in found):
        return CheckResult(check=CHECK, verdict=Verdict.FAIL, why=f"{why}; more blocks would not change that")
    return CheckResult(check=CHECK, verdict=Verdict.INCONCLUSIVE, why=f"{why}; blocks decide", required=False)


@dataclass(frozen=True)
class _Ratio:
    """A metric of the candidate over that of the incumbent: the geometric mean and the lower end of its interval."""

    name: str
    limit: float
    mean: float
    low: float

    @property
    def beyond(self) -> bool:
        return self.low > self.limit * RESTARTS


def _left_open(pairs: Sequence[Mapping[str, Any]], limits: Limits) -> bool:
    """Whether a ratio looks beyond its limit, and none is for certain."""
    found = _ratios(pairs, limits)
    return any(ratio.mean > ratio.limit * RESTARTS for ratio in found) and not any(ratio.beyond for ratio in found)


def _ratios(pairs: Sequence[Mapping[str, Any]], limits: Limits) -> list[_Ratio]:
    """One per metric for which no more than one of the first pairs is lost."""
    found, confidence = [], CONFIDENCE[PAIRS if len(pairs) <= PAIRS else MORE_PAIRS]
    for name, limit_name in METRICS:
        ratios = [
            math.log(pair["candidate"][name] / pair["incumbent"][name])
            for pair in pairs
            if all(pair[arm].get(name) for arm in ("candidate", "incumbent"))
        ]
        if len(ratios) < PAIRS - 1:
            continue
        mean, spread = statistics.fmean(ratios), statistics.stdev(ratios) / math.sqrt(len(ratios))
        low = mean - t_quantile(confidence, len(ratios) - 1) * spread
        found.append(_Ratio(name, getattr(limits, limit_name), math.exp(mean), math.exp(low)))
    return found
