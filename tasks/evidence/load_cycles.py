"""Drills of a native engine on a yard of its own, before any traffic moves: load cycles, and a hang.

load cycles   unload, load, one token; after each the memory of the yard and of the engine: neither may grow
hang          the engine's process is stopped (SIGSTOP) and asked: found wedged, replaced, the request served
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engines.errors import BadInput, SwitchyardError
from engines.process.telemetry import private_bytes, process_tree
from engines.units import number_of
from tasks.evidence.rehearsal import OpenStage, Stage, engine_of, signal_candidate
from tasks.verdicts.statistics import theil_sen
from tasks.verdicts.verdict import CheckResult, Verdict, decided, not_measured

CYCLES, MEMORY, HANG = "native.load_cycles", "native.cycle_memory", "native.hang"
LEAST_CYCLES = 8  # fewer give no slope
WARM_SHARE = 0.2  # of the cycles: caches fill
LIMIT_BYTES_PER_CYCLE = 1_000_000
Say = Callable[[str], None]


def measure_load_cycles(open_stage: OpenStage, *, cycles: int, say: Say = lambda _: None) -> dict[str, Any]:
    """`cycles` times unload, load, one token; bytes of the yard and of the engine after each, seconds of each load."""
    seen: list[dict[str, Any]] = []
    with open_stage(None) as stage:
        stage.client.order("promote", say, model=stage.model_id, to=stage.candidate)
        for number in range(1, cycles + 1):
            say(f"load cycle {number} of {cycles}")
            seen.append(_cycle(stage))
            if not seen[-1]["answered"]:
                break
    return {"asked": cycles, "cycles": seen}


def measure_hang(open_stage: OpenStage, say: Say = lambda _: None) -> dict[str, Any]:
    """The candidate's process stopped, then a request: seconds until it was found wedged, and until who answered."""
    with open_stage(None) as stage:
        stage.client.order("promote", say, model=stage.model_id, to=stage.candidate)
        say(f"stopping {stage.candidate} and sending it a request: it should be found wedged")
        return signal_candidate(stage, signal.SIGSTOP, "wedged", "failing", "dead")


def judge_load_cycles(evidence: Mapping[str, Any], *, limit: float = LIMIT_BYTES_PER_CYCLE) -> list[CheckResult]:
    """Every cycle answered; the slope of memory (Theil-Sen over the cycles, without the first fifth) under `limit`.

    FAIL where the lower bound of the slope is over the limit, PASS where the upper one is under it.
    """
    if why := evidence.get("not_measured"):
        return [not_measured(CYCLES, why), not_measured(MEMORY, why)]
    if broken := evidence.get("failed"):
        return [CheckResult(check=CYCLES, verdict=Verdict.ERROR, why=f"the drill failed: {broken}")]
    cycles: Sequence[Mapping[str, Any]] = evidence["cycles"]
    answered, asked = sum(cycle["answered"] for cycle in cycles), evidence["asked"]
    if len(cycles) > asked:
        raise BadInput(f"{number_of(len(cycles), 'load cycle')} of {asked}: each is counted once")
    first = next((str(cycle["error"]) for cycle in cycles if not cycle["answered"]), "")
    loads = sorted(cycle["load_s"] for cycle in cycles if cycle["load_s"] is not None)
    middle = f"; a load takes {loads[len(loads) // 2]:.1f} s" if loads else ""
    why = f"{answered} of {number_of(asked, 'time')} loaded and answered{middle}{': ' + first if first else ''}"
    verdict = decided(fails=answered < len(cycles), passes=answered == asked > 0)
    return [
        CheckResult(check=CYCLES, verdict=verdict, why=why),
        *(_judge_growth(cycles, part, limit) for part in ("yard", "engine")),
    ]


def judge_hang(evidence: Mapping[str, Any]) -> CheckResult:
    """Found wedged, and the next request answered."""
    if why := evidence.get("not_measured"):
        return not_measured(HANG, why)
    if broken := evidence.get("failed"):
        return CheckResult(check=HANG, verdict=Verdict.ERROR, why=f"the drill failed: {broken}")
    detect_s, answered = evidence["detect_s"], evidence["answered"]
    if not all(math.isfinite(seconds) for seconds in (detect_s, evidence["recover_s"]) if seconds is not None):
        raise BadInput("a time of the hang is not a finite number")
    found = detect_s is not None
    detected = f"found wedged after {detect_s:.1f} s" if found else "not found wedged"
    after = f"answered by {evidence['by']} {evidence['recover_s']:.1f} s after that" if answered else evidence["error"]
    verdict = Verdict.PASS if found and answered else Verdict.FAIL
    return CheckResult(check=HANG, verdict=verdict, why=f"{detected}; the request: {after}")


def _judge_growth(cycles: Sequence[Mapping[str, Any]], part: str, limit: float) -> CheckResult:
    check, key = f"{MEMORY}_{part}", f"{part}_bytes"
    kept = [(number, cycle[key]) for number, cycle in enumerate(cycles) if cycle[key] is not None]
    kept = kept[int(WARM_SHARE * len(kept)) :]
    if len(kept) < LEAST_CYCLES:
        return not_measured(
            check,
            f"{number_of(len(kept), 'cycle')} have a memory sample; a slope needs {LEAST_CYCLES}",
            unit="bytes/cycle",
        )
    slope = theil_sen([number for number, _ in kept], [float(value) for _, value in kept])
    verdict = decided(fails=slope.low > limit, passes=slope.high < limit)
    why = (
        f"memory of the {part} moved by {slope.estimate / 1e3:.0f} kB a cycle (95% between {slope.low / 1e3:.0f} and "
        f"{slope.high / 1e3:.0f}) over {number_of(len(kept), 'cycle')}"
    )
    if verdict is Verdict.INCONCLUSIVE:
        why += f"; it may be {limit / 1e3:.0f} at most: measure more cycles (measure.load_cycles)"
    return CheckResult(check=check, verdict=verdict, value=slope.estimate, limit=limit, unit="bytes/cycle", why=why)


def _cycle(stage: Stage) -> dict[str, Any]:
    nothing = {"yard_bytes": None, "engine_bytes": None, "load_s": None}
    try:
        stage.client.order("unload", model=stage.model_id)
        stage.client.order("load", model=stage.model_id)
    except SwitchyardError as error:
        return {**nothing, "answered": False, "error": str(error).splitlines()[0]}
    answer, engine = stage.answer(), engine_of(stage.route(), stage.candidate)
    right = answer["answered"] and answer["by"] == stage.candidate
    return {
        "answered": right,
        "error": answer["error"] or (None if right else f"{answer['by']} answered, not {stage.candidate}"),
        "load_s": engine["load_s"],
        "yard_bytes": private_bytes([stage.client.status()["pid"]]),
        "engine_bytes": private_bytes(process_tree(engine["pid"])) if engine["pid"] else None,
    }
