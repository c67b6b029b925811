"""The risk register: what could go wrong with a migration, and which checks say whether it does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from tasks.verdicts.verdict import CheckResult, Verdict, gate

Level = Literal["low", "medium", "high"]


@dataclass(frozen=True)
class Risk:
    """One line of the risk register. `evidence` holds patterns of check names, such as `compatibility.*`."""

    risk: str
    likelihood: Level
    impact: Level
    mitigation: str
    evidence: tuple[str, ...]

    def covers(self, check: str) -> bool:
        """True when the result of `check` is evidence about this risk."""
        return any(fnmatchcase(check, pattern) for pattern in self.evidence)


@dataclass(frozen=True)
class RiskVerdict:
    """One risk of the register with the verdict on its evidence and the checks that decided it."""

    risk: Risk
    verdict: Verdict
    decided_by: tuple[CheckResult, ...]


def judge_risks(register: Iterable[Risk], results: Sequence[CheckResult]) -> list[RiskVerdict]:
    """Each risk of the register, judged by the checks that are evidence about it."""
    judged = []
    for risk in register:
        evidence = [result for result in results if risk.covers(result.check)]
        verdict = gate(evidence)
        worst_ones = tuple(r for r in evidence if r.required and r.verdict is verdict and verdict is not Verdict.PASS)
        judged.append(RiskVerdict(risk, verdict, worst_ones))
    return judged
