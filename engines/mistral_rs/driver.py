"""mistral.rs: the `mistralrs` binary (0.7 to 0.9), or the `mistralrs` wheel behind our own OpenAI server."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from engines.driver import (
    Form,
    Installation,
    Installer,
    another_program,
    executable,
    first_executable,
    flags_of,
    got_for_this_user,
    help_flags,
    native_of,
    probe,
    scrubbed,
)
from engines.errors import EngineNotFound
from engines.mistral_rs import memory, support
from engines.mistral_rs.dialect import BinaryDialect, HostDialect, OldBinaryDialect
from engines.mistral_rs.flags import OWN_ARGS
from engines.model.loads import parse_version
from engines.openai.dialect import Dialect
from engines.openai.paths import CHAT, COUNTS_TOKENS, Paths
from engines.openai.public import Public
from engines.settings import EngineArgs, Serve, Settings

PLACES = (
    "~/.local/bin/mistralrs",
    "~/.mistralrs/mistralrs",
    "~/.cargo/bin/mistralrs",
    "/usr/local/bin/mistralrs",
)
HOST_MODULE = "engines.mistral_rs.host"
WORKER_MODULE = "engines.mistral_rs.native.worker"
PINNED = "0.9.2"
LN_LOGPROBS = (0, 9, 1)  # before it log-probabilities have base 10, of raw logits at temperature 0 (pull request 2327)
MOVING = re.compile(
    r"^mistralrs_(?:tokens_processed_total|sequences_completed_total)(?:{[^}]*})? ([0-9.e+]+)$", re.MULTILINE
)

BINARY_PATHS = Paths(generates=frozenset({CHAT, "/v1/completions", "/v1/embeddings"}))
HOST_PATHS = Paths(generates=BINARY_PATHS.generates, reads=frozenset({COUNTS_TOKENS, "/tokenize", "/detokenize"}))


class MistralRs:
    name = "mistral.rs"
    installer = Installer(
        pip=("mistralrs==0.9.5",),
        crate="mistralrs-cli==0.8.1",  # the last one there: later ones need a candle that is on git alone
        crate_program="mistralrs",
        script_url=f"https://raw.githubusercontent.com/EricLBuehler/mistral.rs/v{PINNED}/install.sh",
        script_version=PINNED,
        script_env={
            "MISTRALRS_INSTALL_TAG": f"v{PINNED}",
            "MISTRALRS_INSTALL_YES": "1",
            # yes to everything would otherwise install FFmpeg with sudo and the system's package manager
            "MISTRALRS_INSTALL_IGNORE_FFMPEG": "1",
        },
    )
    places: tuple[str, ...] = PLACES
    wheel = "mistralrs"
    progress_path = "/metrics"
    sees_prompt_progress = False  # prompt tokens are counted once the whole prompt is read
    # no prefix cache (hosted), or one of 16 entries of which the probe takes the same each time
    probe_is_neutral = True
    own_args = OWN_ARGS
    loads = staticmethod(support.loads)
    memory_parts = staticmethod(memory.memory_parts)
    memory_notes = staticmethod(memory.memory_notes)

    def find(self, form: Form = "auto", binary: Path | None = None) -> Installation:
        """The configured binary, else PATH and the installer's places, the hosted wheel, the one built from crates.io.

        That one comes last: crates.io ends at a version that is older than every wheel.
        """
        if binary is not None:
            return _binary_installation(executable(binary, "a mistralrs"))
        cargo = os.environ.get("CARGO_HOME")
        places: list[str | Path] = [*self.places, *([Path(cargo) / "bin" / "mistralrs"] if cargo else [])]
        if form != "hosted" and (found := first_executable("mistralrs", places)):
            return _binary_installation(found)
        if form != "binary" and importlib.util.find_spec(self.wheel):
            return _wheel_installation(self.name, "hosted", HOST_MODULE)
        if form != "hosted" and (found := first_executable("mistralrs", got_for_this_user("mistralrs"))):
            return _binary_installation(found)
        raise EngineNotFound(
            "mistral.rs was not found: no mistralrs on PATH or in common places, no mistralrs wheel; "
            "install it with `switchyard install mistral.rs`, or set `binary` in the plan",
            engine=self.name,
        )

    def argv(self, installation: Installation, serve: Serve) -> list[str]:
        """Flags of `mistralrs serve`, or of our host around the wheel."""
        build = _binary_argv if installation.form == "binary" else _hosted_argv
        return [*installation.program, *build(installation, serve), *self.own_args.words(serve.own.args)]

    def environment(self, installation: Installation, serve: Serve, base: Mapping[str, str]) -> dict[str, str]:
        """Without stray MISTRALRS_*, RAYON_*, CANDLE_* and RUST_*; offline; threads and key where they belong."""
        # with RUST_BACKTRACE the reason of an end is buried under the frames, and clients are sent them
        env = scrubbed(base, ("MISTRALRS_", "RAYON_", "CANDLE_", "RUST_", "SWITCHYARD_ENGINE_API_KEY"))
        env["HF_HUB_OFFLINE"] = "1"
        if serve.settings.threads is not None:
            # mistral.rs has no thread flag; both pools read the environment
            env["RAYON_NUM_THREADS"] = env["CANDLE_NUM_THREADS"] = str(serve.settings.threads)
        if installation.form != "binary" and serve.settings.api_key is not None:
            env["SWITCHYARD_ENGINE_API_KEY"] = serve.settings.api_key.get_secret_value()
        return {**env, **serve.own.env}

    def clashes(self, settings: Settings, own: EngineArgs) -> list[str]:
        return []

    def unsupported(self, installation: Installation, serve: Serve) -> list[str]:
        """Settings mistral.rs cannot honour (flags read at 0.9.2, wheel seen at 0.9.5)."""
        if installation.form == "binary":
            return _unsupported(serve.settings) + _unsupported_by_binary(installation, serve.settings)
        return _unsupported(serve.settings) + _unsupported_by_wheel(serve.settings)

    def cache_budget(self, settings: Settings) -> str:
        """None for the hosted wheel, whose prefix cache is off; the binary's default is 16 sequences of any size."""
        return "none (hosted wheel) or 16 sequences of any size (binary)"

    def progress(self, answer: bytes) -> tuple[int, ...]:
        """Tokens processed and generations ended, from `/metrics` (the binary has it since 0.8.11)."""
        return tuple(int(float(value)) for value in MOVING.findall(answer.decode("utf-8", "replace")))

    def served_name(self, installation: Installation, model_id: str) -> str:
        """The binary answers to its own id or `default` only."""
        return "default" if installation.form == "binary" else model_id

    def paths(self, installation: Installation, own: EngineArgs) -> Paths:
        return BINARY_PATHS if installation.form == "binary" else HOST_PATHS

    def public(self, own: EngineArgs) -> Public:
        return Public()

    def dialect(self, installation: Installation) -> type[Dialect]:
        """Our host's, which is close to llama.cpp's, or the binary's own."""
        if installation.form != "binary":
            return HostDialect
        return BinaryDialect if _has_logprobs(installation) else OldBinaryDialect

    def neutral_body(self) -> dict[str, object]:
        """Nothing: its prefix cache matches whole prefixes only, so unique prompt openings are enough."""
        return {}


