"""For each judge a table of small wrongs in sound evidence, and the verdict that each must turn to.

An exception is an ERROR of its area, as `flows.evaluation.judge` has it. Evidence that a wrong leaves sound (one sample
of many lost) keeps its PASS: a judge that shut the gate on it would be of no use.
"""

# ruff: noqa: E501

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest

from tasks.evidence.canary import judge_canary, judge_shadow
from tasks.evidence.compatibility import judge_compatibility
from tasks.evidence.faults import judge_faults
from tasks.evidence.first_look import judge_pairs
from tasks.evidence.parity.compare import compare_answers
from tasks.evidence.parity.judge import judge_answers
from tasks.evidence.parity.tokens import judge_prompt_tokens
from tasks.evidence.performance import Workload, judge_memory, judge_performance
from tasks.evidence.soak.judge import judge_leak, judge_stability
from tasks.evidence.tool_calls.judge import judge_tool_calls
from tasks.verdicts.limits import DEFAULT_LIMITS, CanaryLimits
from tasks.verdicts.verdict import Verdict, gate

NAN = math.nan
DAY_S = 86_400.0
PASS, INCONCLUSIVE, ERROR, FAIL = "PASS", "INCONCLUSIVE", "ERROR", "FAIL"


# --- sound evidence, and who judges it


def arm(factor: float, index: int) -> dict[str, Any]:
    shaken = [factor * (1 + 0.01 * math.sin(7 * index + request)) for request in range(20)]
    times = {
        name: [value * base for value in shaken] for name, base in (("ttft_ms", 80), ("tpot_ms", 9), ("e2e_ms", 360))
    }
    memory = {"memory_peak_mib": [500 * shaken[0]], "memory_steady_bytes": 5e8, "mapped_weights_bytes": 10**8}
    return {**times, **memory, "errors": [], "records": [{}] * 20, "load_s": 1.0, "reconciled": [], "machine": {}}


def blocks() -> list[dict[str, Any]]:
    """A candidate in half of the time and memory."""
    both = [{"incumbent": arm(1.0, index), "candidate": arm(0.5, index)} for index in range(6)]
    return [one | {"index": index, "order": "AB", "foreign_cpu": {}, "void": None} for index, one in enumerate(both)]


def performance(found: list[dict[str, Any]]) -> Any:
    work = Workload(requests=20, max_tokens=32)
    return judge_performance(found, DEFAULT_LIMITS, work, (6, 12, 24), client_error_ms={})


def pairs() -> list[dict[str, Any]]:
    one = {"ttft_ms": 80.0, "tpot_ms": 9.0, "e2e_ms": 360.0}
    return [
        {name: {key: value + n for key, value in one.items()} for name in ("incumbent", "candidate")} for n in range(5)
    ]


def answers() -> dict[str, Any]:
    """Two engines that say the same with nearly the same probabilities, over 20 prompts of 10 tokens."""

    def said(shift: float) -> list[dict[str, Any]]:
        top = [[f" w{n}", -0.3 - shift, 2 * n] for n in range(10)]
        places = [[*one, [one, [" x", -1.5 + shift, 2 * n + 1]]] for n, one in enumerate(top)]
        text = "".join(one[0] for one in top)
        same = {"prompt": "Say something.", "text": text, "reasoning": "", "tool_calls": [], "finish_reason": "length"}
        same |= {"prompt_tokens": 9, "completion_tokens": 10, "error": None}
        return [same | {"id": f"p{n}", "positions": copy.deepcopy(places)} for n in range(20)]

    return {"incumbent": said(0.0), "candidate": said(0.001)}


def parity(found: dict[str, Any]) -> Any:
    return judge_answers(compare_answers(*({"answers": found[name]} for name in ("incumbent", "candidate"))))


def tokens() -> dict[str, Any]:
    counted = {f"p{n}": {"tokens": 9 + n, "error": None, "tools_shown": None, "preview": "p"} for n in range(20)}
    raw = [{"text": "a", "tokens": 1, "error": None, "ids": None}]
    return {name: {"prompts": copy.deepcopy(counted), "raw": raw} for name in ("incumbent", "candidate")}


