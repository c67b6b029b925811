"""The limits that evidence is held to, each with its default and the reason for it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class ParityLimits(BaseModel):
    """What still counts as the same behaviour; each default with its reason."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt_tokens_share: float = Field(1.0, gt=0, le=1, description="another token count is another prompt")
    top1_agreement: float = Field(
        0.97, gt=0, le=1, description="llama.cpp vs mistral.rs on one GGUF: 0.9765; Q3_K_M vs FP16: 0.896"
    )
    top1_lower_bound: float = Field(
        0.95, gt=0, le=1, description="one-sided 95 % Wilson bound, so that few positions do not pass by luck"
    )
    mean_kld: float = Field(
        0.005, gt=0, description="nats; Q5_K_M vs FP16 is 0.0047: a swap on equal weights stays under that"
    )
    floor_factor: float = Field(
        3.0, ge=1, description="an engine cannot be nearer to another than to itself; 3 times allows for its spread"
    )
    p99_kld: float = Field(0.05, gt=0, description="nats; two engines on one GGUF: 0.015; Q3_K_M has this as its mean")
    tie_gap_nats: float = Field(
        0.5, gt=0, description="rounding turns near ties over: 0.00 to 0.23 nats seen between two sound engines"
    )
    unexplained_divergences: int = Field(0, ge=0, description="one that is no near tie wants a person to look")
    excess_degenerate: int = Field(0, ge=0, description="garbage is a broken kernel or template, however rare")
    min_positions: int = Field(100, ge=1, description="a 99th percentile of fewer is only their maximum")
    length_margin: float = Field(0.10, gt=0, description="length drives latency and cost; 10 % either way is noticed")
    length_required_from: int = Field(
        200, ge=2, description="prompts from which the length ratio gates; its interval is wider than 10 % before"
    )


DEFAULT_LIMITS = ParityLimits()
