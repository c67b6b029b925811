"""The built-in declaration: whole, consistent with itself, and a plan like any other."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from engines.errors import BadInput
from engines.settings import Settings
from migrations import llama_cpp_to_mistral_rs as migration
from migrations.demo import DEMO
from migrations.plan import ModelPlan, Plan
from migrations.plan_file import plan_to_toml
from tasks.verdicts.limits import Limits
from tasks.verdicts.risks import Risk

MODEL = ModelPlan(id="small", gguf=Path("/m/small.gguf"))


def risk(name: str) -> Risk:
    """The risk of the register called `name`."""
    return next(entry for entry in migration.PAIR.risks if entry.risk == name)


@pytest.mark.parametrize(
    ("name", "likelihood", "impact", "check"),
    [
        ("mistral.rs misses features", "medium", "low", "compatibility.chat_stream"),
        ("mistral.rs misses features", "medium", "low", "parity.ignored_parameters"),
        ("performance regression", "low", "medium", "performance.ttft_p50_ratio"),
        ("performance regression", "low", "medium", "memory.peak_ratio"),
        ("model compatibility", "low", "high", "preflight.loads"),
        ("model compatibility", "low", "high", "parity.prompt_tokens"),
        ("native SDK bugs", "medium", "medium", "stability.failures_per_day"),
        ("native SDK bugs", "medium", "medium", "faults.kill_detect_s"),
    ],
)
def test_each_risk_has_evidence(name: str, likelihood: str, impact: str, check: str) -> None:
    """The register's levels, and a check that speaks to the risk."""
    entry = risk(name)
    assert (entry.likelihood, entry.impact) == (likelihood, impact)
    assert entry.covers(check)
    assert not entry.covers("nothing.else")


def test_risks_are_the_four_of_the_register() -> None:
    """No risk is lost, each has its mitigation."""
    assert len(migration.PAIR.risks) == 4
    assert all(entry.mitigation for entry in migration.PAIR.risks)


def test_accepted_unsupported_are_settings_with_a_reason() -> None:
    """Only tuning is accepted unasked: nothing that changes behaviour or safety."""
    assert set(migration.PAIR.accepted_unsupported) <= set(Settings.model_fields)
    assert not {"api_key", "context_tokens", "seed", "prefill_assistant", "jinja"} & set(
        migration.PAIR.accepted_unsupported
    )
    assert all(migration.PAIR.accepted_unsupported.values())


def test_plan_for_models_is_a_whole_plan() -> None:
    """Engines, models, default limits; it can be written as TOML and read back."""
    plan = migration.plan_for([MODEL])
    assert (plan.incumbent.engine, plan.candidate.engine) == ("llama.cpp", "mistral.rs")
    assert plan.models == (MODEL,)
    assert plan.limits == Limits()
    assert Plan.model_validate(tomllib.loads(plan_to_toml(plan))) == plan


def test_overrides_replace_fields() -> None:
    """What is given wins; what is not stays as declared."""
    plan = migration.plan_for([MODEL], measure=DEMO, name="demo", settings=Settings(threads=1))
    assert (plan.name, plan.measure, plan.settings.threads) == ("demo", DEMO, 1)
    assert plan.accepted_unsupported == tuple(migration.PAIR.accepted_unsupported)


def test_wrong_override_is_bad_input() -> None:
    """One line, as for a file."""
    with pytest.raises(BadInput, match=r"^llama\.cpp-to-mistral\.rs: maesure: unknown key; did you mean 'measure'\?$"):
        migration.plan_for([MODEL], maesure=DEMO)
    with pytest.raises(BadInput, match=r"^llama\.cpp-to-mistral\.rs: models: is empty: "):
        migration.plan_for([])
