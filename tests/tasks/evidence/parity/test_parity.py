"""Parity is judged on distributions up to the first difference; near ties pass, other tokenizers and garbage do not."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from openai_stub import KEY, MODEL, stub

from engines.settings import Endpoint
from tasks.evidence.behaviours.battery import BEHAVIOURS
from tasks.evidence.parity.answers import _positions, measure_answers, measure_floor
from tasks.evidence.parity.compare import compare_answers, fill_missing, kld
from tasks.evidence.parity.degenerate import degenerate
from tasks.evidence.parity.judge import judge_answers, judge_parity
from tasks.evidence.parity.parameters import (
    BEHAVIOUR_OF,
    judge_fields,
    judge_ignored_parameters,
    measure_ignored_parameters,
    with_behaviours,
)
from tasks.evidence.parity.tokens import judge_prompt_tokens, measure_prompt_tokens
from tasks.evidence.prompts import load_prompts
from tasks.verdicts.limits import LENGTH_REQUIRED_FROM
from tasks.verdicts.verdict import CheckResult, Verdict

Evidence = dict[str, Any]


def token(text: str, p: float, token_id: int | None = None) -> list[Any]:
    """One listed token of probability `p`."""
    return [text, math.log(p), token_id]


def position(*listed: list[Any], shown: str | None = None) -> list[Any]:
    """One position at which the first of `listed` was generated, shown under another text where asked."""
    text, logprob, token_id = listed[0]
    return [text if shown is None else shown, logprob, token_id, [list(entry) for entry in listed]]


def answer(name: str, *positions: list[Any], text: str | None = None, **more: Any) -> Evidence:
    """One measured answer."""
    said = "".join(p[0] for p in positions) if text is None else text
    return {
        "id": name,
        "prompt": "Say something.",
        "text": said,
        "reasoning": "",
        "tool_calls": [],
        "finish_reason": "length",
        "prompt_tokens": 9,
        "completion_tokens": len(positions),
        "cached_tokens": None,
        "positions": list(positions),
        "error": None,
    } | more


def answers(*given: Evidence) -> Evidence:
    """What measure_answers returns, as far as it is compared."""
    return {"answers": list(given)}


def words(n: int, *, last: list[Any] | None = None, start: int = 0) -> list[list[Any]]:
    """`n` positions of different words at 0.7 against 0.2; `last` replaces the last one."""
    plain = [
        position(token(f" w{start + i}", 0.7, 2 * (start + i)), token(f" x{start + i}", 0.2, 2 * (start + i) + 1))
        for i in range(n)
    ]
    return plain if last is None else [*plain[:-1], last]


def counts(**tokens: int | None) -> Evidence:
    """What measure_prompt_tokens returns; None is a refused prompt."""
    prompts = {
        name: {"tokens": n, "error": None if n else "HTTP 400: no", "tools_shown": None, "preview": name}
        for name, n in tokens.items()
    }
    return {"prompts": prompts, "raw": [{"text": t, "tokens": n, "ids": None} for t, n in (("France", 6), ("x", 4))]}


def one(results: list[CheckResult], check: str) -> CheckResult:
    """The result of that name."""
    return next(result for result in results if result.check == check)


# --- prompt tokens


def test_equal_counts_pass() -> None:
    """Every prompt as many tokens: the same reading."""
    assert judge_prompt_tokens(counts(a=3, b=4), counts(a=3, b=4))[0].verdict is Verdict.PASS


def test_one_other_count_fails_with_cause_and_example() -> None:
    """The cause comes first, then prompts with both counts."""
    theirs = counts(France=11, b=4)
    theirs["raw"][0]["tokens"] = 11
    result = judge_prompt_tokens(counts(France=6, b=4), theirs)[0]
    assert result.verdict is Verdict.FAIL
    assert result.value == 0.5
    assert result.why.startswith("cause: tokenizer")
    assert "'France': 6 vs 11 tokens" in result.why


@pytest.mark.parametrize(
    ("raw", "prompt", "cause"),
    [
        ((6, 4), 9, "cause: tokenizer or chat template, not known which"),
        ((7, 5), 9, "cause: start token"),
        ((7, 5), 12, "cause: tokenizer or chat template, not known which"),
        ((7, 4), 9, "cause: tokenizer, raw"),
        ((None, None), 9, "cause: tokenizer or chat template, not known which"),
    ],
)
def test_raw_texts_tell_a_tokenizer_and_a_start_token(raw: tuple[int, int], prompt: int, cause: str) -> None:
    """Texts that are read alike prove no template: a rule for digits may show in none of them."""
    theirs = counts(a=prompt)
    for found, tokens in zip(theirs["raw"], raw, strict=True):
        found["tokens"] = tokens
    assert judge_prompt_tokens(counts(a=8), theirs)[0].why.startswith(cause)


@pytest.mark.parametrize(
    ("seen", "cause"),
    [
        ({"plain": (4, 4)}, "cause: chat template"),
        ({"plain": (4, 5)}, "cause: tokenizer, without a template"),
        ({"plain": (4, 7)}, "cause: tokenizer, without a template"),
        ({"plain": (4, None)}, "cause: tokenizer or chat template, not known which"),
        ({"template": ("1", "1")}, "cause: tokenizer (both"),
        ({"template": ("1", "2")}, "cause: chat template"),
        ({"template": ("1", None)}, "cause: tokenizer or chat template, not known which"),
    ],
)
def test_the_cause_follows_from_the_prompts_that_differ(seen: dict[str, tuple[Any, Any]], cause: str) -> None:
    """As text with the template, or as tokens without it; the raw texts are read alike in each of these."""
    ours, theirs = counts(a=8, b=3), counts(a=9, b=3)
    for name, pair in seen.items():
        ours["prompts"]["a"][name], theirs["prompts"]["a"][name] = pair
    assert judge_prompt_tokens(ours, theirs)[0].why.startswith(cause)


def test_a_completions_route_that_renders_the_template_shows_no_tokenizer() -> None:
    """As Ollama's: a text counts as much there as in a chat, so nothing is counted without the template."""
    for habits, tokens in (((), 5), (("completes as a chat",), None)):
        with stub("no tokenize", *habits) as base_url:
            found = measure_prompt_tokens(Endpoint(base_url=base_url, model_id=MODEL, engine="stub", api_key=KEY), [])
        assert found["raw"][0]["tokens"] == tokens, habits


