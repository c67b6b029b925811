"""Judge a candidate by live traffic: the requests of a canary, and the copies of a shadow.

Live requests are not chosen, so they are made comparable first. A block of the gate is a stretch of time that holds
`block_requests` answers of each engine: what slows the machine slows both arms of a block. Within a block, times are
brought to one prompt size along a straight line in logarithms (Theil and Sen's slope, from pairs of one engine's own
requests). From there on it is the gate of `tasks.verdicts.noninferiority`, at planned looks: the canary analysis may
ask as often as it likes. The first look that fails, else the first that passes, stands. Live traffic does not end
with the plan's last look: further ones follow, each at twice the blocks of the one before (see `_schedule`).

First tokens are compared where the candidate's prompts lie in its cache as often as the incumbent's. Where they do not,
that is a finding of its own, which the plan may accept.

What this cannot prove, and phase 1 can: every block is of the same start of both engines, and starts differ by 9 to
14% on a small machine; the candidate answers only its share, so it was not seen under the whole load; conversations
are dealt to engines, not requests, so a few odd conversations look like an engine; one that moves to the candidate
comes without its cached prompt, once; a client that leaves makes no sample, and times are per content chunk: an engine
that sends several tokens in one looks slower than it is.

Which conversations the candidate answers, and that they stay with it (sticky), is decided in engines/yard/route.py.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engines.errors import BadInput
from engines.units import number_of, quantity
from tasks.evidence.parity.compare import compare_answers
from tasks.evidence.parity.judge import judge_answers
from tasks.verdicts.limits import PROMPT_TOKENS_SHARE, CanaryLimits
from tasks.verdicts.noninferiority import ALPHA, Metric, MetricOutcome, judge, look_bounds
from tasks.verdicts.statistics import (
    clopper_pearson_lower,
    clopper_pearson_upper,
    newcombe_upper,
    normal_quantile,
    wilson,
)
from tasks.verdicts.verdict import CheckResult, Verdict, at_least, decided, gate, not_measured

LiveSample = Mapping[str, Any]
SURE = 0.9999  # judged all the time: simulated over 4000 requests, equal engines fail in under 1% of canaries
LEAST_RATIO = 1.01  # non-inferiority needs a margin, however small
FEWEST = 3  # failures; two can fall together by chance on any engine
HOPELESS = 0.05  # surely failing more often than this needs no incumbent's figures
MOST_ASKED = 1_000_000
COPIES_FAILED = 0.05
SIZES_APART = 0.2  # ln of prompt sizes: nearer ones give no slope
STEEPEST = 1.5  # a time grows no faster than that with the prompt, attention included
MOST_PAIRED = 100  # requests of an engine in one block whose pairs are looked at
WARM = 0.5  # of its prompt in the cache: a request that was answered from it
FEWER_WARM = 0.2  # the share of requests by which the candidate may be behind before first tokens cannot be compared
FURTHER_LOOKS = 8  # after the plan's last one: 256 times its blocks
FURTHER_ALPHA = 0.01  # of the 5%: kept for the further looks, halved from one to the next
CLIENTS_FAULT = re.compile(r"HTTP 4\d\d$")


@dataclass(frozen=True)
class _Share:
    """How many of how many, on each engine."""

    hits: int
    asked: int
    incumbent_hits: int
    incumbent_asked: int

    @property
    def excess(self) -> float:
        """The candidate's share over the incumbent's; an incumbent that was not asked has none."""
        theirs = self.incumbent_hits / self.incumbent_asked if self.incumbent_asked else 0.0
        return self.hits / self.asked - theirs

    def is_clear(self, margin: float) -> bool:
        """Whether the candidate is surely worse by more than the margin.

        Were both equally prone, each hit would fall on the candidate by its share of what was asked: the exact
        conditional test of the soak. Where the incumbent was hardly asked, the candidate's own share must exceed
        HOPELESS, and what the incumbent's few answers leave possible.
        """
        if self.hits < FEWEST or self.excess <= margin:
            return False
        by_chance = self.asked / (self.asked + self.incumbent_asked)
        falls_here = clopper_pearson_lower(self.hits, self.hits + self.incumbent_hits, SURE)
        theirs = wilson(self.incumbent_hits, self.incumbent_asked, 0.90)[1] if self.incumbent_asked else 0.0
        return falls_here > by_chance or clopper_pearson_lower(self.hits, self.asked, SURE) > max(HOPELESS, theirs)

    @property
    def least_excess(self) -> float:
        """What the candidate's share is surely above the incumbent's by; -1 where nothing is sure."""
        if not self.asked or not self.incumbent_asked:
            return -1.0
        return -newcombe_upper(self.incumbent_hits, self.incumbent_asked, self.hits, self.asked, SURE)

    def upper(self, more: int = 0) -> float:
        """The 95% upper bound of the excess, after `more` clean ones."""
        return newcombe_upper(self.hits, self.asked + more, self.incumbent_hits, self.incumbent_asked)

    def more_needed(self, margin: float) -> int | None:
        """How many clean answers of the candidate would bring the bound within the margin; None: no number would."""
        if self.upper(MOST_ASKED) > margin:
            return None
        return bisect.bisect_left(range(MOST_ASKED), True, key=lambda more: self.upper(more) <= margin)


def judge_canary(
    samples: Sequence[LiveSample], incumbent: str, candidate: str, limits: CanaryLimits
) -> list[CheckResult]:
    """The checks on the live requests since the canary began; each sample as the yard's `Sample`, as a dict.

    An answer that is the client's own fault (HTTP 4xx) counts for neither engine; a candidate that refuses clearly
    more conversations than the incumbent is another matter (`canary.refused`). Raises BadInput where both are the same.
    """
    if incumbent == candidate:
        raise BadInput(f"a canary compares two engines, and both are {incumbent}")
    ours = sorted((s for s in samples if s["engine"] == candidate), key=lambda sample: sample["at"])
    theirs = sorted((s for s in samples if s["engine"] == incumbent), key=lambda sample: sample["at"])
    answered, incumbent_answered = ([s for s in arm if not _clients_fault(s)] for arm in (ours, theirs))
    streamed, incumbent_streamed = _streamed(answered), _streamed(incumbent_answered)
    cache = _judge_cache(answered, incumbent_answered, limits)
    first_token = _judge_speed("ttft", answered, incumbent_answered, limits.ttft_p50_ratio, limits)
    if cache.verdict is Verdict.FAIL and limits.accepts_no_cache:
        why = f"{first_token.why}; reported only: most prompts lay in the incumbent's cache, which the candidate lacks"
        first_token = first_token.model_copy(update={"required": False, "why": why})
    failed = _share(answered, incumbent_answered, lambda sample: not sample["ok"])
    empty = _share(streamed, incumbent_streamed, lambda sample: bool(sample["empty"]))
    margin = limits.failure_rate_margin
    return [
        _judge_share("canary.error_rate", failed, margin, f"requests failed{_kinds(answered)}"),
        _judge_share("canary.silent_empty", empty, margin, "streams ended well without a token"),
        _judge_refused(ours, theirs, margin),
        cache,
        first_token,
        _judge_speed("tpot", answered, incumbent_answered, limits.tpot_p50_ratio, limits),
    ]


def judge_shadow(pairs: Sequence[Mapping[str, Any]]) -> list[CheckResult]:
    """Parity's own checks on live answers and on what the candidate answered to copies of their requests.

    Each pair is `{"sampled": bool, "incumbent": answer, "candidate": answer}`, an answer as `measure_answers` keeps it,
    without logprobs. Answers drawn with a temperature differ by themselves: of those only degenerate text and unknown
    finish reasons count. The checks are called `shadow.*` and stand beside `parity.*`, which sees logprobs as well.
    """
    compared = [pair for pair in pairs if not pair["incumbent"]["error"] and not pair["candidate"]["error"]]
    greedy = [pair for pair in compared if not pair["sampled"]]
    every = {r.check: r for r in judge_answers(_comparison(compared))}
    alike = {r.check: r for r in judge_answers(_comparison(greedy))}
    results = [
        _judge_copies(pairs),
        _judge_sizes(compared),
        every["parity.degenerate"],
        alike["parity.finish_reason"],
        alike["parity.mean_length_ratio"],
        alike["parity.exact_match"],
    ]
    return [result.model_copy(update={"check": result.check.replace("parity.", "shadow.")}) for result in results]


def canary_judge(limits: CanaryLimits) -> Callable[[Sequence[LiveSample], str, str], dict[str, Any]]:
    """The yard's judge of a canary: samples, incumbent, candidate in, `judgement` out."""
    _schedule(limits.looks)  # half a second of arithmetic, kept: now, and not beside the first user's stream
    return lambda samples, incumbent, candidate: judgement(judge_canary(samples, incumbent, candidate, limits))


