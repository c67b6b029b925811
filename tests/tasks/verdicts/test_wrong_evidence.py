"""For each judge a table of small wrongs in sound evidence, and the verdict that each must turn to.

An exception is an ERROR of its area, as `flows.evaluation.judge` has it. Evidence that a wrong leaves sound (one sample
of many lost) keeps its PASS: a judge that shut the gate on it would be of no use.
"""

# ruff: noqa: E501

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from sound_evidence import DAY_S, JUDGES

from engines.yard.state import ModelState
from tasks.verdicts.retirement import Standing
from tasks.verdicts.risks import RiskVerdict
from tasks.verdicts.verdict import CheckResult, Verdict, worst

NAN = math.nan
PASS, INCONCLUSIVE, ERROR, FAIL = "PASS", "INCONCLUSIVE", "ERROR", "FAIL"
PARTS = {  # judges that have no evidence of their own, and whose they are
    "behaviour": "compatibility: one of its rows",
    "parity": "prompt tokens, answers and ignored parameters, one after the other",
    "calibration": "noise: with the plan's metrics",
    "slope": "leak, and windows: of a slope they found",
    **dict.fromkeys(("served", "silent_empty", "drift", "process_leak", "yard_leak"), "windows: a check of them"),
}
NO_PASS = {  # sound evidence that opens nothing, and why
    "pairs": "blocks decide",
    "memory estimate": "it refuses what cannot fit the limit; memory measures the rest",
    "unmeasured": "nothing was measured",
}


def checks_on(judge: str, evidence: Any) -> list[CheckResult | RiskVerdict]:
    found = JUDGES[judge][1](evidence)
    return list(found) if isinstance(found, list) else [found]


def verdict_on(judge: str, evidence: Any) -> str:
    """The worst required verdict, or the worst of a judge that holds no gate."""
    try:
        checks = checks_on(judge, evidence)
    except Exception:
        return ERROR
    held = [check for check in checks if isinstance(check, RiskVerdict) or check.required]
    return worst(check.verdict for check in held or checks).value


@pytest.mark.parametrize("judge", JUDGES)
def test_sound_evidence_passes(judge: str) -> None:
    assert verdict_on(judge, JUDGES[judge][0]()) == (INCONCLUSIVE if judge in NO_PASS else PASS)


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


