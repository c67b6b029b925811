"""`args` and `env` of a plan: read, refused, hashed, passed on, and what of them the candidate gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from engines.driver import Installation
from engines.errors import BadInput
from engines.openai.call import Call
from engines.registry import driver
from engines.settings import EngineArgs
from engines.yard.engine.launch_spec import LaunchSpec
from migrations.carried import no_chat, request_defaults, unsupported
from migrations.plan import Plan, content_hash
from migrations.plan_file import load_plan, plan_to_toml
from tasks.records.payload import plan_hash

HOSTED = Installation("mistral.rs", "hosted", ("python",), "0.9.5")
BINARY = Installation("mistral.rs", "binary", ("mistralrs",), "0.9.2")
LLAMA = Installation("llama.cpp", "binary", ("llama-server",), "b10434", frozenset({"--no-jinja"}))

Load = Callable[..., Plan]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads a plan with the lines given for each table, beside the files that it may name."""
    for name in ("small.gguf", "big.gguf", "projector.gguf", "a.gguf"):
        (tmp_path / name).write_bytes(b"GGUF " + name.encode())

    def load(incumbent: str = "", candidate: str = "", model: str = "") -> Plan:
        path = tmp_path / "plan.toml"
        path.write_text(
            f'[incumbent]\nengine = "llama.cpp"\n{incumbent}\n[candidate]\nengine = "mistral.rs"\n{candidate}\n'
            f'[[models]]\nid = "small"\ngguf = "small.gguf"\n{model}\n'
            '[[models]]\nid = "big"\ngguf = "big.gguf"\n'
        )
        return load_plan(path)

    return load


def test_they_reach_the_engine_as_they_stand(load: Load, tmp_path: Path) -> None:
    """Files start at the plan's directory; a model of its own flags gets those alone; the candidate none of them."""
    plan = load(
        'args = ["--mmproj", "projector.gguf", "--temp=0.6", "-ot", "exps=CPU"]\nenv = {GGML_X = "1"}',
        model='[models.engines."llama.cpp"]\nargs = ["--lora", "a.gguf"]',
    )
    llama = driver("llama.cpp")
    big, small = plan.serve("big", "llama.cpp"), plan.serve("small", "llama.cpp")
    assert llama.argv(LLAMA, big)[-6:] == ["--mmproj", f"{tmp_path}/projector.gguf", "--temp", "0.6", "-ot", "exps=CPU"]
    assert llama.argv(LLAMA, small)[-3:] == ["--metrics", "--lora", f"{tmp_path}/a.gguf"]
    assert llama.environment(LLAMA, big, {"GGML_Y": "2", "LLAMA_ARG_PORT": "1"}) == {"GGML_X": "1"}
    devices = {"CUDA_VISIBLE_DEVICES": "1", "OMP_NUM_THREADS": "2", "HSA_X": "3"}
    for engine, found in (("llama.cpp", LLAMA), ("mistral.rs", HOSTED)):
        env = driver(engine).environment(
            found, plan.serve("small", engine), devices | {"LD_LIBRARY_PATH": "/l", "PATH": "/p"}
        )
        assert devices.keys().isdisjoint(env)
        assert (env["LD_LIBRARY_PATH"], env["PATH"]) == ("/l", "/p")
    assert plan.serve("big", "mistral.rs").own == EngineArgs()


def test_they_are_written_back_as_they_were_read(load: Load, tmp_path: Path) -> None:
    """A list with a line for each flag, tables of variables, and the same plan once it is read again."""
    flags = [word for number in range(20) for word in (f"--spec-ngram-map-k-size-{'nm'[number % 2]}", str(number))]
    plan = load(
        f'args = {json.dumps(flags)}\n[incumbent.env]\nGGML_X = "a b"\nCUDA_VISIBLE_DEVICES = ""',
        model='[models.engines."llama.cpp"]\nargs = ["-n", "-1"]\nenv = {OMP_NUM_THREADS = "2"}',
    )
    text = plan_to_toml(plan)
    assert '\n    "--spec-ngram-map-k-size-m", "1",\n' in text
    (tmp_path / "again.toml").write_text(text)
    assert load_plan(tmp_path / "again.toml") == plan


def test_a_plan_without_them_keeps_both_its_hashes(load: Load) -> None:
    """The keys are left out where they are unused; the same flag in another place is another plan."""
    plain, dumped = load(), load().model_dump(mode="json")
    assert not {"args", "env"} & set(dumped["incumbent"])
    assert "engines" not in dumped["models"][0]
    empty = load("args = []", "env = {}", '[models.engines."llama.cpp"]')
    assert content_hash(empty) != content_hash(load("", "", '[models.engines."llama.cpp"]\nargs = ["--swa-full"]'))
    assert (content_hash(load("args = []", "env = {}")), plan_hash(load("args = []"))) == (
        content_hash(plain),
        plan_hash(plain),
    )
    assert content_hash(load('args = ["--swa-full"]')) != content_hash(plain)


def test_the_content_of_a_file_counts_and_not_its_name(load: Load, tmp_path: Path) -> None:
    plan = load('args = ["--mmproj", "projector.gguf"]')
    before = content_hash(plan)
    (tmp_path / "projector.gguf").rename(tmp_path / "moved.gguf")
    assert content_hash(load('args = ["--mmproj", "moved.gguf"]')) == before
    (tmp_path / "moved.gguf").write_bytes(b"another one")
    assert content_hash(load('args = ["--mmproj", "moved.gguf"]')) != before