def test_equal_counts_of_another_template_fail() -> None:
    """Where both engines show the text; as many tokens can be others."""
    ours, theirs = counts(a=3, b=4), counts(a=3, b=4)
    assert [one.check for one in judge_prompt_tokens(ours, theirs)] == ["parity.prompt_tokens"]
    for key, other in (("a", "1"), ("b", "2")):
        ours["prompts"][key]["template"], theirs["prompts"][key]["template"] = "1", other
    tokens, templates = judge_prompt_tokens(ours, theirs)
    assert (tokens.verdict, templates.check, templates.verdict) == (Verdict.PASS, "parity.templates", Verdict.FAIL)
    assert templates.why.startswith("1 of 2 prompts are rendered to the same text; not 'b'")


def test_a_prompt_only_the_candidate_refuses_fails() -> None:
    """It served before and would not any more."""
    assert judge_prompt_tokens(counts(a=3, b=4), counts(a=3, b=None))[0].verdict is Verdict.FAIL


def test_a_prompt_the_incumbent_refuses_is_left_out_and_said() -> None:
    """It is no regression, but it was not compared."""
    result = judge_prompt_tokens(counts(a=3, b=None), counts(a=3, b=None))[0]
    assert result.verdict is Verdict.PASS
    assert "1 that the incumbent refuses" in result.why


def test_no_counts_are_inconclusive() -> None:
    """Nothing measured is never a pass."""
    assert judge_prompt_tokens(counts(a=None), counts(a=3))[0].verdict is Verdict.INCONCLUSIVE


# --- KLD


def test_kld_of_fully_listed_distributions_is_the_textbook_sum() -> None:
    """0.5 ln(0.5/0.25) + 0.5 ln(0.5/0.75)."""
    shown, other = {"a": 0.5, "b": 0.5}, {"a": 0.25, "b": 0.75}
    filled, tail = fill_missing(shown, other)
    assert kld(shown, filled, tail) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


def test_unlisted_mass_is_one_bucket() -> None:
    """0.6 against 0.3 and the rest 0.4 against 0.7."""
    filled, tail = fill_missing({"a": 0.6}, {"a": 0.3})
    assert kld({"a": 0.6}, filled, tail) == pytest.approx(0.6 * math.log(2) + 0.4 * math.log(4 / 7))


