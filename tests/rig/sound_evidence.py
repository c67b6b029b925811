"""Sound evidence for each judge, and the judge that reads it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

from engines.yard.state import ModelState
from tasks.evidence.canary import judge_canary, judge_shadow
from tasks.evidence.compatibility import judge_compatibility
from tasks.evidence.device import judge_device
from tasks.evidence.faults import judge_faults
from tasks.evidence.first_look import judge_pairs
from tasks.evidence.load_cycles import judge_hang, judge_load_cycles
from tasks.evidence.next_turn import judge_next_turn
from tasks.evidence.parity.compare import compare_answers
from tasks.evidence.parity.judge import judge_answers
from tasks.evidence.parity.parameters import judge_fields, judge_ignored_parameters
from tasks.evidence.parity.tokens import judge_prompt_tokens
from tasks.evidence.performance import Workload, judge_client, judge_memory, judge_noise, judge_performance
from tasks.evidence.preflight import judge_memory_estimate, judge_preflight
from tasks.evidence.rehearsal import judge_rehearsal
from tasks.evidence.soak.judge import judge_leak, judge_stability
from tasks.evidence.soak.judge_windows import judge_windows
from tasks.evidence.tool_calls.judge import judge_tool_calls
from tasks.evidence.unmeasured import judge_unmeasured
from tasks.verdicts.limits import DEFAULT_LIMITS, CanaryLimits
from tasks.verdicts.retirement import Standing, judge_retirement
from tasks.verdicts.risks import Risk, judge_risks
from tasks.verdicts.verdict import CheckResult, Verdict

DAY_S = 86_400.0


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


def fitting(low: float, expected: float, high: float) -> dict[str, Any]:
    need = {"device": "ram", "low": low, "expected": expected, "high": high, "free": 2e10}
    return {"verdict": "fits", "why": "it fits", "needs": [need]}


def preflighted() -> dict[str, Any]:
    engines = [
        {"engine": name, "loads": "yes", "why": "it is known", "fit": fitting(*(size * 1e9 for size in sizes))}
        for name, sizes in (("old", (2, 3, 4)), ("new", (1, 2, 3)))
    ]
    return {"engines": engines, "side_by_side": {"fits": True, "why": "5 GB together, 20 GB free"}}


def estimate(found: dict[str, Any]) -> Any:
    """It has no PASS: what it does not refuse, `memory` measures."""
    return judge_memory_estimate(found, "old", "new", DEFAULT_LIMITS.memory_peak_ratio)


def calibration() -> list[dict[str, Any]]:
    """The incumbent in both places."""
    both = [{"incumbent": arm(1.0, index), "candidate": arm(1.0, index + 3)} for index in range(6)]
    return [one | {"index": index, "order": "AB", "foreign_cpu": {}, "void": None} for index, one in enumerate(both)]


def noise(found: list[dict[str, Any]]) -> Any:
    work = Workload(requests=20, max_tokens=32)
    return judge_noise(found, DEFAULT_LIMITS, work, (6, 12, 24), client_error_ms={})


def parameters() -> dict[str, Any]:
    seen = {name: {"sent": {name: 1}, "effect": True, "observed": "other words"} for name in ("min_p", "seed")}
    return {name: {"parameters": copy.deepcopy(seen)} for name in ("incumbent", "candidate")}


def fields() -> dict[str, Any]:
    used = {"used": {"min_p": 12, "messages": 90}, "ignored": {"incumbent": [], "candidate": []}}
    return {"used": used, **parameters()}


def windows() -> dict[str, Any]:
    """72 hours of the serving engine, and a segment of the incumbent's own soak."""
    segment = {"exposure_s": 3600.0, "requests": 1000, "silent_empty": 0, "failures": []}
    found = []
    for hour in range(72):
        at_s, memory_bytes = hour * 3600.0, 5e8 + 2e5 * math.sin(hour)
        about = {"started_at": at_s, "ended_at": at_s + 3600, "outage": None, "yard_life": "1@1", "ended": ""}
        life = {"life": "7@7", "from": at_s, "until": at_s + 3600, "memory_bytes": memory_bytes}
        speed = {"ttft_ms": [20.0 + math.sin(hour)], "decode_tok_s": [50.0 + math.sin(hour)]}
        yard = {"yard_memory_bytes": 9e7 + 1e4 * math.sin(hour)}
        found.append(copy.deepcopy(segment) | about | speed | yard | {"lives": [life]})
    return {"incumbent": [segment | {"decode_tok_s": [50.0]}], "windows": found}


