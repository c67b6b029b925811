"""Named engines of a plan: names, tables, kinds and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_files import LLAMA, write_gguf

from engines.errors import BadInput, EngineNotFound
from migrations import any_pair, llama_cpp_to_mistral_rs, new_build
from migrations.native import native_plan
from migrations.pairs import pair_of
from migrations.plan import EngineChoice, Plan, content_hash
from migrations.plan_file import build_plan, load_plan, plan_to_toml, recorded_plan
from tasks.records.payload import plan_hash
from tasks.verdicts.limits import Limits

Written = Callable[..., Path]
OLD = '[incumbent]\nengine = "llama.cpp"\n'
NEW = '[candidate]\nname = "llama.cpp@b2"\nengine = "llama.cpp"\n'


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """A plan of the tables given, with two llama-servers beside it."""
    gguf = write_gguf(tmp_path / "m.gguf", keys=LLAMA)
    for name, version in (("one", "0.1 (build 7)"), ("two", "0.2 (build 9)")):
        (tmp_path / name).write_text(
            f"#!/bin/sh\ncase $1 in --version) echo 'version: {version}' ;; *) echo ' --model --port' ;; esac\n"
        )
        (tmp_path / name).chmod(0o755)

    def write(*tables: str, of_model: str = "") -> Path:
        path = tmp_path / "plan.toml"
        path.write_text("\n".join([*tables, f'[[models]]\nid = "m"\ngguf = "{gguf}"\n{of_model}']))
        return path

    return write


def test_a_kind_is_the_name_where_none_is_given(written: Written) -> None:
    """And such a plan is stored as it was before names."""
    plan = load_plan(written(OLD, '[candidate]\nengine = "mistral.rs"\n'))
    assert (plan.incumbent.name, plan.candidate.name) == ("llama.cpp", "mistral.rs")
    assert all(set(plan.model_dump()[arm]) == {"engine", "form", "binary"} for arm in ("incumbent", "candidate"))
    assert "engines" not in plan.model_dump()


def test_two_builds_of_one_kind_are_two_engines(written: Written, tmp_path: Path) -> None:
    """Each is found as its own, under its own name, with its own args."""
    plan = load_plan(
        written(
            f'{OLD}binary = "one"\nargs = ["--temp", "0.1"]\n',
            f'{NEW}binary = "two"\n',
            of_model='[models.engines."llama.cpp@b2"]\nargs = ["--temp", "0.2"]\n',
        )
    )
    found = [choice.find() for choice in (plan.incumbent, plan.candidate)]
    assert [(one.engine, one.kind, one.version) for one in found] == [
        ("llama.cpp", "llama.cpp", "0.1 (build 7)"),
        ("llama.cpp@b2", "llama.cpp", "0.2 (build 9)"),
    ]
    assert [plan.own_args("m", one.engine).args[1] for one in found] == ["0.1", "0.2"]


def test_a_named_plan_is_written_and_stored_as_it_was_read(written: Written, tmp_path: Path) -> None:
    plan = load_plan(written(OLD, f'{NEW}binary = "two"\nversion = "build 9"\n'))
    again = tmp_path / "again.toml"
    again.write_text(plan_to_toml(plan))
    assert load_plan(again) == recorded_plan(plan.model_dump(mode="json")) == plan


def test_a_table_is_used_by_its_name(written: Written) -> None:
    """One that nobody uses changes no hash: it starts nothing."""
    tables = '[engines."llama.cpp@b2"]\nengine = "llama.cpp"\nbinary = "two"\n'
    spare = '[engines.spare]\nengine = "mistral.rs"\n'
    used = load_plan(written(OLD, '[candidate]\nuse = "llama.cpp@b2"\n', tables))
    more = load_plan(written(OLD, '[candidate]\nuse = "llama.cpp@b2"\n', tables, spare))
    plain = load_plan(written(OLD, f'{NEW}binary = "two"\n'))
    assert used.candidate == more.candidate == plain.candidate
    assert len({plan_hash(one) for one in (used, more, plain)}) == len({content_hash(one) for one in (used, more)}) == 1


def test_native_is_a_form(written: Written) -> None:
    """Written as one, or by the name that it had before."""
    form = load_plan(written(OLD, '[candidate]\nengine = "mistral.rs"\nform = "native"\n'))
    name = load_plan(written(OLD, '[candidate]\nengine = "mistral.rs-native"\n'))
    assert form == name
    assert content_hash(form) == content_hash(name)


def test_the_native_form_of_a_named_candidate_has_its_name(written: Written) -> None:
    plan = load_plan(written(OLD, '[candidate]\nname = "m.rs"\nengine = "mistral.rs"\n'))
    native = native_plan(plan).candidate
    assert (native.name, native.engine) == ("m.rs-native", "mistral.rs-native")
    assert plan.kinds == {"llama.cpp": "llama.cpp", "m.rs": "mistral.rs", "m.rs-native": "mistral.rs-native"}


def test_a_kind_stands_for_the_only_engine_of_that_kind(written: Written) -> None:
    """In `engine` and `engines` of a model, as plans had it before names."""
    named = '[candidate]\nname = "m.rs"\nengine = "mistral.rs"\n'
    own = 'engine = "mistral.rs"\n[models.engines."llama.cpp"]\nargs = ["--temp", "0.1"]\n'
    plan = load_plan(written('[incumbent]\nname = "old"\nengine = "llama.cpp"\n', named, of_model=own))
    assert plan.own_args("m", "old").args == ("--temp", "0.1")
    assert plan.named(plan.models[0].engine) == "m.rs"
    assert (plan.named("llama.cpp-native"), plan.named("mistral.rs-native")) == ("llama.cpp-native", "m.rs-native")


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        (
            (OLD, '[candidate]\nengine = "llama.cpp"\nbinary = "two"\n'),
            'both called llama.cpp, .* name = "llama.cpp@new"',
        ),
        ((OLD, NEW.replace("@b2", " b2")), r"candidate\.name \(line 5\): 'llama.cpp b2' does not fit: .*letters"),
        ((OLD, NEW.replace("llama.cpp@b2", "auto")), r"candidate \(line 4\): name 'auto' has a meaning of its own"),
        ((OLD, NEW.replace("@b2", "-native")), "name 'llama.cpp-native' has a meaning of its own"),
        ((OLD, NEW + 'url = "http://x"\n'), 'url is for an attached engine: write engine = "openai"'),
        ((OLD, NEW + 'python = "/x"\nbinary = "y"\n'), "python runs a wheel, binary a program; remove one of the two"),
        ((OLD, NEW + 'form = "native"\n'), "llama.cpp has no native form; its forms are binary and hosted"),
        (
            (OLD, NEW.replace('"llama.cpp"', '"lama.cpp"')),
            "unknown engine 'lama.cpp'; known: .*did you mean 'llama.cpp'",
        ),
        ((OLD, '[candidate]\nuse = "x"\n'), "candidate.use stands alone and names a table .*; there is none"),
        (
            (OLD, '[candidate]\nuse = "x"\nform = "hosted"\n', '[engines.x]\nengine = "llama.cpp"\n'),
            r"candidate.use stands alone .*; there is \[engines.x\]",
        ),
        (
            (OLD, '[candidate]\nuse = "x"\n', '[engines.x]\nengine = "lama.cpp"\n'),
            r"candidate.engine \(line 8\): unknown engine 'lama.cpp'",
        ),
        ((OLD, NEW, '[engines.x]\nengine = "lama.cpp"\n'), r"engines.x.engine \(line 9\): unknown engine 'lama.cpp'"),
    ],
)
def test_what_is_wrong_with_a_name_is_said_in_one_line(written: Written, tables: tuple[str, ...], said: str) -> None:
    with pytest.raises(BadInput, match=f"^[^\n]*plan.toml: .*{said}[^\n]*$"):
        load_plan(written(*tables))


def test_an_engine_of_another_version_is_not_found(written: Written) -> None:
    """A build number is part of what the engine prints; nothing is derived from it."""
    plan = load_plan(written(OLD, f'{NEW}binary = "two"\nversion = "build 8"\n'))
    with pytest.raises(EngineNotFound, match=r"llama.cpp@b2 is version 0.2 \(build 9\) here .*, not build 8; name the"):
        plan.candidate.find()


def test_a_plan_out_of_a_form_takes_tables_too(written: Written, tmp_path: Path) -> None:
    model = {"id": "m", "gguf": str(tmp_path / "m.gguf")}
    engines = {"new": {"engine": "llama.cpp"}}
    plan = build_plan(
        {"engines": engines, "incumbent": {"engine": "llama.cpp"}, "candidate": {"use": "new"}, "models": [model]}
    )
    assert plan.candidate == EngineChoice(engine="llama.cpp", name="new")
    assert isinstance(plan, Plan)


def test_another_build_has_limits_of_its_own(written: Written, tmp_path: Path) -> None:
    """Nearer than those of two engines; what the plan sets wins, and drags along what must lie beside it."""
    two = f'{NEW}binary = "two"\n'
    plain, changed = load_plan(written(OLD, two)), load_plan(written(OLD, two, "[limits]\ntop1_agreement = 0.96\n"))
    assert (plain.limits, plain.limits.mean_kld) == (new_build.PAIR.limits, 0.0005)
    low = changed.limits.top1_lower_bound
    assert (changed.limits.top1_agreement, low, changed.limits.mean_kld) == (0.96, 0.96, 0.0005)
    again = tmp_path / "again.toml"
    again.write_text(plan_to_toml(changed))
    assert load_plan(again) == recorded_plan(changed.model_dump(mode="json")) == changed
    assert load_plan(written(OLD, '[candidate]\nengine = "mistral.rs"\n')).limits == Limits()


def test_each_kind_of_move_has_its_declaration(written: Written) -> None:
    """Every area of checks is evidence on a risk of it."""
    rs = 'engine = "mistral.rs"\n'
    moves = [
        (llama_cpp_to_mistral_rs.PAIR, (OLD, f"[candidate]\n{rs}")),
        (new_build.PAIR, (OLD, NEW)),
        (any_pair.PAIR, (f"[incumbent]\n{rs}", '[candidate]\nengine = "llama.cpp"\n')),
    ]
    for pair, tables in moves:
        assert pair_of(load_plan(written(*tables))) is pair
        covered = {kind.partition(".")[0] for risk in pair.risks for kind in risk.evidence}
        assert covered >= {"preflight", "parity", "compatibility", "performance", "memory", "stability", "faults"}
    native = native_plan(load_plan(written(OLD, f"[candidate]\n{rs}")))
    assert pair_of(native) is llama_cpp_to_mistral_rs.PAIR
