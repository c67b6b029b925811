"""Tool calls in two numbers: on played transcripts, and against a server that is well behaved unless told otherwise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from jsonschema.validators import Draft202012Validator
from openai_stub import KEY, MODEL, stub
from pydantic import SecretStr

from engines.settings import Endpoint
from tasks.evidence.behaviours.base import WEATHER, weather_turns
from tasks.evidence.prompts import Prompt
from tasks.evidence.tool_calls.judge import (
    SCHEMA,
    TRIGGER,
    batches_of,
    calls_settled,
    judge_tool_calls,
    tool_call_differences,
    tool_call_rows,
)
from tasks.evidence.tool_calls.measure import call_fault, measure_tool_calls, tools_hidden
from tasks.evidence.tool_calls.prompts import chosen_prompts, load_tool_prompts, tool_looks
from tasks.verdicts.limits import DEFAULT_LIMITS
from tasks.verdicts.verdict import CheckResult, Verdict

Evidence = dict[str, Any]
GROUPS = ("several", "one", "none", "several", "one")


# --- the prompts


def test_two_hundred_prompts_of_every_kind_from_the_first_on() -> None:
    prompts = load_tool_prompts()
    assert len(prompts) == len({prompt.id for prompt in prompts}) == 200
    assert {prompt.group for prompt in prompts[:5]} == {prompt.group for prompt in prompts} == set(GROUPS)
    assert [sum(prompt.group == kind for prompt in prompts) for kind in ("one", "several", "none")] == [80, 80, 40]
    assert all(len(prompt.tools or ()) > 1 for prompt in prompts if prompt.group == "several")


def test_the_shipped_schemas_are_sound_and_hold_what_engines_trip_over() -> None:
    """Nested objects, unions, enums in other scripts, numbers as text, and a schema that contains itself."""
    schemas = {
        tool["function"]["name"]: tool["function"]["parameters"] for p in load_tool_prompts() for tool in p.tools
    }
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    text = json.dumps(schemas, ensure_ascii=False)
    assert all(word in text for word in ('"anyOf"', '"oneOf"', '"$ref"', '"enum"', "材料", "Küche", '"^[0-9]{12}$"'))


def test_the_users_transcripts_are_asked_in_turns_with_the_shipped_ones() -> None:
    own = [Prompt(id=f"line-{n}", messages=weather_turns(answered=True), tools=[WEATHER]) for n in range(9)]
    plain = own[0].model_copy(update={"id": "plain", "tools": None})
    chosen = [prompt.id for prompt in chosen_prompts([plain, *own], 3)]
    assert chosen[1::2] == ["line-0", "line-1", "line-2"]
    assert len(chosen) == 6
    assert chosen_prompts(own, 0) == []


@pytest.mark.parametrize(("n", "looks"), [(60, (20, 40, 60)), (200, (67, 133, 200)), (12, (12,)), (1, (3,))])
def test_the_numbers_are_looked_at_after_thirds(n: int, looks: tuple[int, ...]) -> None:
    assert tool_looks(n) == looks


# --- one call


@pytest.mark.parametrize(
    ("name", "arguments", "fault"),
    [
        ("get_weather", '{"city": "Paris", "unit": "celsius"}', ""),
        ("get_weather", '{"city": "Paris", "unit": "kelvin"}', "$.unit: 'kelvin' is not one of"),
        ("get_weather", "{}", "$: 'city' is a required property"),
        ("get_weather", '{"city": "Par', "arguments are not JSON text"),
        ("get_weather", {"city": "Paris"}, "arguments are not JSON text"),
        ("get_weather", None, "arguments are not JSON text"),
        ("get_weather", "[1]", "arguments are no object"),
        ("get_weather", '{"city": NaN}', "arguments are not JSON text: NaN"),
        ("no_such", "{}", "no such tool: 'no_such'"),
        ("convert_currency", '{"amount": 12.5, "source": "EUR", "target": "JPY"}', "$.amount: 12.5 is not of type"),
        ("convert_currency", '{"amount": "12.5", "source": "EUR", "target": "JPY"}', ""),
        ("set_light", '{"room": "Küche", "state": {"brightness": 30}}', ""),
        ("set_light", '{"room": "Küche", "state": {"brightness": 130}}', "$.state"),
        ("create_folders", '{"root": {"name": "a", "children": [{"name": "b"}]}}', ""),
        ("create_folders", '{"root": {"name": "a", "children": [{}]}}', "$.root.children[0]: 'name' is a required"),
        ("schedule_backup", '{"folder": "/", "target": {"type": "s3", "path": "/"}, "keep_days": 1}', "$.target"),
    ],
)
def test_a_call_is_valid_or_says_where_it_is_not(name: str, arguments: Any, fault: str) -> None:
    tools = {tool["function"]["name"]: tool for prompt in load_tool_prompts() for tool in prompt.tools or ()}
    found = call_fault({"name": name, "arguments": arguments}, list(tools.values()))
    assert found is not None
    assert found.startswith(fault) if fault else found == ""


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "text"},
        {"properties": {"a": {"pattern": "("}}},
        {"$ref": "https://example.org/schema.json"},
        {"$ref": "#/$defs/missing"},
        {"$ref": "#"},
        "no schema",
    ],
)
def test_a_schema_that_cannot_be_read_says_nothing_about_a_call(schema: Any) -> None:
    """It is the user's; nothing is fetched to read it."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    assert call_fault({"name": "f", "arguments": '{"a": "b"}'}, tools) is None


