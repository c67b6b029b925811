"""The arithmetic of health: limits, budget, rates."""

import pytest

from engines.openai.call import reported_cached, reported_prefill_rate
from engines.yard.engine.health import BACK_OFF_S, PATIENCE, Rate, RestartBudget, stall_limit_s, token_limit_s
from engines.yard.engine.in_flight import InFlight
from engines.yard.engine.stats import EngineStats


def limit(**changes):
    known = {
        "least_s": 20,
        "prompt_tokens": 1000,
        "prefill_rate": 100,
        "sees_prompt_progress": False,
        "batch_tokens": 256,
    }
    return stall_limit_s(**{**known, **changes})


def test_a_long_prompt_may_take_as_long_as_its_measured_speed_explains():
    assert limit(prompt_tokens=100_000) == PATIENCE * 1000
    assert limit(prompt_tokens=10) == 20


def test_where_prompt_progress_is_seen_the_wait_is_for_one_batch():
    assert limit(prompt_tokens=100_000, sees_prompt_progress=True, prefill_rate=10) == PATIENCE * 25.6


def test_an_unknown_speed_is_taken_as_slow():
    """The first prompt of a slow engine must not look like a hang: 900 tokens at 15 per second are 60 s."""
    assert limit(prompt_tokens=900, prefill_rate=None) > 60


def test_a_token_may_take_many_times_the_usual_gap_and_never_less_than_the_least():
    assert token_limit_s(least_s=20, token_s=5.0) == 200
    assert token_limit_s(least_s=20, token_s=0.01) == 20
    assert token_limit_s(least_s=1, token_s=None) > 1


def test_the_budget_is_spent_backs_off_and_comes_back_with_time():
    budget = RestartBudget(3, 100)
    assert [budget.spend(0), budget.spend(10), budget.spend(20)] == list(BACK_OFF_S[:3])
    assert budget.spend(30) is None
    assert budget.spend(101) is not None
    budget.reset()
    assert budget.spend(102) == 0


def test_no_restarts_at_all_is_a_budget_too():
    assert RestartBudget(0, 100).spend(0) is None


def test_a_rate_forgets():
    rate = Rate()
    assert rate.value is None
    rate.learn(10)
    for _ in range(50):
        rate.learn(1)
    assert 1 <= rate.value < 1.01


@pytest.mark.parametrize(
    ("cached", "learned"), [(b"", 100.0), (b',"prompt_tokens_details":{"cached_tokens":0}', 820.0)]
)
def test_a_prompt_that_may_have_been_cached_makes_no_engine_look_faster(cached, learned):
    """Else the next long prompt, which is read anew, would be taken for a hang."""
    stats, usage = EngineStats(), b'"usage":{"prompt_tokens":2000,"avg_prompt_tok_per_sec":%d' + cached + b"}"
    for rate in (100, 3700):
        running = InFlight(2000, None)
        running.reported(usage % rate)
        stats.learn(running)
    assert stats.prefill.value == pytest.approx(learned)


def test_the_prefill_rate_is_what_the_engine_tells_of_the_tokens_it_really_read():
    """A prompt that lay in the cache is no fast prefill: 2195 tokens, of which 7 were read."""
    llama_cpp = b'"timings":{"cache_n":2188,"prompt_n":70,"prompt_ms":700.0,"predicted_n":3}}\n\ndata: [DONE]\n\n'
    assert reported_prefill_rate(llama_cpp) == 100
    assert reported_prefill_rate(llama_cpp.replace(b'"prompt_n":70', b'"prompt_n":7')) is None
    mistral_rs = b'"usage":{"completion_tokens":3,"prompt_tokens":40,"avg_prompt_tok_per_sec":15.5}'
    assert reported_prefill_rate(mistral_rs) == 15.5
    assert reported_prefill_rate(b"data: [DONE]") is None


def test_how_much_of_a_prompt_lay_in_the_cache():
    """llama.cpp's timings leave out what was cached, OpenAI's usage counts it."""
    assert reported_cached(b'"timings":{"cache_n":30,"prompt_n":10,"prompt_ms":700.0}') == (30, 40)
    usage = b'"usage":{"prompt_tokens":40,"prompt_tokens_details":{"cached_tokens":10}}'
    assert reported_cached(usage) == (10, 40)
    assert reported_cached(b'"usage":{"prompt_tokens":40}') is None
    assert reported_cached(b"data: [DONE]") is None