def moved_at(found: dict[str, Any], at: float | None) -> None:
    route = ModelState(serving="new", undo="old").model_copy(update={"moved_at": at})
    found["models"][0] = Standing("m", route)


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
    ("pairs", "eleven times as slow", lambda e: [one["candidate"].update(ttft_ms=900.0) for one in e], FAIL),
    ("pairs", "arms swapped", swap_all, INCONCLUSIVE),
    ("pairs", "a NaN", lambda e: e[0]["candidate"].update(ttft_ms=NAN), ERROR),
    ("pairs", "no pairs", lambda e: e.clear(), INCONCLUSIVE),
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
    ("answers", "logprobs lost", lambda e: [one.update(positions=[]) for one in e["candidate"]], INCONCLUSIVE),
    ("answers", "no answers", lambda e: e["candidate"].clear(), INCONCLUSIVE),
    ("answers", "a duplicate answer", lambda e: e["incumbent"].append(copy.deepcopy(e["incumbent"][0])), ERROR),
    ("answers", "answers of other prompts", lambda e: e["candidate"].reverse(), PASS),  # matched by prompt
    ("answers", "empty texts", lambda e: [one.update(text="") for one in e["candidate"]], FAIL),
    ("prompt tokens", "a prompt of another length", lambda e: e["candidate"]["prompts"]["p3"].update(tokens=13), FAIL),
    ("prompt tokens", "a prompt lost", lambda e: e["candidate"]["prompts"].pop("p3"), PASS),
    ("prompt tokens", "a prompt refused", lambda e: e["candidate"]["prompts"]["p3"].update(tokens=None, error="400"), FAIL),
    ("prompt tokens", "a NaN", lambda e: e["candidate"]["prompts"]["p3"].update(tokens=NAN), FAIL),
    ("prompt tokens", "no prompts", lambda e: e["candidate"]["prompts"].clear(), INCONCLUSIVE),
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
    ("tool calls", "arms swapped", swap_all, PASS),
    ("preflight", "arms swapped", lambda e: [one.update(engine=name) for one, name in zip(e["engines"], ("new", "old"), strict=True)], PASS),
    ("preflight", "a candidate that does not load", lambda e: e["engines"][1].update(loads="no"), FAIL),
    ("preflight", "an incumbent that does not load", lambda e: e["engines"][0].update(loads="no"), PASS),
    ("preflight", "a NaN", lambda e: e["engines"][1]["fit"]["needs"][0].update(free=NAN), ERROR),
    ("preflight", "an unknown word", lambda e: e["engines"][1].update(loads="?"), ERROR),
    ("preflight", "an engine lost", lambda e: e["engines"].pop(), INCONCLUSIVE),
    ("preflight", "no engines", lambda e: e.update(engines=[], side_by_side={"fits": None, "why": ""}), INCONCLUSIVE),
    ("memory estimate", "candidate's in KiB", lambda e: e["engines"][1]["fit"]["needs"][0].update(low=1e12), FAIL),
    ("memory estimate", "a NaN", lambda e: e["engines"][1]["fit"]["needs"][0].update(low=NAN), ERROR),
    ("memory estimate", "incumbent's a NaN", lambda e: e["engines"][0]["fit"]["needs"][0].update(high=NAN), ERROR),
    ("memory estimate", "no engines", lambda e: e["engines"].clear(), INCONCLUSIVE),
    ("fields", "candidate's lost", lambda e: e["candidate"]["parameters"].clear(), PASS),
    ("fields", "one without effect", lambda e: e["candidate"]["parameters"]["min_p"].update(effect=False), FAIL),
    ("fields", "arms swapped", swap, PASS),
    ("fields", "no fields sent", lambda e: e["used"]["used"].clear(), INCONCLUSIVE),
    ("ignored parameters", "one of no use to the user", lambda e: e["candidate"]["parameters"]["seed"].update(effect=False), PASS),
    ("ignored parameters", "one relied on", lambda e: e["candidate"]["parameters"]["min_p"].update(effect=False), FAIL),
    ("ignored parameters", "one refused", lambda e: e["candidate"]["parameters"]["min_p"].update(effect=None), FAIL),
    ("ignored parameters", "one lost", lambda e: e["candidate"]["parameters"].pop("min_p"), INCONCLUSIVE),
    ("ignored parameters", "incumbent's lost", lambda e: e["incumbent"]["parameters"].pop("min_p"), INCONCLUSIVE),
    ("ignored parameters", "arms swapped", swap, PASS),
    ("ignored parameters", "no parameters", lambda e: [one["parameters"].clear() for one in e.values()], INCONCLUSIVE),
    ("client", "percent", lambda e: e.update(client_cpu_share=10.0), INCONCLUSIVE),
    ("client", "a NaN", lambda e: e.update(client_cpu_share=NAN), ERROR),
    ("client", "no figure", lambda e: e.update(client_cpu_share=None), INCONCLUSIVE),
    ("noise", "one block lost", lambda e: e.pop(), INCONCLUSIVE),
    ("noise", "arms swapped", swap_all, PASS),
    ("noise", "one arm's TTFT in us", lambda e: scale(e, "candidate", "ttft_ms", 1000), FAIL),
    ("noise", "one arm's TTFT in s", lambda e: scale(e, "candidate", "ttft_ms", 1e-3), FAIL),
    ("noise", "a NaN", lambda e: e[1]["candidate"]["e2e_ms"].append(NAN), ERROR),
    ("noise", "a duplicate block", lambda e: e.append(copy.deepcopy(e[0])), ERROR),
    ("noise", "no blocks", lambda e: e.clear(), INCONCLUSIVE),
    ("windows", "one of 72 lost", lambda e: e["windows"].pop(), INCONCLUSIVE),
    ("windows", "a duplicate window", lambda e: e["windows"].append(copy.deepcopy(e["windows"][-1])), ERROR),
    ("windows", "one in place of another", lambda e: e["windows"].__setitem__(9, copy.deepcopy(e["windows"][8])), ERROR),
    ("windows", "a NaN exposure", lambda e: e["windows"][3].update(exposure_s=NAN), ERROR),
    ("windows", "a NaN of memory", lambda e: e["windows"][30]["lives"][0].update(memory_bytes=NAN), ERROR),
    ("windows", "a NaN TTFT", lambda e: e["windows"][30].update(ttft_ms=[NAN]), ERROR),
    ("windows", "seconds in ms", lambda e: [one.update(exposure_s=3.6) for one in e["windows"]], INCONCLUSIVE),
    ("windows", "one TTFT in s", lambda e: e["windows"][30].update(ttft_ms=[0.02]), PASS),
    ("windows", "the last day's TTFT in us", lambda e: [one.update(ttft_ms=[2e4]) for one in e["windows"][-36:]], INCONCLUSIVE),
    ("windows", "an outage", lambda e: e["windows"][5].update(outage="it does not start"), FAIL),
    ("windows", "fifty empty answers", lambda e: e["windows"][5].update(silent_empty=50), PASS),
    ("windows", "a tenth of them", lambda e: [one.update(silent_empty=100) for one in e["windows"]], FAIL),
    ("windows", "five failures", lambda e: [one["failures"].append({"type": "x"}) for one in e["windows"][:5]], INCONCLUSIVE),
    ("windows", "twelve failures", lambda e: [one["failures"].append({"type": "x"}) for one in e["windows"][:12]], FAIL),
    ("windows", "memory lost", lambda e: [one.update(lives=[]) for one in e["windows"]], INCONCLUSIVE),
    ("windows", "no windows", lambda e: e["windows"].clear(), INCONCLUSIVE),
    ("rehearsal", "a drill lost", lambda e: e.pop("fallback"), ERROR),
    ("rehearsal", "drills swapped, each with who is right", lambda e: e.update(fallback=e["killed_candidate"], killed_candidate=e["fallback"]), PASS),
    ("rehearsal", "the other engine", lambda e: e["fallback"].update(by="new"), FAIL),
    ("rehearsal", "nobody named", lambda e: e["hidden_candidate"].update(by=None, fallback=None), FAIL),
    ("rehearsal", "a NaN", lambda e: e["fallback"].update(detect_s=NAN), ERROR),
    ("rehearsal", "a load of NaN", lambda e: e["fallback"].update(load_s=NAN), ERROR),
    ("rehearsal", "seconds in ms", lambda e: e["killed_candidate"].update(recover_s=2900.0), FAIL),
    ("rehearsal", "not noticed", lambda e: e["killed_candidate"].update(detect_s=None), INCONCLUSIVE),
    ("rehearsal", "no drills", lambda e: e.clear(), ERROR),
    ("next turn", "a turn lost", lambda e: e.pop("again"), PASS),
    ("next turn", "no turns", lambda e: e.clear(), ERROR),
    ("next turn", "a NaN", lambda e: e["again"].update(ttft_ms=NAN), ERROR),
    ("next turn", "the first a NaN", lambda e: e["before"].update(ttft_ms=NAN), ERROR),
    ("next turn", "before and after swapped", lambda e: e.update(before=e["moved"], moved=e["before"]), INCONCLUSIVE),
    ("next turn", "in us", lambda e: e["back"].update(ttft_ms=99e3), FAIL),
    ("next turn", "no prompt sizes", lambda e: [one.update(prompt_tokens=None) for one in e.values()], INCONCLUSIVE),
    ("load cycles", "one cycle lost", lambda e: e["cycles"].pop(), INCONCLUSIVE),
    ("load cycles", "a duplicate cycle", lambda e: e["cycles"].append(e["cycles"][0]), ERROR),
    ("load cycles", "one not answered", lambda e: e["cycles"][-1].update(answered=False, error="HTTP 503"), FAIL),
    ("load cycles", "a NaN", lambda e: e["cycles"][20].update(engine_bytes=NAN), ERROR),
    ("load cycles", "the last in another unit", lambda e: [one.update(yard_bytes=one["yard_bytes"] * 1000) for one in e["cycles"][30:]], FAIL),
    ("load cycles", "memory lost", lambda e: [one.update(engine_bytes=None) for one in e["cycles"]], INCONCLUSIVE),
    ("load cycles", "no cycles", lambda e: e.update(asked=0, cycles=[]), INCONCLUSIVE),
    ("hang", "not found", lambda e: e.update(detect_s=None), FAIL),
    ("hang", "a NaN", lambda e: e.update(detect_s=NAN), ERROR),
    ("hang", "a recovery of NaN", lambda e: e.update(recover_s=NAN), ERROR),
    ("hang", "nobody answered", lambda e: e.update(answered=False, by=None, error="HTTP 503"), FAIL),
    ("hang", "nothing", lambda e: e.clear(), ERROR),
    ("device", "the other device", lambda e: e.update(where="cpu"), FAIL),
    ("device", "not seen", lambda e: e.update(where="unknown"), INCONCLUSIVE),
    ("device", "an unknown word", lambda e: e.update(where="tpu"), ERROR),
    ("device", "nothing", lambda e: e.clear(), ERROR),
    ("risks", "a check lost", lambda e: e.pop(), INCONCLUSIVE),
    ("risks", "a duplicate check", lambda e: e.append(e[0]), PASS),
    ("risks", "another area's", lambda e: e.__setitem__(0, e[0].model_copy(update={"check": "parity.a"})), INCONCLUSIVE),
    ("risks", "one failed", lambda e: e.append(e[0].model_copy(update={"verdict": Verdict.FAIL})), FAIL),
    ("risks", "one broken", lambda e: e.append(e[0].model_copy(update={"verdict": Verdict.ERROR})), ERROR),
    ("risks", "no checks", lambda e: e.clear(), INCONCLUSIVE),
    ("retirement", "engines swapped", lambda e: e.update(engine="new"), FAIL),
    ("retirement", "a model never moved", lambda e: e["models"].append(Standing("o", None)), FAIL),
    ("retirement", "now in ms", lambda e: e.update(now=e["now"] * 1000), PASS),  # longer ago than any window
    ("retirement", "now in ks", lambda e: e.update(now=e["now"] / 1000), INCONCLUSIVE),
    ("retirement", "a window in ms", lambda e: e.update(window_s=e["window_s"] * 1000), INCONCLUSIVE),
    ("retirement", "a NaN", lambda e: e.update(now=NAN), ERROR),
    ("retirement", "moved at a NaN", lambda e: moved_at(e, NAN), ERROR),
    ("retirement", "moved at an unknown time", lambda e: moved_at(e, None), INCONCLUSIVE),
    ("retirement", "a duplicate model", lambda e: e["models"].append(e["models"][0]), PASS),
    ("retirement", "no models", lambda e: e["models"].clear(), INCONCLUSIVE),
    ("unmeasured", "as if it were measured", lambda e: e.update(verdict="PASS"), ERROR),
    ("unmeasured", "an unknown verdict", lambda e: e.update(verdict="?"), ERROR),
    ("unmeasured", "broken", lambda e: e.update(verdict="ERROR"), ERROR),
    ("unmeasured", "failed", lambda e: e.update(verdict="FAIL"), FAIL),
    ("unmeasured", "nothing", lambda e: e.clear(), ERROR),
]  # fmt: skip