# --- played transcripts


def answer(name: str, group: str, *calls: str | None, **more: Any) -> Evidence:
    """One answer; each of `calls` is the fault of a call."""
    made = [{"name": "f", "arguments": "{}", "fault": fault} for fault in calls]
    return {
        "id": name,
        "group": group,
        "prompt": f"{name}?",
        "calls": made,
        "text": "" if made else "no",
        "leaked": False,
        "cut": False,
        "error": None,
    } | more


def played(called: Sequence[bool], *, fault: str = "", n_faults: int = 0) -> list[Evidence]:
    """Answers to prompts of which some are called; the first `n_faults` calls have that fault."""
    answers, left = [], n_faults
    for number, calls in enumerate(called):
        faults = [fault if left > 0 else ""] if calls else []
        left -= calls
        answers.append(answer(f"p{number}", GROUPS[number % 5], *faults))
    return answers


NEEDED = [group != "none" for group in GROUPS * 12]  # 48 of 60 prompts


def flipped(called: Sequence[bool], *places: int) -> list[bool]:
    return [value != (place in places) for place, value in enumerate(called)]


def batches(ours: list[Evidence], theirs: list[Evidence], again: list[Evidence] | None = None) -> list[Evidence]:
    """The evidence of a whole schedule; the incumbent repeats itself to the letter unless told otherwise."""
    looks, again = tool_looks(len(ours)), ours if again is None else again
    made, start = [], 0
    for number, end in enumerate(looks):
        about: Evidence = {"batch": str(number), "looks": list(looks), "required": False, "hidden": None}
        part = slice(start, end)
        made.append(about | {"again": again[part], "incumbent": ours[part], "candidate": theirs[part]})
        start = end
    return made


def judged(made: Sequence[Evidence]) -> tuple[CheckResult, CheckResult]:
    trigger, schema = judge_tool_calls(made, DEFAULT_LIMITS)
    assert (trigger.check, schema.check) == (TRIGGER, SCHEMA)
    return trigger, schema


def test_the_same_calls_pass_and_the_f1_is_that_of_the_counts() -> None:
    """6 of 48 calls missing and 1 made without need: F1 = 84 / 91."""
    same = played(NEEDED)
    trigger, schema = judged(batches(same, same))
    assert (trigger.verdict, trigger.value, schema.verdict, schema.value) == (Verdict.PASS, 1.0, Verdict.PASS, 1.0)
    assert "60 prompts: both call a tool on 48" in trigger.why
    near = played(flipped(NEEDED, 0, 1, 3, 4, 5, 6, 2))
    trigger, _ = judged(batches(same, near))
    assert trigger.value == pytest.approx(84 / 91)
    assert "the incumbent alone on 6, the candidate alone on 1; F1 0.923" in trigger.why
    assert (trigger.verdict, trigger.required) == (Verdict.INCONCLUSIVE, True)
    assert trigger.why.endswith("more prompts would settle it (measure.tool_prompts)")


def test_a_candidate_that_calls_otherwise_fails() -> None:
    """Never, on other prompts, or always: a third of the prompts is enough to see it."""
    same = played(NEEDED)
    for called in ([False] * 60, [not one for one in NEEDED]):
        made = batches(same, played(called))[:1]
        trigger, _ = judged(made)
        assert (trigger.verdict, trigger.required) == (Verdict.FAIL, True)
        assert calls_settled(made, DEFAULT_LIMITS)
    rarely = played([place % 10 == 0 for place in range(60)])
    always, _ = judged(batches(rarely, played([True] * 60)))
    assert always.verdict is Verdict.FAIL


