"""Does the candidate read and answer like the incumbent? In order of cost: prompt tokens, answers, noise, parameters.

Pure: tokens.py, answers.py and parameters.py measured the evidence.
Greedy text differs between two sound engines on the same weights, so text equality is reported and not gated: what is
gated is each engine's distribution at every position up to, and including, the first different token.
"""

from __future__ import annotations

from collections.abc import Sequence

from engines.units import figure, number_of, quantity
from tasks.evidence.parity.asking import Evidence
from tasks.evidence.parity.compare import compare_answers
from tasks.evidence.parity.degenerate import LOOP
from tasks.evidence.parity.parameters import judge_ignored_parameters
from tasks.evidence.parity.tokens import judge_prompt_tokens
from tasks.verdicts.limits import (
    DEFAULT_LIMITS,
    EXCESS_DEGENERATE,
    FLOOR_FACTOR,
    LENGTH_MARGIN,
    LENGTH_REQUIRED_FROM,
    MIN_POSITIONS,
    MIN_PROMPTS,
    UNEXPLAINED_DIVERGENCES,
    Limits,
)
from tasks.verdicts.statistics import binomial_tail
from tasks.verdicts.verdict import CheckResult, Verdict, at_most, decided, not_measured


def judge_parity(
    tokens_incumbent: Evidence,
    tokens_candidate: Evidence,
    answers_incumbent: Evidence | None = None,
    answers_candidate: Evidence | None = None,
    *,
    floors: Sequence[Evidence] = (),
    ignored_incumbent: Evidence | None = None,
    ignored_candidate: Evidence | None = None,
    required_parameters: Sequence[str] = (),
    limits: Limits = DEFAULT_LIMITS,
) -> list[CheckResult]:
    """All parity checks for which there is evidence; the cheap gate first."""
    results = judge_prompt_tokens(tokens_incumbent, tokens_candidate, limits)
    if answers_incumbent and answers_candidate:
        comparison = compare_answers(answers_incumbent, answers_candidate, tie_gap_nats=limits.tie_gap_nats)
        results += judge_answers(comparison, floors, limits)
    if ignored_incumbent and ignored_candidate:
        results += judge_ignored_parameters(ignored_incumbent, ignored_candidate, required_parameters)
    return results


def judge_answers(
    comparison: Evidence, floors: Sequence[Evidence] = (), limits: Limits = DEFAULT_LIMITS
) -> list[CheckResult]:
    """The checks on a `compare_answers`, with the engines' own noise (`measure_floor` of each) as the least limit."""
    return [
        _judge_top1(comparison, limits),
        *_judge_kld(comparison, floors, limits),
        _judge_divergences(comparison, limits),
        _judge_degenerate(comparison, limits),
        _judge_finish(comparison),
        _judge_length(comparison, limits),
        _judge_exact(comparison),
    ]


def _basis(comparison: Evidence) -> str:
    """How much was compared; what could not be compared comes first."""
    differ, errors = len(comparison["prompt_tokens_differ"]), len(comparison["errors"])
    first = f"{number_of(differ, 'prompt')} read as other tokens and left out; " if differ else ""
    first += f"{number_of(errors, 'prompt')} failed ({comparison['errors'][0][:80]}); " if errors else ""
    positions, prompts = comparison["positions"], comparison["prompts_compared"]
    return f"{first}{number_of(positions, 'position')} of {number_of(prompts, 'prompt')}"


def _judge_top1(comparison: Evidence, limits: Limits) -> CheckResult:
    check, share = "parity.top1_agreement", comparison["top1_agreement"]
    if share is None:
        why = f"no logprobs to compare: {_basis(comparison)}"
        return not_measured(check, why, limit=limits.top1_agreement, unit="share")
    low, high = comparison["top1_low"], comparison["top1_high"]
    why = f"{share:.2%} on {_basis(comparison)}, 95% bounds {low:.2%} and {high:.2%}"
    enough = share >= limits.top1_agreement and low >= limits.top1_lower_bound
    sampled = comparison["positions"] >= MIN_POSITIONS or comparison["prompts_compared"] >= MIN_PROMPTS
    fails = sampled and high < limits.top1_agreement
    verdict = decided(fails=fails, passes=enough)
    why += f"; limit {quantity(limits.top1_agreement, 'share')}"
    if verdict is Verdict.INCONCLUSIVE:
        why += f" (lower bound {limits.top1_lower_bound:.0%}): more prompts would settle it"
    return CheckResult(check=check, verdict=verdict, value=share, limit=limits.top1_agreement, unit="share", why=why)


def _judge_kld(comparison: Evidence, floors: Sequence[Evidence], limits: Limits) -> list[CheckResult]:
    results = []
    alone = "; the candidate lists no token but its own, so that this is a lower bound"
    for name, least in (("mean_kld", limits.mean_kld), ("p99_kld", limits.p99_kld)):
        noise = [floor[run][name] for floor in floors for run in ("repeat", "cached", "parallel")]
        own = max((value for value in noise if value is not None), default=0.0)
        # the fixed p99 limit is far over any mean that passes: it does not move with the floor
        limit = max(least, FLOOR_FACTOR * own) if name == "mean_kld" else least
        value, low, high = (comparison[f"{name}{end}"] for end in ("", "_low", "_high"))
        why = f"{_basis(comparison)}; own noise {f'{figure(own)} nats' if floors else 'not measured'}"
        enough = comparison["positions"] >= MIN_POSITIONS
        if value is not None:
            why += f"; {quantity(value, 'nats', limit)}, 95% bounds {figure(low)} and {figure(high)}"
            why += f", limit {quantity(limit, 'nats')}{alone * (comparison['candidate_lists'] == 1)}"
        if not enough:
            why += f"; {MIN_POSITIONS} positions are needed"
        elif value > limit >= low:
            why += "; the limit lies between the bounds, more prompts would settle it"
        verdict = decided(fails=enough and low > limit, passes=enough and value <= limit)
        results.append(
            CheckResult(check=f"parity.{name}", verdict=verdict, value=value, limit=limit, unit="nats", why=why)
        )
    return results


