"""Attached engines in a plan: what is taken, what is refused in one line, and what enters its hashes."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_files import LLAMA, write_gguf
from openai_stub import stub

from engines.errors import BadInput
from engines.mistral_rs.dialect import OldBinaryDialect
from engines.registry import driver
from engines.settings import NO_FILE
from migrations.pairs import pair_of
from migrations.plan import EngineChoice, content_hash
from migrations.plan_file import load_plan, plan_to_toml

OLD = 'name = "old"\nengine = "openai"\nurl = "http://127.0.0.1:5000/v1"\ndialect = "tabbyapi"\n'
NEW = 'engine = "llama.cpp"\n'


def plan_file(folder: Path, incumbent: str, candidate: str, model: str = "") -> Path:
    path = folder / "plan.toml"
    path.write_text(f'[incumbent]\n{incumbent}[candidate]\n{candidate}[[models]]\nid = "m"\n{model}')
    return path


def with_file(folder: Path) -> str:
    return f'gguf = "{write_gguf(folder / "m.gguf", keys=LLAMA)}"\n'


def test_it_comes_back_as_it_was_written(tmp_path: Path) -> None:
    """Names there, the variable of its key and its dialect included; a model of nobody's file has none."""
    other = 'name = "new"\nengine = "openai"\nurl = "https://models.example"\napi_key_env = "NEW_KEY"\n'
    path = plan_file(tmp_path, OLD, other, '[models.names]\nold = "Smol-exl3"\nnew = "team/smol"\n')
    plan = load_plan(path)
    assert (plan.incumbent.url, plan.incumbent.engine) == ("http://127.0.0.1:5000", "openai:tabbyapi")
    assert (plan.models[0].gguf, plan.models[0].digest) == (NO_FILE, "unknown")
    assert (plan.name_there("m", "old"), plan.name_there("m", "new")) == ("Smol-exl3", "team/smol")
    again = tmp_path / "again.toml"
    again.write_text(plan_to_toml(plan))
    assert load_plan(again) == plan
    assert content_hash(load_plan(again)) == content_hash(plan)
    path.write_text(path.read_text().replace("team/smol", "team/other"))
    assert content_hash(load_plan(path)) != content_hash(plan)


def test_a_server_that_reports_no_version_has_the_plans() -> None:
    """`mistralrs` reports none, and gives log-probabilities of another base before 0.9.1."""
    with stub("needs no key") as url:
        choice = EngineChoice.model_validate({"engine": "openai", "url": url, "dialect": "mistral.rs"})
        said = choice.model_copy(update={"version": "0.8.1"})
        assert (choice.find().version, said.find().version, said.find(ask=False).version) == (
            "unknown",
            "0.8.1",
            "0.8.1",
        )
        assert driver(said.engine).dialect(said.find()) is OldBinaryDialect


@pytest.mark.parametrize(
    ("incumbent", "said"),
    [
        ('engine = "openai"\n', "url is missing: where the server answers"),
        ('engine = "openai"\nurl = "127.0.0.1:5000"\n', "url is no address"),
        ('engine = "openai"\nurl = "http://me:s3cret@127.0.0.1"\n', "a key belongs in a variable"),
        ('engine = "openai"\nurl = "http://a/?key=s3cret"\n', "a key belongs in a variable"),
        (OLD.replace("tabbyapi", "koboldcpp"), "unknown dialect 'koboldcpp'"),
        (OLD + 'binary = "plan.toml"\n', "binary: an attached engine is started by others"),
        (OLD + 'args = ["--x"]\n', "args: an attached engine is started by others"),
        (OLD + 'form = "hosted"\n', "form: an attached engine is started by others"),
        (OLD + 'api_key_env = "s3cret-sk"\n', "must be the NAME of an environment variable"),
        (
            'engine = "mistral.rs"\nurl = "http://127.0.0.1:1"\n',
            'url is for an attached engine: write engine = "openai"',
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path, incumbent: str, said: str) -> None:
    """And no secret is shown."""
    with pytest.raises(BadInput) as refused:
        load_plan(plan_file(tmp_path, incumbent, NEW, with_file(tmp_path)))
    assert said in str(refused.value)
    assert "s3cret" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_engine_that_is_started_needs_the_file(tmp_path: Path) -> None:
    """The line and the key are those of the model."""
    with pytest.raises(BadInput, match=r"models\[0\]\.gguf \(line 8\): is missing: the model file"):
        load_plan(plan_file(tmp_path, OLD, NEW))


def test_a_name_there_is_of_an_attached_engine(tmp_path: Path) -> None:
    model = with_file(tmp_path) + '[models.names]\n"llama.cpp" = "smol"\n'
    with pytest.raises(BadInput, match=r"models\.names\.llama\.cpp of m: no attached engine of this plan"):
        load_plan(plan_file(tmp_path, OLD, NEW, model))


def test_its_pair_is_that_of_what_it_speaks(tmp_path: Path) -> None:
    """An attached llama-server and one that we start are two builds of one engine."""
    attached = 'name = "theirs"\nengine = "openai"\nurl = "http://127.0.0.1:1"\ndialect = "llama.cpp"\n'
    plan = load_plan(plan_file(tmp_path, attached, NEW, with_file(tmp_path)))
    assert pair_of(plan).risks[0].risk == "the new build is slower with this model"
    assert plan.limits.mean_kld == 0.0005