def behaviours() -> dict[str, Any]:
    names = ("chat_answer", "stop_string", "seed")
    seen = {n: {"outcome": "passed", "observed": "yes", "claim": "", "group": "chat", "elapsed_ms": 1} for n in names}
    return {name: {"behaviours": copy.deepcopy(seen)} for name in ("incumbent", "candidate")}


def soaked() -> dict[str, Any]:
    hour = {"exposure_s": 3600.0, "requests": 1000, "silent_empty": 0, "failures": [], "decode_tok_s": [50.0]}
    return {name: [copy.deepcopy(hour) for _ in range(72)] for name in ("incumbent", "candidate")}


def stability(found: dict[str, Any]) -> Any:
    arms = (found["incumbent"], found["candidate"])
    return judge_stability(*arms, soak_s=3 * DAY_S, failures_per_day=1.0, throughput_retention=0.9)


def memory() -> dict[str, Any]:
    times = [600.0 * n for n in range(432)]
    return {"t": times, "v": [5e8 + 2e5 * math.sin(n) for n in range(432)]}


def leak(found: dict[str, Any]) -> Any:
    return [judge_leak(found["t"], found["v"], soak_s=3 * DAY_S, limit_bytes_per_day=50e6)]


def drills() -> dict[str, Any]:
    seen = {"load_s": 1.0, "no_progress_s": 2.0, "evidence": "e", "detect_s": 0.1, "recover_s": 1.1, "client_saw": "x"}
    refused = {"classified": "refused", "evidence": "e", "detect_s": 0.1}
    interrupted = {
        "sigkill": seen | {"classified": "dead"},
        "sigstop": seen | {"classified": "wedged", "detect_s": 2.1},
    }
    return interrupted | {"truncated_gguf": refused, "port_taken": refused}


def faults(found: dict[str, Any]) -> Any:
    return judge_faults(found, kill_detect_s=1.0, hang_detect_s=2.0, recover_s=1.0)


def live() -> list[dict[str, Any]]:
    """600 answers of each engine, the candidate's in half of the time."""
    found = []
    for at in range(1200):
        new = at % 2
        about = {"at": float(at), "engine": "new" if new else "old", "conversation": f"{new} {at % 14}", "ok": True}
        pace = (0.5 if new else 1.0) * (1 + 0.05 * math.sin(at))
        found.append(about | {"prompt_tokens": 100, "error": None, "empty": False, "cached_share": 0.9})
        found[-1] |= {"ttft_ms": 50 * pace, "tpot_ms": 10 * pace}
    return found


def canary(found: list[dict[str, Any]]) -> Any:
    return judge_canary(found, "old", "new", CanaryLimits())


def copies() -> list[dict[str, Any]]:
    arms = answers()
    every = [(one, other) for _ in range(4) for one, other in zip(arms["incumbent"], arms["candidate"], strict=True)]
    return [{"sampled": False, "incumbent": copy.deepcopy(a), "candidate": copy.deepcopy(b)} for a, b in every]


def called() -> list[dict[str, Any]]:
    call = [{"name": "f", "arguments": "{}", "fault": ""}]
    one = {"group": "one", "prompt": "p", "calls": call, "text": "", "leaked": False, "cut": False, "error": None}
    made = [one | {"id": f"p{n}", "calls": copy.deepcopy(call) if n % 5 else []} for n in range(60)]
    batch = {"batch": "0", "looks": [60], "required": False, "hidden": None, "again": made}
    return [batch | {"incumbent": made, "candidate": copy.deepcopy(made)}]


JUDGES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "performance": (blocks, performance),
    "first look": (pairs, lambda found: [judge_pairs(found, DEFAULT_LIMITS)]),
    "memory": (blocks, lambda found: [judge_memory(found, DEFAULT_LIMITS, (6, 12, 24))]),
    "answers": (answers, parity),
    "tokens": (tokens, lambda found: judge_prompt_tokens(found["incumbent"], found["candidate"])),
    "compatibility": (
        behaviours,
        lambda found: judge_compatibility(found["incumbent"], found["candidate"], ["chat_answer", "stop_string"]),
    ),
    "stability": (soaked, stability),
    "leak": (memory, leak),
    "faults": (drills, faults),
    "canary": (live, canary),
    "shadow": (copies, judge_shadow),
    "tool calls": (called, lambda found: judge_tool_calls(found, DEFAULT_LIMITS)),
}


