"""Which pair declaration holds for which two engines."""

from __future__ import annotations

from engines.driver import native_of
from engines.registry import ATTACHED
from migrations import any_pair, llama_cpp_to_mistral_rs, llama_cpp_to_vllm, new_build, ollama_to_llama_cpp
from migrations.pair import Pair
from migrations.plan import Plan

DECLARED = {
    ("llama.cpp", "mistral.rs"): llama_cpp_to_mistral_rs.PAIR,
    ("ollama", "llama.cpp"): ollama_to_llama_cpp.PAIR,
    ("llama.cpp", "vllm"): llama_cpp_to_vllm.PAIR,
}


def pair_of(plan: Plan) -> Pair:
    """The declaration for the plan's two kinds of engine; the native form of an engine is that engine."""
    old, new = (choice.speaks.removesuffix(native_of("")) for choice in (plan.incumbent, plan.candidate))
    if plan.incumbent.speaks == plan.candidate.speaks != ATTACHED:
        return new_build.PAIR
    if old == new:  # phase 3 of a move to it
        return next((pair for (_, candidate), pair in DECLARED.items() if candidate == new), any_pair.PAIR)
    return DECLARED.get((old, new), any_pair.PAIR)
