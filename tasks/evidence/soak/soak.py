"""Stability: an agent's kind of load for a given time, and what its failures do and do not prove.

The load grows a conversation turn by turn, offers tools, leaves some streams half-way, pauses, and starts afresh when
the context is nearly full. Evidence is saved in segments, so that a killed soak goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engines.client.client import client_session, stream_chat
from engines.client.record import StreamRecord
from engines.errors import EngineError
from engines.process.serving import Served, exit_reason
from engines.process.telemetry import Sampler
from engines.settings import Endpoint
from tasks.evidence.engine_under_test import EngineUnderTest
from tasks.verdicts.statistics import Slope, bucket_medians, poisson_upper_rate, theil_sen
from tasks.verdicts.verdict import CheckResult, Verdict, at_most, not_measured

ANSWER_TOKENS = 24
CONTEXT_SHARE = 0.6  # a conversation starts afresh beyond this share of the context
FALLBACK_CONTEXT = 2048
STALL_S = 60.0
MEMORY_EVERY_S = 1.0
DYING_S = 5.0
RESTARTS_ALLOWED = 20
DAY_S = 86_400
WARM_SHARE = 0.1  # of the soak, and 6 h at most, before memory is judged: caches fill first
BUCKETS = 12
LEAK, LEAK_UNIT = "memory.leak_bytes_per_day", "bytes/day"
TOOL = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "Read a file of the project",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
    },
}
ASKS = (
    "What should we look at first?",
    "Explain that in one sentence.",
    "Which file would you open next, and why?",
    "Summarise what we know so far.",
    "Write a short test for it.",
    "Was sollten wir als Nächstes tun?",
    "List three things that could go wrong.",
)


def soak(
    contender: EngineUnderTest,
    *,
    soak_s: float,
    done: Sequence[Mapping[str, Any]],
    save: Callable[[int, dict[str, Any]], None],
    on_memory: Callable[[float, int | None], None],
    segment_s: float = 60.0,
    seed: int = 0,
    stop: threading.Event | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Load the engine until `soak_s` seconds are on record; `done` holds the segments of an earlier, killed run.

    Every segment is handed to `save(index, evidence)` as it ends, and memory to `on_memory(epoch seconds, bytes)` every
    second (anonymous memory and swap of the process tree). A died or hung engine is a failure: it is counted,
    restarted, and the soak goes on; after RESTARTS_ALLOWED restarts it stops and the evidence says so. `stop`, when set
    from another thread, ends it without keeping the segment under way.
    """
    exposed_s = sum(segment["exposure_s"] for segment in done)
    index = len(done)
    restarts = sum(segment["restarts"] + _failed_starts(segment) for segment in done)
    agent = Agent(seed + index)
    carried: list[dict[str, Any]] = []
    stop = stop or threading.Event()
    while exposed_s < soak_s and restarts <= RESTARTS_ALLOWED and not stop.is_set():
        try:
            with contender.up() as served, _watched(served, on_memory):
                while exposed_s < soak_s:
                    length_s = min(segment_s, soak_s - exposed_s)
                    segment = _segment(served, agent, length_s, exposed_s, carried, stop)
                    if stop.is_set():
                        return
                    carried = []
                    save(index, segment)
                    index, exposed_s = index + 1, exposed_s + segment["exposure_s"]
                    restarts += segment["restarts"]
                    progress(f"{exposed_s:.0f} of {soak_s:.0f} s, {segment['requests']} requests in the last segment")
                    if segment["restarts"]:
                        break
        except EngineError as error:
            if stop.is_set():
                return
            restarts += 1
            carried.append({"at_s": exposed_s, "type": "start", "error": str(error).splitlines()[0]})
    if carried:  # it never came up again: the failures themselves are the evidence
        save(index, empty_segment(carried))


def _watched(served: Served, on_memory: Callable[[float, int | None], None]) -> Sampler:
    return Sampler(
        served.process.pid, MEMORY_EVERY_S, on_sample=lambda sample: on_memory(time.time(), sample["memory_bytes"])
    )