def verdict_on(judge: str, evidence: Any) -> str:
    try:
        return gate(JUDGES[judge][1](evidence)).value
    except Exception:
        return ERROR


@pytest.mark.parametrize("judge", [name for name in JUDGES if name != "first look"])
def test_sound_evidence_passes(judge: str) -> None:
    """A first look passes nothing."""
    assert verdict_on(judge, JUDGES[judge][0]()) == PASS


# --- small wrongs


def swap(one: dict[str, Any]) -> None:
    one["incumbent"], one["candidate"] = one["candidate"], one["incumbent"]


def swap_all(found: list[dict[str, Any]]) -> None:
    for one in found:
        swap(one)


def scale(found: list[dict[str, Any]], arm: str, name: str, factor: float) -> None:
    for one in found:
        one[arm][name] = [value * factor for value in one[arm][name]]


def rename(found: list[dict[str, Any]]) -> None:
    for one in found:
        one["engine"] = {"old": "new", "new": "old"}[one["engine"]]


def times(found: list[dict[str, Any]], engine: str, factor: float, key: str = "ttft_ms") -> None:
    for one in found:
        if one["engine"] == engine:
            one[key] *= factor


def each_logprob(found: dict[str, Any], arm: str, change: Callable[[float], float]) -> None:
    for one in found[arm]:
        for place in one["positions"]:
            place[1] = change(place[1])
            place[3] = [[text, change(p), number] for text, p, number in place[3]]


