"""The gate: published bounds, the three outcomes, what is refused, and how often it errs."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from typing import Any

import pytest

from engines.errors import BadInput
from tasks.verdicts.noninferiority import (
    DEFAULT_LOOKS,
    Metric,
    block_log_ratio,
    block_orders,
    blocks_for_power,
    decision_reached,
    judge,
    judge_calibration,
    look_bounds,
    spent_alpha,
)
from tasks.verdicts.statistics import clopper_pearson_lower, normal_quantile
from tasks.verdicts.verdict import Verdict

TTFT = Metric(name="ttft_p50", samples="ttft_ms", quantile=0.5, margin=0.10, unit="ms")
SPEED = Metric(name="decode", quantile=0.5, margin=0.10, unit="tok/s", higher_is_better=True)


def make_block(index: int, incumbent: list[float], candidate: list[float], **fields: Any) -> dict[str, Any]:
    """One valid block with the same samples under both metrics' names."""
    arms = {
        arm: {"ttft_ms": list(samples), "decode": list(samples)}
        for arm, samples in (("incumbent", incumbent), ("candidate", candidate))
    }
    return {"index": index, "order": "AB", **arms, "foreign_cpu": {}, "void": None} | fields


def make_blocks(n: int, slower: float = 1.0, sd: float = 0.02, seed: int = 1) -> list[dict[str, Any]]:
    """`n` blocks whose log ratio is ln(`slower`) with block standard deviation `sd`."""
    rng = random.Random(seed)
    return [make_block(i, [100.0] * 3, [100.0 * slower * math.exp(rng.gauss(0, sd))] * 3) for i in range(n)]


@pytest.mark.parametrize(("looks", "constant"), [(1, 1.645), (2, 1.678), (3, 1.710), (4, 1.733), (5, 1.751)])
def test_bounds_of_even_looks_are_the_published_ones(looks: int, constant: float) -> None:
    """Jennison and Turnbull 2000, table 2.3 (alpha 0.1 two-sided): C_B for 1 to 5 evenly spaced looks."""
    schedule = tuple(10 * look for look in range(1, looks + 1))
    assert look_bounds(schedule)[-1] == pytest.approx(constant, abs=1e-3)


def test_default_bounds_spend_five_percent_where_the_tabulated_ones_spend_more() -> None:
    """2.961, 2.094, 1.710 are for even looks: 5% there, 5.3% at 6, 12 and 24 blocks."""
    tabulated = (2.961, 2.094, 1.710)
    assert spent_alpha((1, 2, 3), tabulated) == pytest.approx(0.0500, abs=1e-4)
    assert spent_alpha(DEFAULT_LOOKS, tabulated) == pytest.approx(0.0530, abs=1e-4)
    assert spent_alpha(DEFAULT_LOOKS, look_bounds(DEFAULT_LOOKS)) == pytest.approx(0.05, abs=1e-6)
    assert look_bounds(DEFAULT_LOOKS) == pytest.approx((3.356, 2.373, 1.678), abs=3e-3)


@pytest.mark.parametrize("looks", [(), (2,), (6, 6), (12, 6), (6.5,)])
def test_impossible_looks_are_refused(looks: tuple[int, ...]) -> None:
    """None, too early, twice the same, backwards, half a block."""
    with pytest.raises(BadInput, match="looks"):
        judge(TTFT, make_blocks(6), looks)


@pytest.mark.parametrize(
    ("margin", "expected"), [(0.05, [4, 11, 38, 83, 146]), (0.10, [3, 5, 11, 23, 40]), (0.20, [3, 3, 5, 8, 12])]
)
def test_blocks_for_power_reproduce_the_planning_table(margin: float, expected: list[int]) -> None:
    """Blocks for a 90% chance to pass an equal engine, at block sd 0.02 to 0.20 (noncentral t)."""
    assert [blocks_for_power(sd, margin) for sd in (0.02, 0.05, 0.10, 0.15, 0.20)] == expected


def test_an_equal_engine_passes() -> None:
    """Little noise, same speed: PASS at the first look, in words that name both engines' times."""
    outcome = judge(TTFT, make_blocks(6))
    assert (outcome.verdict, outcome.look, outcome.n_blocks) == (Verdict.PASS, 6, 6)
    assert "the incumbent" in outcome.why
    assert "over 6 blocks; limit 1.1×" in outcome.why


def test_a_much_slower_engine_fails_with_its_ratio_as_the_value() -> None:
    """3.41 times as slow is FAIL at the first look, and the check carries the numbers."""
    outcome = judge(TTFT, make_blocks(6, slower=3.41))
    result = outcome.check_result()
    assert result.check == "performance.ttft_p50_ratio"
    assert result.verdict is Verdict.FAIL
    assert (result.value, result.limit) == (pytest.approx(3.41, rel=0.03), pytest.approx(1.10))
    assert outcome.ci_low is not None
    assert outcome.ci_low > 1.10