@pytest.mark.parametrize(("judge", "wrong", "change", "verdict"), WRONGS, ids=[f"{one[0]}: {one[1]}" for one in WRONGS])
def test_a_small_wrong_turns_the_verdict(judge: str, wrong: str, change: Callable[[Any], Any], verdict: str) -> None:
    evidence = JUDGES[judge][0]()
    change(evidence)
    assert verdict_on(judge, evidence) == verdict, wrong


NOTHING = [one for one in WRONGS if one[1] in ("none", "nothing") or one[1].startswith("no ")]


@pytest.mark.parametrize(("judge", "wrong", "change", "_"), NOTHING, ids=[f"{one[0]}: {one[1]}" for one in NOTHING])
def test_no_check_passes_on_nothing(judge: str, wrong: str, change: Callable[[Any], Any], _: str) -> None:
    """Not even one that holds no gate, or one of several."""
    evidence = JUDGES[judge][0]()
    change(evidence)
    if verdict_on(judge, evidence) != ERROR:
        assert [check for check in checks_on(judge, evidence) if check.verdict is Verdict.PASS] == [], wrong


def judges() -> set[str]:
    """The names of all functions `judge_...`, without it."""
    packages = map(find_spec, ("engines", "tasks", "migrations", "flows"))  # in the checkout, or where it is installed
    folders = [Path(folder) for found in packages if found for folder in found.submodule_search_locations or ()]
    sources = [file for folder in folders for file in folder.rglob("*.py")]
    return {name for file in sources for name in re.findall(r"^def judge_(\w+)", file.read_text(), re.MULTILINE)}


def test_each_judge_has_its_wrongs() -> None:
    """A new judge comes with a row in JUDGES and its wrongs, or is a part of one that has."""
    named = {name.replace(" ", "_") for name in JUDGES}
    assert judges() == named | set(PARTS)
    assert named.isdisjoint(PARTS)
    assert {one[0] for one in WRONGS} == set(JUDGES)
    assert {Verdict(one[3]) for one in WRONGS} == set(Verdict)
