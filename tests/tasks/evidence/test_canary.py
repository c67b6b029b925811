"""The verdict on live traffic: what fails, what passes, what is not enough, and how often simulation fools it."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest

from engines.errors import BadInput
from tasks.evidence.canary import _schedule, judge_canary, judge_shadow, judgement
from tasks.verdicts.limits import CanaryLimits
from tasks.verdicts.noninferiority import spent_alpha
from tasks.verdicts.verdict import CheckResult, Verdict, gate

LIMITS = CanaryLimits()
CHECKS = [
    "canary.error_rate",
    "canary.silent_empty",
    "canary.refused",
    "canary.prompt_cache",
    "canary.ttft_p50_ratio",
    "canary.tpot_p50_ratio",
]


def a_sample(at: float, engine: str = "new", **fields: Any) -> dict[str, Any]:
    """A streamed answer as the yard remembers it."""
    usual = {
        "at": at,
        "engine": engine,
        "conversation": f"{engine} {at % 7}",
        "prompt_tokens": 100,
        "ok": True,
        "error": None,
        "empty": False,
        "ttft_ms": 50.0,
        "tpot_ms": 10.0,
    }
    return usual | fields


def failed(at: float, engine: str = "new", error: str = "HTTP 500") -> dict[str, Any]:
    return a_sample(at, engine, ok=False, error=error, ttft_ms=None, tpot_ms=None)


def live_traffic(
    seed: int,
    requests: int = 3000,
    *,
    weight: float = 0.2,
    slower: float = 1.0,
    failing: tuple[float, float] = (0.0, 0.0),
    silent: float = 0.0,
    larger_prompts: float = 1.0,
) -> list[dict[str, Any]]:
    """Requests of 400 conversations of very different length, on a machine whose load drifts; 20% noise in each."""
    rng = random.Random(seed)
    load, samples = 0.0, []
    talks = [(f"c{n}", rng.random() < weight, math.exp(rng.gauss(6.5, 0.8))) for n in range(400)]
    for at in range(requests):
        load = 0.98 * load + rng.gauss(0, 0.05)
        name, on_new, size = rng.choice(talks)
        tokens = max(8, int(size * math.exp(rng.gauss(0, 0.5)) * (larger_prompts if on_new else 1)))
        pace = (slower if on_new else 1.0) * math.exp(load)
        engine = "new" if on_new else "old"
        if rng.random() < failing[on_new]:
            samples.append(failed(at, engine) | {"conversation": name})
            continue
        empty = on_new and rng.random() < silent
        ttft, tpot = (25 + 0.4 * tokens) * pace * math.exp(rng.gauss(0, 0.2)), 12 * pace * math.exp(rng.gauss(0, 0.1))
        times = {"ttft_ms": None if empty else ttft, "tpot_ms": None if empty else tpot}
        samples.append(a_sample(at, engine, conversation=name, prompt_tokens=tokens, empty=empty, **times))
    return samples


def verdicts_of(runs: int, **traffic: Any) -> Counter[Verdict]:
    return Counter(gate(judge_canary(live_traffic(seed, **traffic), "old", "new", LIMITS)) for seed in range(runs))


def check_of(results: list[CheckResult], name: str) -> CheckResult:
    return next(result for result in results if result.check == f"canary.{name}")


def test_equal_engines_pass_and_never_fail() -> None:
    """600 requests on the candidate are enough for nearly all, though prompts differ by a factor of twenty."""
    verdicts = verdicts_of(20)
    assert verdicts[Verdict.FAIL] == 0
    assert verdicts[Verdict.PASS] >= 18


def test_longer_prompts_on_one_engine_are_no_slower_engine() -> None:
    """Conversations are not dealt evenly: one engine gets prompts twice as long, and is still judged alike."""
    verdicts = verdicts_of(12, larger_prompts=2.0)
    assert verdicts[Verdict.FAIL] == 0
    assert verdicts[Verdict.PASS] >= 10


@pytest.mark.parametrize("larger_prompts", [1.0, 0.5], ids=["same prompts", "shorter prompts"])
def test_a_third_slower_never_passes(larger_prompts: float) -> None:
    """Not even behind shorter prompts, which make it look fast."""
    verdicts = verdicts_of(12, slower=1.3, larger_prompts=larger_prompts)
    assert verdicts[Verdict.PASS] == 0
    assert verdicts[Verdict.FAIL] >= 10


@pytest.mark.parametrize("weight", [0.05, 0.2, 0.5])
def test_five_percent_errors_fail(weight: float) -> None:
    assert set(verdicts_of(6, requests=6000, weight=weight, failing=(0.0, 0.05))) == {Verdict.FAIL}


def test_five_percent_silent_answers_fail() -> None:
    assert set(verdicts_of(6, silent=0.05)) == {Verdict.FAIL}


def test_equal_failures_do_not_fail_however_often_one_looks() -> None:
    """Both engines lose 2%, and the judge is asked after every hundred requests."""
    for seed in range(8):
        samples = live_traffic(seed, failing=(0.02, 0.02))
        for seen in range(100, len(samples) + 1, 100):
            results = judge_canary(samples[:seen], "old", "new", LIMITS)
            assert gate(results) is not Verdict.FAIL, (seed, seen, judgement(results)["why"])


def test_a_decided_speed_stays_decided() -> None:
    """A look counts once: later traffic neither reopens a PASS nor shifts the blocks behind it."""
    samples = live_traffic(3)
    seen = [check_of(judge_canary(samples[:n], "old", "new", LIMITS), "tpot_p50_ratio") for n in range(1000, 3001, 250)]
    passed = [result for result in seen if result.verdict is Verdict.PASS]
    assert passed
    assert passed == seen[seen.index(passed[0]) :]
    assert len({result.value for result in passed}) == 1


def test_traffic_beyond_the_plans_last_look_decides() -> None:
    """Three blocks leave equal engines open; what comes after them is used, as long as it comes."""
    short = CanaryLimits(looks=(3,))
    samples = live_traffic(1)
    few, all_of_it = (
        check_of(judge_canary(seen, "old", "new", short), "ttft_p50_ratio") for seen in (samples[:400], samples)
    )
    assert few.verdict is Verdict.INCONCLUSIVE
    assert "would settle it" in few.why
    assert all_of_it.verdict is Verdict.PASS


@pytest.mark.parametrize("looks", [(3,), (3, 6), (6, 12, 24)])
def test_all_looks_together_spend_five_percent_at_most(looks: tuple[int, ...]) -> None:
    assert 0.03 < spent_alpha(*_schedule(looks)) <= 0.05


def warm_and_cold(cached_share: float | None) -> list[dict[str, Any]]:
    """An incumbent that answers a shared prompt from its cache, and a candidate 30 times as slow to the first token."""
    old = [a_sample(at, "old", cached_share=0.95, ttft_ms=20.0 + at % 3) for at in range(200)]
    new = [a_sample(at + 0.5, "new", cached_share=cached_share, ttft_ms=600.0 + at % 3) for at in range(200)]
    return old + new


def test_a_cache_that_the_candidate_lacks_is_a_finding_of_its_own() -> None:
    results = judge_canary(warm_and_cold(0.0), "old", "new", LIMITS)
    cache = check_of(results, "prompt_cache")
    assert (cache.verdict, cache.required) == (Verdict.FAIL, True)
    assert "0 of 193 prompts lay in the candidate's cache for the most part, 193 of 193 in the incumbent's" in cache.why


@pytest.mark.parametrize(("n_new", "n_old"), [(4, 1), (60, 1), (4, 200)])
def test_few_cold_prompts_are_no_missing_cache(n_new: int, n_old: int) -> None:
    """Cold ones are usual: 16 conversations on 4 slots drive each other out, on either engine."""
    old = [a_sample(at, "old", conversation="old", cached_share=0.95) for at in range(n_old)]
    new = [a_sample(at + 0.5, "new", conversation="new", cached_share=0.0) for at in range(n_new)]
    assert check_of(judge_canary(old + new, "old", "new", LIMITS), "prompt_cache").verdict is Verdict.PASS


def test_the_first_prompt_of_a_conversation_says_nothing_of_the_cache() -> None:
    """A canary's conversations all begin on it; those of the incumbent went on."""
    old = [a_sample(at, "old", conversation="old", cached_share=0.95) for at in range(200)]
    new = [a_sample(at + 0.5, "new", conversation=f"new {at // 2}", cached_share=0.9 * (at % 2)) for at in range(200)]
    assert check_of(judge_canary(old + new, "old", "new", LIMITS), "prompt_cache").verdict is Verdict.PASS