def test_the_first_look_does_not_promise_what_only_all_prompts_prove() -> None:
    same = played(NEEDED)
    first, whole = batches(same, same)[:1], batches(same, same)
    assert (judged(first)[0].verdict, judged(whole)[0].verdict) == (Verdict.INCONCLUSIVE, Verdict.PASS)
    assert (calls_settled(first, DEFAULT_LIMITS), calls_settled(whole, DEFAULT_LIMITS)) == (False, True)


def test_no_calls_by_both_are_inconclusive_and_shut_no_gate() -> None:
    none = played([False] * 60)
    made = batches(none, none)[:1]
    trigger, schema = judged(made)
    for result in (trigger, schema):
        assert (result.verdict, result.value, result.required) == (Verdict.INCONCLUSIVE, None, False)
    assert trigger.why.startswith("0 calls by both engines on 20 prompts with tools")
    assert calls_settled(made, DEFAULT_LIMITS)
    eager, _ = judged(batches(none, played(NEEDED)))
    assert (eager.verdict, eager.required) == (Verdict.INCONCLUSIVE, False)
    assert "0 calls by the incumbent, 48 by the candidate" in eager.why


def test_too_few_calls_to_prove_anything_shut_no_gate() -> None:
    """Five that agree are reported; five that do not, against none, are a FAIL all the same."""
    few = [place < 5 for place in range(60)]
    trigger, schema = judged(batches(played(few), played(few)))
    for result in (trigger, schema):
        assert (result.verdict, result.value, result.required) == (Verdict.INCONCLUSIVE, 1.0, False)
        assert result.why.endswith("too few calls to reach it")
    lost, _ = judged(batches(played(few), played([False] * 60)))
    assert (lost.verdict, lost.required) == (Verdict.FAIL, True)


def test_an_incumbent_that_is_not_sure_of_itself_lowers_the_limit() -> None:
    """Its repeat calls on 8 of 48 prompts less: F1 0.91, and 0.9 of that is asked for."""
    ours, again = played(NEEDED), played(flipped(NEEDED, 0, 1, 3, 4, 5, 6, 8, 9))
    near = played(flipped(NEEDED, 0, 1, 3, 4, 5, 6))
    assert judged(batches(ours, near))[0].verdict is Verdict.INCONCLUSIVE
    trigger, _ = judged(batches(ours, near, again))
    assert trigger.verdict is Verdict.PASS
    assert trigger.limit == pytest.approx(0.9 * 80 / 88)
    assert "the incumbent against itself 0.909" in trigger.why


def test_broken_arguments_fail_unless_the_incumbent_breaks_them_too() -> None:
    sound, broken = played(NEEDED), played(NEEDED, fault="$.city: 7 is not of type 'string'", n_faults=20)
    _, schema = judged(batches(sound, broken))
    assert (schema.verdict, schema.required) == (Verdict.FAIL, True)
    assert schema.value == pytest.approx(28 / 48)
    assert "such as $.city: 7 is not of type 'string'" in schema.why
    _, both = judged(batches(broken, broken))
    assert both.verdict is not Verdict.FAIL
    assert both.limit == pytest.approx(0.9 * 28 / 48)


def test_calls_that_are_demanded_are_reported_where_none_are_made_by_themselves() -> None:
    none = played([False] * 60)
    demanded = {"batch": "required", "looks": [20, 40, 60], "required": True, "hidden": None, "again": []}
    forced = demanded | {"incumbent": played([True] * 12), "candidate": played([True] * 12, fault="$", n_faults=12)}
    trigger, schema = judged([*batches(none, none)[:1], forced])
    assert (trigger.value, trigger.required) == (None, False)
    assert (schema.value, schema.verdict, schema.required) == (0.0, Verdict.FAIL, False)
    assert schema.why.startswith("with tool_choice required, 12 prompts: ")


def test_what_cannot_be_compared_is_left_out_and_said() -> None:
    """A thought without an end, a failed prompt, a call that was cut, a schema that cannot be read, a call as text."""
    ours, theirs = played(NEEDED), played(NEEDED)
    theirs[0] = answer("p0", "several", cut=True, text="")
    ours[1] = answer("p1", "one", error="HTTP 500: no")
    theirs[3] = answer("p3", "several", "arguments are not JSON text", cut=True)
    theirs[4] = answer("p4", "one", None)
    theirs[5] = answer("p5", "several", leaked=True, text="<tool_call>")
    trigger, schema = judged(batches(ours, theirs))
    assert "58 prompts: both call a tool on 45, the incumbent alone on 1" in trigger.why
    assert "1 answer of the candidate did not end within their tokens" in trigger.why
    assert "1 prompt failed on the incumbent (HTTP 500: no)" in trigger.why
    assert "1 call of the candidate stayed text" in trigger.why
    assert "in 44 of the candidate's 44 answers with calls" in schema.why


