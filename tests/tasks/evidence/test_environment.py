"""The environment of a run: complete, and storable as they are."""

from __future__ import annotations

import json

from tasks.evidence.environment import machine_environment


def test_environment_name_machine_software_and_clock() -> None:
    """What a reader needs in order to believe, or to repeat, a measurement."""
    told = machine_environment()
    assert set(told) >= {"host", "cpu", "ram_bytes", "gpus", "kernel", "python", "packages", "clock"}
    assert isinstance(told["ram_bytes"], int)
    assert told["ram_bytes"] > 0
    packages = told["packages"]
    assert isinstance(packages, dict)
    assert {"psutil", "switchyard-llm"} <= set(packages)
    assert json.loads(json.dumps(told, allow_nan=False)) == told
