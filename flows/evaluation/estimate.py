"""How long an evaluation, a rehearsal, the drills, the canary and a whole migration take: printed before they begin."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from migrations.native import native_plan
from migrations.plan import CanarySteps, ModelPlan, Plan
from tasks.evidence.behaviours.battery import BEHAVIOURS, DEFAULT_REQUIRED
from tasks.evidence.preflight import preflight
from tasks.evidence.tool_calls.measure import MAX_TOKENS

# pairs: of the fastest engines in use, and of the slowest; bytes a second at which weights are read for each token
CPU_BYTES_PER_S, GPU_BYTES_PER_S = (12e9, 3e9), (400e9, 100e9)
LOAD_BYTES_PER_S, START_S = 1e9, (0.5, 2.0)
READ_AT_ONCE = 4  # so many tokens of a prompt take as long as one of an answer
SHORT_PROMPT_TOKENS, BEHAVIOUR_TOKENS = 48, 12
TOOL_PROMPT_TOKENS = 320  # of a prompt with its tools
# of a call or the text in its place; a weak model that is held to a grammar does not find the end
TOOL_TOKENS = (48, MAX_TOKENS)
FIRST_REQUESTS, FIRST_TOKENS = (9, 14), 12  # of the first look, to each engine
FAULT_DRILLS, DRILL_S = 4, (1.0, 10.0)
PAIR_STARTS = 2  # of a yard with both engines
REHEARSAL_STARTS = 1 + PAIR_STARTS + 2  # a yard without the candidate, one with it, and who serves after each kill


class Pace(NamedTuple):
    """Seconds that an engine takes to start, to the first token of a timed request, and for each further one."""

    start_s: float
    first_s: float
    token_s: float


class Sized(NamedTuple):
    """What a model's header tells of the time it takes: weights, whether both engines fit at once, and tools."""

    weights_bytes: int
    side_by_side: bool
    shows_tools: bool


class Span(NamedTuple):
    """Seconds at the least and at the most: of fast engines that the first look settles, of slow ones and the last."""

    least_s: float = 0.0
    most_s: float = 0.0

    def plus(self, least_s: float, most_s: float) -> Span:
        return Span(self.least_s + least_s, self.most_s + most_s)

    def __str__(self) -> str:
        """`about 7 min`, `7 to 12 min`, `50 min to 1 h 10 min`."""
        least, most = spelled(self.least_s), spelled(self.most_s)
        if self.most_s <= 1.2 * self.least_s or least == most:
            return f"{'about ' * most[0].isdigit()}{most}"
        number, _, unit = least.partition(" ")
        return f"{number if most.split()[1:] == [unit] else least} to {most}"


def estimate(plan: Plan, *, with_soak: bool = True, quick: bool = False) -> str:
    """`takes 6 to 50 min; soak 2 min`; models that cannot be read take no time."""
    if quick:
        n_models = len(plan.models)
        return f"a first look at {n_models} model{'s' * (n_models > 1)}, under a minute each for small ones"
    return takes(*_evaluation_s(plan, with_soak=with_soak))


def still_takes(
    plan: Plan,
    model: ModelPlan,
    pairs: Sequence[Mapping[str, Any]],
    *,
    starts_s: Mapping[str, float] | None = None,
    with_soak: bool = True,
) -> str:
    """`by the speeds just measured 6 to 12 min more`, soak and all; "" where the first look's `pairs` have no speed.

    `starts_s` are the seconds that the incumbent and the candidate took to start, where both were seen to.
    """
    timed = [one for pair in pairs for one in pair.values() if one["ttft_ms"] and one["tpot_ms"]]
    sized = _size(plan, model)
    if not timed or sized is None:
        return ""
    first_s, token_s = (statistics.fmean(one[key] for one in timed) / 1e3 for key in ("ttft_ms", "tpot_ms"))
    more_s = 0.0
    if starts_s:
        start_s = statistics.fmean(starts_s.values())
        paces = [Pace(start_s, first_s, token_s)] * 2
        # blocks of calibration start the incumbent alone, drills the candidate
        more_s = (FAULT_DRILLS - 2 * plan.measure.calibration_blocks) * (starts_s["candidate"] - start_s)
    else:
        paces = [Pace(_load_s(sized.weights_bytes, bound), first_s, token_s) for bound in (0, 1)]
    more_s += _soak_s(plan, sized.side_by_side) * with_soak
    measuring_s = [_measuring_s(plan, sized, pace, bound) for bound, pace in enumerate(paces)]
    return f"by the speeds just measured {Span(*measuring_s).plus(more_s, more_s)} more"


def takes(whole: Span | float, soak_s: float = 0.0, canary_s: float = 0.0) -> str:
    """`takes about 3 days 4 h; soak 3 days; canary up to 6 h more`: a canary takes as long as its traffic needs."""
    spent = [f"takes {whole if isinstance(whole, Span) else Span(whole, whole)}"]
    spent += [f"soak {spelled(soak_s)}"] if soak_s else []
    return "; ".join(spent + ([f"canary up to {spelled(canary_s)} more"] if canary_s else []))