def test_a_token_missing_in_the_others_list_is_bounded_by_its_last() -> None:
    """`b` cannot have more than 0.1 there, though 0.3 is unlisted: the bound keeps the difference visible."""
    shown, other = {"a": 0.6, "b": 0.3}, {"a": 0.6, "c": 0.1}
    filled, tail = fill_missing(shown, other)
    assert filled["b"] == pytest.approx(0.1)
    assert tail == pytest.approx(0.3)
    assert kld(shown, filled, tail) > 0.2


def test_kld_is_a_lower_bound_of_the_whole_vocabularys() -> None:
    """Whatever the lists leave out, the number never overstates the difference."""
    p = [0.4, 0.3, 0.15, 0.1, 0.05]
    q = [0.2, 0.05, 0.25, 0.3, 0.2]
    whole = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    for k in (1, 2, 3, 4, 5):
        shown = dict(sorted(enumerate(p), key=lambda item: -item[1])[:k])
        filled, tail = fill_missing(shown, dict(sorted(enumerate(q), key=lambda item: -item[1])[:k]))
        assert 0 <= kld(shown, filled, tail) <= whole + 1e-9


# --- comparison


def test_equal_answers_agree_everywhere() -> None:
    """No divergence, no KLD, all checks that gate pass."""
    same = answers(*(answer(f"p{n}", *words(40, start=40 * n)) for n in range(4)))
    comparison = compare_answers(same, same)
    assert (comparison["top1_agreement"], comparison["mean_kld"], comparison["divergences"]) == (1.0, 0.0, [])
    assert all(result.verdict is Verdict.PASS for result in judge_answers(comparison) if result.required)


def near_tie(mine: float, other: float) -> tuple[list[Any], list[Any]]:
    """One position at which two engines choose differently between the same two tokens."""
    ours = position(token(" yes", mine, 900), token(" no", other, 901))
    theirs = position(token(" no", mine, 901), token(" yes", other, 900))
    return ours, theirs


def test_positions_end_at_the_first_difference() -> None:
    """What follows has another context: 5 alike and the different one are 6."""
    ours, theirs = near_tie(0.46, 0.44)
    a = answers(answer("p", *words(5), ours, *words(7, start=50)))
    b = answers(answer("p", *words(5), theirs, *words(7, start=80)))
    comparison = compare_answers(a, b)
    assert (comparison["positions"], comparison["same_top1"]) == (6, 5)
    assert comparison["divergences"][0]["position"] == 5


def test_a_near_tie_is_explained_and_a_clear_choice_is_not() -> None:
    """Under 0.5 nats rounding can turn it over; at 2 nats a person has to look, and is told where."""
    for mine, other, explained in ((0.46, 0.44, True), (0.8, 0.1, False)):
        ours, theirs = near_tie(mine, other)
        comparison = compare_answers(answers(answer("p", *words(3), ours)), answers(answer("p", *words(3), theirs)))
        assert comparison["divergences"][0]["explained"] is explained
        result = one(judge_answers(comparison), "parity.explained_divergences")
        assert result.verdict is (Verdict.PASS if explained else Verdict.FAIL)
        assert explained or "p at 3: ' yes' vs ' no'" in result.why


def test_a_tie_of_the_best_two_does_not_explain_a_far_third() -> None:
    """The candidate's own choice has to be near, not just any other token."""
    ours = position(token(" a", 0.45, 1), token(" b", 0.44, 2), token(" z", 0.01, 3))
    theirs = position(token(" z", 0.6, 3), token(" a", 0.2, 1))
    divergence = compare_answers(answers(answer("p", ours)), answers(answer("p", theirs)))["divergences"][0]
    assert divergence["gap_nats"] < 0.5 < divergence["choice_gap_nats"]
    assert divergence["explained"] is False


def test_prompts_read_differently_are_left_out_and_said_first() -> None:
    """Answers to other prompts say nothing about the engine."""
    a = answers(answer("p", *words(4)), answer("q", *words(4)))
    b = answers(answer("p", *words(4)), answer("q", *words(4), prompt_tokens=12))
    comparison = compare_answers(a, b)
    assert comparison["prompt_tokens_differ"] == ["q"]
    assert one(judge_answers(comparison), "parity.mean_kld").why.startswith("1 prompt read as other tokens")