def test_noise_is_inconclusive_and_says_how_many_blocks_are_missing() -> None:
    """An equal engine under 15% noise is not passed at 6 blocks; at least the next look is asked for."""
    outcome = judge(TTFT, make_blocks(6, sd=0.15))
    assert outcome.verdict is Verdict.INCONCLUSIVE
    assert outcome.blocks_needed is not None
    assert outcome.blocks_needed >= 6
    assert "more blocks" in outcome.why


def test_blocks_needed_is_the_formula_of_the_plan() -> None:
    """((1.645 + 1.282) s / (ln 1.1 - d))^2 in all, less what was measured."""
    outcome = judge(TTFT, make_blocks(24, slower=0.97, sd=0.3, seed=1))
    assert outcome.verdict is Verdict.INCONCLUSIVE
    assert outcome.sd is not None
    assert outcome.ratio is not None
    total = (
        (normal_quantile(0.95) + normal_quantile(0.90)) * outcome.sd / (math.log(1.1) - math.log(outcome.ratio))
    ) ** 2
    assert outcome.blocks_needed == math.ceil(total) - 24


def test_higher_is_better_flips_the_sign() -> None:
    """Half the tokens per second is a ratio of 2, twice as many a ratio of one half."""
    slow, fast = make_block(0, [100.0], [50.0]), make_block(0, [100.0], [200.0])
    assert block_log_ratio(SPEED, slow) == pytest.approx(math.log(2))
    assert block_log_ratio(SPEED, fast) == pytest.approx(-math.log(2))
    assert judge(SPEED, make_blocks(6, slower=0.5)).verdict is Verdict.FAIL
    assert judge(SPEED, make_blocks(6, slower=2.0)).verdict is Verdict.PASS


def test_between_looks_nothing_new_is_judged() -> None:
    """Blocks 7 to 11 wait for the look at 12: judging them early would be one look too many."""
    blocks = make_blocks(6) + [make_block(i, [100.0], [500.0]) for i in range(6, 11)]
    assert judge(TTFT, blocks) == judge(TTFT, blocks[:6])


def test_too_few_blocks_are_never_a_pass() -> None:
    """No, one and five blocks of a twice as fast candidate are INCONCLUSIVE."""
    for n, needed in ((0, 6), (1, 5), (5, 1)):
        outcome = judge(TTFT, make_blocks(n, slower=0.5))
        assert (outcome.verdict, outcome.blocks_needed) == (Verdict.INCONCLUSIVE, needed)


def test_discarded_blocks_are_left_out_and_counted() -> None:
    """A discarded block changes no number, and the reason line counts it."""
    blocks = [*make_blocks(6), make_block(6, [1.0], [900.0], void="foreign CPU 31%")]
    outcome = judge(TTFT, blocks)
    assert (outcome.verdict, outcome.n_void, outcome.n_blocks) == (Verdict.PASS, 1, 6)
    assert "1 discarded and not counted, the last because foreign CPU 31%" in outcome.why


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0, None])
def test_samples_that_are_not_positive_numbers_are_refused(bad: float | None) -> None:
    """A NaN would compare as passed, a zero would be an infinite ratio."""
    blocks = make_blocks(6)
    blocks[3]["candidate"]["ttft_ms"].append(bad)
    with pytest.raises(BadInput, match=r"block 3, candidate, ttft_ms"):
        judge(TTFT, blocks)


def test_a_block_in_which_the_candidate_never_answered_cannot_be_passed_over() -> None:
    """Missing samples in a valid block: INCONCLUSIVE for good, and the loop stops."""
    blocks = make_blocks(7)
    blocks[2]["candidate"]["ttft_ms"] = []
    outcome = judge(TTFT, blocks)
    assert (outcome.verdict, outcome.final, outcome.ratio) == (Verdict.INCONCLUSIVE, True, None)
    assert decision_reached([TTFT], blocks).stop


def test_the_same_block_twice_is_refused() -> None:
    """Counting one block twice would be certainty from nothing."""
    with pytest.raises(BadInput, match="block 0 occurs twice"):
        judge(TTFT, [*make_blocks(6), make_blocks(1)[0]])


def test_a_margin_under_three_client_errors_is_not_judged() -> None:
    """10% of 100 ms is 10 ms: a client wrong by 4 ms cannot tell, one wrong by 3 ms can."""
    refused = judge(TTFT, make_blocks(6), client_error=4.0)
    assert (refused.verdict, refused.final) == (Verdict.INCONCLUSIVE, True)
    assert "client's own error" in refused.why
    assert judge(TTFT, make_blocks(6), client_error=3.0).verdict is Verdict.PASS


@pytest.mark.parametrize("seed", range(20))
def test_a_further_slow_down_never_improves_the_verdict(seed: int) -> None:
    """Property: the slower the same candidate, the worse or equal its verdict."""
    rng = random.Random(seed)
    sd, start = rng.uniform(0.005, 0.3), rng.uniform(0.8, 1.2)
    verdicts = [judge(TTFT, make_blocks(12, start * step, sd, seed)).verdict for step in (1.0, 1.05, 1.2, 1.5, 3.0)]
    assert [verdict.badness for verdict in verdicts] == sorted(verdict.badness for verdict in verdicts)


