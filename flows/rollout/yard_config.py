"""The plan's models and engines as the yard takes them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import replace

from engines.driver import Installation, native_of
from engines.errors import BadInput, EngineNotFound
from engines.registry import native_driver
from engines.yard.config import ModelConfig, OverflowConfig, YardConfig
from engines.yard.engine.launch_spec import LaunchSpec
from migrations import carried
from migrations.plan import ModelPlan, Plan
from tasks.evidence.canary import canary_judge, shadow_judge
from tasks.verdicts.limits import CanaryLimits

PREFIX_CACHE = "prefix cache"  # as drivers name it where they have none


def yard_config(plan: Plan, environment: Mapping[str, str] = os.environ) -> YardConfig:
    """The yard as `plan` wants it, with the engines that are found now; one that is missing is no error.

    Raises BadInput when the key's variable is not set, EngineNotFound when there is no engine at all.
    """
    found: dict[str, Installation] = {}
    missing: dict[str, str] = {}
    for choice in (plan.incumbent, plan.candidate):
        try:
            found[choice.name] = choice.find()
        except (EngineNotFound, BadInput) as error:  # the other one serves all the same
            if choice.url and isinstance(error, EngineNotFound) and not choice.version:
                found[choice.name] = choice.find(ask=False)  # it may be there by the time that it is needed
            else:
                missing[choice.name] = str(error)
    if not found:
        raise EngineNotFound("; ".join(missing.values()))
    with contextlib.suppress(EngineNotFound):  # a third place for the candidate, where there is one
        native = native_driver(plan.candidate.engine)
        if native is not None:
            name = native_of(plan.candidate.name)
            found[name] = replace(native.find(), engine=name)
    models = tuple(
        ModelConfig(
            id=model.id,
            incumbent=plan.incumbent.name,
            candidate=plan.candidate.name,
            specs={
                engine: LaunchSpec.of(
                    installation,
                    model.id,
                    plan.given(model.id, engine),
                    plan.settings_on(model.id, engine),
                    own=plan.own_args(model.id, engine),
                    name_there=plan.name_there(model.id, engine),
                    request_defaults=carried.request_defaults(plan, model.id, installation),
                    not_given=carried.not_given(plan, model.id, installation),
                )
                for engine, installation in found.items()
            },
            missing=missing,
            kinds=plan.kinds,
            aliases=model.aliases,
            engine=plan.named(model.engine),
            load=model.load,
            pin=model.pin,
            overflow=_overflow(plan, model),
        )
        for model in plan.models
    )
    return YardConfig(
        settings=plan.yard,
        models=models,
        api_key=plan.api_keys(environment),
        notify=plan.notify,
        accepted=frozenset(plan.accepted_unsupported),
        judge_canary=canary_judge(canary_limits(plan)),
        judge_shadow=shadow_judge(),
    )


def _overflow(plan: Plan, model: ModelPlan) -> OverflowConfig | None:
    over = model.overflow
    return None if over is None else OverflowConfig(plan.named(over.engine), over.waiting)


def canary_limits(plan: Plan) -> CanaryLimits:
    """The plan's limits and looks as they hold for live traffic."""
    return CanaryLimits(
        **plan.limits.model_dump(),
        looks=plan.measure.looks,
        accepts_no_cache=PREFIX_CACHE in plan.accepted_unsupported,
    )


def unsupported(plan: Plan, config: YardConfig) -> list[str]:
    """What each engine does not support, one line each, without what the plan accepts."""
    lines: dict[str, None] = {}
    for model in config.models:
        for engine, spec in model.specs.items():
            for one in carried.unsupported(plan, model.id, spec.installation):
                if carried.named(one) not in plan.accepted_unsupported:
                    lines[f"{engine}: {one}"] = None
    return list(lines)