def test_without_ids_tokens_match_by_text_and_all_ends_are_one() -> None:
    """llama.cpp shows the end as an empty text, mistral.rs as its name."""
    hi = position(token("hi", 0.9), token("yo", 0.05))
    ours = answer("p", hi, position(token("", 0.9), token("!", 0.05)), text="hi", finish_reason="stop")
    theirs = answer("p", hi, position(token("<|im_end|>", 0.9), token("!", 0.05)), text="hi", finish_reason="stop")
    comparison = compare_answers(answers(ours), answers(theirs))
    assert comparison["matched_by"] == "text"
    assert (comparison["divergences"], comparison["positions"]) == ([], 2)


def test_a_part_of_a_character_that_one_engine_cuts_off_is_no_difference() -> None:
    """Ollama shows '' and ' ' where llama-server shows U+FFFD after them; the same log-probabilities are the same."""
    cut = position(token("の", 0.6), token("", 0.2), token(" ", 0.1))
    shown = position(token("の", 0.6), token("\ufffd", 0.2), token(" \ufffd", 0.1))
    comparison = compare_answers(answers(answer("a", cut)), answers(answer("a", shown)))
    assert (comparison["positions"], comparison["max_kld"]) == (1, 0)


@pytest.mark.parametrize("turned", [False, True])
def test_a_token_that_ends_in_a_part_of_a_character_is_no_difference_where_it_shows_as_nothing(turned: bool) -> None:
    """vLLM lists '' where llama-server lists ' ' or a letter before U+FFFD, beside a ' ' of its own."""
    shown = position(token("の", 0.5), token(" \ufffd", 0.2), token(" ", 0.1), token("o\ufffd", 0.1))
    vanished = position(token("の", 0.5), token("", 0.2), token(" ", 0.1), token("", 0.1))
    found = [answers(answer("a", one)) for one in (shown, vanished)]
    comparison = compare_answers(*(reversed(found) if turned else found))
    assert (comparison["positions"], comparison["max_kld"]) == (1, pytest.approx(0, abs=1e-9))


def test_a_character_shown_whole_by_one_and_in_parts_by_the_other_is_no_divergence() -> None:
    """llama.cpp joins the parts of a character into the entry of the last part; the walk continues behind it."""
    part, last = token("\ufffd", 0.8, 7365), token("\ufffd", 0.8, 247)
    joined = position(last, token("\ufffd", 0.1, 233), shown="そ")
    parts = [position(part, token("x", 0.1, 5)), position(last, token("\ufffd", 0.1, 233))]
    comparison = compare_answers(
        answers(answer("p", *words(3), joined, *words(2, start=9))),
        answers(answer("p", *words(3), *parts, *words(2, start=9), text=" w0 w1 w2そ w9 w10")),
    )
    assert (comparison["divergences"], comparison["positions"], comparison["hidden_positions"]) == ([], 6, 1)


def test_a_difference_within_a_joined_character_is_explained_by_the_engine_that_shows_it() -> None:
    """The incumbent hides the position; the candidate's near tie there stands in, and no false KLD is counted."""
    joined = position(token("\ufffd", 0.99, 247), token("\ufffd", 0.005, 233), shown="そ")
    shown = position(token(" a", 0.41, 11), token("\ufffd", 0.40, 7365))
    comparison = compare_answers(answers(answer("p", *words(3), joined)), answers(answer("p", *words(3), shown)))
    assert comparison["divergences"][0]["explained"] is True
    assert (comparison["positions"], comparison["mean_kld"], comparison["top1_agreement"]) == (3, 0.0, 0.75)
    alone = position(token("\ufffd", 0.41, 11))  # and where it lists no other token, nothing is explained or refuted
    comparison = compare_answers(answers(answer("p", *words(3), joined)), answers(answer("p", *words(3), alone)))
    assert comparison["divergences"][0]["explained"] is None


def test_a_difference_within_a_character_that_no_engine_shows_is_neither_explained_nor_refuted() -> None:
    """llama.cpp and Ollama list the last parts of two emojis; they part at an earlier one. Ollama's have no ids."""
    joined = position(token("\ufffd", 0.9, 117), token("\ufffd", 0.04, 111), shown="🌧")
    other = position(token("\ufffd", 0.9), token("\ufffd", 0.04), shown="🏃")
    comparison = compare_answers(answers(answer("p", *words(3), joined)), answers(answer("p", *words(3), other)))
    (divergence,) = comparison["divergences"]
    assert (divergence["explained"], comparison["positions"]) == (None, 3)
    alike = position(token("\ufffd", 0.9), token("\ufffd", 0.04), shown="🌧")
    comparison = compare_answers(answers(answer("p", *words(3), joined)), answers(answer("p", *words(3), alike)))
    assert (comparison["divergences"], comparison["hidden_positions"]) == ([], 1)