@pytest.mark.parametrize(
    ("incumbent", "candidate", "model", "line"),
    [
        ('args = ["--port", "1"]', "", "", "incumbent.args: --port is said by `yard.port` in a plan; remove it here"),
        ('env = {LLAMA_ARG_HOST = "::"}', "", "", "incumbent.env: LLAMA_ARG_HOST is said by `yard.host` in a plan"),
        ('env = {HOME = "/x"}', "", "", "incumbent.env: HOME is no variable of this engine"),
        (
            'args = ["--tools", "all"]',
            "",
            "",
            "incumbent.args: --tools is not passed on: it lets the model or a web page",
        ),
        ('args = ["--temp"]', "", "", "incumbent.args: --temp: its value is missing"),
        ('args = ["--mmproj", "gone.gguf"]', "", "", "incumbent.args (line 3): "),
        ('args = "--temp 1"', "", "", "incumbent.args (line 3): '--temp 1' is not a list in [brackets]"),
        ("args = [1]", "", "", "incumbent.args[0] (line 3): 1 is not a text in quotes"),
        ("env = {OMP_NUM_THREADS = 1}", "", "", "incumbent.env.OMP_NUM_THREADS (line 3): 1 is not a text in quotes"),
        ("", 'args = ["--agent"]', "", "candidate.args: --agent is not passed on: it lets the model act"),
        ("", "", "[models.engines.vllm]\nargs = []", "models.engines.vllm: no engine of this plan"),
        ("", "", '[models.engines."llama.cpp"]\nargs = ["-c", "1"]', "models.engines.llama.cpp.args: -c is said by"),
    ],
)
def test_what_may_not_be_passed_on_is_one_line(
    load: Load, incumbent: str, candidate: str, model: str, line: str
) -> None:
    with pytest.raises(BadInput) as caught:
        load(incumbent, candidate, model)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sampling_defaults_become_defaults_of_requests(load: Load) -> None:
    """In the engine's own words; those that it does not act on are named, and what the candidate is given is not."""
    plan = load(
        'args = ["--temp", "0.6", "--repeat-penalty", "1.1", "--mirostat", "2", "--chat-template-kwargs", '
        '\'{"enable_thinking": false}\', "--mmproj", "projector.gguf", "--prio", "2"]\n'
        'env = {LLAMA_ARG_TOP_K = "7"}'
    )
    fields = {"top_k": 7, "temperature": 0.6, "chat_template_kwargs": {"enable_thinking": False}}
    assert request_defaults(plan, "small", HOSTED) == fields | {"repeat_penalty": 1.1}
    assert request_defaults(plan, "small", BINARY) == fields | {"repetition_penalty": 1.1}
    assert request_defaults(plan, "small", LLAMA) == {}
    named = [line.partition(":")[0] for line in unsupported(plan, "small", HOSTED) if line.startswith("args")]
    assert named == ["args --mirostat", "args --mmproj"]
    assert not [line for line in unsupported(plan, "small", LLAMA) if line.startswith("args")]


@pytest.mark.parametrize(
    ("incumbent", "what"),
    [
        ('args = ["--embedding"]', "--embedding: an embedding server answers /v1/embeddings and no chat"),
        ('args = ["--reranking", "--embeddings"]', "--rerank: a reranking server answers /v1/rerank and no chat"),
        ('env = {LLAMA_ARG_EMBEDDINGS = "1"}', "--embedding: an embedding server"),
        ('args = ["--pooling", "mean"]', None),
    ],
)
def test_a_server_without_chat_is_said_to_be_one(load: Load, incumbent: str, what: str | None) -> None:
    found = no_chat(load(incumbent), "small")
    assert found is None if what is None else (found or "").startswith(what)
    other = load(incumbent, model='[models.engines."llama.cpp"]\nargs = []')
    assert no_chat(other, "small") is None


def test_a_request_keeps_what_it_sets() -> None:
    """Null is not set, as llama.cpp has it."""
    call = Call("/v1/chat/completions", b"", {"temperature": 0, "top_k": None, "stream": True})
    changed = call.with_defaults({"temperature": 0.6, "top_k": 7})
    assert changed.body == {"temperature": 0, "top_k": 7, "stream": True} == json.loads(changed.raw)


def test_a_stored_spec_without_them_is_what_an_older_version_wrote() -> None:
    spec = LaunchSpec.of(LLAMA, "m", Path("/m.gguf"), Plan.model_fields["settings"].default)
    assert not {"own", "request_defaults"} & set(spec.model_dump(mode="json"))
    own = EngineArgs(args=("--temp", "1"), env={"GGML_X": "1"})
    passed_on = spec.model_copy(update={"own": own, "request_defaults": {"top_k": 7}})
    assert LaunchSpec.model_validate_json(passed_on.model_dump_json()) == passed_on
    assert passed_on.serve(1, None).own == own


@pytest.mark.parametrize(
    "model",
    [
        '[models.settings]\nflash_attention = false\nkv_type = "q4_0"',
        '[models.engines."llama.cpp"]\nargs = ["-ctv", "q8_0"]\n[models.settings]\nflash_attention = false',
    ],
)
def test_what_the_engine_refuses_together_is_refused_before_a_launch(load: Load, model: str) -> None:
    """llama-server b10434 ends with `quantized V cache requires flash_attn`; K alone may be quantised."""
    with pytest.raises(BadInput, match=r"would refuse to start: a V cache of q\d_0 needs flash attention"):
        load(model=model)
    load(model='[models.engines."llama.cpp"]\nargs = ["-ctk", "q8_0"]\n[models.settings]\nflash_attention = false')
