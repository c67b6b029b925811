"""How long an evaluation, a rehearsal, the drills, the canary and a whole migration take: printed before they begin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from migrations.native import native_plan
from migrations.plan import CanarySteps, ModelPlan, Plan
from tasks.evidence.behaviours.battery import BEHAVIOURS, DEFAULT_REQUIRED
from tasks.evidence.preflight import preflight

# bytes a second at which weights are read for each token: slow CPU engines reach this, and so do small GPUs
CPU_BYTES_PER_S, GPU_BYTES_PER_S = 3e9, 100e9
LOAD_BYTES_PER_S, START_S = 1e9, 2.0
BEHAVIOUR_TOKENS = 32
FAULT_DRILLS, DRILL_S = 4, 10.0
PAIR_STARTS = 2  # of a yard with both engines
REHEARSAL_STARTS = 1 + PAIR_STARTS + 2  # a yard without the candidate, one with it, and who serves after each kill


def estimate(plan: Plan, *, with_soak: bool = True, quick: bool = False) -> str:
    """`takes about 3 days 4 h; soak 3 days`; models that cannot be read take no time."""
    if quick:
        n_models = len(plan.models)
        return f"a first look at {n_models} model{'s' * (n_models > 1)}, under a minute each for small ones"
    return takes(*_evaluation_s(plan, with_soak=with_soak))


def takes(total_s: float, soak_s: float = 0.0, canary_s: float = 0.0) -> str:
    """`takes about 3 days 4 h; soak 3 days; canary up to 6 h more`: a canary takes as long as its traffic needs."""
    spent = [f"takes {'about ' * (total_s >= 30)}{spelled(total_s)}"]
    spent += [f"soak {spelled(soak_s)}"] if soak_s else []
    return "; ".join(spent + ([f"canary up to {spelled(canary_s)} more"] if canary_s else []))


def migration_estimate(
    plan: Plan, phases: Mapping[str, Sequence[ModelPlan]], *, rehearsal: bool = True, canary: bool = True
) -> str:
    """What is left of a migration: `phases` has the models that `evaluate`, `subprocess` and `native` wait for."""
    total_s = soak_s = canary_s = 0.0
    for phase, models in phases.items():
        if models and phase != "subprocess":
            part = native_plan(plan, [model.id for model in models]) if phase == "native" else plan
            measured_s, soaked_s = _evaluation_s(part)
            total_s, soak_s = total_s + measured_s, soak_s + soaked_s
        for model in models if phase != "evaluate" else ():
            total_s += rehearsal_s(plan, model) * rehearsal + drills_s(plan, model) * (phase == "native")
            canary_s += canary_most_s(plan.canary) * canary
    return takes(total_s, soak_s, canary_s)


def rehearsal_s(plan: Plan, model: ModelPlan) -> float:
    """Seconds of the fallback's rehearsal."""
    return REHEARSAL_STARTS * _start_s(plan, model)


def drills_s(plan: Plan, model: ModelPlan) -> float:
    """Seconds of the native drills: a hang, and the load cycles."""
    return (2 * PAIR_STARTS + plan.measure.load_cycles) * _start_s(plan, model) + plan.yard.wedged_after_s


def canary_most_s(canary: CanarySteps, first: float = 0.0) -> float:
    """Seconds that the shares from `first` on take where too few answers come."""
    return 60 * canary.max_minutes * sum(weight >= first for weight in canary.steps)


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


def _evaluation_s(plan: Plan, *, with_soak: bool = True) -> tuple[float, float]:
    """Seconds of an evaluation with its soak, and of the soak alone."""
    models = [(model, sized) for model in plan.models if (sized := _size(plan, model)) is not None]
    soak_s = sum(plan.measure.soak_s * (1 if side_by_side else 2) for _, (_, side_by_side) in models) * with_soak
    return soak_s + sum(_measuring_s(plan, model, n_bytes) for model, (n_bytes, _) in models), soak_s


def _load_s(n_bytes: int) -> float:
    return START_S + n_bytes / LOAD_BYTES_PER_S


def _start_s(plan: Plan, model: ModelPlan) -> float:
    sized = _size(plan, model)
    return 0.0 if sized is None else _load_s(sized[0])


def _size(plan: Plan, model: ModelPlan) -> tuple[int, bool] | None:
    """Bytes of the weights, and whether both engines are soaked at once; None of a file that cannot be read."""
    engines = {one.name: one.engine for one in (plan.incumbent, plan.candidate)}
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
    start_s = _load_s(n_bytes)
    answers = amounts.parity_prompts * amounts.parity_tokens
    behaviours = len(BEHAVIOURS if amounts.every_behaviour else plan.client.requires or DEFAULT_REQUIRED)
    levels = 1 + sum(level > 1 for level in amounts.concurrency)
    block_tokens = (amounts.warmup_min + levels * amounts.requests_per_block) * amounts.max_tokens
    blocks = amounts.calibration_blocks + amounts.looks[-1]
    once_s = 3 * start_s + (answers + behaviours * BEHAVIOUR_TOKENS) * per_token_s
    return 2 * (once_s + blocks * (start_s + block_tokens * per_token_s)) + FAULT_DRILLS * (start_s + DRILL_S)
