"""From any engine to any other: what is known without knowing either."""

from __future__ import annotations

from migrations.pair import Pair
from tasks.verdicts.risks import Risk

PAIR = Pair(
    risks=(
        Risk(
            risk="the candidate misses features",
            likelihood="medium",
            impact="medium",
            mitigation="keep the incumbent as fallback",
            evidence=("compatibility.*", "parity.ignored_parameters"),
        ),
        Risk(
            risk="performance regression",
            likelihood="medium",
            impact="medium",
            mitigation="benchmark before switching",
            evidence=("performance.*", "memory.*"),
        ),
        Risk(
            risk="model compatibility",
            likelihood="medium",
            impact="high",
            mitigation="test with all current models",
            evidence=("preflight.*", "launch.*", "parity.*"),
        ),
        Risk(
            risk="the candidate crashes or hangs",
            likelihood="medium",
            impact="high",
            mitigation="move a share of live traffic first, with a way back",
            evidence=("stability.*", "faults.*"),
        ),
    ),
)
