"""One live request that an engine answered, as a canary is judged by it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LiveSample:
    """One live request that an engine answered. Times in ms, as the yard saw them; None where there is none."""

    at: float
    engine: str
    conversation: str
    prompt_tokens: int
    ok: bool
    error: str | None
    empty: bool
    ttft_ms: float | None
    tpot_ms: float | None
