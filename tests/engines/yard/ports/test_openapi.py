"""docs/openapi.yaml against a yard over fake engines: requests that schemathesis makes of it, good and bad ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode, checks

DESCRIPTION = Path(__file__).parents[4] / "docs" / "openapi.yaml"
# what a body may hold the engine decides: a wrong one need not be refused
EXPECTED = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


PATHS = yaml.safe_load(DESCRIPTION.read_text())["paths"]
CASES = [(method, path, GenerationMode.POSITIVE) for path, item in PATHS.items() for method in item]
CASES += [("post", path, GenerationMode.NEGATIVE) for path, item in PATHS.items() if "post" in item]


@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_the_yard_is_as_it_is_described(yard_of_all: Any, method: str, path: str, mode: GenerationMode) -> None:
    """No answer has another status, type or shape, for requests that are as described and for some that are not."""
    description = schemathesis.openapi.from_path(DESCRIPTION)
    description.config.update(base_url=yard_of_all.url)

    @given(case=description[path][method].as_strategy(generation_mode=mode))
    @settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def holds(case: Any) -> None:
        case.call_and_validate(checks=EXPECTED, timeout=30)

    holds()
