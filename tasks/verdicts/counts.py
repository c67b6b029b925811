"""A count of mishaps against the incumbent's: worse only where chance does not explain it."""

from __future__ import annotations

from tasks.verdicts.statistics import binomial_tail
from tasks.verdicts.verdict import CheckResult, decided, not_measured

BY_CHANCE = 0.05


def chance_of(k: int, exposure: float, k_theirs: int, exposure_theirs: float) -> float:
    """Chance of so many or more on the candidate, were both engines equally prone: the exact conditional test."""
    return binomial_tail(k, k + k_theirs, exposure / (exposure + exposure_theirs or 1))


def no_more_than_incumbent(
    check: str, ours: tuple[int, int], theirs: tuple[int, int], unit: str, why: str
) -> CheckResult:
    """(how many, of how many) on the candidate against the incumbent: PASS where its share is no larger.

    FAIL where that many would fall on it in under 5% of cases by chance, INCONCLUSIVE between.
    """
    (k, n), (k_theirs, n_theirs) = ours, theirs
    if not n:
        return not_measured(check, "nothing was asked of the candidate", unit=unit)
    limit = k_theirs * n / n_theirs if n_theirs else 0
    chance = chance_of(k, n, k_theirs, n_theirs)
    verdict = decided(fails=k > limit and chance < BY_CHANCE, passes=k <= limit)
    why += "" if k <= limit else f"; by chance alone {chance:.0%}"
    return CheckResult(check=check, verdict=verdict, value=k, limit=limit, unit=unit, why=why)