def test_no_logprobs_are_inconclusive() -> None:
    """An engine that returns none has shown nothing."""
    bare = answers(answer("p", text="hello there"))
    results = judge_answers(compare_answers(bare, bare))
    for check in ("parity.top1_agreement", "parity.mean_kld", "parity.explained_divergences"):
        assert one(results, check).verdict is Verdict.INCONCLUSIVE


def test_few_positions_are_inconclusive() -> None:
    """Ten equal tokens do not bound agreement from below."""
    few = answers(answer("p", *words(10)))
    results = judge_answers(compare_answers(few, few))
    assert one(results, "parity.top1_agreement").verdict is Verdict.INCONCLUSIVE
    assert one(results, "parity.p99_kld").verdict is Verdict.INCONCLUSIVE


def test_a_large_kld_fails_and_the_own_noise_raises_the_limit() -> None:
    """0.7 against 0.6 is over 0.005 nats; an engine as far from itself makes it the measure."""
    theirs = [position(token(p[0], 0.6, p[2]), token(p[3][1][0], 0.3, p[3][1][2])) for p in words(120)]
    comparison = compare_answers(answers(answer("p", *words(120))), answers(answer("p", *theirs)))
    assert one(judge_answers(comparison), "parity.mean_kld").verdict is Verdict.FAIL
    noise = {"mean_kld": comparison["mean_kld"], "p99_kld": 0.0}
    floor = {"repeat": noise, "cached": noise, "parallel": {"mean_kld": None, "p99_kld": None}}
    raised = one(judge_answers(comparison, [floor]), "parity.mean_kld")
    assert raised.verdict is Verdict.PASS
    assert raised.limit == pytest.approx(3 * comparison["mean_kld"])


def test_a_candidate_that_lists_its_own_token_alone_is_compared() -> None:
    """As mistralrs 0.8.1 does: agreement as it is, and of the KLD what those tokens show."""
    alone = [position(listed[3][0]) for listed in words(120)]
    results = judge_answers(compare_answers(answers(answer("a", *words(120))), answers(answer("a", *alone))))
    for check in ("top1_agreement", "mean_kld", "explained_divergences"):
        assert one(results, f"parity.{check}").verdict is Verdict.PASS
    assert "lists no token but its own" in one(results, "parity.mean_kld").why
    worse = [position(token(f" w{i}", 0.3, 2 * i)) for i in range(120)]
    results = judge_answers(compare_answers(answers(answer("a", *words(120))), answers(answer("a", *worse))))
    assert one(results, "parity.mean_kld").verdict is Verdict.FAIL


def test_equal_text_that_ends_for_another_reason_fails() -> None:
    """Clients branch on finish_reason."""
    a, b = answer("p", *words(4)), answer("p", *words(4), finish_reason="stop")
    assert one(judge_answers(compare_answers(answers(a), answers(b))), "parity.finish_reason").verdict is Verdict.FAIL


def test_length_is_reported_and_gates_only_on_many_prompts() -> None:
    """Twice as long is seen with few prompts, and holds the gate from the stated number on."""
    for prompts in (5, LENGTH_REQUIRED_FROM - 1, LENGTH_REQUIRED_FROM):
        a = answers(*(answer(f"p{n}", text="x y", completion_tokens=10) for n in range(prompts)))
        b = answers(*(answer(f"p{n}", text="x y", completion_tokens=20) for n in range(prompts)))
        result = one(judge_answers(compare_answers(a, b)), "parity.mean_length_ratio")
        assert (result.verdict, result.value) == (Verdict.FAIL, 2.0)
        assert result.required == (prompts == LENGTH_REQUIRED_FROM)


# --- degenerate text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("  \n", "empty"),
        ("a\ufffd\ufffdb\ufffdc", "replacement"),
        ("..,;;!! --- ...", "no letters"),
        ("the cat sat " * 8, "loop"),
        ("x" * 60, "one character"),
        ("Привет мир 你好世界 שלום עולם สวัสดี", "mixed scripts"),
    ],
)
def test_garbage_is_named(text: str, reason: str) -> None:
    """Each kind of text that no reader would call an answer."""
    assert reason in (degenerate(text) or "")