def shadow_judge() -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
    """The yard's judge of a shadow: pairs of answers in, `judgement` out."""
    return lambda pairs: judgement(judge_shadow(pairs))


def judgement(results: Sequence[CheckResult]) -> dict[str, Any]:
    """What the yard acts on and shows: `verdict`, `why` (the checks that hold it) and every check, all plain."""
    verdict = gate(results)
    holding = [result for result in results if result.required and result.verdict is verdict]
    return {
        "verdict": str(verdict),
        "why": "; ".join(f"{result.check}: {result.why}" for result in holding) or "nothing was measured",
        "checks": [result.model_dump(mode="json") for result in results],
    }


# --- failures --------------------------------------------------------------------------------------------------------


def _clients_fault(sample: LiveSample) -> bool:
    return not sample["ok"] and CLIENTS_FAULT.match(sample["error"] or "") is not None


def _streamed(samples: Iterable[LiveSample]) -> list[LiveSample]:
    """Streams that ended well: only of those does the yard know whether they had a token."""
    return [sample for sample in samples if sample["ok"] and (sample["empty"] or sample["ttft_ms"] is not None)]


def _share(ours: Sequence[LiveSample], theirs: Sequence[LiveSample], hit: Callable[[LiveSample], bool]) -> _Share:
    return _Share(sum(map(hit, ours)), len(ours), sum(map(hit, theirs)), len(theirs))


