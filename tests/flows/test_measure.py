"""What is measured of an engine counts only while it lives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from engines.errors import EngineExited
from engines.process.serving import free_port
from engines.settings import Endpoint
from flows.evaluation.measure import _while_alive


def test_answers_of_an_engine_that_is_dying_are_not_its_own() -> None:
    """Its port is closed before its process has ended, and a measurement keeps refused connections as answers."""
    ends = iter([None, None, 3])
    process: Any = SimpleNamespace(poll=lambda: next(ends, 3), returncode=3, log_tail=lambda: ["died"])
    endpoint = Endpoint(base_url=f"http://127.0.0.1:{free_port()}", model_id="m", engine="llama.cpp")
    served: Any = SimpleNamespace(process=process, endpoint=endpoint)
    with pytest.raises(EngineExited):
        _while_alive(served, lambda _: {"prompts": {}})
