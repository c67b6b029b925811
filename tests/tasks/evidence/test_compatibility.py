"""The compatibility battery: passes a good server, catches each bad habit, and judges as a migration needs."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import httpx
import installed
import pytest
from openai_stub import CONTEXT_TOKENS, KEY, MODEL, stub

from engines.errors import BadInput
from engines.settings import Endpoint
from tasks.evidence.behaviours.base import ENDING, Asker
from tasks.evidence.behaviours.battery import BEHAVIOURS, DEFAULT_REQUIRED
from tasks.evidence.behaviours.caller import ApiReply
from tasks.evidence.compatibility import ANSWERED_BY_THE_YARD, judge_compatibility, measure_compatibility
from tasks.verdicts.verdict import CheckResult, Verdict

HABITS = {
    "chat_answer": "is a bot",
    "chat_ids": "has one id",
    "chat_model_name": "names another model",
    "system_message": "drops system",
    "developer_message": "drops developer",
    "multi_turn": "drops assistant",
    "content_parts": "prints content parts",
    "extra_fields": "refuses unknown fields",
    "cached_prompt": "never repeats itself",
    "keep_alive": "closes connections",
    "stream_pieces": "streams all at once",
    "stream_shape": "names no chunks",
    "stream_role_first": "opens without a role",
    "stream_equals_plain": "loses the last piece",
    "stream_done": "never says done",
    "stream_finish_once": "finishes twice",
    "stream_one_id": "changes ids",
    "usage_adds_up": "adds up wrong",
    "usage_in_stream": "streams no usage",
    "usage_only_when_asked": "always streams usage",
    "stop_string": "ignores stop",
    "stop_list": "reads the first stop only",
    "stop_five": "four stops at most",
    "stop_in_stream": "ignores stop in streams",
    "ends_by_itself": "shows markers",
    "ignore_eos": "ignores ignore_eos",
    "max_tokens": "ignores max_tokens",
    "max_completion_tokens": "ignores max_completion_tokens",
    "max_tokens_beyond_context": "refuses a large max_tokens",
    "long_prompt": "truncates",
    "overflow": "truncates",
    "overflow_stream": "refuses late",
    "greedy_repeats": "never repeats itself",
    "temperature_varies": "ignores temperature",
    "seed": "ignores seed",
    "top_p": "ignores top_p",
    "top_k": "ignores top_k",
    "logit_bias": "ignores logit_bias",
    "frequency_penalty": "ignores penalties",
    "presence_penalty": "ignores penalties",
    "two_choices": "ignores n",
    "logprobs": "gives token numbers",
    "top_logprobs": "gives unsorted alternatives",
    "logprobs_in_stream": "streams no logprobs",
    "tools_shown": "refuses tools",
    "tool_choice_auto": "leaves calls in the text",
    "tool_call_streamed": "cuts arguments",
    "tool_choice_required": "ignores tool_choice",
    "tool_choice_named": "ignores tool_choice",
    "tool_choice_none": "calls anyway",
    "one_call_at_a_time": "calls twice",
    "tool_round_trip": "drops tool",
    "null_content": "refuses null content",
    "json_schema": "ignores schema",
    "json_schema_stream": "ignores schema in streams",
    "json_object": "ignores json_object",
    "bad_schema": "takes any schema",
    "unicode_stream": "spoils wide characters",
    "unicode_equals_plain": "spoils wide characters",
    "unicode_request": "reads latin-1",
    "error_body": "has bare errors",
    "wrong_type": "takes any type",
    "bad_json": "500 on bad JSON",
    "unknown_model": "serves any model",
    "unknown_route": "serves any route",
    "empty_messages": "500 on no messages",
    "error_leaves_no_trace": "errors leave traces",
    "cancel_stream": "keeps running after a leave",
    "cancel_plain": "keeps running after a plain leave",
    "three_at_once": "mixes answers",
    "equal_lengths_at_once": "breaks on equal lengths",
    "models_list": "lists another model",
    "completions_route": "completes nothing",
    "tokenize_route": "no tokenize",
    "props_route": "no props",
    "health_route": "no health",
    "metrics_route": "no metrics",
    "key_enforced": "needs no key",
}


def endpoint(base_url: str, **changes: Any) -> Endpoint:
    """The stub as the battery sees it."""
    fields = {"model_id": MODEL, "engine": "stub", "context_tokens": CONTEXT_TOKENS, "api_key": KEY} | changes
    return Endpoint(base_url=base_url, **fields)


@pytest.fixture(scope="module")
def good() -> dict[str, Any]:
    """What a well behaved server shows."""
    with stub() as base_url:
        return measure_compatibility(endpoint(base_url))


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_a_good_server_passes(good: dict[str, Any], name: str) -> None:
    """Every behaviour passes on a server that has it, so a failure means something."""
    assert good["behaviours"][name]["outcome"] == "passed", good["behaviours"][name]["observed"]


def test_every_behaviour_has_a_habit_that_breaks_it() -> None:
    """A check that nothing can fail would prove nothing."""
    assert set(HABITS) == set(BEHAVIOURS)


@pytest.mark.parametrize(
    ("name", "habit"),
    [*HABITS.items(), ("empty_messages", "200 on no messages"), ("tool_choice_required", "nests arguments")],
)
def test_a_bad_habit_is_caught(name: str, habit: str) -> None:
    """A server that answers 200 without doing what was asked fails the behaviour."""
    with stub(habit) as base_url:
        seen = measure_compatibility(endpoint(base_url), names=[name])["behaviours"][name]
    assert seen["outcome"] == "failed", seen["observed"]


def test_the_required_set_covers_a_tool_calling_agent() -> None:
    """At least 34 behaviours; a required one in each group that such a client leans on."""
    groups = {BEHAVIOURS[name].group for name in DEFAULT_REQUIRED}
    assert len(BEHAVIOURS) >= 34
    assert groups >= {"chat", "stream", "usage", "stop", "limits", "tools", "json", "unicode", "errors", "cancel"}


def test_tools_that_the_template_drops_do_not_apply() -> None:
    """An engine whose prompt does not change with tools is said not to show them, call checks included."""
    names = ["tools_shown", "tool_choice_required", "tool_call_streamed"]
    with stub("drops tools") as base_url:
        seen = measure_compatibility(endpoint(base_url), names=names)["behaviours"]
    assert {record["outcome"] for record in seen.values()} == {"not_applicable"}


def test_the_context_is_found_where_the_endpoint_does_not_state_it() -> None:
    """Overflow is tried at the size that /props tells."""
    with stub() as base_url:
        seen = measure_compatibility(endpoint(base_url, context_tokens=None), names=["overflow"])["behaviours"]
    assert seen["overflow"]["outcome"] == "passed"


def test_a_model_that_never_ends_is_asked_once_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two behaviours need an answer that ends by itself; that there is none is found out once."""
    asked: list[object] = []

    def endless(ask: Asker, messages: object, **_: object) -> ApiReply:
        asked.append(messages)
        choice = {"message": {"content": "on and on"}, "finish_reason": "length"}
        return ApiReply(200, "", {"choices": [choice]})

    monkeypatch.setattr(Asker, "chat", endless)
    with stub() as base_url:
        names = ["ends_by_itself", "ignore_eos"]
        seen = measure_compatibility(endpoint(base_url), names=names)["behaviours"]
    assert {record["outcome"] for record in seen.values()} == {"not_applicable"}
    assert asked == list(ENDING)