class MistralRsNative(MistralRs):
    """Driver for the same wheel without a server: a worker process that the yard talks to in frames."""

    name = native_of(MistralRs.name)

    def find(self, form: Form = "auto", binary: Path | None = None) -> Installation:
        """The wheel; where it is and which form the plan names for the server makes no difference."""
        if not importlib.util.find_spec(self.wheel):
            raise EngineNotFound(
                "native mistral.rs needs the mistralrs wheel: install it with `switchyard install mistral.rs`",
                engine=self.name,
            )
        return _wheel_installation(self.name, "native", WORKER_MODULE)


def _hosted_argv(installation: Installation, serve: Serve) -> list[str]:
    settings = serve.settings
    argv = ["--gguf", str(serve.gguf), "--model-id", serve.model_id, "--host", serve.host, "--port", str(serve.port)]
    argv += flags_of(
        ("--context", settings.context_tokens),
        ("--parallel", settings.parallel or None),
        ("--threads", settings.threads),
        ("--seed", settings.seed),
        ("--tokenizer-json", settings.tokenizer_json),
        ("--chat-template", settings.chat_template),
    )
    if settings.gpu_layers == 0:
        argv.append("--cpu")
    # the wheel never evicts: SmolLM2 135M grew by 11.3 MiB with every distinct prompt, at any setting above 0 (0.9.5)
    return [*argv, "--prefix-cache", "0"]