def test_single_questions_show_whether_a_shared_beginning_is_cached() -> None:
    """None of them has an earlier turn."""
    old = [a_sample(at, "old", conversation=f"old {at}", cached_share=0.95) for at in range(60)]
    new = [a_sample(at + 0.5, "new", conversation=f"new {at}", cached_share=0.0) for at in range(60)]
    assert check_of(judge_canary(old + new, "old", "new", LIMITS), "prompt_cache").verdict is Verdict.FAIL


def test_where_the_plan_accepts_it_first_tokens_are_reported_only() -> None:
    results = judge_canary(
        warm_and_cold(0.0), "old", "new", CanaryLimits(accepts_no_cache=True, failure_rate_margin=0.1)
    )
    assert [r.check for r in results if not r.required] == ["canary.prompt_cache", "canary.ttft_p50_ratio"]
    assert check_of(results, "ttft_p50_ratio").verdict is Verdict.FAIL
    assert gate(results) is Verdict.PASS


@pytest.mark.parametrize("share", [None, 0.95], ids=["unknown", "as warm"])
def test_a_slow_first_token_without_that_excuse_fails(share: float | None) -> None:
    """Accepting a missing cache accepts nothing else."""
    results = judge_canary(warm_and_cold(share), "old", "new", CanaryLimits(accepts_no_cache=True))
    assert not check_of(results, "prompt_cache").required
    assert check_of(results, "ttft_p50_ratio").required
    assert gate(results) is Verdict.FAIL


