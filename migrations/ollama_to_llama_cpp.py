"""From Ollama to llama.cpp's own server: the built-in declaration. It does no I/O; a plan in TOML overrides it."""

from __future__ import annotations

from migrations.pair import Pair
from migrations.plan import EngineChoice
from tasks.verdicts.risks import Risk

NAME = "ollama-to-llama.cpp"
INCUMBENT = EngineChoice(engine="ollama")
CANDIDATE = EngineChoice(engine="llama.cpp")

PAIR = Pair(
    risks=(
        Risk(
            # a Go template of Ollama's library is not the Jinja template in the file
            risk="the chat template is another one",
            likelihood="medium",
            impact="high",
            mitigation="compare prompts token by token; keep the transcripts of your own clients in the plan",
            evidence=("parity.*",),
        ),
        Risk(
            # /v1 of Ollama sets temperature and top_p to 1, llama.cpp to 0.8 and 0.95
            risk="answers change where a request sets no temperature",
            likelihood="high",
            impact="low",
            mitigation="have clients set what they rely on",
            evidence=("parity.ignored_parameters", "compatibility.*"),
        ),
        Risk(
            risk="model compatibility",
            likelihood="medium",
            impact="high",
            mitigation="blobs that only Ollama's patches can read are named before anything is measured",
            evidence=("preflight.*", "launch.*"),
        ),
        Risk(
            risk="performance regression",
            likelihood="low",
            impact="medium",
            mitigation="benchmark before switching: another build of the same code",
            evidence=("performance.*", "memory.*"),
        ),
        Risk(
            risk="the candidate crashes or hangs",
            likelihood="low",
            impact="high",
            mitigation="move a share of live traffic first, with a way back",
            evidence=("stability.*", "faults.*"),
        ),
    ),
)