def rehearsed() -> dict[str, Any]:
    hidden = {"answered": True, "took_s": 0.1, "error": None, "by": "old", "right": "old", "fallback": "old"}
    killed = {"answered": True, "error": None, "by": "new", "right": "new", "usual_s": 0.2, "load_s": 2.0}
    killed |= {"detect_s": 0.1, "recover_s": 2.9}
    fallback = killed | {"by": "old", "right": "old"}
    return {"hidden_candidate": hidden | {"incidents": []}, "killed_candidate": killed, "fallback": fallback}


def rehearsal(found: dict[str, Any]) -> Any:
    return judge_rehearsal(found, kill_detect_s=1.0, recover_s=1.0)


def turns() -> dict[str, Any]:
    def turn(ttft_ms: float, cached: int, by: str) -> dict[str, Any]:
        return {"ttft_ms": ttft_ms, "prompt_tokens": 3012, "cached_tokens": cached, "by": by}

    there = {"before": turn(90, 2990, "old"), "moved": turn(12_400, 0, "new")}
    return there | {"back": turn(99, 2990, "old"), "again": turn(108, 2990, "new")}


def cycles() -> dict[str, Any]:
    shaken = [1e8 + 3e4 * math.sin(7 * number) for number in range(50)]
    seen = [{"answered": True, "error": None, "load_s": 1.5, "yard_bytes": b, "engine_bytes": b} for b in shaken]
    return {"asked": 50, "cycles": seen}


def hung() -> dict[str, Any]:
    return {"detect_s": 3.0, "recover_s": 2.0, "answered": True, "by": "new", "error": None}


def device(found: dict[str, Any]) -> Any:
    return [judge_device("launch.device", "new", 99, found)]


def standings() -> dict[str, Any]:
    moved = [Standing(name, ModelState(serving="new", undo="old", moved_at=0.0)) for name in ("m", "n")]
    return {"models": moved, "engine": "old", "now": 10 * DAY_S, "window_s": 7 * DAY_S}


def retirement(found: dict[str, Any]) -> Any:
    return judge_retirement(found["engine"], found["models"], window_s=found["window_s"], now=found["now"])


def risks() -> list[CheckResult]:
    names = [kind.replace("*", "a") for kind in RISK.evidence]
    return [CheckResult(check=name, verdict=Verdict.PASS, why="it is so") for name in names]


RISK = Risk(risk="slow", likelihood="low", impact="low", mitigation="measure", evidence=("performance.*", "memory.*"))

# the name of each is that of the function, without `judge_`
JUDGES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "preflight": (preflighted, lambda found: judge_preflight(found, "old", "new")),
    "memory estimate": (preflighted, estimate),
    "compatibility": (
        behaviours,
        lambda found: judge_compatibility(found["incumbent"], found["candidate"], ["chat_answer", "stop_string"]),
    ),
    "fields": (fields, lambda e: [judge_fields(e["used"], e["incumbent"], e["candidate"])]),
    "prompt tokens": (tokens, lambda found: judge_prompt_tokens(found["incumbent"], found["candidate"])),
    "answers": (answers, parity),
    "ignored parameters": (
        parameters,
        lambda found: judge_ignored_parameters(found["incumbent"], found["candidate"], ["min_p"]),
    ),
    "tool calls": (called, lambda found: judge_tool_calls(found, DEFAULT_LIMITS)),
    "pairs": (pairs, lambda found: [judge_pairs(found, DEFAULT_LIMITS)]),
    "client": (
        lambda: {"client_cpu_share": 0.1, "lateness_p99_ms": 0.2},
        lambda found: [judge_client(found, DEFAULT_LIMITS.client_cpu)],
    ),
    "noise": (calibration, noise),
    "performance": (blocks, performance),
    "memory": (blocks, lambda found: [judge_memory(found, DEFAULT_LIMITS, (6, 12, 24))]),
    "stability": (soaked, stability),
    "leak": (memory, leak),
    "windows": (
        windows,
        lambda e: judge_windows(e["incumbent"], e["windows"], soak_s=3 * DAY_S, limits=DEFAULT_LIMITS, is_over=True),
    ),
    "faults": (drills, faults),
    "rehearsal": (rehearsed, rehearsal),
    "next turn": (turns, lambda found: [judge_next_turn(found)]),
    "load cycles": (cycles, judge_load_cycles),
    "hang": (hung, lambda found: [judge_hang(found)]),
    "device": (lambda: {"where": "gpu", "why": "its log says so"}, device),
    "canary": (live, canary),
    "shadow": (copies, judge_shadow),
    "risks": (risks, lambda found: judge_risks([RISK], found)),
    "retirement": (standings, retirement),
    "unmeasured": (
        lambda: {"verdict": "INCONCLUSIVE", "why": "left out", "log": []},
        lambda found: [judge_unmeasured("candidate", "faults", found)],
    ),
}
