"""The risk register: what could go wrong with a migration, and which checks say whether it does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from tasks.verdicts.verdict import CheckResult, Verdict, gate, worst

Level = Literal["low", "medium", "high"]
ONLY_WHERE_IT_FAILED = ("launch.*",)  # an engine that starts has no check of its own


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
    """One risk of the register with the verdict on its evidence and the checks that decided it.

    `unmeasured` names the kinds of evidence on it that there are none of: with one of these it is no better than
    INCONCLUSIVE.
    """

    risk: Risk
    verdict: Verdict
    decided_by: tuple[CheckResult, ...]
    unmeasured: tuple[str, ...] = ()


def judge_risks(register: Iterable[Risk], results: Sequence[CheckResult]) -> list[RiskVerdict]:
    """Each risk of the register, judged by the checks that are evidence about it."""
    judged = []
    for risk in register:
        evidence = [result for result in results if risk.covers(result.check)]
        found = gate(evidence)
        worst_ones = tuple(r for r in evidence if r.required and r.verdict is found and found is not Verdict.PASS)
        measured = [r.check for r in evidence if r.verdict is not Verdict.INCONCLUSIVE or r.value is not None]
        kinds = (kind for kind in risk.evidence if kind not in ONLY_WHERE_IT_FAILED)
        absent = tuple(kind.removesuffix(".*") for kind in kinds if not any(fnmatchcase(c, kind) for c in measured))
        verdict = worst((found, Verdict.INCONCLUSIVE)) if absent else found
        judged.append(RiskVerdict(risk, verdict, worst_ones, absent))
    return judged
