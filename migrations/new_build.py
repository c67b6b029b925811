"""From one build of an engine to another build of it: the same code, some weeks on. It should answer the same."""

from __future__ import annotations

from migrations.pair import Pair
from tasks.verdicts.limits import Limits
from tasks.verdicts.risks import Risk

PAIR = Pair(
    risks=(
        Risk(
            risk="the new build is slower with this model",
            likelihood="high",  # an upgrade made 28 of 61 models slower while their mean became faster
            impact="medium",
            mitigation="measure each model in use, not the average",
            evidence=("performance.*", "memory.*"),
        ),
        Risk(
            risk="the new build answers differently",
            likelihood="medium",
            impact="high",
            mitigation="compare tokens, templates and probabilities with the old build's own noise",
            evidence=("preflight.*", "launch.*", "parity.*"),
        ),
        Risk(
            risk="an option or a behaviour in use is gone",
            likelihood="medium",
            impact="medium",
            mitigation="check options against the new build's help, and the API on both builds",
            evidence=("compatibility.*", "parity.ignored_parameters"),
        ),
        Risk(
            risk="the new build crashes or hangs",
            likelihood="low",
            impact="high",
            mitigation="keep the old build as the way back until its window ends",
            evidence=("stability.*", "faults.*"),
        ),
    ),
    # of KLD the greater of these and 3 times the old build's own noise counts. SmolLM2, on a CPU: equal kernels differ
    # by 0 nats, another kernel for the quant by 0.0032, a KV cache of q8_0 by 0.0040, which is enough for two engines
    limits=Limits(top1_agreement=0.99, top1_lower_bound=0.97, mean_kld=0.0005, p99_kld=0.01),
)
