"""What an evaluation says it takes, before it begins."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gguf_files import write_gguf

from flows.evaluation.estimate import (
    Span,
    canary_most_s,
    drills_s,
    estimate,
    migration_estimate,
    rehearsal_s,
    spelled,
    still_takes,
)
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


@pytest.mark.parametrize(
    ("least", "most", "words"),
    [
        (10, 20, "under a minute"),
        (20, 200, "under a minute to 3 min"),
        (400, 420, "about 7 min"),
        (400, 3000, "7 to 50 min"),
        (3000, 4200, "50 min to 1 h 10 min"),
        (259_200, 262_000, "about 3 days 1 h"),
    ],
)
def test_what_is_not_known_is_a_span(least: float, most: float, words: str) -> None:
    assert str(Span(least, most)) == words


def test_the_first_look_corrects_the_estimate(tmp_path: Path) -> None:
    """The speeds are those of a real run of this plan, which took 6 min 38 s more; its blocks were settled at once."""
    model = ModelPlan(id="m", gguf=write_gguf(tmp_path / "m.gguf", template="{{ messages }}"))
    plan = plan_for([model], measure=Measure(soak_s=30))
    one = {"ttft_ms": 120.0, "tpot_ms": 9.5}
    unanswered = dict.fromkeys(one)
    pairs = [{"incumbent": one, "candidate": one}, {"incumbent": one, "candidate": unanswered}]
    assert still_takes(plan, model, pairs) == "by the speeds just measured 6 to 15 min more"
    assert still_takes(plan, model, [{"incumbent": unanswered, "candidate": unanswered}]) == ""
    slow = {"incumbent": 1.0, "candidate": 240.0}  # 11 to 29 starts of the candidate
    assert still_takes(plan, model, pairs, starts_s=slow) == "by the speeds just measured 51 min to 2 h 10 min more"


def test_the_soak_of_each_model_counts_and_one_that_cannot_be_read_does_not(tmp_path: Path) -> None:
    models = [ModelPlan(id=name, gguf=write_gguf(tmp_path / f"{name}.gguf")) for name in ("a", "b")]
    (tmp_path / "broken.gguf").write_bytes(b"no model")
    broken = ModelPlan(id="broken", gguf=tmp_path / "broken.gguf")
    plan = plan_for([*models, broken], measure=Measure(soak_s=3 * 86_400))
    assert estimate(plan).startswith("takes about 6 days")
    assert estimate(plan).endswith("; soak 6 days")
    assert "soak" not in estimate(plan, with_soak=False)
    assert estimate(plan_for([broken])) == "takes under a minute"


def test_what_is_left_of_a_migration_counts_each_phase_once(tmp_path: Path) -> None:
    """Native is measured as well; what a person left out takes no time; a canary has its longest beside."""
    models = [ModelPlan(id=name, gguf=write_gguf(tmp_path / f"{name}.gguf")) for name in ("a", "b")]
    plan = plan_for(models, measure=Measure(soak_s=86_400))
    assert migration_estimate(plan, {"evaluate": models}) == estimate(plan)
    moves = migration_estimate(plan, {"evaluate": [], "subprocess": models})
    assert re.fullmatch(r"takes (under a minute|about \d+ min); canary up to 12 h more", moves)
    whole = migration_estimate(plan, {"evaluate": models, "subprocess": models, "native": models[:1]})
    assert whole.endswith("; soak 3 days; canary up to 18 h more")
    left_out = migration_estimate(plan, {"subprocess": models}, rehearsal=False, canary=False)
    assert left_out == "takes under a minute"
    assert rehearsal_s(plan, models[0]) < drills_s(plan, models[0])
    assert canary_most_s(plan.canary, 0.25) == 2 * 7200


def test_tool_prompts_take_time_where_the_template_shows_tools(tmp_path: Path) -> None:
    """Up to three answers of 512 tokens each; none where it shows none, or where the plan leaves them out."""
    shows = write_gguf(tmp_path / "shows.gguf", template="{% if tools %}{{ tools }}{% endif %}{{ messages }}")
    hides = write_gguf(tmp_path / "hides.gguf", template="{{ messages }}")
    one = {"ttft_ms": 500.0, "tpot_ms": 100.0}

    def left(gguf: Path, n: int) -> str:
        model = ModelPlan(id="m", gguf=gguf)
        plan = plan_for([model], measure=Measure(soak_s=1, tool_prompts=n))
        return still_takes(plan, model, [{"incumbent": one, "candidate": one}])

    assert left(hides, 200) == left(hides, 0) == left(shows, 0)
    least, most = (int(found[1]) for found in re.finditer(r"(\d+) h", left(shows, 200)))
    assert least < 200 * 3 * 512 * 0.1 / 3600 < most
