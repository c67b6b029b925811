"""Soak an engine of its own: an agent's kind of load for a given time.

The load grows a conversation turn by turn, offers tools, leaves some streams half-way, pauses, and starts afresh when
the context is nearly full. Evidence is saved in segments, so that a killed soak resumes where it stopped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engines.errors import EngineError
from engines.process.readiness import exit_reason
from engines.process.serving import Served
from engines.process.telemetry import MemorySampler
from engines.units import duration, number_of
from tasks.evidence.engine_under_test import EngineUnderTest, ends_within
from tasks.evidence.soak.prompts import FALLBACK_CONTEXT, Agent
from tasks.evidence.soak.segment import DYING_S, MEMORY_EVERY_S, STALL_S, ask, count_answer, count_turn, empty_segment

RESTARTS_ALLOWED = 20


def soak(
    engine: EngineUnderTest,
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
    restarted, and the soak continues; after RESTARTS_ALLOWED restarts it stops. Setting `stop` from another thread ends
    it without keeping the segment under way.
    """
    exposed_s = sum(segment["exposure_s"] for segment in done)
    index = len(done)
    failed_starts = sum(failure["type"] == "start" for segment in done for failure in segment["failures"])
    restarts = failed_starts + sum(segment["restarts"] for segment in done)
    agent = Agent(seed + index)
    carried: list[dict[str, Any]] = []
    stop = stop or threading.Event()

    def remember(memory_bytes: int | None) -> None:
        on_memory(time.time(), memory_bytes)

    while exposed_s < soak_s and restarts <= RESTARTS_ALLOWED and not stop.is_set():
        try:
            with engine.up() as served, MemorySampler(served.process.pid, MEMORY_EVERY_S, on_sample=remember):
                while exposed_s < soak_s:
                    length_s = min(segment_s, soak_s - exposed_s)
                    segment = _segment(served, agent, length_s, exposed_s, carried, stop)
                    if stop.is_set():
                        return
                    carried = []
                    save(index, segment)
                    index, exposed_s = index + 1, exposed_s + segment["exposure_s"]
                    restarts += segment["restarts"]
                    exposed = f"{duration(exposed_s)} of {duration(soak_s)}"
                    progress(f"{exposed}, {number_of(segment['requests'], 'request')} in the last segment")
                    if segment["restarts"]:
                        break
        except EngineError as error:
            if stop.is_set():
                return
            restarts += 1
            carried.append({"at_s": exposed_s, "type": "start", "error": str(error).splitlines()[0]})
    if carried:  # it never came up again: the failures themselves are the evidence
        save(index, empty_segment(carried))


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
        count_turn(segment, kind)
        dying = record.error_type in ("connect", "stream_truncated")  # a dying engine closes its sockets first
        if record.error_type == "hang" or ends_within(served, DYING_S if dying else 0.0):
            # one event, one failure: the broken request is part of the death
            death = {"at_s": at_s, "type": "crash", "error": f"ended with {exit_reason(served.process)}"}
            if served.process.poll() is None:
                death |= {"type": "hang", "error": f"no byte for {STALL_S:.0f} s; the engine was restarted"}
            segment["failures"].append(death)
            segment["restarts"] += 1
            break
        count_answer(segment, record, kind, at_s)
    segment["exposure_s"] = time.monotonic() - started
    return segment
