"""The gate: checks -> risks -> one verdict per model. The worst required check wins, and PASS alone opens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tasks.verdicts.risks import Risk
from tasks.verdicts.verdict import CheckResult, Verdict, overall


@dataclass(frozen=True)
class RiskVerdict:
    """One risk of the register with the verdict on its evidence and the checks that decided it."""

    risk: Risk
    verdict: Verdict
    decided_by: tuple[CheckResult, ...]
    n_checks: int


def gate(results: Sequence[CheckResult]) -> Verdict:
    """The worst verdict of the required checks; INCONCLUSIVE when nothing required was measured."""
    return overall(results)


def risks(register: Iterable[Risk], results: Sequence[CheckResult]) -> list[RiskVerdict]:
    """Each risk of the register, judged by the checks that are evidence about it."""
    judged = []
    for risk in register:
        evidence = [result for result in results if risk.covers(result.check)]
        verdict = overall(evidence)
        worst_ones = tuple(r for r in evidence if r.required and r.verdict is verdict and verdict is not Verdict.PASS)
        judged.append(RiskVerdict(risk, verdict, worst_ones, len(evidence)))
    return judged


def reasons(results: Sequence[CheckResult]) -> list[CheckResult]:
    """The required checks that keep the gate shut, worst first, in their order otherwise."""
    shut = [result for result in results if result.required and result.verdict is not Verdict.PASS]
    return sorted(shut, key=lambda result: -result.verdict.badness)


def run_verdict(models: Mapping[str, Verdict]) -> Verdict:
    """The verdict of a whole run: the worst of its models."""
    return max(models.values(), key=lambda verdict: verdict.badness, default=Verdict.INCONCLUSIVE)