@pytest.mark.parametrize(
    "text",
    [
        "42",
        "🌧️☂️🙂",
        "The sea is wide, and the sea is deep.",
        "今日は天気がいいので、公園まで散歩に行きましょう。",
        "one\ntwo\nthree\nfour\nfive\nsix\nseven\neight",
        "| a | b |\n|---|---|\n| 1 | 2 |",
        "Tokyo (東京) and Seoul (서울)",
        "これは途中で切れた文字\ufffd",
    ],
)
def test_answers_are_not_called_garbage(text: str) -> None:
    """Short, listed, tabular, foreign, or cut within a character: still answers."""
    assert degenerate(text) is None


def test_garbage_of_the_candidate_alone_fails_and_one_loop_does_not() -> None:
    """One broken answer is one too many; small models loop by themselves, now here, now there."""
    fine = answer("p", text="A fine answer.")
    for text, verdict in (("\ufffd\ufffd\ufffd a", Verdict.FAIL), ("to and fro " * 9, Verdict.PASS)):
        comparison = compare_answers(answers(fine), answers(answer("p", text=text)))
        assert one(judge_answers(comparison), "parity.degenerate").verdict is verdict


def test_many_more_loops_fail() -> None:
    """Eight new loops and none gone are no chance."""
    a = answers(*(answer(f"p{n}", text="A fine answer.") for n in range(8)))
    b = answers(*(answer(f"p{n}", text="to and fro " * 9) for n in range(8)))
    assert one(judge_answers(compare_answers(a, b)), "parity.degenerate").verdict is Verdict.FAIL


# --- parameters


def probed(**effects: bool | None) -> Evidence:
    """What measure_ignored_parameters returns."""
    return {"parameters": {k: {"sent": {}, "effect": v, "observed": f"{k} seen"} for k, v in effects.items()}}


def test_a_lost_parameter_gates_only_when_relied_on() -> None:
    """It is always listed."""
    ours, theirs = probed(seed=True, stop=True, n=False), probed(seed=False, stop=True, n=False)
    reported = judge_ignored_parameters(ours, theirs)[0]
    assert (reported.verdict, reported.required) == (Verdict.FAIL, False)
    assert "seed" in reported.why
    assert judge_ignored_parameters(ours, theirs, ["seed"])[0].verdict is Verdict.FAIL
    assert judge_ignored_parameters(ours, theirs, ["seed"])[0].required
    assert judge_ignored_parameters(ours, theirs, ["stop"])[0].verdict is Verdict.PASS
    assert judge_ignored_parameters(ours, theirs, ["n"])[0].verdict is Verdict.PASS


def test_fields_in_use_that_only_the_candidate_ignores_are_named_and_hold_no_gate() -> None:
    """Known ones and measured ones; a refusal is not silence, and what nobody sends does not matter."""
    used = {"mirostat": 3, "response_format": 2, "seed": 1, "temperature": 9, "lora": 4, "logit_bias": 5}
    known = {"used": used, "ignored": {"incumbent": ["lora"], "candidate": ["lora", "mirostat"]}}
    ours = {"response_format.json_schema": True, "temperature": True, "seed": True, "n": True, "logit_bias": True}
    theirs = {"response_format.json_schema": False, "temperature": True, "seed": None, "n": False}
    parameters = ({"parameters": {name: {"effect": effect} for name, effect in one.items()}} for one in (ours, theirs))
    found = judge_fields(known, *parameters)
    assert (found.verdict, found.value, found.required) == (Verdict.FAIL, 2, False)
    assert "mirostat (3 requests), response_format (2 requests)" in found.why
    assert judge_fields(known, None, None).value == 1
    fine = judge_fields({"used": used, "ignored": {"incumbent": ["lora"], "candidate": ["lora"]}}, None, None)
    assert (fine.verdict, fine.value) == (Verdict.PASS, 0)


def test_a_required_parameter_without_a_probe_is_inconclusive() -> None:
    """What cannot be looked for is not assumed."""
    assert judge_ignored_parameters(probed(seed=True), probed(seed=True), ["magic"])[0].verdict is Verdict.INCONCLUSIVE


def test_only_what_was_measured_is_judged() -> None:
    """The cheap gate alone, when the answers were not asked for."""
    assert [r.check for r in judge_parity(counts(a=3), counts(a=4))] == ["parity.prompt_tokens"]