def test_an_incumbent_that_is_shown_no_tools_has_nothing_to_compare() -> None:
    hidden = {"batch": "0", "looks": [20], "required": False, "hidden": "the chat template shows no tools to the model"}
    made = batches_of([hidden | {"answers": [], "again": []}], [])
    for result in judge_tool_calls(made, DEFAULT_LIMITS):
        assert (result.verdict, result.required) == (Verdict.INCONCLUSIVE, False)
        assert result.why.endswith("the chat template shows no tools to the model")
    assert judge_tool_calls(batches_of([], []), DEFAULT_LIMITS) == []


def test_the_table_counts_by_need_and_lists_what_differs() -> None:
    ours = [*played(NEEDED), answer("line-1", "transcript", "")]
    theirs = [*played(flipped(NEEDED, 1)), answer("line-1", "transcript", "$: 'city' is a required property")]
    made = batches(ours, theirs)
    rows = {row["prompts"]: row for row in tool_call_rows(made)}
    assert list(rows) == ["all", "one tool, needed", "one of several needed", "none needed", "own transcripts"]
    assert (rows["all"]["counts"].asked, rows["all"]["counts"].incumbent_only) == (61, 1)
    assert rows["none needed"]["counts"].f1 is None
    assert rows["own transcripts"]["valid"] == [(1, 1), (0, 1)]
    first, second = tool_call_differences(made)
    assert first == ("p1", "p1?", "f({})", "no")
    assert second[3].splitlines()[1] == "not valid: $: 'city' is a required property"


# --- measured


def asked(*habits: str, required: bool = False, repeat: bool = False) -> Evidence:
    """Two prompts to a stub: one that makes it call, and one that does not."""
    prompts = [
        Prompt(id="calls", messages=weather_turns(answered=True), tools=[WEATHER]),
        Prompt(id="says", messages=[{"role": "user", "content": "Good morning!"}], tools=[WEATHER]),
    ]
    with stub(*habits) as base_url:
        return measure_tool_calls(endpoint(base_url), prompts, required=required, repeat=repeat)


def endpoint(base_url: str) -> Endpoint:
    return Endpoint(base_url=base_url, model_id=MODEL, engine="stub", api_key=SecretStr(KEY))


def test_a_streamed_call_is_joined_and_checked_and_text_is_left_early() -> None:
    found = asked(repeat=True)
    called, said = found["answers"]
    assert called["calls"] == [{"name": "get_weather", "arguments": '{"city": "Paris"}', "fault": ""}]
    assert (said["calls"], said["cut"], bool(said["text"])) == ([], False, True)
    assert [one["id"] for one in found["again"]] == ["calls", "says"]


@pytest.mark.parametrize(
    ("habit", "seen"),
    [
        ("cuts arguments", {"fault": "arguments are not JSON text"}),
        ("nests arguments", {"fault": "arguments are not JSON text: nested too deeply"}),
        ("sends arguments as objects", {"error": "unreadable answer: TypeError"}),
        ("leaves calls in the text", {"leaked": True}),
        ("refuses tools", {"error": "HTTP 422: refuses tools"}),
    ],
)
def test_a_bad_habit_is_seen_in_the_answer(habit: str, seen: Evidence) -> None:
    answer = asked(habit)["answers"][0]
    shown = answer | (answer["calls"][0] if answer["calls"] else {})
    assert all(str(shown[key]).startswith(str(value)) for key, value in seen.items())


def test_a_call_is_demanded_with_tool_choice_required() -> None:
    assert [len(one["calls"]) for one in asked(required=True)["answers"]] == [1, 1]
    assert [len(one["calls"]) for one in asked("ignores tool_choice", required=True)["answers"]] == [1, 0]


def test_tools_that_reach_no_model_are_said_before_anything_is_asked() -> None:
    words = []
    for habit in ("has one id", "drops tools", "refuses tools"):
        with stub(habit) as base_url:
            words.append(tools_hidden(endpoint(base_url)))
    assert words[:2] == [None, "the chat template shows no tools to the model"]
    assert words[2] == "a request with tools is refused (HTTP 422: refuses tools)"