class Agent:
    """The conversation so far, and what the agent does next."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._turn = 0
        self.messages: list[dict[str, Any]] = []
        self.restart()

    def restart(self) -> None:
        """A new conversation."""
        name = self._random.choice(("parser", "scheduler", "cache", "router", "importer"))
        self.messages = [{"role": "system", "content": f"You help with the {name} of a small program. Be brief."}]

    def next(self) -> tuple[str, dict[str, Any], int | None, float]:
        """(kind of turn, request body, chunks after which the client leaves, pause before it in seconds)."""
        self._turn += 1
        self.messages.append({"role": "user", "content": self._random.choice(ASKS)})
        body: dict[str, Any] = {"messages": list(self.messages), "max_tokens": ANSWER_TOKENS, "temperature": 0.7}
        if self._turn % 7 == 0:
            return "cancelled", body, 3, 0.0
        if self._turn % 5 == 0:
            return "after a pause", body, None, 1.0
        if self._turn % 3 == 0:
            return "tools", {**body, "tools": [TOOL]}, None, 0.0
        return "turn", body, None, 0.0

    def answered(self, record: StreamRecord, context_tokens: int) -> None:
        """Take the answer into the conversation; begin a new one when the context is nearly full or it broke."""
        if record.tool_calls:
            calls = [
                {
                    "id": call["id"] or f"call_{i}",
                    "type": "function",
                    "function": {k: call[k] for k in ("name", "arguments")},
                }
                for i, call in enumerate(record.tool_calls)
            ]
            self.messages.append({"role": "assistant", "content": record.text or "", "tool_calls": calls})
            self.messages += [{"role": "tool", "tool_call_id": c["id"], "content": "file not found"} for c in calls]
        else:
            self.messages.append({"role": "assistant", "content": record.text or "..."})
        used = (record.prompt_tokens or 0) + (record.completion_tokens or 0)
        if not record.ok or used > CONTEXT_SHARE * context_tokens:
            self.restart()


def _segment(
    served: Served,
    agent: Agent,
    length_s: float,
    offset_s: float,
    carried: Sequence[Mapping[str, Any]],
    stop: threading.Event,
) -> dict[str, Any]:
    context = served.endpoint.context_tokens or FALLBACK_CONTEXT
    started = time.monotonic()
    segment = empty_segment(carried)
    while (elapsed := time.monotonic() - started) < length_s and not stop.is_set():
        kind, body, leave_after, pause_s = agent.next()
        time.sleep(min(pause_s, max(0.0, length_s - elapsed)))
        record = ask(served.endpoint, body, leave_after)
        agent.answered(record, context)
        at_s = round(offset_s + time.monotonic() - started, 2)
        segment["requests"] += 1
        segment["kinds"][kind] = segment["kinds"].get(kind, 0) + 1
        if record.error_type == "hang" or _died(served, record):
            # one event, one failure: the broken request is part of the death
            segment["failures"].append(_death(served, at_s))
            segment["restarts"] += 1
            break
        count_answer(segment, record, kind, at_s)
    segment["exposure_s"] = time.monotonic() - started
    return segment


def ask(endpoint: Endpoint, body: dict[str, Any], leave_after: int | None) -> StreamRecord:
    """What came of one turn; the client leaves after `leave_after` chunks, where given."""

    async def one() -> StreamRecord:
        async with client_session() as session:
            return await stream_chat(session, endpoint, body, cancel_after_chunks=leave_after, stall_s=STALL_S)

    return asyncio.run(one())


def count_answer(segment: dict[str, Any], record: StreamRecord, kind: str, at_s: float) -> None:
    """Take what came of a turn into the segment: a failure, an empty answer, or its speed."""
    if not record.ok:
        segment["failures"].append({"at_s": at_s, "type": record.error_type, "error": record.error, "turn": kind})
        return
    if record.cancelled:
        return
    if not record.text and not record.tool_calls:
        segment["silent_empty"] += 1
    measured = record.metrics()
    segment["ttft_ms"].append(measured["ttft_ms"])
    segment["decode_tok_s"].append(measured["decode_tok_s"])
    segment["prompt_tokens"].append(record.prompt_tokens)


def _died(served: Served, record: StreamRecord) -> bool:
    """True when the process ended. A dying one closes its sockets first: after a lost connection it gets DYING_S."""
    limit = time.monotonic() + (DYING_S if record.error_type in ("connect", "stream_truncated") else 0.0)
    while served.process.poll() is None:
        if time.monotonic() >= limit:
            return False
        time.sleep(0.02)
    return True


def _failed_starts(segment: Mapping[str, Any]) -> int:
    return sum(failure["type"] == "start" for failure in segment["failures"])


def _death(served: Served, at_s: float) -> dict[str, Any]:
    if served.process.poll() is None:
        return {"at_s": at_s, "type": "hang", "error": f"no byte for {STALL_S:.0f} s; the engine was restarted"}
    return {"at_s": at_s, "type": "crash", "error": f"ended with {exit_reason(served.process)}"}


def empty_segment(carried: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """A segment of no exposure, with the failures that are known before it begins."""
    return {
        "exposure_s": 0.0,
        "requests": 0,
        "kinds": {},
        "failures": [dict(failure) for failure in carried],
        "restarts": 0,
        "silent_empty": 0,
        "ttft_ms": [],
        "decode_tok_s": [],
        "prompt_tokens": [],
    }


def judge_stability(
    incumbent: Sequence[Mapping[str, Any]],
    candidate: Sequence[Mapping[str, Any]],
    *,
    soak_s: float,
    failures_per_day: float,
    throughput_retention: float,
) -> list[CheckResult]:
    """Failures against the incumbent's and the limit, silent-empty answers, throughput at the end."""
    if not candidate:
        return [not_measured("stability.failures", "the candidate was not soaked")]
    ours, theirs = _totals(candidate), _totals(incumbent)
    return [
        _judge_failures(ours, theirs),
        _judge_rate(ours, theirs, soak_s, failures_per_day),
        _judge_silent_empty(ours, theirs),
        _judge_retention(candidate, throughput_retention),
    ]