# --- over HTTP


class Mute(BaseHTTPRequestHandler):
    """An engine in mistral.rs' shape: it honours max_tokens and nothing else, drops tools, and refuses `unicode`."""

    def do_POST(self) -> None:
        """Answer the same words to everything."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = json.dumps(body.get("messages", ""), ensure_ascii=False)
        if self.path == "/v1/chat/completions" and "emoji" not in said:
            self._reply(200, self._chat(body, len(said) // 4))
        elif self.path == "/v1/completions":
            self._reply(200, {"usage": {"prompt_tokens": len(body["prompt"])}})
        else:
            self._reply(422 if "chat" in self.path else 404, {"message": "not here"})

    def _chat(self, body: Evidence, prompt_tokens: int) -> Evidence:
        said = [" light", " house", " keeper", " story"] * 16
        said = said[: body["max_tokens"]]
        content = [self._entry(text, number) for number, text in enumerate(said)]
        choice = {
            "message": {"content": "".join(said)},
            "finish_reason": "length",
            "logprobs": {"content": content} if body.get("logprobs") else None,
        }
        return {"choices": [choice], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": len(said)}}

    def _entry(self, text: str, number: int) -> Evidence:
        top = [{"token": number, "logprob": -0.1, "bytes": text}, {"token": 99, "logprob": -2.5, "bytes": "x"}]
        return {"token": text, "logprob": -0.1, "bytes": list(text.encode()), "top_logprobs": top}

    def _reply(self, status: int, body: Evidence) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def mute() -> Iterator[Endpoint]:
    """A served `Mute`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mute)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Endpoint(base_url=f"http://127.0.0.1:{server.server_port}", model_id="m", engine="mute")
    server.shutdown()
    server.server_close()


def test_prompt_tokens_keep_refusals_and_see_dropped_tools(mute: Endpoint) -> None:
    """A refused prompt stays with its error; tools that leave the count alone are not shown to the model."""
    found = measure_prompt_tokens(mute, load_prompts(10))
    assert found["prompts"]["unicode-01"]["tokens"] is None
    assert "HTTP 422" in found["prompts"]["unicode-01"]["error"]
    assert found["prompts"]["tools-01"]["tools_shown"] is False
    assert found["raw"][0] == {"text": "The capital of France is", "tokens": 24, "error": None, "ids": None}
    assert json.loads(json.dumps(found)) == found


def test_characters_of_several_tokens_as_vllm_shows_them() -> None:
    """Empty texts, then the last token as the whole character; the end of an answer may be empty and stays."""

    def shown(*texts: str) -> Evidence:
        return {"content": [{"token": text, "logprob": -0.1, "bytes": list(text.encode())} for text in texts]}

    assert [position[0] for position in _positions(shown("", "", "🌧", " a", ""))] == ["🌧", " a", ""]
    assert _positions(None) == []


def test_a_joined_character_that_matches_by_text_has_no_kld() -> None:
    """llama.cpp lists parts beside the whole character, vLLM whole characters: the texts agree, the lists cannot."""
    joined = position(token("\ufffd", 0.8, 117), token("\ufffd", 0.02, 249), shown="🌧")
    whole = position(token("🌧", 0.8), token("🌟", 0.02))
    comparison = compare_answers(answers(answer("a", joined, *words(2))), answers(answer("a", whole, *words(2))))
    assert (comparison["hidden_positions"], comparison["positions"], comparison["divergences"]) == (1, 2, [])


def test_answers_read_mistral_rs_shape_and_keep_errors(mute: Endpoint) -> None:
    """Ids come from the top tokens; an answer that failed is compared as an error, not dropped."""
    found = measure_answers(mute, load_prompts(4), max_tokens=3)
    assert found["answers"][0]["positions"][1][:3] == [" house", -0.1, 1]
    comparison = compare_answers(found, found)
    assert (comparison["matched_by"], comparison["positions"], comparison["prompts_compared"]) == ("id", 9, 3)
    assert comparison["errors"][0].startswith("unicode-01: HTTP 422")


def test_the_floor_of_a_deterministic_engine_is_zero(mute: Endpoint) -> None:
    """Repeat, cached and parallel each have their numbers."""
    floor = measure_floor(mute, load_prompts(2), max_tokens=3)
    assert [floor[run]["mean_kld"] for run in ("repeat", "cached", "parallel")] == [0.0, 0.0, 0.0]