def test_a_broken_candidate_fails_after_a_handful() -> None:
    samples = [a_sample(at, "old") for at in range(20)] + [failed(20 + at) for at in range(6)]
    result = check_of(judge_canary(samples, "old", "new", LIMITS), "error_rate")
    assert result.verdict is Verdict.FAIL
    assert "6 of 6 requests failed (HTTP 500)" in result.why


def test_a_candidate_that_alone_is_asked_can_still_fail() -> None:
    """One user, one conversation, all of it on the canary: nothing to compare with, and every answer an error."""
    samples = [failed(at, error="lost: the engine went away") for at in range(8)]
    assert check_of(judge_canary(samples, "old", "new", LIMITS), "error_rate").verdict is Verdict.FAIL


@pytest.mark.parametrize("failures", [1, 2])
def test_one_or_two_failures_are_no_verdict(failures: int) -> None:
    samples = [a_sample(at, "old") for at in range(50)] + [failed(50 + at) for at in range(failures)]
    assert check_of(judge_canary(samples, "old", "new", LIMITS), "error_rate").verdict is Verdict.INCONCLUSIVE


def test_the_clients_own_faults_count_for_neither() -> None:
    samples = [failed(at, "new", "HTTP 400") for at in range(40)] + [a_sample(at + 0.5, "old") for at in range(40)]
    one_client = [sample | {"conversation": "one"} for sample in samples]
    results = judge_canary(one_client, "old", "new", LIMITS)
    assert check_of(results, "error_rate").why == "the candidate answered nothing yet"
    assert check_of(results, "refused").verdict is Verdict.PASS


def test_refusing_what_the_incumbent_takes_fails() -> None:
    """Many conversations meet a 400 on the candidate, none on the incumbent: then it is the engine."""
    samples = [failed(at, "new", "HTTP 400") | {"conversation": f"n{at}"} for at in range(20)]
    samples += [a_sample(at + 0.5, "old", conversation=f"o{at}") for at in range(60)]
    assert check_of(judge_canary(samples, "old", "new", LIMITS), "refused").verdict is Verdict.FAIL


def test_too_few_say_how_many_more() -> None:
    samples = [a_sample(at, ("new", "old")[at % 2]) for at in range(40)]
    results = judge_canary(samples, "old", "new", LIMITS)
    assert [result.check for result in results] == CHECKS
    assert gate(results) is Verdict.INCONCLUSIVE
    assert "248 more clean answers are needed" in check_of(results, "error_rate").why
    assert "that is 50 more streamed answers of each engine" in check_of(results, "ttft_p50_ratio").why