def test_no_key_means_no_key_check() -> None:
    """Enforcement of a key that was not set is not judged."""
    with stub("needs no key") as base_url:
        seen = measure_compatibility(endpoint(base_url, api_key=None), names=["key_enforced"])["behaviours"]
    assert seen["key_enforced"]["outcome"] == "not_applicable"


def test_a_dead_server_errors_and_the_rest_is_not_tried() -> None:
    """A lost connection is an error with its reason; after three the battery stops asking."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    seen = list(measure_compatibility(endpoint(f"http://127.0.0.1:{port}"))["behaviours"].values())
    assert {record["outcome"] for record in seen} == {"errored"}
    assert "ConnectError" in seen[0]["observed"]
    assert "not tried" in seen[3]["observed"]


def test_a_silent_server_errors_at_the_read_limit() -> None:
    """A server that takes a request and says nothing is an error, not a failure of the claim."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        silent = endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}")
        seen = measure_compatibility(silent, names=["models_list"], read_timeout_s=0.2)["behaviours"]
    assert seen["models_list"]["outcome"] == "errored"
    assert "ReadTimeout" in seen["models_list"]["observed"]


def test_an_unknown_name_is_refused_with_the_closest() -> None:
    """A mistyped behaviour is named, with what was probably meant."""
    with pytest.raises(BadInput, match=r"'stop_strng' is no behaviour; did you mean stop_string"):
        measure_compatibility(endpoint("http://127.0.0.1:9"), names=["stop_strng"])
    with pytest.raises(BadInput, match="compatibility required: 'jsn_schema'"):
        judge_compatibility(shown(), shown(), ["jsn_schema"])


def shown(**outcomes: str) -> dict[str, Any]:
    """Evidence in which each named behaviour had that outcome."""
    records = {
        name: {"outcome": kind, "observed": f"{name} was {kind}", "claim": "", "group": "", "elapsed_ms": 1.0}
        for name, kind in outcomes.items()
    }
    return {"engine": "e", "version": "1", "behaviours": records}