def test_ignored_parameters_are_found_by_their_missing_effect(mute: Endpoint) -> None:
    """All get a 200; none does anything, and a min_p cannot show where temperature does nothing either."""
    found = measure_ignored_parameters(mute)["parameters"]
    assert [found[name]["effect"] for name in ("repeat_penalty", "repetition_penalty", "min_p")] == [False, False, None]


def test_what_the_compatibility_battery_saw_counts_as_well() -> None:
    """A refusal is not silence; a behaviour that was not tried says nothing."""
    seen = {
        "stop_string": {"outcome": "passed", "observed": "cut"},
        "seed": {"outcome": "failed", "observed": "seed 7 twice: two texts"},
        "two_choices": {"outcome": "failed", "observed": "HTTP 400: n must be 1"},
        "top_k": {"outcome": "not_applicable", "observed": "nothing was drawn"},
    }
    found = with_behaviours(probed(min_p=True), {"behaviours": seen})["parameters"]
    effects = {name: parameter["effect"] for name, parameter in found.items()}
    assert effects == {"min_p": True, "stop": True, "seed": False, "n": None, "top_k": None}


def test_every_behaviour_that_stands_for_a_parameter_exists() -> None:
    assert set(BEHAVIOUR_OF.values()) <= set(BEHAVIOURS)


def test_an_end_of_answer_that_only_one_engine_lists_is_no_difference() -> None:
    """llama.cpp has a position for it (empty text), our host of mistral.rs has none; an early end still is one."""
    end = position(token("", 0.7, 2), token("\n", 0.2, 3))
    ours = answers(answer("a", *words(3), end, finish_reason="stop"))
    assert compare_answers(ours, answers(answer("a", *words(3), finish_reason="stop")))["divergences"] == []
    (early,) = compare_answers(ours, answers(answer("a", *words(2), finish_reason="stop")))["divergences"]
    assert early["position"] == 2


def shifted(n: int, p: float, *, start: int = 0) -> list[list[Any]]:
    """`words`, read by an engine that gives the first of the two `p`."""
    return [position(token(one[0], p, one[2]), token(one[3][1][0], 0.3, one[3][1][2])) for one in words(n, start=start)]


@pytest.mark.parametrize(
    ("p", "n", "expected"), [(0.4, 64, "INCONCLUSIVE"), (0.7, 64, "INCONCLUSIVE"), (0.4, 120, "FAIL")]
)
def test_kld_over_64_positions_is_inconclusive_either_way(p: float, n: int, expected: str) -> None:
    """Far beyond the limit or at nothing: it is too little to know."""
    ours = answers(*(answer(str(i), *words(n // 4, start=100 * i)) for i in range(4)))
    theirs = answers(*(answer(str(i), *shifted(n // 4, p, start=100 * i)) for i in range(4)))
    results = judge_answers(compare_answers(ours, theirs))
    assert {one(results, f"parity.{name}").verdict for name in ("mean_kld", "p99_kld")} == {Verdict(expected)}
    assert all("nats, 95% bounds" in one(results, f"parity.{name}").why for name in ("mean_kld", "p99_kld"))


def test_a_kld_fails_only_where_its_bounds_lie_beyond_the_limit() -> None:
    """One prompt of twelve is far off: drawn again without it, the mean is within the limit."""
    read = [answer(str(i), *words(20, start=100 * i)) for i in range(12)]
    odd = [
        answer(str(i), *(shifted(20, 0.45, start=100 * i) if i == 0 else words(20, start=100 * i))) for i in range(12)
    ]
    comparison = compare_answers(answers(*read), answers(*odd))
    assert comparison["mean_kld_low"] < 0.005 < comparison["mean_kld"]
    result = one(judge_answers(comparison), "parity.mean_kld")
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "limit 0.005 nats; the limit lies between the bounds" in result.why


def test_agreement_of_a_few_tokens_is_no_verdict() -> None:
    """Three prompts that part at once are three positions; ten such prompts are enough."""
    for prompts, expected in ((3, Verdict.INCONCLUSIVE), (10, Verdict.FAIL)):
        ours = answers(*(answer(str(i), *words(1, start=10 * i)) for i in range(prompts)))
        theirs = answers(*(answer(str(i), *words(1, start=10 * i + 500)) for i in range(prompts)))
        assert one(judge_answers(compare_answers(ours, theirs)), "parity.top1_agreement").verdict is expected
