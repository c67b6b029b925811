"""What an evaluation says it takes, before it begins."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_files import write_gguf

from flows.evaluation.estimate import estimate, spelled
from migrations.llama_cpp_to_mistral_rs import plan_for
from migrations.plan import ModelPlan
from tasks.verdicts.limits import Measure


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (20, "under a minute"),
        (720, "12 min"),
        (3600, "1 h"),
        (7800, "2 h 10 min"),
        (86_399, "1 day"),
        (259_200, "3 days"),
        (273_600, "3 days 4 h"),
    ],
)
def test_a_duration_in_two_units(seconds: float, words: str) -> None:
    assert spelled(seconds) == words


def test_the_soak_of_each_model_counts_and_one_that_cannot_be_read_does_not(tmp_path: Path) -> None:
    models = [ModelPlan(id=name, gguf=write_gguf(tmp_path / f"{name}.gguf")) for name in ("a", "b")]
    (tmp_path / "broken.gguf").write_bytes(b"no model")
    broken = ModelPlan(id="broken", gguf=tmp_path / "broken.gguf")
    plan = plan_for([*models, broken], measure=Measure(soak_s=3 * 86_400))
    assert estimate(plan).startswith("takes about 6 days")
    assert estimate(plan).endswith("; soak 6 days")
    assert "soak" not in estimate(plan, with_soak=False)
    assert estimate(plan_for([broken])) == "takes about under a minute"