def _kinds(samples: Iterable[LiveSample]) -> str:
    kinds = {str(sample["error"])[:80] for sample in samples if not sample["ok"]}
    return f" ({'; '.join(sorted(kinds)[:3])})" if kinds else ""


def _judge_share(check: str, share: _Share, margin: float, what: str) -> CheckResult:
    """PASS once the excess is surely within the margin, FAIL as soon as it is surely beyond."""
    if not share.asked:
        return not_measured(check, "the candidate answered nothing yet", limit=margin, unit="share")
    why = f"{share.hits} of {share.asked} {what}, on the incumbent {share.incumbent_hits} of {share.incumbent_asked}"
    verdict = Verdict.INCONCLUSIVE
    if share.is_clear(margin):
        verdict, why = Verdict.FAIL, f"{why}: clearly more than {margin:.1%} above"
    elif not share.incumbent_asked:
        why += ": nothing to compare with"
    elif (upper := share.upper()) <= margin:
        verdict, why = Verdict.PASS, f"{why}, with 95% confidence at most {upper:.2%} above"
    else:
        more = share.more_needed(margin)
        settle = (
            "no number of clean answers would settle it" if more is None else f"{more} more clean answers are needed"
        )
        why += f", with 95% confidence at most {upper:.2%} above; {settle} for {margin:.1%}"
    return CheckResult(check=check, verdict=verdict, value=share.excess, limit=margin, unit="share", why=why)


def _judge_refused(ours: Sequence[LiveSample], theirs: Sequence[LiveSample], margin: float) -> CheckResult:
    """Whether the candidate refuses (HTTP 4xx) what the incumbent takes; by conversation: one client repeats itself."""
    share = _Share(*_conversations(ours), *_conversations(theirs))
    if not share.asked:
        return not_measured("canary.refused", "the candidate answered nothing yet", unit="share")
    why = (
        f"{share.hits} of {number_of(share.asked, 'conversation')} met HTTP 4xx, on the incumbent "
        f"{share.incumbent_hits} of {share.incumbent_asked}"
    )
    verdict = Verdict.FAIL if share.is_clear(margin) else Verdict.PASS
    return CheckResult(check="canary.refused", verdict=verdict, value=share.excess, unit="share", why=why)


def _conversations(samples: Sequence[LiveSample]) -> tuple[int, int]:
    """Conversations that met a 4xx, and all of them."""
    known = [sample for sample in samples if sample["conversation"]]  # a request lost with its engine has none
    return len({s["conversation"] for s in known if _clients_fault(s)}), len({s["conversation"] for s in known})


