"""The plan: what is read, what is refused and in which words, what is written back, and what its hash means."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from engines.errors import BadInput
from engines.model.digest import WHOLE_UP_TO_BYTES, model_digest
from engines.settings import Settings
from migrations.plan import CanarySteps, EngineChoice, ModelPlan, Plan, content_hash
from migrations.plan_file import build_plan, load_plan, plan_to_toml, recorded_plan
from tasks.records import payload
from tasks.verdicts.limits import ClientNeeds, Limits, Measure

EXAMPLE = Path(__file__).parents[2] / "examples" / "plan.toml"
PLAN = """
name = "box"

[incumbent]
engine = "llama.cpp"

[candidate]
engine = "mistral.rs"

[[models]]
id = "small"
gguf = "small.gguf"
"""

Write = Callable[[str], Path]


def refusal(path: Path) -> str:
    """The one line with which a plan is refused, its directory cut off."""
    with pytest.raises(BadInput) as caught:
        load_plan(path)
    line = str(caught.value)
    assert "\n" not in line
    return line.replace(f"{path.parent}/", "")


def test_smallest_plan_loads_with_defaults(write: Write) -> None:
    """Two engines and a model are enough; a relative path starts at the plan's directory."""
    path = write(PLAN)
    plan = load_plan(path)
    assert plan.models[0].gguf == path.parent / "small.gguf"
    assert (plan.measure, plan.limits, plan.client) == (Measure(), Limits(), ClientNeeds())


def test_model_settings_win_field_by_field(write: Write) -> None:
    """A model overrides what it sets and nothing else."""
    plan = load_plan(
        write(
            PLAN
            + "[models.settings]\ncontext_tokens = 512\n[settings]\nthreads = 3\ncontext_tokens = 4096\nparallel = 2"
        )
    )
    served = plan.settings_for("small")
    assert (served.context_tokens, served.threads, served.parallel) == (512, 3, 2)


def test_model_settings_survive_a_dump() -> None:
    """A plan that travels as JSON (a Prefect parameter) overrides no more afterwards than before."""
    model = ModelPlan(id="a", gguf=Path("/m/a.gguf"), settings=Settings(context_tokens=512))
    plan = a_plan(models=(model,), settings=Settings(parallel=4))
    for again in (Plan.model_validate_json(plan.model_dump_json()), Plan.model_validate(plan.model_dump())):
        assert again == plan
        assert again.settings_for("a") == Settings(context_tokens=512, parallel=4)


def test_api_key_comes_from_the_environment() -> None:
    """The plan names a variable; its value reaches the settings and never the plan."""
    plan = a_plan(api_key_env="BOX_KEY")
    key = plan.api_key({"BOX_KEY": "sk-secret"})
    assert key == SecretStr("sk-secret")
    assert plan.settings_for("a", api_key=key).api_key == key
    assert "sk-secret" not in plan.model_dump_json()
    assert a_plan().api_key({}) is None
    with pytest.raises(BadInput, match=r"^api_key_env: the environment variable BOX_KEY is not set; export it first$"):
        plan.api_key({})


def test_unknown_model_lists_the_known() -> None:
    """Asking for a model that is not in the plan names those that are."""
    with pytest.raises(BadInput, match=r"^unknown model 'b': the plan has a$"):
        a_plan().settings_for("b")


MEND_KEY = (
    "a key does not belong in a plan: export it in an environment variable and write "
    'api_key_env = "NAME_OF_THE_VARIABLE" at the top of the plan instead'
)
NAME_ONLY = "must be the NAME of an environment variable in capitals, such as SWITCHYARD_API_KEY"
LIMITS_KEYS = ", ".join(Limits.model_fields)
CANARY_KEYS = ", ".join(CanarySteps.model_fields)


