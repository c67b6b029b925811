"""The first look at a pair of engines: a few pairs of requests, enough to see a candidate that is hopelessly slow.

Both engines are up where both fit into memory, and answer the same prompt in turns, so that whatever else the machine
does slows both. A FAIL here must not be overturned by the blocks of `tasks.evidence.performance`, which restart the
engines: the whole interval has to lie beyond the limit by more than a restart changes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
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
TOKENS = 8
CONFIDENCE = 0.999
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


def measure_pairs(incumbent: Ask, candidate: Ask, *, in_turns: bool) -> list[dict[str, Any]]:
    """`PAIRS` pairs of records after one warm-up each: pair by pair `in_turns`, else one engine after the other."""
    asks = {"incumbent": incumbent, "candidate": candidate}
    numbers = range(1, PAIRS + 1)
    if not in_turns:
        alone = {arm: [ask(number) for number in (0, *numbers)][1:] for arm, ask in asks.items()}
        return [dict(zip(alone, pair, strict=True)) for pair in zip(*alone.values(), strict=True)]
    for ask in asks.values():
        ask(0)
    orders = {number: list(asks)[:: 1 if number % 2 else -1] for number in numbers}
    return [{arm: asks[arm](number) for arm in order} for number, order in orders.items()]


def judge_pairs(pairs: Sequence[Mapping[str, Any]], limits: Limits) -> CheckResult:
    """FAIL where a ratio is beyond its limit for certain; else a figure that does not hold the gate."""
    said, failed = [], False
    for name, limit_name in METRICS:
        limit = getattr(limits, limit_name)
        ratios = [
            math.log(pair["candidate"][name] / pair["incumbent"][name])
            for pair in pairs
            if all(pair[arm].get(name) for arm in ("candidate", "incumbent"))
        ]
        if len(ratios) < PAIRS - 1:
            continue
        mean, spread = statistics.fmean(ratios), statistics.stdev(ratios) / math.sqrt(len(ratios))
        low = math.exp(mean - t_quantile(CONFIDENCE, len(ratios) - 1) * spread)
        beyond = low > limit * RESTARTS
        failed |= beyond
        what = f"{name.removesuffix('_ms').upper()} {figure(math.exp(mean))}x"
        said.append(f"{what} (at least {figure(low)}x; limit {figure(limit)}x)" if beyond else what)
    if not said:
        return not_measured(CHECK, "too few of its requests were answered", required=False)
    why = f"candidate against incumbent over {number_of(len(pairs), 'pair')} of requests: {', '.join(said)}"
    if failed:
        return CheckResult(check=CHECK, verdict=Verdict.FAIL, why=f"{why}; more blocks would not change that")
    return CheckResult(check=CHECK, verdict=Verdict.INCONCLUSIVE, why=f"{why}; blocks decide", required=False)