def judge_leak(
    times_s: Sequence[float], memory_bytes: Sequence[float | None], *, soak_s: float, limit_bytes_per_day: float
) -> CheckResult:
    """The slope of memory (Theil-Sen on bucket medians, after a warm-up) with its 95 % bounds, in bytes a day.

    FAIL iff the lower bound is over 0 and the slope over the limit; PASS iff the upper bound is under the limit. Slopes
    of a soak shorter than a day are reported and not required: a cache that fills looks like a leak for hours.
    """
    required = soak_s >= DAY_S
    points = [(t - times_s[0], v) for t, v in zip(times_s, memory_bytes, strict=True) if v is not None]
    if not points:
        why = "no memory was sampled during the soak"
        return not_measured(LEAK, why, limit=limit_bytes_per_day, unit=LEAK_UNIT, required=required)
    kept = [(t, value) for t, value in points if t >= warm_up_s(soak_s)]
    width_s = max(soak_s / BUCKETS / 2, 1.0)
    # a candidate that died early has samples in its warm-up alone
    times, medians = bucket_medians([t for t, _ in kept], [v for _, v in kept], width_s) if kept else ([], [])
    if len(medians) < 4:
        why = f"{len(medians)} medians of memory after the warm-up; at least 4 are needed for a slope"
        return not_measured(LEAK, why, limit=limit_bytes_per_day, unit=LEAK_UNIT, required=required)
    return judge_slope(theil_sen(times, medians), soak_s=soak_s, limit_bytes_per_day=limit_bytes_per_day)


def warm_up_s(soak_s: float) -> float:
    """How long memory is not judged at first."""
    return min(WARM_SHARE * soak_s, 6 * 3600)


def judge_slope(slope: Slope, *, soak_s: float, limit_bytes_per_day: float) -> CheckResult:
    """The verdict on a slope of memory in bytes per second, as `judge_leak` says."""
    required = soak_s >= DAY_S
    per_day = {"slope": slope.estimate * DAY_S, "low": slope.low * DAY_S, "high": slope.high * DAY_S}
    verdict = Verdict.INCONCLUSIVE
    if per_day["low"] > 0 and per_day["slope"] > limit_bytes_per_day:
        verdict = Verdict.FAIL
    elif per_day["high"] < limit_bytes_per_day:
        verdict = Verdict.PASS
    why = (
        f"memory moved by {per_day['slope'] / 1e6:.3g} MB a day (95 % between {per_day['low'] / 1e6:.3g} and "
        f"{per_day['high'] / 1e6:.3g}), limit {limit_bytes_per_day / 1e6:.3g}"
    )
    if not required:
        verdict = Verdict.INCONCLUSIVE
        why += f"; {duration(soak_s)} cannot tell a filling cache from a leak: soak for two days"
    return CheckResult(
        check=LEAK,
        verdict=verdict,
        value=per_day["slope"],
        limit=limit_bytes_per_day,
        unit=LEAK_UNIT,
        why=why,
        required=required,
    )


