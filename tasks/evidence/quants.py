"""The quant of the weights, as a preflight report has it: what a figure of speed holds for, and which other to try."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from engines.units import figure
from tasks.verdicts.verdict import CheckResult, Verdict

NOT_SPEED = ("performance.errors", "performance.client")
MINOR_SHARE = 0.1  # of the quantised tensors: a kind below it is left out of the name


def measured_on(report: Mapping[str, Any], threads: int | None, *, ours: bool = True) -> str:
    """`Q4_1 weights, 1 thread, CPU`: what a figure of speed holds for; the weights alone where others run one."""
    counts = {kind: n for kind, n in report["header"]["quant_types"].items() if kind != "F32"} or {"F32": 1}
    kinds = [kind for kind, n in counts.items() if n >= MINOR_SHARE * sum(counts.values())]
    devices = {need["device"] for entry in report["engines"] for need in entry["fit"]["needs"]}
    parts = [f"{'/'.join(kinds)} weights"]
    if ours and threads:
        parts.append(f"{threads} thread{'s' * (threads > 1)}")
    if ours and devices:
        parts.append("GPU" if "vram" in devices else "CPU")
    return ", ".join(parts)


def another_quant(
    results: Sequence[CheckResult], report: Mapping[str, Any], limits: Mapping[str, Any], gguf: str
) -> str | None:
    """Whether another quant of the same model may turn a verdict that FAILs on speed alone, and how to try it.

    None where something else fails too, or the candidate computes these weights no slower than the incumbent does.
    `report` has the incumbent first and the candidate last.
    """
    failed = [one.check for one in results if one.required and one.verdict is Verdict.FAIL]
    if not failed or not all(name.startswith("performance.") and name not in NOT_SPEED for name in failed):
        return None
    ours, theirs = (report["engines"][at] for at in (0, -1))
    if any(need["device"] == "vram" for need in theirs["fit"]["needs"]):
        return None
    both = {slow["quant"] for slow in ours.get("slow", ())}
    found = [slow for slow in theirs.get("slow", ()) if slow["quant"] not in both]
    if not found:
        return None
    best, limited = found[0], (("ttft_p50_ratio", "a prompt"), ("tpot_p50_ratio", "a token"))
    beyond = [
        f"{what}, limit {figure(limits[name])}"
        for (name, what), times in zip(limited, best["times"], strict=True)
        if times > limits.get(name, times)
    ]
    by_limits = f"by that still beyond the limits ({'; '.join(beyond)})" if beyond else "by that within the limits"
    first, then = map(figure, best["times"])
    return (
        f"Another quant {'is faster' if beyond else 'may turn it'}: {'; '.join(slow['why'] for slow in found)}. "
        f"As {best['faster']} {first} and {then} ({best['source']}), {by_limits}. "
        f"To try it: `switchyard requantize {shlex.quote(gguf)} --to {best['faster']}`, then evaluate a plan with that "
        "file. Nothing is promised: those figures are of another model."
    )
