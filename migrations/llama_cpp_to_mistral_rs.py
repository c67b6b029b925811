"""From llama.cpp's server to mistral.rs: the built-in declaration. It does no I/O; a plan in TOML overrides it."""

from __future__ import annotations

from collections.abc import Sequence

from migrations.pair import Pair
from migrations.plan import EngineChoice, ModelPlan, Plan
from migrations.plan_file import build_plan
from tasks.verdicts.risks import Risk

NAME = "llama.cpp-to-mistral.rs"
INCUMBENT = EngineChoice(engine="llama.cpp")
CANDIDATE = EngineChoice(engine="mistral.rs")

PAIR = Pair(
    risks=(
        Risk(
            risk="mistral.rs misses features",
            likelihood="medium",
            impact="low",
            mitigation="keep llama.cpp as fallback",
            evidence=("compatibility.*", "parity.ignored_parameters"),
        ),
        Risk(
            risk="performance regression",
            likelihood="low",
            impact="medium",
            mitigation="benchmark before switching",
            evidence=("performance.*", "memory.*"),
        ),
        Risk(
            risk="model compatibility",
            likelihood="low",
            impact="high",
            mitigation="test with all current models",
            evidence=("preflight.*", "launch.*", "parity.*"),
        ),
        Risk(
            # the wheel that hosts the candidate is the native SDK: what breaks there breaks in-process too
            risk="native SDK bugs",
            likelihood="medium",
            impact="medium",
            mitigation="start with subprocess mode",
            evidence=("stability.*", "faults.*"),
        ),
    ),
    # Tuning that mistral.rs has no word for. Accepted, because its effect on speed and memory is measured. A loss of
    # behaviour or of safety (an ignored request parameter, an API key, the context limit) is never accepted unasked.
    accepted_unsupported={
        "mlock": "the weights are a private copy; performance.* and memory.* show what paging costs",
        "cache_reuse_tokens": "the prefix cache matches whole prefixes; performance.* shows the time to first token",
        "host_cache_mib": "the prefix cache is counted in entries, not in MiB; memory.* shows its size",
        "batch_tokens": "only some builds size the prefill batch; performance.* shows the time to first token",
        "ubatch_tokens": "there is no physical batch; performance.* shows the time to first token",
        "flash_attention": "a build feature, not a flag; performance.* shows its effect",
    },
)


def plan_for(models: Sequence[ModelPlan], **overrides: object) -> Plan:
    """The built-in plan for `models`; `overrides` replace whole fields of Plan (`measure=DEMO`, `limits=...`)."""
    declared = {
        "name": NAME,
        "incumbent": INCUMBENT,
        "candidate": CANDIDATE,
        "models": tuple(models),
        "accepted_unsupported": tuple(PAIR.accepted_unsupported),
    }
    return build_plan({**declared, **overrides}, where=NAME)