@pytest.mark.parametrize(
    ("added", "line"),
    [
        ("[limits]\nttft_p50_ratio = 0.5", "limits.ttft_p50_ratio (line 14): 0.5 is below 1.0; write 1.0 or more"),
        ("[limits]\ntop1_agreement = 97", "limits.top1_agreement (line 14): 97 is above 1.0; write 1.0 or less"),
        ("[limits]\nmean_kld = 0.0", "limits.mean_kld (line 14): 0.0 is not above 0.0; write more than 0.0"),
        ("[limits]\nmean_kld = nan", "limits.mean_kld (line 14): NaN is not a number"),
        ("[limits]\nttft_p50_ratio = '1'", "limits.ttft_p50_ratio (line 14): '1' is not a number"),
        ("[limits]\nttft = 1.1", "limits.ttft (line 14): unknown key; did you mean 'ttft_p50_ratio'?"),
        ("[limits]\nzzz = 1.1", f"limits.zzz (line 14): unknown key; known: {LIMITS_KEYS}"),
        (
            "[limits]\ntop1_lower_bound = 0.99",
            "limits (line 13): top1_lower_bound 0.99 is above top1_agreement 0.97; lower it",
        ),
        (
            "[limits]\nmean_kld = 0.1",
            "limits (line 13): mean_kld 0.1 is above p99_kld 0.05; a mean lies under its tail",
        ),
        ("[measure]\nmax_tokens = true", "measure.max_tokens (line 14): true is not a whole number"),
        ("[measure]\nmax_tokens = 2.5", "measure.max_tokens (line 14): 2.5 is not a whole number"),
        ("[measure]\nmax_tokens = 1", "measure.max_tokens (line 14): 1 is below 2; write 2 or more"),
        ("[measure]\nlooks = 6", "measure.looks (line 14): 6 is not a list in [brackets]"),
        ("[measure]\nlooks = [2]", "measure.looks[0] (line 14): 2 is below 3; write 3 or more"),
        (
            "[measure]\nlooks = [12, 6]",
            "measure (line 13): looks [12, 6] must rise, each value once; write [6, 12, 24] for instance",
        ),
        (
            "[measure]\nlooks = []",
            f"measure.looks (line 14): is empty: {Measure.model_fields['looks'].description}",
        ),
        (
            "[canary]\nsteps = [0.5, 0.05]",
            "canary (line 13): steps [0.5, 0.05] must rise, each share once; write [0.05, 0.25, 0.5]",
        ),
        ("[canary]\nsteps = [1.0]", "canary.steps[0] (line 14): 1.0 is above 0.99; write 0.99 or less"),
        ("[canary]\nsteps = [0.0]", "canary.steps[0] (line 14): 0.0 is not above 0.0; write more than 0.0"),
        ("[canary]\nsteps = []", f"canary.steps (line 14): is empty: {CanarySteps.model_fields['steps'].description}"),
        ("[canary]\nmin_requests = 0", "canary.min_requests (line 14): 0 is below 1; write 1 or more"),
        ("[canary]\nmax_minutes = 0.0", "canary.max_minutes (line 14): 0.0 is not above 0.0; write more than 0.0"),
        ("[canary]\nshares = 5", f"canary.shares (line 14): unknown key; known: {CANARY_KEYS}"),
        (
            "[measure]\nwarmup_min = 20",
            "measure (line 13): warmup_min 20 is above warmup_max 10; raise warmup_max",
        ),
        (
            "[measure]\nprompt_set = 'shrt'",
            "measure.prompt_set (line 14): unknown 'shrt'; known: short, long; did you mean 'short'?",
        ),
        ("[setings]\nparallel = 2", "setings (line 13): unknown key; did you mean 'settings'?"),
        ("[models.settings]\nctx = 2", "models[0].settings.ctx (line 14): unknown key; did you mean 'context_tokens'?"),
        ("[settings]\nparallel = -1", "settings.parallel (line 14): -1 is below 0; write 0 or more"),
        (
            "[settings]\nkv_type = 'q9'",
            "settings.kv_type (line 14): unknown 'q9'; known: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, f8e4m3",
        ),
        ("[settings]\napi_key = 'sk-secret'", f"settings.api_key (line 14): {MEND_KEY}"),
        ("[settings]\napi_key = 7", f"settings.api_key (line 14): {MEND_KEY}"),
        ("[models.settings]\napi_key = 'sk-secret'", f"models[0].settings.api_key (line 14): {MEND_KEY}"),
        ("[[settings]]\napi_key = 'sk-secret'", "settings (line 13): a list of tables is not a table of keys"),
        ("settings = 3", "models[0].settings (line 13): 3 is not a table of keys"),
        (
            "[client]\nrequires = [{api_key = 'sk-secret'}]",
            "client.requires[0] (line 14): a table is not a text in quotes",
        ),
        (
            "[[models]]\nid = 'small'\ngguf = 'small.gguf'",
            "models (line 10): id 'small' is given twice; give each model an id of its own",
        ),
        ("[[models]]\nid = 'b'", "models[1].gguf (line 13): is missing: the model file; the first one of a split set"),
        (
            "[[models]]\nid = 'a/b'\ngguf = 'small.gguf'",
            f"models[1].id (line 14): 'a/b' does not fit: {ModelPlan.model_fields['id'].description}",
        ),
        (
            "[[models]]\nid = 'b'\ngguf = 'none.gguf'",
            "models[1].gguf (line 15): none.gguf: no such file; relative paths start at the plan's own directory",
        ),
        (
            "transcripts = '.'",
            "models[0].transcripts (line 13): PLAN_DIR: is a directory, not a file; "
            "relative paths start at the plan's own directory",
        ),
        (
            "[limits]\nttft = 1.1\ntpot_p50_ratio = 0.1\n[measure]\nmax_tokens = 0",
            "limits.ttft (line 14): unknown key; did you mean 'ttft_p50_ratio'?",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(write: Write, added: str, line: str) -> None:
    """The line names the file, the key, the line (PLAN ends on 12), what is wrong and what to write."""
    path = write(PLAN + added)
    said = refusal(path)
    assert "sk-secret" not in said
    assert said.replace(str(path.parent), "PLAN_DIR") in (f"plan.toml: {line}", f"plan.toml: {line} (and 2 more)")


def test_several_errors_are_counted(write: Write) -> None:
    """The first is told, the others are counted."""
    path = write(PLAN + "[limits]\nttft_p50_ratio = 0.5\ntpot_p50_ratio = 0.1\n[measure]\nmax_tokens = 0")
    assert refusal(path).endswith("(and 2 more)")


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ('"llama.cpp"', '"lama.cpp"', "incumbent.engine (line 5): unknown engine 'lama.cpp'; "),
        (
            '"llama.cpp"',
            '"exllama"',
            "incumbent.engine (line 5): unknown engine 'exllama'; known: llama.cpp, mistral.rs",
        ),
        ('name = "box"', 'api_key = "sk-secret"', f"api_key (line 2): {MEND_KEY}"),
        ('name = "box"', 'api_key_env = "sk-secret"', f"api_key_env (line 2): {NAME_ONLY}"),
        ('name = "box"', 'name = ""', "name (line 2): is empty: name of the plan in runs and reports"),
        ('name = "box"', "name = 3", "name (line 2): 3 is not a text in quotes"),
        ('[candidate]\nengine = "mistral.rs"', "", "candidate: is missing: the engine that is proposed"),
        (
            'engine = "mistral.rs"',
            'engine = "mistral.rs"\nform = "hosted"\nbinary = "m"',
            'candidate (line 7): form "hosted" runs a Python wheel and takes no binary; remove one of the two',
        ),
        (
            'engine = "mistral.rs"',
            'engine = "mistral.rs"\nbinary = "bin/mistralrs"',
            "candidate.binary (line 9): bin/mistralrs: no such file; relative paths start at the plan's own directory",
        ),
    ],
)
def test_wrong_heads_are_said_in_one_line(write: Write, old: str, new: str, line: str) -> None:
    """Engines, names and keys at the top of the file are refused as clearly as limits; a key is never echoed."""
    assert old in PLAN
    said = refusal(write(PLAN.replace(old, new)))
    assert said.startswith(f"plan.toml: {line}")
    assert "sk-secret" not in said


def test_missing_plan_says_how_to_get_one(tmp_path: Path) -> None:
    """No file: `init` writes one."""
    assert refusal(tmp_path / "plan.toml") == "plan.toml: no such file; `switchyard init` writes a plan"


def test_directory_for_a_plan_is_refused(tmp_path: Path) -> None:
    """A directory is not a plan."""
    (tmp_path / "plan.toml").mkdir()
    assert refusal(tmp_path / "plan.toml") == "plan.toml: cannot be read: Is a directory"


def test_broken_toml_names_the_line(write: Write) -> None:
    """A syntax error carries its line and column."""
    assert refusal(write('name = "box\n')).startswith("plan.toml: not valid TOML: Illegal character")
    assert "at line 1, column 12" in refusal(write('name = "box\n'))


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    """TOML is UTF-8."""
    (tmp_path / "plan.toml").write_bytes(b'name = "\xe9"')
    assert refusal(tmp_path / "plan.toml") == "plan.toml: not UTF-8 text (byte 8); save it as UTF-8"


def test_missing_shard_is_named(write: Write) -> None:
    """A split model needs all of its files."""
    path = write(PLAN.replace("small.gguf", "m-00001-of-00002.gguf"))
    (path.parent / "m-00001-of-00002.gguf").write_bytes(b"GGUF")
    expected = "m-00001-of-00002.gguf: 1 of 2 shards are missing; fetch m-00002-of-00002.gguf"
    assert refusal(path) == f"plan.toml: models[0].gguf (line 12): {expected}"


def test_plan_from_parts_is_refused_in_the_same_words() -> None:
    """A form's values go the same way as a file's."""
    with pytest.raises(BadInput, match=r"^form: models: is empty: every model in use; each gets its own verdict$"):
        build_plan(
            {"incumbent": {"engine": "llama.cpp"}, "candidate": {"engine": "mistral.rs"}, "models": []}, where="form"
        )
    with pytest.raises(BadInput, match=rf"^plan: settings\.api_key: {re.escape(MEND_KEY)}$"):
        a_plan(settings=Settings(api_key=SecretStr("sk-secret")))


def a_plan(**parts: Any) -> Plan:
    """A plan built in Python; no file of it exists."""
    model = ModelPlan(id="a", gguf=Path("/m/a.gguf"))
    given = {
        "incumbent": EngineChoice(engine="llama.cpp"),
        "candidate": EngineChoice(engine="mistral.rs"),
        "models": (model,),
    }
    return build_plan({**given, **parts})


def a_full_plan() -> Plan:
    """Every kind of value, with the characters that a TOML writer gets wrong."""
    odd = 'a "quoted" \\ back\tslash\x7f # no comment \u2028 é 😀'
    models = (
        ModelPlan(id="A.b_c-1", gguf=Path("/m m/ä.gguf"), transcripts=Path("/t.jsonl")),
        ModelPlan(id="b", gguf=Path("/m/b.gguf"), settings=Settings(mlock=False, parallel=1, seed=7, kv_type="q8_0")),
    )
    return a_plan(
        name=odd,
        api_key_env="KEY",
        accepted_unsupported=("mlock", odd),
        incumbent=EngineChoice(engine="llama.cpp", form="binary", binary=Path("/bin/llama-server")),
        settings=Settings(context_tokens=524288, flash_attention=True, chat_template=Path("/t.jinja")),
        models=models,
        measure=Measure(looks=(6,), concurrency=(1, 4), soak_s=0.5),
        limits=Limits(mean_kld=1e-5, leak_bytes_per_day=1e9),
        client=ClientNeeds(requires=("chat.basic",)),
        canary=CanarySteps(steps=(0.01, 0.99), min_requests=1, max_minutes=0.5),
    )


def test_toml_round_trip() -> None:
    """What is written reads back as the same plan, down to what each model overrides."""
    plan = a_full_plan()
    text = plan_to_toml(plan, header_comment="from llama-server\non 8080\x07", unsupported=["mlock: none\nat all", "x"])
    again = Plan.model_validate_json(json.dumps(tomllib.loads(text)), strict=True)
    assert again == plan
    assert [again.settings_for(m.id) for m in again.models] == [plan.settings_for(m.id) for m in plan.models]
    assert again.models[1].settings.model_fields_set == {"mlock", "parallel", "seed", "kv_type"}


def test_toml_explains_every_key() -> None:
    """Every key stands under a comment, what is unsupported above what accepts them."""
    text = plan_to_toml(a_full_plan(), header_comment="mine", unsupported=["mlock: no counterpart"])
    lines = text.splitlines()
    assert lines[0] == "# mine"
    assert "#   - mlock: no counterpart" in lines
    keys = [number for number, line in enumerate(lines) if "=" in line and not line.startswith("#")]
    assert len(keys) > 40
    assert all(lines[number - 1].startswith("#") for number in keys)


def test_example_loads_once_its_models_are_there(tmp_path: Path) -> None:
    """examples/plan.toml is a plan; only the model files are the reader's own."""
    path = tmp_path / "plan.toml"
    path.write_text(EXAMPLE.read_text())
    assert "models[0].gguf (line 31): models/NVIDIA-Nemotron" in refusal(path)
    (tmp_path / "models").mkdir()
    for name in re.findall(r'"(models/.+)"', EXAMPLE.read_text()):
        (tmp_path / name).write_bytes(b"GGUF")
    plan = load_plan(path)
    assert plan.limits == Limits()
    assert plan.settings_for("SmolLM2-135M-Instruct").context_tokens == 8192
    assert plan.settings_for("nemotron-3-nano-30b-a3b").prefill_assistant is False


def _properties(schema: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every property of a JSON schema with its dotted name."""
    parts = {"Plan": schema, **schema["$defs"]}
    return [(f"{part}.{name}", value) for part, body in parts.items() for name, value in body["properties"].items()]


def test_every_field_is_described_and_has_no_real_union() -> None:
    """A description is the comment in a plan and the end of an error; a union would be two errors for one value."""
    for name, value in _properties(Plan.model_json_schema()):
        assert value.get("description"), name
        kinds = [kind for kind in value.get("anyOf", []) if kind != {"type": "null"}]
        assert len(kinds) <= 1, name


def test_at_most_six_primary_metrics() -> None:
    """Each further primary metric costs power: all of them have to pass."""
    assert len([name for name in Limits.model_fields if re.search(r"_p\d+_ratio$", name)]) <= 6


def test_hash_means_content_not_place(tmp_path: Path, write: Write) -> None:
    """A moved plan, another key order and a default written out keep the hash; another model or limit changes it."""
    plan = load_plan(write(PLAN))
    before = content_hash(plan)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / "renamed.gguf").write_bytes(b"GGUF small")
    (moved / "plan.toml").write_text(PLAN.replace("small.gguf", "renamed.gguf") + "[models.settings]\nparallel = 1\n")
    assert content_hash(load_plan(moved / "plan.toml")) == before
    assert content_hash(plan.model_copy(update={"limits": Limits(ttft_p50_ratio=1.05)})) != before
    # how traffic moves changes nothing about what was measured
    assert content_hash(plan.model_copy(update={"canary": CanarySteps(steps=(0.1,))})) == before
    (tmp_path / "small.gguf").write_bytes(b"GGUF smalL")
    assert content_hash(plan) != before


def test_hash_covers_template_and_binary(tmp_path: Path, write: Write) -> None:
    """An edited template or another executable is another plan."""
    for name in ("t.jinja", "engine"):
        (tmp_path / name).write_text("one")
    text = PLAN.replace('"mistral.rs"', '"mistral.rs"\nbinary = "engine"') + "[settings]\nchat_template = 't.jinja'"
    plan = load_plan(write(text))
    seen = {content_hash(plan)}
    for name in ("t.jinja", "engine"):
        (tmp_path / name).write_text("two")
        seen.add(content_hash(plan))
    assert len(seen) == 3


def test_digest_of_a_large_file_sees_size_edges_and_samples(tmp_path: Path) -> None:
    """Another size, header, tail or sampled middle changes the digest, which names itself as sampled."""
    path = tmp_path / "large.gguf"
    size = WHOLE_UP_TO_BYTES + 12_345
    with path.open("wb") as file:
        file.truncate(size)
    seen = {model_digest(path)}
    for offset in (0, size // 2, size - 1):
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(b"\x01" * 65536 if offset == size // 2 else b"\x01")
        seen.add(model_digest(path))
    with path.open("r+b") as file:
        file.truncate(size - 1)
    seen.add(model_digest(path))
    assert len(seen) == 5
    assert {digest.partition(":")[0] for digest in seen} == {"sampled-sha256"}


def test_digest_of_a_split_model_covers_every_shard(tmp_path: Path) -> None:
    """Changing the second shard changes who the model is."""
    first, second = (tmp_path / f"m-0000{n}-of-00002.gguf" for n in (1, 2))
    first.write_bytes(b"GGUF 1")
    second.write_bytes(b"GGUF 2")
    before = model_digest(first)
    second.write_bytes(b"GGUF 3")
    assert model_digest(first) != before


def test_digest_of_an_absent_file_is_bad_input(tmp_path: Path) -> None:
    """The reason is the system's own."""
    with pytest.raises(BadInput, match=r"none\.gguf: cannot be read: No such file or directory$"):
        model_digest(tmp_path / "none.gguf")


def test_a_recorded_plan_of_one_name_can_still_be_read() -> None:
    """A report of an old run is made from its plan; starting anything by it is refused."""
    told = a_plan(candidate=EngineChoice(engine="llama.cpp", name="again", form="hosted")).model_dump(mode="json")
    del told["candidate"]["name"]
    assert recorded_plan(told).candidate.name == "llama.cpp"
    with pytest.raises(BadInput, match=r"both called llama\.cpp"):
        build_plan(told)


def test_an_engine_beside_itself_needs_no_second_name() -> None:
    """Plans had it before engines had names; one that is given twice is a mistake all the same."""
    told = a_plan().model_dump(mode="json")
    told["candidate"] = told["incumbent"]
    assert build_plan(told).candidate.name == told["incumbent"]["engine"]
    told["candidate"] = told["incumbent"] = {**told["incumbent"], "name": "twice"}
    with pytest.raises(BadInput, match="both called twice"):
        build_plan(told)


def test_both_hashes_of_a_plan_stay_what_they_were(tmp_path: Path, write: Write) -> None:
    """Stored verdicts are found by them: a plan that uses no new key keeps both."""
    plan = load_plan(write(PLAN))
    assert content_hash(plan) == "dd8ec0fd79f46323362212d5610e7070a7f8b8ce3fe08e6802c6b2b0cc666c11"
    stored = plan.model_dump(mode="json")
    for model in stored["models"]:
        model["gguf"] = "/m.gguf"
    assert payload.plan_hash(stored) == "03933499f8519d2d6f02e5827f06be2e1d5b032730c7e969b8f019792c8432d5"


OLD = """accepted_losses = ["mlock"]
{plan}
[sampling]
max_void_blocks = 3
[limits]
top1_lower = 0.9
"""
NEW = OLD.replace("accepted_losses", "accepted_unsupported").replace("sampling", "measure")
NEW = NEW.replace("max_void_blocks", "max_discarded_blocks").replace("top1_lower", "top1_lower_bound")


def test_both_names_of_a_renamed_key_are_refused(write: Write) -> None:
    path = write(PLAN + "\n[measure]\nsoak_s = 60\n\n[sampling]\nsoak_s = 30\n")
    with pytest.raises(BadInput, match=r"sampling \(line 17\): is the old name of 'measure', which is given as well"):
        load_plan(path)


def test_renamed_keys_are_read_under_their_old_names(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    """One line says so, however often the plan is read; the hashes are those of the old names."""
    old, new = write(OLD.format(plan=PLAN), "old.toml"), write(NEW.format(plan=PLAN), "new.toml")
    plan = load_plan(old)
    assert (load_plan(old), load_plan(new)) == (plan, plan)
    assert (plan.accepted_unsupported, plan.measure.max_discarded_blocks, plan.limits.top1_lower_bound) == (
        ("mlock",),
        3,
        0.9,
    )
    assert [record.message for record in caplog.records] == [
        f"{old}: sampling is now measure, accepted_losses is now accepted_unsupported, max_void_blocks is now "
        "max_discarded_blocks, top1_lower is now top1_lower_bound; the old name is still read"
    ]
    told = json.loads(plan.model_dump_json())
    assert set(payload.RENAMED_KEYS[""]) < set(told)
    assert payload.plan_hash(told) == payload.plan_hash(payload.with_old_keys(told))
    assert build_plan(payload.with_old_keys(told)) == plan == recorded_plan(payload.with_old_keys(told))
