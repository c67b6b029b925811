"""A pair declaration: what a kind of move risks, where its limits lie, and what is let go without asking. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tasks.verdicts.limits import Limits
from tasks.verdicts.risks import Risk


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One kind of move. A plan's own `limits` and `accepted_unsupported` win over these."""

    risks: tuple[Risk, ...]
    limits: Limits = field(default_factory=Limits)
    accepted_unsupported: Mapping[str, str] = field(default_factory=dict)  # names, with the reason
