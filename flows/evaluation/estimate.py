"""How long an evaluation will take, from its plan and the sizes of its models: said before it begins."""

from __future__ import annotations

from migrations.plan import ModelPlan, Plan
from tasks.evidence.behaviours.battery import BEHAVIOURS, DEFAULT_REQUIRED
from tasks.evidence.preflight import preflight

# bytes a second at which weights are read for each token: slow CPU engines reach this, and so do small GPUs
CPU_BYTES_PER_S, GPU_BYTES_PER_S = 3e9, 100e9
LOAD_BYTES_PER_S, START_S = 1e9, 2.0
BEHAVIOUR_TOKENS = 32
FAULT_DRILLS, DRILL_S = 4, 10.0


def estimate(plan: Plan, *, with_soak: bool = True) -> str:
    """`takes about 3 days 4 h; soak 3 days`; models that cannot be read take no time."""
    models = [(model, sized) for model in plan.models if (sized := _size(plan, model)) is not None]
    soak_s = sum(plan.measure.soak_s * (1 if side_by_side else 2) for _, (_, side_by_side) in models) * with_soak
    total_s = soak_s + sum(_measuring_s(plan, model, n_bytes) for model, (n_bytes, _) in models)
    return f"takes about {spelled(total_s)}" + (f"; soak {spelled(soak_s)}" if soak_s else "")


def spelled(seconds: float) -> str:
    """`3 days 4 h`, `2 h 10 min`, `12 min` or `under a minute`."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return "under a minute"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        parts = [(minutes // 60, "h"), (minutes % 60, "min")]
    else:
        hours = round(seconds / 3600)
        parts = [(hours // 24, "days" if hours >= 48 else "day"), (hours % 24, "h")]
    return " ".join(f"{number} {unit}" for number, unit in parts if number)


def _size(plan: Plan, model: ModelPlan) -> tuple[int, bool] | None:
    """Bytes of the weights, and whether both engines are soaked at once; None of a file that cannot be read."""
    engines = list(dict.fromkeys((plan.incumbent.engine, plan.candidate.engine)))
    settings = {model.id: plan.settings_for(model.id)}
    try:
        report = preflight([(model.id, model.gguf)], settings_by_model=settings, engines=engines)["models"][0]
    except Exception:  # no reason to end a run: preflight itself says what is wrong
        return None
    return int(report["memory"]["weights_bytes"]), bool(report["side_by_side"]["fits"])


def _measuring_s(plan: Plan, model: ModelPlan, n_bytes: int) -> float:
    """Seconds of both engines without the soak, where no look ends the blocks before the last."""
    amounts = plan.measure
    per_token_s = n_bytes / (GPU_BYTES_PER_S if plan.settings_for(model.id).gpu_layers else CPU_BYTES_PER_S)
    start_s = START_S + n_bytes / LOAD_BYTES_PER_S
    answers = amounts.parity_prompts * amounts.parity_tokens
    behaviours = len(BEHAVIOURS if amounts.every_behaviour else plan.client.requires or DEFAULT_REQUIRED)
    levels = 1 + sum(level > 1 for level in amounts.concurrency)
    block_tokens = (amounts.warmup_min + levels * amounts.requests_per_block) * amounts.max_tokens
    blocks = amounts.calibration_blocks + amounts.looks[-1]
    once_s = 3 * start_s + (answers + behaviours * BEHAVIOUR_TOKENS) * per_token_s
    return 2 * (once_s + blocks * (start_s + block_tokens * per_token_s)) + FAULT_DRILLS * (start_s + DRILL_S)