def judged(before: str | None, after: str | None, *, required: bool = True) -> CheckResult:
    """The verdict on one behaviour that went from `before` to `after`."""
    old = shown(stop_string=before) if before else shown()
    new = shown(stop_string=after) if after else shown()
    found = judge_compatibility(old, new, ["stop_string"] if required else ["seed"])
    return next(result for result in found if result.check == "compatibility.stop_string")


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ("passed", "passed", Verdict.PASS),
        ("failed", "passed", Verdict.PASS),
        ("errored", "passed", Verdict.PASS),
        (None, "passed", Verdict.PASS),
        ("passed", "failed", Verdict.FAIL),
        ("passed", "not_applicable", Verdict.FAIL),
        ("failed", "failed", Verdict.PASS),
        ("failed", "not_applicable", Verdict.PASS),
        ("not_applicable", "failed", Verdict.PASS),
        ("passed", "errored", Verdict.ERROR),
        ("failed", "errored", Verdict.ERROR),
        ("errored", "failed", Verdict.INCONCLUSIVE),
        (None, "failed", Verdict.INCONCLUSIVE),
        ("passed", None, Verdict.INCONCLUSIVE),
    ],
)
def test_a_required_behaviour_is_judged_against_the_incumbent(
    before: str | None, after: str | None, verdict: Verdict
) -> None:
    """Only what the incumbent has can be lost; what was not measured is not passed."""
    result = judged(before, after)
    assert (result.verdict, result.required) == (verdict, True)


@pytest.mark.parametrize("name", sorted(ANSWERED_BY_THE_YARD))
def test_what_the_yard_answers_for_its_clients_is_not_lost(name: str) -> None:
    """Behind the yard no client meets the engine's own; an engine that gives no answer at all is another matter."""
    verdicts = {}
    for after in ("failed", "errored"):
        found = judge_compatibility(shown(**{name: "passed"}), shown(**{name: after}), [name])
        result = next(one for one in found if one.check == f"compatibility.{name}")
        verdicts[after] = result.verdict
        assert (
            after == "errored" or result.why == f"the yard answers it for its clients; the candidate: {name} was failed"
        )
    assert verdicts == {"failed": Verdict.PASS, "errored": Verdict.ERROR}


def test_what_the_incumbent_lacks_too_is_no_regression_and_says_so() -> None:
    """Both failing passes, with both observations."""
    assert judged("failed", "failed").why.startswith("not a regression: the incumbent fails it too")


def test_an_optional_loss_is_listed_without_holding_the_gate() -> None:
    """A behaviour outside the required set fails openly but not as required."""
    result = judged("passed", "failed", required=False)
    assert (result.verdict, result.required) == (Verdict.FAIL, False)


def test_what_applies_to_neither_is_listed_without_holding_the_gate() -> None:
    """A key that is set nowhere, say."""
    result = judged("not_applicable", "not_applicable")
    assert (result.verdict, result.required) == (Verdict.INCONCLUSIVE, False)


def test_the_summary_is_the_share_of_required_behaviours_that_pass() -> None:
    """One of two required lost: a half, FAIL, and the lost one named."""
    old = shown(seed="passed", stop_string="passed", top_k="passed")
    new = shown(seed="passed", stop_string="failed", top_k="failed")
    summary = judge_compatibility(old, new, ["seed", "stop_string"])[-1]
    assert (summary.check, summary.value, summary.verdict) == ("compatibility.required_passed", 0.5, Verdict.FAIL)
    assert summary.why == "1 of 2 required behaviours pass; not: stop_string; 50%, limit 100%"


def test_nothing_measured_is_inconclusive() -> None:
    """Two empty records open no gate."""
    summary = judge_compatibility(shown(), shown())[-1]
    assert (summary.verdict, summary.value) == (Verdict.INCONCLUSIVE, 0.0)


def test_a_server_judged_against_itself_passes(good: dict[str, Any]) -> None:
    """The same evidence on both sides opens the gate."""
    assert judge_compatibility(good, good)[-1].verdict is Verdict.PASS


@contextlib.contextmanager
def llama_server() -> Iterator[Endpoint]:
    """A real llama-server with SmolLM2 135M; skips where either is not installed."""
    model, binary = installed.smollm2(installed.LLAMA_SERVER), installed.llama_server()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    argv = [str(binary), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "--alias", MODEL,
            "--ctx-size", "2048", "--parallel", "1", "--threads", "1", "--jinja", "--metrics"]  # fmt: skip
    process = subprocess.Popen(
        argv,
        env=os.environ | {"LD_LIBRARY_PATH": str(binary.parent)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        base_url = f"http://127.0.0.1:{port}"
        wait_until_healthy(process, base_url)
        yield Endpoint(base_url=base_url, model_id=MODEL, engine="llama.cpp")
    finally:
        process.kill()
        process.wait()


def wait_until_healthy(process: subprocess.Popen[bytes], base_url: str, deadline_s: float = 60.0) -> None:
    """Return once /health says 200; fails when the process dies or the deadline passes."""
    until = time.monotonic() + deadline_s
    while time.monotonic() < until:
        assert process.poll() is None, "llama-server died"
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{base_url}/health", trust_env=False, verify=False).status_code == 200:
                return
        time.sleep(0.1)
    pytest.fail("llama-server did not become healthy")


@pytest.mark.engine
def test_llama_server_passes_what_applies_of_the_required_set() -> None:
    """The incumbent itself has all that the default set asks for, save tools that its template cannot show."""
    with llama_server() as served:
        seen = measure_compatibility(served)["behaviours"]
    lost = {name: seen[name]["observed"] for name in DEFAULT_REQUIRED if seen[name]["outcome"] in ("failed", "errored")}
    assert lost == {}
