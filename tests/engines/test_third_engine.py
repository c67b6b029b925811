"""A new engine is one folder and one line in the registry: nobody else knows an engine by name."""

from __future__ import annotations

import ast
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

ROOT = Path(__file__).parents[2]
HOMES = tuple(f"engines/{name}/" for name in ("attached", "llama_cpp", "mistral_rs", "ollama", "vllm"))
HOMES += ("engines/registry.py", "migrations/")


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> str:
    """The engine, known for one test."""
    monkeypatch.setitem(registry.DRIVERS, ThirdEngine.name, ThirdEngine())
    return ThirdEngine.name


def names_in(path: Path) -> list[str]:
    """Where a file spells an engine's name as a string of its own."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    where = path.relative_to(ROOT).as_posix()
    return [f"{where}:{node.lineno} {node.value!r}" for node in found if node.value in registry.known_engines()]


def test_no_engine_is_known_by_name_outside_its_folder() -> None:
    """Names are data: they come from the plan, the registry, a declaration of a migration or the records."""
    files = [path for top in ("engines", "tasks", "flows", "migrations") for path in sorted((ROOT / top).rglob("*.py"))]
    outside = [path for path in files if not path.relative_to(ROOT).as_posix().startswith(HOMES)]
    assert len(outside) > 100
    assert [line for path in outside for line in names_in(path)] == []


def test_a_plan_may_name_it(third: str, tmp_path: Path) -> None:
    """And an engine that nobody registered is still refused."""
    models = [{"id": "m", "gguf": str(write_gguf(tmp_path / "m.gguf"))}]
    plan = build_plan({"incumbent": {"engine": "llama.cpp"}, "candidate": {"engine": third}, "models": models})
    assert plan.candidate.engine == third
    with pytest.raises(BadInput, match=r"unknown engine 'fourth'; known: llama\.cpp, mistral\.rs, .*third"):
        build_plan({"incumbent": {"engine": third}, "candidate": {"engine": "fourth"}, "models": models})


def test_it_answers_for_what_it_loads_and_takes(third: str, tmp_path: Path) -> None:
    """Its lists and its memory are the driver's own."""
    path = write_gguf(tmp_path / "m.gguf", keys=LLAMA)
    header = read_header(path)
    assert loads(third, header, version="3.1").why == "third engine 3.1 loads every architecture"
    fit = estimate(header, Settings(), third, 128)
    assert (fit.verdict, [part.name for part in fit.parts]) == ("fits", ["weights"])
    (report,) = preflight([("m", path)], versions={third: "3.1"})["models"]
    assert [entry["engine"] for entry in report["engines"]] == [*registry.DRIVERS]
