"""Options of llama-server as data: every one of them is a setting, passed on, or named; none gets lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines.driver import Installation
from engines.llama_cpp.argv import BESIDE, KV_TYPES, OURS, SWITCHES, TAKES, read_flags
from engines.llama_cpp.driver import LlamaCpp
from engines.llama_cpp.flags import ELSEWHERE, FILES, NEVER, OPTIONS, OWN_ARGS, ROUTING
from engines.own_args import Flag, Option
from engines.settings import EngineArgs, Serve

FOUND = Installation(
    "llama.cpp", "binary", ("llama-server",), "b10434", frozenset({"--load-mode", "--offline", "--no-jinja"})
)
# values that an option takes, where any text would not do
VALUES = {
    "--host": st.sampled_from(["127.0.0.1", "0.0.0.0", "localhost"]),
    "--flash-attn": st.sampled_from(["on", "off", "auto"]),
    "--load-mode": st.sampled_from(["auto", "none", "mmap", "mlock", "mmap+mlock", "dio"]),
    "--cache-type-k": st.sampled_from(["f16", "q8_0", "iq4_nl"]),
    "--cache-type-v": st.sampled_from(["f16", "q8_0", "iq4_nl"]),
    "--gpu-layers": st.sampled_from(["auto", "all", "0", "99"]),
    "--model": st.just("/m/m.gguf"),
    "--alias": st.sampled_from(["one", "a/b", "one,two"]),
}
NUMBERS = ("--port", "--ctx-size", "--parallel", "--threads", "--batch-size", "--ubatch-size", "--cache-reuse")
NUMBERS += ("--cache-ram", "--seed")
ALL = sorted({*OPTIONS.values()})
OF_ONE_MODEL = [option for option in ALL if option.name not in ROUTING]
ANY = st.from_regex(r"[A-Za-z0-9_./:=,+\\\[{\"(|*-][ A-Za-z0-9_./:=,+\\\]}\")|*-]{0,12}", fullmatch=True)


@st.composite
def flags(draw: st.DrawFn) -> Flag:
    option = draw(st.sampled_from(OF_ONE_MODEL))
    name = draw(st.sampled_from((*option.names, *option.negations)))
    value = st.integers(1, 60000).map(str) if option.name in NUMBERS else VALUES.get(option.name, ANY)
    n_values = 0 if name in option.negations else len(option.value.split())
    return Flag(name, tuple(draw(value) for _ in range(n_values)), option)


@settings(suppress_health_check=[HealthCheck.too_slow])  # the first draw reads the character tables
@given(st.lists(flags(), max_size=12))
def test_no_flag_gets_lost(given_flags: list[Flag]) -> None:
    """Each is a setting of the plan, is passed on with its value, or is named in a note."""
    command = read_flags([word for flag in given_flags for word in (flag.name, *flag.values)])
    passed = [(flag.key, flag.values) for flag in OWN_ARGS.split(command.own.args)]
    for flag in given_flags:
        taken = flag.key in TAKES or flag.key in SWITCHES or flag.key in OURS
        taken = taken or (flag.key in KV_TYPES and "kv_type" in command.values)
        noted = any(note.startswith(f"{flag.name}") for note in command.notes)
        kind = FILES.get(flag.key)
        assert taken or noted or kind or (flag.key, flag.values) in passed, flag
        assert not kind or flag.key in [key for key, _ in passed]


@given(st.lists(flags(), max_size=12))
def test_a_command_read_from_its_own_argv_is_the_same(given_flags: list[Flag]) -> None:
    """What the plan makes of a command starts a server with the same settings: read again, nothing differs."""
    words = ["--model", "/m/m.gguf", *(word for flag in given_flags for word in (flag.name, *flag.values))]
    command = read_flags(words, cwd=Path("/w"))
    serve = Serve(
        model_id=command.model_id,
        gguf=command.gguf or Path("/m/m.gguf"),
        port=command.port,
        host="127.0.0.1",
        settings=command.settings,
        own=command.own,
    )
    again = read_flags(LlamaCpp().argv(FOUND, serve)[1:], cwd=Path("/w"))
    assert (again.settings, again.own, again.gguf) == (command.settings, command.own, command.gguf)


@given(st.lists(flags(), max_size=12))
def test_what_was_read_may_stand_in_a_plan(given_flags: list[Flag]) -> None:
    command = read_flags([word for flag in given_flags for word in (flag.name, *flag.values)])
    set_here = {name for name, value in command.settings if value not in (None, False)}
    assert OWN_ARGS.problems(command.own, set_here) == []


def test_tables_name_options_that_there_are() -> None:
    for table in (ELSEWHERE, NEVER, BESIDE, FILES, TAKES, SWITCHES):
        for name in table:
            assert Flag(name, (), OPTIONS[name]).key == name


@pytest.mark.parametrize("option", ALL, ids=lambda option: option.name)
def test_variables_are_read_like_their_flags(option: Option) -> None:
    if option.variable:
        flag = OWN_ARGS.flag_of(option.variable, "7" if option.value else "1")
        assert flag is not None
        assert flag.key == option.name


@pytest.mark.parametrize(
    ("args", "env", "problem"),
    [
        ("--port 1", {}, "args: --port is said by `yard.port` in a plan; remove it here"),
        ("--api_key x", {}, "args: --api-key is said by `api_key_env` in a plan; remove it here"),
        ("-np=2", {}, "args: -np is said by `settings.parallel` in a plan; remove it here"),
        ("--no-jinja", {}, "args: --no-jinja is said by `settings.jinja` in a plan; remove it here"),
        (
            "",
            {"LLAMA_ARG_NO_JINJA": "1"},
            "env: LLAMA_ARG_NO_JINJA is said by `settings.jinja` in a plan; remove it here",
        ),
        ("", {"LLAMA_ARG_PORT": "1"}, "env: LLAMA_ARG_PORT is said by `yard.port` in a plan; remove it here"),
        ("", {"LLAMA_API_KEY": "k"}, "env: LLAMA_API_KEY is said by `api_key_env` in a plan; remove it here"),
        ("", {"GGML_TOKEN": "k"}, "env: GGML_TOKEN is named like a secret, and a plan holds none; remove it"),
        (
            "",
            {"PATH": "/x"},
            "env: PATH is no variable of this engine or of a compute library; export it where the yard is started",
        ),
        ("stray", {}, "args: 'stray' is no flag, and no flag before it takes a value; remove it"),
        ("--ctk q8_0 -ctk q8_0", {}, "args: -ctk contradicts `settings.kv_type`; remove one of the two"),
    ],
)
def test_what_may_not_stand_in_a_plan(args: str, env: dict[str, str], problem: str) -> None:
    assert OWN_ARGS.problems(EngineArgs(args=tuple(args.split()), env=env), {"kv_type"}) == [problem]


@pytest.mark.parametrize("name", sorted(NEVER))
def test_what_is_never_passed_on_is_named_with_its_reason(name: str) -> None:
    values = ["x"] * len(OPTIONS[name].value.split()) if name in OPTIONS[name].names else []
    [problem] = OWN_ARGS.problems(EngineArgs(args=(name, *values)), set())
    assert problem == f"args: {name} is not passed on: {NEVER[name]}; remove it"
