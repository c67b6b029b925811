"""Risks and phases as data: what could go wrong, and which checks say whether it does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

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

    def evidence_of(self, checks: Iterable[str]) -> list[str]:
        """Those of `checks` that are evidence about this risk, in their order."""
        return [check for check in checks if self.covers(check)]


@dataclass(frozen=True)
class Phase:
    """One phase of a migration and the one question that its gate answers."""

    number: int
    name: str
    to_do: str
    question: str