def migration_estimate(
    plan: Plan, phases: Mapping[str, Sequence[ModelPlan]], *, rehearsal: bool = True, canary: bool = True
) -> str:
    """What is left of a migration: `phases` has the models that `evaluate`, `subprocess` and `native` wait for."""
    total, soak_s, canary_s = Span(), 0.0, 0.0
    for phase, models in phases.items():
        if models and phase != "subprocess":
            part = native_plan(plan, [model.id for model in models]) if phase == "native" else plan
            measured, soaked_s = _evaluation_s(part)
            total, soak_s = total.plus(*measured), soak_s + soaked_s
        for model in models if phase != "evaluate" else ():
            more_s = rehearsal_s(plan, model) * rehearsal + drills_s(plan, model) * (phase == "native")
            total, canary_s = total.plus(more_s, more_s), canary_s + canary_most_s(plan.canary) * canary
    return takes(total, soak_s, canary_s)


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


def _evaluation_s(plan: Plan, *, with_soak: bool = True) -> tuple[Span, float]:
    """Seconds of an evaluation with its soak, and of the soak alone."""
    total, soak_s = Span(), 0.0
    for model in plan.models:
        if (sized := _size(plan, model)) is None:
            continue
        paces = [_guess(plan, model, sized.weights_bytes, bound) for bound in (0, 1)]
        spent_s = (_first_look_s(pace, at) + _measuring_s(plan, sized, pace, at) for at, pace in enumerate(paces))
        total = total.plus(*spent_s)
        soak_s += _soak_s(plan, sized.side_by_side) * with_soak
    return total.plus(soak_s, soak_s), soak_s


def _soak_s(plan: Plan, side_by_side: bool) -> float:
    return plan.measure.soak_s * (1 if side_by_side else 2)


def _load_s(n_bytes: int, bound: int) -> float:
    return START_S[bound] + n_bytes / LOAD_BYTES_PER_S


def _start_s(plan: Plan, model: ModelPlan) -> float:
    sized = _size(plan, model)
    return 0.0 if sized is None else _load_s(sized.weights_bytes, 1)


def _size(plan: Plan, model: ModelPlan) -> Sized | None:
    """What the header says; None of a file that cannot be read."""
    engines = {one.name: one.engine for one in (plan.incumbent, plan.candidate)}
    settings = {model.id: plan.settings_for(model.id)}
    try:
        report = preflight([(model.id, model.gguf)], settings_by_model=settings, engines=engines)["models"][0]
    except Exception:  # no reason to end a run: preflight itself says what is wrong
        return None
    shows_tools = report["header"]["template_shows_tools"] is True
    return Sized(int(report["memory"]["weights_bytes"]), bool(report["side_by_side"]["fits"]), shows_tools)


def _guess(plan: Plan, model: ModelPlan, n_bytes: int, bound: int) -> Pace:
    """An engine's pace by the size of the model; `bound` 0 is a fast one, 1 a slow one."""
    settings = plan.settings_for(model.id)
    token_s = n_bytes / (GPU_BYTES_PER_S if settings.gpu_layers else CPU_BYTES_PER_S)[bound]
    is_short, context = plan.measure.prompt_set == "short", settings.context_tokens or 4096
    n_tokens = SHORT_PROMPT_TOKENS if is_short else context // 2
    return Pace(_load_s(n_bytes, bound), n_tokens / READ_AT_ONCE * token_s, token_s)


def _first_look_s(pace: Pace, bound: int) -> float:
    return 2 * (pace.start_s + FIRST_REQUESTS[bound] * (pace.first_s + FIRST_TOKENS * pace.token_s))


def _measuring_s(plan: Plan, sized: Sized, pace: Pace, bound: int) -> float:
    """Seconds of both engines after the first look, without the soak; `bound` 0 ends at the first look at blocks."""
    amounts = plan.measure
    answers = amounts.parity_prompts * (SHORT_PROMPT_TOKENS / READ_AT_ONCE + amounts.parity_tokens)
    behaviours = len(BEHAVIOURS if amounts.every_behaviour else plan.client.requires or DEFAULT_REQUIRED)
    levels = 1 + sum(level > 1 for level in amounts.concurrency)
    requests = amounts.warmup_min + bound + levels * amounts.requests_per_block
    block_s = pace.start_s + requests * (pace.first_s + amounts.max_tokens * pace.token_s)
    blocks = amounts.calibration_blocks + (amounts.looks[-1] if bound else amounts.looks[0])
    once_s = pace.start_s + (answers + behaviours * BEHAVIOUR_TOKENS) * pace.token_s
    whole_s = 2 * (once_s + blocks * block_s) + FAULT_DRILLS * (pace.start_s + DRILL_S[bound])
    return whole_s + _tool_calls_s(plan, pace, bound) * sized.shows_tools


def _tool_calls_s(plan: Plan, pace: Pace, bound: int) -> float:
    """Seconds of the tool prompts: each once to the candidate and twice to the incumbent, the second time cached."""
    prompts = plan.measure.tool_prompts / (1 if bound else 3)
    return prompts * (2 * TOOL_PROMPT_TOKENS / READ_AT_ONCE + 3 * TOOL_TOKENS[bound]) * pace.token_s