WRONGS: list[tuple[str, str, Callable[[Any], Any], str]] = [
    ("performance", "one sample lost", lambda e: e[2]["candidate"]["ttft_ms"].pop(), PASS),
    ("performance", "one block lost", lambda e: e.pop(), INCONCLUSIVE),
    ("performance", "arms swapped", swap_all, FAIL),
    ("performance", "arms of one block swapped", lambda e: swap(e[0]), INCONCLUSIVE),
    ("performance", "candidate's TTFT in us", lambda e: scale(e, "candidate", "ttft_ms", 1000), FAIL),
    ("performance", "candidate's TTFT in s", lambda e: scale(e, "candidate", "ttft_ms", 1e-3), INCONCLUSIVE),
    ("performance", "incumbent's TPOT in us", lambda e: scale(e, "incumbent", "tpot_ms", 1000), INCONCLUSIVE),
    ("performance", "a NaN", lambda e: e[1]["candidate"]["e2e_ms"].append(NAN), ERROR),
    ("performance", "a zero", lambda e: e[1]["candidate"]["e2e_ms"].append(0.0), ERROR),
    ("performance", "an empty list", lambda e: e[3]["candidate"].update(tpot_ms=[]), INCONCLUSIVE),
    ("performance", "no blocks", lambda e: e.clear(), INCONCLUSIVE),
    ("performance", "a duplicate block", lambda e: e.append(copy.deepcopy(e[0])), ERROR),
    ("performance", "a failed request", lambda e: e[0]["candidate"]["errors"].extend(["HTTP 500"] * 20), FAIL),
    ("first look", "eleven times as slow", lambda e: [one["candidate"].update(ttft_ms=900.0) for one in e], FAIL),
    ("first look", "arms swapped", swap_all, INCONCLUSIVE),
    ("first look", "a NaN", lambda e: e[0]["candidate"].update(ttft_ms=NAN), ERROR),
    ("first look", "no pairs", lambda e: e.clear(), INCONCLUSIVE),
    ("memory", "one block lost", lambda e: e.pop(), INCONCLUSIVE),
    ("memory", "arms swapped", swap_all, FAIL),
    ("memory", "candidate's peak in KiB", lambda e: scale(e, "candidate", "memory_peak_mib", 1000), FAIL),
    ("memory", "candidate's peak in GiB", lambda e: scale(e, "candidate", "memory_peak_mib", 1e-3), PASS),
    ("memory", "an empty list", lambda e: e[0]["candidate"].update(memory_peak_mib=[]), INCONCLUSIVE),
    ("memory", "a NaN", lambda e: e[0]["candidate"].update(memory_peak_mib=[NAN]), ERROR),
    ("memory", "a duplicate block", lambda e: e.append(copy.deepcopy(e[0])), ERROR),
    ("answers", "one answer lost", lambda e: e["candidate"].pop(), PASS),
    ("answers", "arms swapped", swap, PASS),
    ("answers", "candidate's in base 10", lambda e: each_logprob(e, "candidate", lambda p: p / math.log(10)), FAIL),
    ("answers", "a NaN", lambda e: each_logprob(e, "candidate", lambda _: NAN), ERROR),
    ("answers", "one NaN", lambda e: e["candidate"][0]["positions"][4][3][0].__setitem__(1, NAN), ERROR),
    ("answers", "no logprobs", lambda e: [one.update(positions=[]) for one in e["candidate"]], INCONCLUSIVE),
    ("answers", "no answers", lambda e: e["candidate"].clear(), INCONCLUSIVE),
    ("answers", "a duplicate answer", lambda e: e["incumbent"].append(copy.deepcopy(e["incumbent"][0])), ERROR),
    ("answers", "answers of other prompts", lambda e: e["candidate"].reverse(), PASS),  # matched by prompt
    ("answers", "empty texts", lambda e: [one.update(text="") for one in e["candidate"]], FAIL),
    ("tokens", "a prompt of another length", lambda e: e["candidate"]["prompts"]["p3"].update(tokens=13), FAIL),
    ("tokens", "a prompt lost", lambda e: e["candidate"]["prompts"].pop("p3"), PASS),
    ("tokens", "a prompt refused", lambda e: e["candidate"]["prompts"]["p3"].update(tokens=None, error="400"), FAIL),
    ("tokens", "a NaN", lambda e: e["candidate"]["prompts"]["p3"].update(tokens=NAN), FAIL),
    ("tokens", "no prompts", lambda e: e["candidate"]["prompts"].clear(), INCONCLUSIVE),
    ("compatibility", "one lost", lambda e: e["candidate"]["behaviours"].pop("stop_string"), INCONCLUSIVE),
    ("compatibility", "none", lambda e: e["candidate"]["behaviours"].clear(), INCONCLUSIVE),
    ("compatibility", "one failed", lambda e: e["candidate"]["behaviours"]["seed"].update(outcome="failed"), PASS),
    (
        "compatibility",
        "a required one failed",
        lambda e: e["candidate"]["behaviours"]["chat_answer"].update(outcome="failed"),
        FAIL,
    ),
    (
        "compatibility",
        "an unknown outcome",
        lambda e: e["candidate"]["behaviours"]["chat_answer"].update(outcome="?"),
        FAIL,
    ),
    ("stability", "one hour lost", lambda e: e["candidate"].pop(), INCONCLUSIVE),
    ("stability", "seconds in ms", lambda e: [one.update(exposure_s=3.6) for one in e["candidate"]], INCONCLUSIVE),
    ("stability", "seconds in us", lambda e: [one.update(exposure_s=3.6e6) for one in e["candidate"]], ERROR),
    ("stability", "a NaN", lambda e: e["candidate"][0].update(exposure_s=NAN), ERROR),
    ("stability", "no segments", lambda e: e["candidate"].clear(), INCONCLUSIVE),
    ("stability", "five failures", lambda e: [one["failures"].append({"type": "x"}) for one in e["candidate"][:5]], FAIL),
    ("stability", "the incumbent's", lambda e: [one["failures"].append({"type": "x"}) for one in e["incumbent"][:4]], PASS),
    ("stability", "an empty answer", lambda e: e["candidate"][0].update(silent_empty=1), INCONCLUSIVE),
    ("stability", "fifty of them", lambda e: e["candidate"][0].update(silent_empty=50), FAIL),
    ("leak", "one sample lost", lambda e: (e["t"].pop(9), e["v"].pop(9)), PASS),
    ("leak", "samples without a time", lambda e: e["t"].pop(9), ERROR),
    ("leak", "a gap", lambda e: e["v"].__setitem__(slice(50, 90), [None] * 40), PASS),
    ("leak", "a NaN", lambda e: e["v"].__setitem__(200, NAN), ERROR),
    ("leak", "a leak", lambda e: e.update(v=[v + 100e6 * t / DAY_S for t, v in zip(e["t"], e["v"], strict=True)]), FAIL),
    ("leak", "times in ms", lambda e: e.update(t=[t / 1000 for t in e["t"]]), INCONCLUSIVE),
    ("leak", "no samples", lambda e: e.update(t=[0.0], v=[None]), INCONCLUSIVE),
    ("faults", "a drill lost", lambda e: e.pop("sigkill"), ERROR),
    ("faults", "a NaN", lambda e: e["sigkill"].update(detect_s=NAN), ERROR),
    ("faults", "seconds in ms", lambda e: e["sigkill"].update(detect_s=100.0), FAIL),
    ("faults", "drills swapped", lambda e: e.update(sigkill=e["sigstop"], sigstop=e["sigkill"]), FAIL),
    ("faults", "a drill that failed", lambda e: e.update(sigstop={"failed": "no"}), ERROR),
    ("canary", "one sample lost", lambda e: e.pop(7), PASS),
    ("canary", "engines swapped", rename, FAIL),
    ("canary", "candidate's TTFT in us", lambda e: times(e, "new", 1000), FAIL),
    ("canary", "candidate's TTFT in s", lambda e: times(e, "new", 1e-3), INCONCLUSIVE),
    ("canary", "a NaN", lambda e: e[9].update(ttft_ms=NAN), PASS),  # a time that was not measured
    ("canary", "no answer of the candidate", lambda e: e.__setitem__(slice(None), e[::2]), INCONCLUSIVE),
    ("canary", "no samples", lambda e: e.clear(), INCONCLUSIVE),
    ("canary", "failures", lambda e: [one.update(ok=False, error="HTTP 500") for one in e[1:101:2]], FAIL),
    ("shadow", "one pair lost", lambda e: e.pop(), PASS),
    ("shadow", "no pairs", lambda e: e.clear(), INCONCLUSIVE),
    ("shadow", "failed copies", lambda e: [one["candidate"].update(error="HTTP 500") for one in e[:30]], FAIL),
    ("shadow", "empty texts", lambda e: [one["candidate"].update(text="") for one in e], FAIL),
    ("shadow", "other prompt sizes", lambda e: [one["candidate"].update(prompt_tokens=8) for one in e], FAIL),
    ("tool calls", "one answer lost", lambda e: e[0]["candidate"].pop(), PASS),
    ("tool calls", "calls lost", lambda e: [one.update(calls=[]) for one in e[0]["candidate"]], FAIL),
    ("tool calls", "no calls at all", lambda e: [o.update(calls=[]) for a in ("incumbent", "candidate") for o in e[0][a]], INCONCLUSIVE),
    ("tool calls", "a third not valid", lambda e: [c.update(fault="$") for o in e[0]["candidate"][:20] for c in o["calls"]], FAIL),
    ("tool calls", "a duplicate answer", lambda e: e[0]["candidate"].append(copy.deepcopy(e[0]["candidate"][1])), ERROR),
    ("tool calls", "no answers", lambda e: e[0]["candidate"].clear(), INCONCLUSIVE),
    ("tool calls", "no batches", lambda e: e.clear(), INCONCLUSIVE),
]  # fmt: skip


@pytest.mark.parametrize(("judge", "wrong", "change", "verdict"), WRONGS, ids=[f"{one[0]}: {one[1]}" for one in WRONGS])
def test_a_small_wrong_turns_the_verdict(judge: str, wrong: str, change: Callable[[Any], Any], verdict: str) -> None:
    evidence = JUDGES[judge][0]()
    change(evidence)
    assert verdict_on(judge, evidence) == verdict, wrong


def test_each_judge_has_its_wrongs() -> None:
    assert {one[0] for one in WRONGS} == set(JUDGES)
    assert {Verdict(one[3]) for one in WRONGS} == set(Verdict)