def _binary_argv(installation: Installation, serve: Serve) -> list[str]:
    # every flag here is valid at all tags 0.7.0 to 0.9.2, or asked of --help first
    settings = serve.settings
    argv = ["serve", "--host", serve.host, "-p", str(serve.port), "--format", "gguf"]
    argv += ["-m", str(serve.gguf.parent), "-f", serve.gguf.name]
    argv += flags_of(("--max-seqs", settings.parallel or None))
    if settings.gpu_layers == 0:
        argv.append("--cpu")
    elif settings.gpu_layers is not None:
        argv += ["-n", f"0:{settings.gpu_layers}"]
    if settings.context_tokens is not None and settings.gpu_layers != 0 and installation.knows("--pa-context-len"):
        argv += ["--pa-context-len", str(settings.context_tokens)]
    if settings.kv_type == "f8e4m3" and _pages_in_f8(installation, settings):
        argv += ["--pa-cache-type", "f8e4m3"]
    if settings.batch_tokens is not None and installation.knows("--max-num-batched-tokens"):
        argv += ["--max-num-batched-tokens", str(settings.batch_tokens)]
    argv += flags_of(("--seed", settings.seed), ("-t", settings.tokenizer_json), ("-j", settings.chat_template))
    if _has_tokenizer_folder(installation, settings) and settings.tokenizer_json is not None:
        argv += ["--tok-model-id", str(settings.tokenizer_json.parent)]  # 0.8.1 has `-t`, and no use for it with a GGUF
    if installation.knows("--token-source"):
        argv += ["--token-source", "none"]  # else it reads the user's own Hugging Face token
    if installation.knows("--no-ui"):
        argv.append("--no-ui")  # on by default since 0.8.2
    return argv


def _has_logprobs(installation: Installation) -> bool:
    """False for a build whose log-probabilities have base 10 and are raw logits at temperature 0."""
    version = parse_version(installation.version)
    return version is None or version >= LN_LOGPROBS


def _has_tokenizer_folder(installation: Installation, settings: Settings) -> bool:
    """True where the tokenizer is given as the folder of a file that has the usual name."""
    named = settings.tokenizer_json is not None and settings.tokenizer_json.name == "tokenizer.json"
    return named and installation.knows("--tok-model-id")


def _pages_in_f8(installation: Installation, settings: Settings) -> bool:
    """True where the KV cache can be f8e4m3: paged attention only, which needs a GPU."""
    return installation.knows("--pa-cache-type") and settings.gpu_layers != 0


