"""The opening of an evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
from played import plan_of

from flows.evaluation import run
from migrations.plan_file import load_plan
from tasks.records.store import open_records


def test_an_evaluation_is_on_record_before_its_self_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted there, it is what `--resume latest` takes up."""

    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("SWITCHYARD_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(run, "self_test", interrupted)
    plan = load_plan(plan_of(tmp_path, "m"))
    with (
        pytest.raises(KeyboardInterrupt),
        run.opened(plan, None, command=("switchyard", "evaluate", "/plans/a b.toml")),
    ):
        pass
    with open_records(tmp_path / "home" / "switchyard.db") as records:
        (recorded,) = records.history(kind="evaluate")
    assert (recorded.name, recorded.status) == ("played", "interrupted")
    assert recorded.environment["command"] == ["switchyard", "evaluate", "/plans/a b.toml"]