def _totals(segments: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    failures = [failure for segment in segments for failure in segment["failures"]]
    return {
        "exposure_s": sum(segment["exposure_s"] for segment in segments),
        "requests": sum(segment["requests"] for segment in segments),
        "failures": failures,
        "silent_empty": sum(segment["silent_empty"] for segment in segments),
    }


def _judge_failures(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> CheckResult:
    """Exact conditional test: were both engines equally prone, each failure would fall on the candidate by exposure."""
    k, k_theirs = len(ours["failures"]), len(theirs["failures"])
    exposure = (
        f"{duration(ours['exposure_s'])} and {ours['requests']} requests (incumbent: {k_theirs} in "
        f"{duration(theirs['exposure_s'])} and {theirs['requests']})"
    )
    if k == 0 and ours["requests"]:
        verdict, why = Verdict.PASS, f"no failure in {exposure}"
    elif not ours["requests"]:
        verdict, why = Verdict.FAIL, f"the candidate served no request; {_kinds(ours['failures'])}"
    else:
        chance = _at_least(k, k + k_theirs, ours["exposure_s"] / (ours["exposure_s"] + theirs["exposure_s"] or 1))
        verdict = Verdict.FAIL if chance < 0.05 or (k_theirs == 0 and k >= 3) else Verdict.INCONCLUSIVE
        why = f"{k} failures ({_kinds(ours['failures'])}) in {exposure}; by chance alone {chance:.0%}"
    return CheckResult(check="stability.failures", verdict=verdict, value=k, limit=0, unit="failures", why=why)


def _judge_rate(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], soak_s: float, failures_per_day: float
) -> CheckResult:
    """The 95 % upper bound of the failure rate. Required where the planned soak is long enough to prove the limit."""
    check, unit = "stability.failure_rate_upper95", "failures/day"
    can_prove = poisson_upper_rate(0, soak_s / DAY_S) <= failures_per_day * 1.001
    if not ours["exposure_s"]:
        return not_measured(check, "no exposure", limit=failures_per_day, unit=unit, required=can_prove)
    upper = poisson_upper_rate(len(ours["failures"]), ours["exposure_s"] / DAY_S)
    per_request = poisson_upper_rate(len(ours["failures"]), ours["requests"]) if ours["requests"] else None
    why = f"with 95 % confidence under {upper:.3g} failures a day"
    why += f" and under {per_request:.2%} of requests" if per_request is not None else ""
    if theirs["exposure_s"]:
        why += (
            f" (incumbent: under {poisson_upper_rate(len(theirs['failures']), theirs['exposure_s'] / DAY_S):.3g} a day)"
        )
    if upper <= failures_per_day:
        verdict = Verdict.PASS
    else:
        verdict = Verdict.INCONCLUSIVE
        needed_s = poisson_upper_rate(len(ours["failures"]), 1.0) / failures_per_day * DAY_S
        why += f"; to prove under {failures_per_day:g} a day it needs {duration(needed_s)} without another failure"
    return CheckResult(
        check=check,
        verdict=verdict,
        value=upper,
        limit=failures_per_day,
        unit=unit,
        why=why,
        required=can_prove,
    )


def _judge_silent_empty(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> CheckResult:
    if not ours["requests"]:
        return not_measured("stability.silent_empty", "the candidate served no request", unit="answers")
    return at_most(
        "stability.silent_empty",
        ours["silent_empty"],
        limit=theirs["silent_empty"],
        unit="answers",
        why=f"{ours['silent_empty']} of {ours['requests']} answers were a 200 without a token "
        f"(incumbent: {theirs['silent_empty']} of {theirs['requests']})",
    )


def _judge_retention(segments: Sequence[Mapping[str, Any]], limit: float) -> CheckResult:
    """Decode speed of the last third over the first; reported, for a neighbour on the machine moves it as well."""
    check, rates = "stability.throughput_retention", _known(segments, "decode_tok_s")
    if len(rates) < 9:
        return not_measured(
            check, f"{len(rates)} measured answers; 9 are needed", limit=limit, unit="ratio", required=False
        )
    third = len(rates) // 3
    ratio = statistics.median(rates[-third:]) / statistics.median(rates[:third])
    verdict = Verdict.PASS if ratio >= limit else Verdict.INCONCLUSIVE
    why = f"decode at the end ran at {ratio:.0%} of its speed at the start"
    return CheckResult(check=check, verdict=verdict, value=ratio, limit=limit, unit="ratio", why=why, required=False)


def _known(segments: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [value for segment in segments for value in segment[name] if value is not None]


def _kinds(failures: Sequence[Mapping[str, Any]]) -> str:
    counted: dict[str, int] = {}
    for failure in failures:
        counted[str(failure["type"])] = counted.get(str(failure["type"]), 0) + 1
    return ", ".join(f"{number} {kind}" for kind, number in counted.items()) or "none"


def _at_least(k: int, n: int, p: float) -> float:
    """P(X >= k) of a binomial."""
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


def duration(seconds: float) -> str:
    """As people say it: `2.0 min`, `3.0 h` or `3.0 days`."""
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * DAY_S else f"{seconds / DAY_S:.1f} days"