def _judge_cache(ours: Sequence[LiveSample], theirs: Sequence[LiveSample], limits: CanaryLimits) -> CheckResult:
    """Whether the candidate's prompts lie in its cache as often as the incumbent's do.

    Holds the gate only where they clearly do not and the plan does not accept it: few repeated prompts prove nothing.
    Cold prompts are no failures: every engine has them, and only the difference counts.
    """
    check = "canary.prompt_cache"
    known, incumbent = ([s for s in arm if s.get("cached_share") is not None] for arm in (ours, theirs))
    if not known or not incumbent:
        silent = "incumbent" if known else "candidate"
        return not_measured(check, f"the {silent} does not say what lay in its cache", unit="share", required=False)
    if all(later := [_later(arm) for arm in (known, incumbent)]):
        known, incumbent = later
    cold = _share(known, incumbent, lambda sample: sample["cached_share"] < WARM)
    fails = cold.least_excess > FEWER_WARM
    why = (
        f"{cold.asked - cold.hits} of {number_of(cold.asked, 'prompt')} lay in the candidate's cache for the most "
        f"part, {cold.incumbent_asked - cold.incumbent_hits} of {cold.incumbent_asked} in the incumbent's"
    )
    if fails:
        why += "; a conversation waits for its whole prompt at every turn"
        why += ", which the plan accepts" if limits.accepts_no_cache else ""
    return CheckResult(
        check=check,
        verdict=Verdict.FAIL if fails else Verdict.PASS,
        value=cold.excess,
        limit=FEWER_WARM,
        unit="share",
        why=why,
        required=fails and not limits.accepts_no_cache,
    )


def _later(samples: Sequence[LiveSample]) -> list[LiveSample]:
    """Those of conversations that this engine has answered before: one that is new to it comes without its prompt."""
    seen, later = set[str](), list[LiveSample]()
    for sample in samples:
        if sample["conversation"] in seen:
            later.append(sample)
        seen.add(sample["conversation"])
    return later


# --- speed -----------------------------------------------------------------------------------------------------------


def _judge_speed(
    name: str, ours: Sequence[LiveSample], theirs: Sequence[LiveSample], ratio: float, limits: CanaryLimits
) -> CheckResult:
    check, key = f"canary.{name}_p50_ratio", f"{name}_ms"
    ratio = max(ratio, LEAST_RATIO)
    metric = Metric(name=f"{name}_p50", samples=key, quantile=0.5, margin=ratio - 1, unit="ms")
    warm = _measured(ours, key)[limits.warm_up :]
    incumbent = _measured(theirs, key)
    fewest = min(len({s["conversation"] for s in arm}) for arm in (warm, incumbent))
    if not warm or not incumbent:
        needed = limits.looks[0] * limits.block_requests
        why = (
            f"{len(warm)} streamed answers with a time, on the incumbent {len(incumbent)}: {needed} of each are needed"
        )
        return not_measured(check, why, limit=ratio, unit="ratio")
    outcome = _first_decision(metric, _blocks(warm, incumbent, key, limits.block_requests), limits.looks)
    result = outcome.check_result().model_copy(update={"check": check})
    if fewest < limits.min_conversations:
        seen = number_of(fewest, "conversation")
        why = f"{result.why}; from {seen} on one engine, {limits.min_conversations} are needed"
        return result.model_copy(update={"verdict": Verdict.INCONCLUSIVE, "why": why})
    if outcome.blocks_needed is not None and result.verdict is Verdict.INCONCLUSIVE:
        more = outcome.blocks_needed * limits.block_requests
        return result.model_copy(update={"why": f"{result.why}; that is {more} more streamed answers of each engine"})
    return result


def _measured(samples: Sequence[LiveSample], key: str) -> list[LiveSample]:
    """The answers that have this time; a stream that came in one piece has a TPOT of 0, which is none."""
    return [s for s in samples if s["ok"] and s[key] is not None and s[key] > 0 and s["prompt_tokens"] > 0]


def _first_decision(metric: Metric, blocks: Sequence[Mapping[str, Any]], looks: Sequence[int]) -> MetricOutcome:
    """The gate at each look that was reached, as one sequence: FAIL wins, then the first PASS, then the last word."""
    every, bounds = _schedule(tuple(looks))
    reached = [look for look in every if look <= len(blocks)]
    seen = [blocks[:look] for look in reached[:-1]] + [blocks]
    outcomes = [judge(metric, some, every, bounds=bounds) for some in seen]
    decisive = (one for wanted in (Verdict.FAIL, Verdict.PASS) for one in outcomes if one.verdict is wanted)
    return next(decisive, outcomes[-1])


