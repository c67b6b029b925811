"""What is measured of an engine counts only while it lives."""

from __future__ import annotations

from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from engines.errors import EngineExited
from engines.process.serving import free_port
from engines.settings import Endpoint
from flows.evaluation import measure
from flows.evaluation.measure import _while_alive
from flows.progress import ConsoleProgress, progress
from tasks.evidence.performance import Workload
from tasks.verdicts.limits import Limits, Measure

CAUSE = "other processes used 63% of the CPU while the candidate ran (limit 10%)"


def test_answers_of_an_engine_that_is_dying_are_not_its_own() -> None:
    """Its port is closed before its process has ended, and a measurement keeps refused connections as answers."""
    ends = iter([None, None, 3])
    process: Any = SimpleNamespace(pid=1, poll=lambda: next(ends, 3), returncode=3, log_tail=lambda: ["died"])
    endpoint = Endpoint(base_url=f"http://127.0.0.1:{free_port()}", model_id="m", engine="llama.cpp")
    served: Any = SimpleNamespace(process=process, endpoint=endpoint)
    with pytest.raises(EngineExited):
        _while_alive(served, lambda _: {"prompts": {}})


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_discarded_block_is_said_at_once_with_its_cause(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    """On a terminal and in a log; and that no more are repeated, with what to do."""
    blocks: list[dict[str, Any]] = []
    said = StringIO()
    shown_at: list[str] = []

    def measured(*_: Any, index: int, **__: Any) -> dict[str, Any]:
        shown_at.append(said.getvalue())
        return {"index": index, "incumbent": {}, "candidate": {}, "void": CAUSE}

    monkeypatch.setattr(measure, "measure_block", measured)
    trial: Any = SimpleNamespace(
        plan=SimpleNamespace(measure=Measure(looks=(3,), max_discarded_blocks=2), limits=Limits()),
        model=SimpleNamespace(id="tiny"),
        engines={"incumbent": None, "candidate": None},
        workload=Workload(requests=1, max_tokens=2),
        client_errors={},
        say=lambda _: None,
        gather=lambda _arm, _kind, work, key: blocks.append(work()),
        payloads=lambda _arm, _kind: blocks,
        payload=lambda _arm, _kind: None,
    )
    console = Console(file=said, force_terminal=is_terminal, width=60, color_system=None)
    token = progress.set(ConsoleProgress(console))
    try:
        with progress.get().step("tiny: performance"):
            measure.performance(trial)
    finally:
        progress.reset(token)
    assert f"tiny: performance block 1 of 3 was discarded: {CAUSE}" in shown_at[1]
    assert f"tiny: performance block 5 of 7 was discarded: {CAUSE}" in said.getvalue()
    assert "tiny: 5 blocks were discarded, no more are repeated; quiet the machine" in said.getvalue()
