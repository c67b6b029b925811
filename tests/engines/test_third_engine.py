"""A new engine is one folder and one line in the registry: nobody else knows an engine by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_files import LLAMA, write_gguf
from third_engine.driver import ThirdEngine

from engines import registry
from engines.errors import BadInput
from engines.fit import estimate
from engines.model.header import read_header
from engines.settings import Settings
from engines.support import loads
from migrations.plan_file import build_plan
from tasks.evidence.preflight import preflight


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> str:
    """The engine, known for one test."""
    monkeypatch.setitem(registry.DRIVERS, ThirdEngine.name, ThirdEngine())
    return ThirdEngine.name


def test_a_plan_may_name_it(third: str, tmp_path: Path) -> None:
    """And an engine that nobody registered is still refused."""
    models = [{"id": "m", "gguf": str(write_gguf(tmp_path / "m.gguf"))}]
    plan = build_plan({"incumbent": {"engine": "llama.cpp"}, "candidate": {"engine": third}, "models": models})
    assert plan.candidate.engine == third
    with pytest.raises(BadInput, match=r"unknown engine 'fourth'; known: llama\.cpp, mistral\.rs, third"):
        build_plan({"incumbent": {"engine": third}, "candidate": {"engine": "fourth"}, "models": models})


def test_it_answers_for_what_it_loads_and_takes(third: str, tmp_path: Path) -> None:
    """Its lists and its memory are the driver's own."""
    path = write_gguf(tmp_path / "m.gguf", keys=LLAMA)
    header = read_header(path)
    assert loads(third, header, version="3.1").why == "third engine 3.1 loads every architecture"
    fit = estimate(header, Settings(), third, 128)
    assert (fit.verdict, [part.name for part in fit.parts]) == ("fits", ["weights"])
    (report,) = preflight([("m", path)], versions={third: "3.1"})["models"]
    assert [entry["engine"] for entry in report["engines"]] == ["llama.cpp", "mistral.rs", third]