def _unsupported(settings: Settings) -> list[str]:
    found = ["seed: a request's own seed is ignored; only the engine's seed counts"]
    if settings.flash_attention is not None:
        found.append("flash_attention: decided when mistral.rs is built, not by a flag; no effect for GGUF models")
    if settings.ubatch_tokens is not None:
        found.append("ubatch_tokens: mistral.rs has no physical batch size")
    if settings.mlock:
        found.append("mlock: mistral.rs loads a private copy and cannot pin it; use a memory cgroup or ulimit instead")
    if settings.cache_reuse_tokens:
        found.append("cache_reuse_tokens: its prefix cache matches whole prefixes only; nothing is shifted")
    if settings.host_cache_mib is not None:
        found.append("host_cache_mib: its prefix cache is counted in sequences (16), not in bytes")
    if settings.kv_type not in (None, "f16", "f8e4m3"):
        found.append(f"kv_type: no {settings.kv_type} KV cache; f16 is used")
    if settings.prefill_assistant:
        found.append("prefill_assistant: a trailing assistant message is history, it is not continued")
    if not settings.jinja:
        found.append("jinja: the model's Jinja template is always used")
    return found


def _unsupported_by_wheel(settings: Settings) -> list[str]:
    found = ["prefix cache: off; the wheel's own keeps every prompt for ever (0.9.5), so each turn is prefilled anew"]
    if settings.batch_tokens is not None:
        found.append("batch_tokens: the wheel has no prefill batch setting")
    if settings.kv_type == "f8e4m3":
        found.append("kv_type: the wheel on a CPU has no f8e4m3 KV cache; f16 is used")
    if settings.seed is not None:
        found.append("seed: on a CPU the wheel's sampler starts from a constant; the engine's seed is not used")
    if settings.sequences > 1:
        found.append("parallel: on a CPU the wheel takes one sequence at a time; further requests queue")
    if settings.gpu_layers:
        found.append("gpu_layers: the wheel from PyPI is a CPU build on Linux; nothing goes to the GPU")
    return found


def _unsupported_by_binary(installation: Installation, settings: Settings) -> list[str]:
    found = []
    if settings.api_key is not None:
        found.append("api_key: mistralrs checks no key; keep it on loopback behind something that does")
    if settings.batch_tokens is not None and not installation.knows("--max-num-batched-tokens"):
        found.append("batch_tokens: this build has no --max-num-batched-tokens")
    if settings.context_tokens is not None and (settings.gpu_layers == 0 or not installation.knows("--pa-context-len")):
        found.append(
            "context_tokens: without paged attention the context is the model's own; keep prompts short yourself"
        )
    if settings.kv_type == "f8e4m3" and not _pages_in_f8(installation, settings):
        found.append("kv_type: an f8e4m3 KV cache needs paged attention, which needs a GPU; f16 is used")
    if not _has_logprobs(installation):
        if settings.tokenizer_json is not None and not _has_tokenizer_folder(installation, settings):
            found.append("tokenizer_json: this build reads one beside a GGUF only if its name is tokenizer.json")
        found.append("logprobs: at temperature 0 of the chosen token alone; this build has no others' there")
    found.append("served name: mistralrs answers to its own id or 'default' only")
    return found


def _binary_installation(binary: Path) -> Installation:
    version_text = probe([str(binary)], "--version")
    version = re.search(r"^mistralrs\S* v?(\d+\.\d+\.\d+)", version_text or "", re.MULTILINE)
    if version_text and version is None:
        raise another_program(binary, "a mistralrs", version_text)
    if version is None:
        raise EngineNotFound(f"{binary} does not report its version: try `{binary} --version`", engine="mistral.rs")
    flags = help_flags(probe([str(binary)], "serve", "--help") or "")
    if not flags:
        raise EngineNotFound(
            f"{binary} {version.group(1)} has no `serve` command: Switchyard knows mistralrs 0.7 and later",
            engine="mistral.rs",
        )
    return Installation("mistral.rs", "binary", (str(binary),), version.group(1), flags, where=str(binary))


def _wheel_installation(engine: str, form: Literal["hosted", "native"], module: str) -> Installation:
    version = importlib.metadata.version("mistralrs")
    return Installation(engine, form, (sys.executable, "-m", module), version, where="wheel mistralrs")
