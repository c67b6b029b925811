"""From llama.cpp's server to vLLM: other weights files, another batch, another memory. No I/O."""

from __future__ import annotations

from migrations.pair import Pair
from tasks.verdicts.risks import Risk

PAIR = Pair(
    risks=(
        Risk(
            risk="the directory holds other weights than the GGUF",
            likelihood="medium",
            impact="high",
            mitigation="convert it from the GGUF, and compare tokens and probabilities",
            evidence=("preflight.*", "launch.*", "parity.*"),
        ),
        Risk(
            risk="one user waits longer, although many are served faster",
            likelihood="high",
            impact="medium",
            mitigation="measure at the concurrency in use",
            evidence=("performance.*",),
        ),
        Risk(
            risk="it takes several times the memory",
            likelihood="high",
            impact="medium",
            # no limit suits every model: torch and a pool dwarf a small one, and a quant of a large one becomes floats
            mitigation="set limits.memory_peak_ratio to what the machine has room for, or make its cache smaller",
            evidence=("memory.*",),
        ),
        Risk(
            risk="vLLM misses request fields and paths",
            likelihood="medium",
            impact="medium",
            mitigation="keep llama.cpp as fallback",
            evidence=("compatibility.*", "parity.ignored_parameters"),
        ),
        Risk(
            risk="its engine ends or hangs while its server answers",
            likelihood="medium",
            impact="high",
            mitigation="judge it by tokens, and end the whole session",
            evidence=("stability.*", "faults.*"),
        ),
    ),
    accepted_unsupported={
        "mlock": "the weights are a private copy; performance.* and memory.* show what paging costs",
        "cache_reuse_tokens": "its prefix cache matches whole blocks; performance.* shows the time to first token",
        "host_cache_mib": "its prefix cache lies in the pool of the KV cache; memory.* shows its size",
        "ubatch_tokens": "there is no physical batch; performance.* shows the time to first token",
        "flash_attention": "the attention backend is chosen by itself; performance.* shows its effect",
        "prefill_assistant": "a request asks for it by continue_final_message",
    },
)
