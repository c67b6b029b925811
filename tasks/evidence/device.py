"""Whether an engine that was to use the GPU does: many fall back to the CPU without an error."""

from __future__ import annotations

from collections.abc import Mapping

from tasks.verdicts.verdict import CheckResult, Verdict

VERDICTS = {"gpu": Verdict.PASS, "cpu": Verdict.FAIL, "unknown": Verdict.INCONCLUSIVE}


def judge_device(check: str, engine: str, layers: int, seen: Mapping[str, str]) -> CheckResult:
    """The check of one engine with `gpu_layers`; what cannot be seen holds no gate, and is not taken for the GPU."""
    where = {"gpu": "on the GPU", "cpu": "on the CPU", "unknown": "on an unknown device"}[seen["where"]]
    why = f"gpu_layers is {layers}, and the weights of {engine} are {where}: {seen['why']}"
    return CheckResult(check=check, verdict=VERDICTS[seen["where"]], why=why, required=seen["where"] != "unknown")
