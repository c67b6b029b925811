"""The demo's amounts, and what it says that they cannot prove."""

from __future__ import annotations

from pathlib import Path

from migrations.demo import CANNOT_PROVE, DEMO, DEMO_NAME, cannot_prove
from migrations.llama_cpp_to_mistral_rs import plan_for
from migrations.plan import ModelPlan
from tasks.verdicts.limits import Measure

MODELS = [ModelPlan(id="small", gguf=Path("/m/small.gguf"))]


def test_demo_is_smaller_and_says_what_it_cannot_prove() -> None:
    """A short run is honest about what it leaves open."""
    assert DEMO.looks[-1] * DEMO.requests_per_block < Measure().looks[0] * Measure().requests_per_block
    assert DEMO.soak_s < Measure().soak_s
    said = " ".join(CANNOT_PROVE)
    assert all(word in said for word in ("p95", "10%", "leaks", "failures per day"))


def test_a_users_plan_called_demo_has_no_caveats() -> None:
    """The demo is known by its amounts, whatever the length of its soak."""
    soaked_longer = Measure.model_validate({**DEMO.model_dump(), "soak_s": 600.0})
    assert cannot_prove(plan_for(MODELS, name=DEMO_NAME, measure=DEMO)) == CANNOT_PROVE
    assert cannot_prove(plan_for(MODELS, name=DEMO_NAME, measure=soaked_longer)) == CANNOT_PROVE
    assert cannot_prove(plan_for(MODELS, name=DEMO_NAME)) == ()
    assert cannot_prove(plan_for(MODELS, measure=DEMO)) == ()