def test_candidates_at_the_margin_are_promoted_about_one_time_in_twenty() -> None:
    """300 migrations to a truly 10% slower engine: wrong promotions are compatible with the 5.3% that is spent."""
    promoted = 0
    for run in range(300):
        blocks = make_blocks(24, slower=1.10, sd=0.10, seed=1000 + run)
        verdicts = [judge(TTFT, blocks[:look]).verdict for look in DEFAULT_LOOKS]
        decided = next((verdict for verdict in verdicts if verdict is not Verdict.INCONCLUSIVE), None)
        promoted += decided is Verdict.PASS
    assert clopper_pearson_lower(promoted, 300, 0.99) <= 0.053


def loaded_blocks(n: int, bias: float = 0.0) -> list[dict[str, Any]]:
    """Equal engines; another process takes some of the CPU and slows what it meets (d = 4 x + little noise)."""
    rng = random.Random(3)
    blocks = []
    for index in range(n):
        x = bias + rng.uniform(-0.1, 0.1)
        candidate = [100.0 * math.exp(4 * x + rng.gauss(0, 0.01))]
        share = {"incumbent": 0.2, "candidate": 0.2 + x}
        blocks.append(make_block(index, [100.0], candidate, foreign_cpu=share))
    return blocks


def test_foreign_load_is_taken_out_where_it_explains_the_noise() -> None:
    """12 blocks that the noise leaves undecided pass once the other process is accounted for."""
    blocks = loaded_blocks(12)
    blind = [block | {"foreign_cpu": {"incumbent": None, "candidate": None}} for block in blocks]
    assert judge(TTFT, blind).verdict is Verdict.INCONCLUSIVE
    outcome = judge(TTFT, blocks)
    assert (outcome.verdict, outcome.adjusted) == (Verdict.PASS, True)
    assert "foreign CPU" in outcome.why


def test_foreign_load_is_not_taken_out_where_it_follows_the_candidate() -> None:
    """Load that is always there when the candidate runs may be the candidate's own: it is not excused."""
    assert not judge(TTFT, loaded_blocks(12, bias=0.2)).adjusted


def test_six_blocks_are_too_few_for_the_covariate() -> None:
    """A slope from six points would add more noise than it takes out."""
    assert not judge(TTFT, loaded_blocks(6)).adjusted


def test_the_loop_stops_when_all_pass_or_one_fails_and_goes_on_otherwise() -> None:
    """PASS of all, FAIL of one, undecided, undecided at the last look."""
    assert decision_reached([TTFT], make_blocks(6)).stop
    failing = decision_reached([TTFT, SPEED], make_blocks(6, slower=2.0))
    assert (failing.stop, failing.verdict) == (True, Verdict.FAIL)
    undecided = decision_reached([TTFT], make_blocks(6, sd=0.15))
    assert not undecided.stop
    assert "look at 12" in undecided.why
    assert not decision_reached([TTFT], make_blocks(5)).stop
    last = decision_reached([TTFT], make_blocks(24, slower=1.09, sd=0.2))
    assert (last.stop, last.verdict) == (True, Verdict.INCONCLUSIVE)


def test_calibration_tells_a_quiet_a_noisy_and_a_biased_bench() -> None:
    """The incumbent against itself: quiet passes, noise names the blocks it would need, a biased arm fails."""
    quiet, noisy, biased, faster = (
        judge_calibration([TTFT], make_blocks(6, *world))[0]
        for world in ((1.0, 0.03), (1.0, 0.35), (1.4, 0.02), (1 / 1.4, 0.02))
    )
    assert quiet.check == "calibration.ttft_p50"
    assert quiet.verdict is Verdict.PASS
    assert noisy.verdict is Verdict.INCONCLUSIVE
    assert "the plan has 24" in noisy.why
    assert biased.verdict is faster.verdict is Verdict.FAIL


def test_calibration_needs_six_blocks() -> None:
    """Five blocks of A/A are not enough to know the noise."""
    result = judge_calibration([TTFT], make_blocks(5))[0]
    assert (result.verdict, result.value) == (Verdict.INCONCLUSIVE, None)


def test_orders_are_drawn_from_the_seed() -> None:
    """The same plan has the same orders; both occur."""
    assert block_orders(24, seed=7) == block_orders(24, seed=7)
    assert set(block_orders(24, seed=7)) == {"AB", "BA"}


def test_an_outcome_is_plain_data() -> None:
    """It can be stored and read back as JSON."""
    stored = json.loads(json.dumps(dataclasses.asdict(judge(TTFT, make_blocks(6)))))
    assert (stored["verdict"], stored["n_blocks"]) == ("PASS", 6)