def _judge_divergences(comparison: Evidence, limits: Limits) -> CheckResult:
    check, limit, unit = "parity.explained_divergences", UNEXPLAINED_DIVERGENCES, "unexplained divergences"
    if not comparison["positions"]:
        return not_measured(check, f"no logprobs to compare: {_basis(comparison)}", limit=limit, unit=unit)
    found = comparison["divergences"]
    unexplained = [d for d in found if d["explained"] is False]
    unseen = [d for d in found if d["explained"] is None]
    why = f"{number_of(len(found), 'divergence')}, {len(found) - len(unexplained) - len(unseen)} on near ties"
    why += f", {len(unseen)} where the logprobs are not shown" if unseen else ""
    if unexplained:
        shown = "; ".join(
            f"{d['prompt']} at {d['position']}: {d['incumbent_token']!r} vs {d['candidate_token']!r}, "
            f"{d['choice_gap_nats']:.2f} nats apart"
            for d in unexplained[:3]
        )
        why += f"; unexplained: {shown}"
    if len(unseen) * 2 > len(found) and len(unexplained) <= limit:
        return not_measured(check, f"{why}: most cannot be explained or refuted", limit=limit, unit=unit)
    return at_most(check, len(unexplained), limit=limit, unit=unit, why=why)


def _judge_degenerate(comparison: Evidence, limits: Limits) -> CheckResult:
    """Broken text may not appear more often; loops, which small models make by themselves, not significantly so."""
    check, limit = "parity.degenerate", EXCESS_DEGENERATE
    if comparison["exact_match_share"] is None:
        return not_measured(check, "no answers by both engines", limit=limit, unit="answers")
    ours, theirs = comparison["degenerate"]["incumbent"], comparison["degenerate"]["candidate"]
    gained, lost = _discordant(ours, theirs, loops=False)
    loops_gained, loops_lost = _discordant(ours, theirs, loops=True)
    excess = len(gained) - len(lost)
    why = f"{len(theirs)} of the candidate's answers, {len(ours)} of the incumbent's"
    if gained:
        why += f"; new: {'; '.join(f'{key}: {theirs[key]}' for key in gained[:3])}"
    if loops_gained or loops_lost:
        why += f"; loops only in the candidate {len(loops_gained)}, only in the incumbent {len(loops_lost)}"
    # sign test: were both sides as likely, so many or more would rarely fall on the candidate
    if binomial_tail(len(loops_gained), len(loops_gained) + len(loops_lost), 0.5) < 0.05:
        excess += len(loops_gained) - len(loops_lost)
        why += " (p < 0.05)"
    return at_most(check, max(0, excess), limit=limit, unit="answers", why=why)


def _discordant(ours: dict[str, str], theirs: dict[str, str], *, loops: bool) -> tuple[list[str], list[str]]:
    """Prompts degenerate in this way with the candidate only, and with the incumbent only."""
    gained = [key for key, why in theirs.items() if key not in ours and why.startswith(LOOP) == loops]
    lost = [key for key, why in ours.items() if key not in theirs and why.startswith(LOOP) == loops]
    return gained, lost


def _judge_finish(comparison: Evidence) -> CheckResult:
    """A reason the incumbent never gives is a new word to clients; equal text must end for the same reason."""
    check, reasons = "parity.finish_reason", comparison["finish_reasons"]
    if comparison["exact_match_share"] is None:
        return not_measured(check, "no answers by both engines", limit=0, unit="answers")
    known = set(reasons["incumbent"]) | {"stop", "length", "tool_calls"}
    strange = {reason: n for reason, n in reasons["candidate"].items() if reason not in known}
    differ = reasons["differ_on_equal_text"]
    why = f"same reason in {comparison['finish_reason_agreement']:.0%} of all answers"
    why += f"; equal text, other reason: {'; '.join(differ[:3])}" if differ else ""
    why += f"; unknown reasons {strange}" if strange else ""
    return at_most(check, len(differ) + sum(strange.values()), limit=0, unit="answers", why=why)


def _judge_length(comparison: Evidence, limits: Limits) -> CheckResult:
    check, length = "parity.mean_length_ratio", comparison["length"]
    required = length["prompts"] >= LENGTH_REQUIRED_FROM
    inside = 1 / (1 + LENGTH_MARGIN), 1 + LENGTH_MARGIN
    if length["ratio"] is None:
        why = "completion tokens of fewer than 2 answers"
        return not_measured(check, why, limit=inside[1], unit="ratio", required=False)
    low, high = length["low"], length["high"]
    verdict = decided(fails=high < inside[0] or low > inside[1], passes=inside[0] <= low and high <= inside[1])
    why = f"{length['ratio']:.3f}, 95% interval {low:.3f} to {high:.3f} over {number_of(length['prompts'], 'prompt')}"
    return CheckResult(
        check=check, verdict=verdict, value=length["ratio"], limit=inside[1], unit="ratio", why=why, required=required
    )


def _judge_exact(comparison: Evidence) -> CheckResult:
    check, share = "parity.exact_match", comparison["exact_match_share"]
    if share is None:
        return not_measured(check, "no answers by both engines", unit="share", required=False)
    why = f"{share:.0%} of the answers are equal to the letter; reported only, sound engines differ on near ties"
    return CheckResult(check=check, verdict=Verdict.PASS, value=share, unit="share", why=why, required=False)