@functools.cache
def _schedule(looks: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The plan's looks and those that follow while traffic does, with the z bound of each.

    By the union bound a candidate at the limit passes in under 5%: the plan's looks spend 4% between them, as O'Brien
    and Fleming would, the further ones 0.5%, 0.25% and so on.
    """
    steps = range(1, FURTHER_LOOKS + 1)
    bounds = [normal_quantile(1 - FURTHER_ALPHA / 2**step) for step in steps]
    return (*looks, *(looks[-1] * 2**step for step in steps)), (*look_bounds(looks, ALPHA - FURTHER_ALPHA), *bounds)


def _blocks(
    ours: Sequence[LiveSample], theirs: Sequence[LiveSample], key: str, block_requests: int
) -> list[dict[str, Any]]:
    """Successive stretches of time, each closed as soon as it holds `block_requests` of each engine.

    A block depends on nothing that comes after it, so a verdict does not move under later traffic.
    """
    blocks: list[dict[str, Any]] = []
    arms: dict[str, list[LiveSample]] = {"incumbent": [], "candidate": []}
    stamped = itertools.chain(((s, "incumbent") for s in theirs), ((s, "candidate") for s in ours))
    for sample, arm in sorted(stamped, key=lambda pair: pair[0]["at"]):
        arms[arm].append(sample)
        if min(map(len, arms.values())) >= block_requests:
            index = len(blocks)
            blocks.append({"index": index, "order": "AB", "foreign_cpu": {}, "void": None, **_levelled(arms, key)})
            arms = {"incumbent": [], "candidate": []}
    return blocks


def _levelled(arms: Mapping[str, Sequence[LiveSample]], key: str) -> dict[str, dict[str, list[float]]]:
    """Each arm's times as they would be at the block's middle prompt size."""
    sizes = {arm: np.log([float(s["prompt_tokens"]) for s in samples]) for arm, samples in arms.items()}
    times = {arm: np.log([float(s[key]) for s in samples]) for arm, samples in arms.items()}
    slope = _slope([(sizes[arm], times[arm]) for arm in arms])
    middle = float(np.median(np.concatenate(list(sizes.values()))))
    return {arm: {key: np.exp(times[arm] - slope * (sizes[arm] - middle)).tolist()} for arm in arms}


def _slope(arms: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Change of ln time per ln prompt tokens: the median over pairs of one engine's requests of different size."""
    slopes = []
    for sizes, times in arms:
        step = max(1, math.ceil(len(sizes) / MOST_PAIRED))
        x, y = sizes[::step], times[::step]
        first, second = np.triu_indices(len(x), 1)
        apart = x[second] - x[first]
        far = np.abs(apart) > SIZES_APART
        slopes.append((y[second] - y[first])[far] / apart[far])
    found = np.concatenate(slopes)
    return float(np.clip(np.median(found), 0.0, STEEPEST)) if len(found) else 0.0


# --- copies ----------------------------------------------------------------------------------------------------------


def _comparison(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    arms = (
        {"answers": [{**pair[arm], "id": str(n)} for n, pair in enumerate(pairs)]} for arm in ("incumbent", "candidate")
    )
    return compare_answers(*arms)


def _judge_copies(pairs: Sequence[Mapping[str, Any]]) -> CheckResult:
    """Copies that the candidate failed on, of requests that the incumbent answered; 59 clean ones bound them at 5%."""
    check = "shadow.failed"
    if not pairs:
        return not_measured(check, "no request was copied yet", limit=COPIES_FAILED, unit="share")
    failed = [pair["candidate"]["error"] for pair in pairs if pair["candidate"]["error"]]
    upper = clopper_pearson_upper(len(failed), len(pairs))
    why = f"{len(failed)} of {number_of(len(pairs), 'copy')} failed" + (f" ({failed[0][:80]})" if failed else "")
    why += f", with 95% confidence at most {upper:.1%}, limit {quantity(COPIES_FAILED, 'share')}"
    surely = len(failed) >= FEWEST and clopper_pearson_lower(len(failed), len(pairs)) > COPIES_FAILED
    verdict = decided(fails=surely, passes=upper <= COPIES_FAILED)
    return CheckResult(check=check, verdict=verdict, value=upper, limit=COPIES_FAILED, unit="share", why=why)


def _judge_sizes(pairs: Sequence[Mapping[str, Any]]) -> CheckResult:
    """Prompts read as equally many tokens, where the client asked for usage."""
    counts = [(pair["incumbent"]["prompt_tokens"], pair["candidate"]["prompt_tokens"]) for pair in pairs]
    known = [(ours, theirs) for ours, theirs in counts if ours is not None and theirs is not None]
    limit = PROMPT_TOKENS_SHARE
    if not known:
        why = "no pair of answers with usage: clients did not ask for it"
        return not_measured("shadow.prompt_tokens", why, limit=limit, unit="share", required=False)
    equal = sum(ours == theirs for ours, theirs in known)
    why = f"{equal} of {number_of(len(known), 'prompt')} read as equally many tokens"
    return at_least("shadow.prompt_tokens", equal / len(known), limit=limit, unit="share", why=why)
