"""From Ollama to llama.cpp's own server: the built-in declaration. It does no I/O; a plan in TOML overrides it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path

from engines.ollama.library import DEFAULT_CONTEXT, StoredModel, settings_of
from engines.settings import Settings, safe_id
from migrations.pair import Pair
from migrations.plan import EngineChoice, ModelPlan, Plan
from migrations.plan_file import build_plan
from tasks.verdicts.risks import Risk

NAME = "ollama-to-llama.cpp"
INCUMBENT = EngineChoice(engine="ollama")
CANDIDATES = (EngineChoice(engine="llama.cpp"), EngineChoice(engine="mistral.rs"))  # the first one that is here

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


def plan_for(models: Sequence[StoredModel], candidate: EngineChoice = CANDIDATES[0]) -> Plan:
    """The plan of a user's stored models: each name that clients use stays one by which they can ask.

    Tags of one file with the same settings are one model, measured and moved once.
    """
    named = dict[tuple[Path, Settings], list[str]]()
    for model in models:
        settings = Settings(**{"context_tokens": DEFAULT_CONTEXT, **settings_of(model)})
        named.setdefault((model.gguf, settings), []).extend({model.name.removesuffix(":latest"): 0, model.name: 0})
    taken, planned = {name for names in named.values() for name in names}, list[ModelPlan]()
    for (gguf, settings), names in named.items():
        plain = safe_id(min(names, key=len))
        ids = chain([plain], (f"{plain}-{number}" for number in count(2)))
        model_id = next(one for one in ids if one in names or one not in taken)
        taken.add(model_id)
        aliases = tuple(name for name in names if name != model_id)
        planned.append(ModelPlan(id=model_id, gguf=gguf, aliases=aliases, load="demand", settings=settings))
    declared = {"name": NAME, "incumbent": INCUMBENT, "candidate": candidate, "models": tuple(planned)}
    return build_plan(declared, where=NAME)
