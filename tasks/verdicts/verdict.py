"""Verdicts: what a check returns, and how several become one. Nothing measured is INCONCLUSIVE, never PASS.

The words of the verdict table are in `flows/cli/output.py` (terminal) and `tasks/report/report.py` (report).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from engines.redaction import redacted_text
from engines.units import quantity

LEFT_TO_WHOLE = "a first look (--quick) leaves it to the whole evaluation"  # why a check was not measured


class Verdict(StrEnum):
    """Best to worst; a gate opens on PASS alone."""

    PASS = "PASS"
    INCONCLUSIVE = "INCONCLUSIVE"
    ERROR = "ERROR"
    FAIL = "FAIL"

    @property
    def badness(self) -> int:
        """0 for PASS to 3 for FAIL."""
        return list(Verdict).index(self)


class CheckResult(BaseModel):
    """One comparison of one number with one limit. Stored as returned.

    `required` is False for what is reported but does not hold the gate (an optional API behaviour, say). `why` has the
    value and the limit with their unit: they are added where a judge left them out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    check: str
    verdict: Verdict
    value: float | None = None
    limit: float | None = None
    unit: str = ""
    why: str
    required: bool = True

    @field_validator("why")
    @classmethod
    def _with_figures(cls, why: str, info: ValidationInfo) -> str:
        text = redacted_text(why)  # it quotes what engines answered
        value, limit, unit = info.data.get("value"), info.data.get("limit"), str(info.data.get("unit") or "")
        known = f"limit {quantity(limit, unit)}"
        if value is None or limit is None or known in text:
            return text
        return f"{text}; {quantity(value, unit, limit)}, {known}"

    @field_validator("value", "limit")
    @classmethod
    def _finite(cls, number: float | None) -> float | None:
        # NaN compares False with everything: it would slip through any later comparison
        if number is not None and not math.isfinite(number):
            raise ValueError("a check needs a finite number; use None for 'not measured'")
        return number


def at_most(check: str, value: float | None, *, limit: float, unit: str, why: str = "") -> CheckResult:
    """PASS at or under `limit`, FAIL over it, INCONCLUSIVE when there is no value."""
    if value is None:
        return not_measured(check, why or "no samples", limit=limit, unit=unit)
    verdict = Verdict.PASS if value <= limit else Verdict.FAIL
    why = why or f"{quantity(value, unit, limit)}, limit {quantity(limit, unit)}"
    return CheckResult(check=check, verdict=verdict, value=value, limit=limit, unit=unit, why=why)


def at_least(check: str, value: float | None, *, limit: float, unit: str, why: str = "") -> CheckResult:
    """PASS at or over `limit`, FAIL under it, INCONCLUSIVE when there is no value."""
    if value is None:
        return not_measured(check, why or "no samples", limit=limit, unit=unit)
    verdict = Verdict.PASS if value >= limit else Verdict.FAIL
    why = why or f"{quantity(value, unit, limit)}, limit {quantity(limit, unit)}"
    return CheckResult(check=check, verdict=verdict, value=value, limit=limit, unit=unit, why=why)


def decided(*, fails: bool, passes: bool) -> Verdict:
    """FAIL where the evidence `fails`, else PASS where it `passes`, else INCONCLUSIVE."""
    if fails:
        return Verdict.FAIL
    return Verdict.PASS if passes else Verdict.INCONCLUSIVE


def not_measured(
    check: str, why: str, *, limit: float | None = None, unit: str = "", required: bool = True
) -> CheckResult:
    """INCONCLUSIVE without a value: what was not measured is reported, not guessed."""
    return CheckResult(check=check, verdict=Verdict.INCONCLUSIVE, limit=limit, unit=unit, why=why, required=required)


def is_near(ratio: float, limit: float) -> bool:
    """Whether a larger limit would be a small concession: twice the margin of a limit over 1 at the most."""
    return max(ratio, 1 / ratio) - 1 <= 2 * (limit - 1)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of `verdicts`; INCONCLUSIVE when there are none."""
    return max(verdicts, key=lambda verdict: verdict.badness, default=Verdict.INCONCLUSIVE)


def gate(results: Iterable[CheckResult]) -> Verdict:
    """The worst required verdict of `results`; INCONCLUSIVE when nothing required was measured."""
    return worst(result.verdict for result in results if result.required)


def reasons(results: Iterable[CheckResult]) -> list[CheckResult]:
    """The required checks that keep the gate closed, worst first, in their order otherwise."""
    closed = [result for result in results if result.required and result.verdict is not Verdict.PASS]
    return sorted(closed, key=lambda result: -result.verdict.badness)