def test_no_traffic_is_inconclusive() -> None:
    results = judge_canary([], "old", "new", LIMITS)
    assert {result.verdict for result in results} == {Verdict.INCONCLUSIVE}


def test_a_single_conversation_is_not_compared() -> None:
    """All of the candidate's requests are one conversation: it is that which is judged, not the engine."""
    samples = [a_sample(at, ("new", "old")[at % 2]) for at in range(400)]
    alone = [s | {"conversation": "one"} if s["engine"] == "new" else s for s in samples]
    result = check_of(judge_canary(alone, "old", "new", LIMITS), "ttft_p50_ratio")
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "from 1 conversation on" in result.why


def test_answers_in_one_piece_have_no_speed() -> None:
    samples = [a_sample(at, ("new", "old")[at % 2], ttft_ms=None, tpot_ms=None) for at in range(400)]
    result = check_of(judge_canary(samples, "old", "new", LIMITS), "tpot_p50_ratio")
    assert (result.verdict, result.value) == (Verdict.INCONCLUSIVE, None)


def test_an_engine_is_not_its_own_canary() -> None:
    with pytest.raises(BadInput, match="both are old"):
        judge_canary([], "old", "old", LIMITS)


def test_judgement_is_plain_and_names_what_holds_it() -> None:
    said = judgement(judge_canary([failed(at) for at in range(8)], "old", "new", LIMITS))
    assert said["verdict"] == "FAIL"
    assert said["why"].startswith("canary.error_rate: 8 of 8 requests failed")
    assert [check["check"] for check in said["checks"]] == CHECKS


def an_answer(text: str = "It is Paris.", **fields: Any) -> dict[str, Any]:
    usual = {"id": "", "prompt": "", "text": text, "reasoning": "", "tool_calls": [], "finish_reason": "stop"}
    usual |= {"prompt_tokens": 9, "completion_tokens": 4, "cached_tokens": None, "positions": [], "error": None}
    return usual | fields


def a_pair(candidate: dict[str, Any], *, sampled: bool = False) -> dict[str, Any]:
    return {"sampled": sampled, "incumbent": an_answer(), "candidate": candidate}


def shadow_verdicts(pairs: list[dict[str, Any]]) -> dict[str, Verdict]:
    return {result.check: result.verdict for result in judge_shadow(pairs)}


def test_equal_copies_pass_paritys_checks() -> None:
    few = judge_shadow([a_pair(an_answer()) for _ in range(58)])
    assert gate(few) is Verdict.INCONCLUSIVE
    results = judge_shadow([a_pair(an_answer()) for _ in range(59)])
    assert gate(results) is Verdict.PASS
    assert next(r.value for r in results if r.check == "shadow.exact_match") == 1.0


def test_copies_show_what_is_broken() -> None:
    assert shadow_verdicts([a_pair(an_answer("")), a_pair(an_answer())])["shadow.degenerate"] is Verdict.FAIL
    assert shadow_verdicts([a_pair(an_answer(prompt_tokens=11))])["shadow.prompt_tokens"] is Verdict.FAIL
    assert shadow_verdicts([a_pair(an_answer(finish_reason="length"))])["shadow.finish_reason"] is Verdict.FAIL
    assert shadow_verdicts([a_pair(an_answer(error="HTTP 500"))] * 3)["shadow.failed"] is Verdict.FAIL


def test_drawn_answers_are_not_compared() -> None:
    """Another text and another end are no finding where tokens are drawn; an empty answer still is."""
    drawn = [a_pair(an_answer("Paris, of course.", finish_reason="length"), sampled=True)]
    verdicts = shadow_verdicts(drawn)
    assert verdicts["shadow.finish_reason"] is Verdict.INCONCLUSIVE
    assert verdicts["shadow.degenerate"] is Verdict.PASS
    assert shadow_verdicts([a_pair(an_answer(""), sampled=True)])["shadow.degenerate"] is Verdict.FAIL


def test_nothing_copied_is_inconclusive() -> None:
    assert gate(judge_shadow([])) is Verdict.INCONCLUSIVE
