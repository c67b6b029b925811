"""Ollama as an engine that Switchyard starts: on a port of its own, with a store of models of our own.

The user's own daemon and store are left alone. From 0.30 on Ollama starts a `llama-server` for each model that it has
loaded, before that a runner of its own; either is its child.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from engines.driver import (
    Form,
    Installation,
    Installer,
    another_program,
    executable,
    first_executable,
    flags_of,
    got_for_this_user,
    probe,
    scrubbed,
)
from engines.errors import EngineNotFound
from engines.home import home
from engines.llama_cpp import memory, support
from engines.model.header import Header
from engines.model.loads import Loads, parse_version
from engines.model.memory import MIB, MemoryCase, Part
from engines.ollama.dialect import OllamaDialect
from engines.ollama.flags import OWN_ARGS
from engines.openai.dialect import Dialect
from engines.openai.paths import CHAT, Paths
from engines.openai.public import Public
from engines.settings import EngineArgs, Serve, Settings

PLACES = ("~/.local/bin/ollama", "/usr/local/bin/ollama", "/usr/bin/ollama", "/opt/homebrew/bin/ollama")
HOST_MODULE = "engines.ollama.host"
LLAMA_SERVER_SINCE = (0, 30, 0)
NOBODY = "127.0.0.1:9"  # `ollama --version` asks a daemon first: not the user's
VERSION = re.compile(r"^(?:Warning: client|ollama) version is (\S+)", re.MULTILINE)
KV_TYPES = (None, "f16", "q8_0", "q4_0")

PATHS = Paths(
    generates=frozenset({CHAT, "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages"}),
    changes={"/api/": "what the engine serves is written in the plan; change it there"},
)


class Ollama:
    name = "ollama"
    installer = Installer(pip=())
    places: tuple[str, ...] = PLACES
    progress_path = "/api/ps"
    sees_prompt_progress = False
    own_args = OWN_ARGS
    probe_is_neutral = False  # a completion takes the one slot of its runner, with the prompt that is cached in it

    def find(self, form: Form = "auto", binary: Path | None = None) -> Installation:
        """The configured binary, else PATH, the places of its installers, and what was got for this user."""
        if binary is not None:
            return _installation(executable(binary, "an ollama"))
        if form != "hosted" and (found := first_executable("ollama", [*self.places, *got_for_this_user("ollama")])):
            return _installation(found)
        raise EngineNotFound(
            "ollama was not found: it is not on PATH or in common places; install it as its own pages say, "
            "or set `binary` in the plan",
            engine=self.name,
        )

    def argv(self, installation: Installation, serve: Serve) -> list[str]:
        """Our host, which imports the model into our store and then becomes `ollama serve`."""
        settings = serve.settings
        argv = [sys.executable, "-m", HOST_MODULE, "--program", *installation.program, "--gguf", str(serve.gguf)]
        argv += ["--model-id", serve.model_id, "--port", str(serve.port), "--store", str(home() / "ollama")]
        argv += flags_of(
            ("--threads", settings.threads),
            ("--batch", settings.batch_tokens),
            ("--gpu-layers", settings.gpu_layers),
            ("--seed", settings.seed),
        )
        if not _has_llama_server(installation.version):
            argv.append("--create")  # it has a Go template in place of the file's own
        return [*argv, *(["--", *serve.own.args] if serve.own.args else [])]

    def environment(self, installation: Installation, serve: Serve, base: Mapping[str, str]) -> dict[str, str]:
        """Without the user's OLLAMA_* and LLAMA_*; the model stays loaded, and nothing leaves this machine."""
        settings, env = serve.settings, scrubbed(base, ("OLLAMA_", "LLAMA_", "GGML_"))
        env |= {
            "OLLAMA_HOST": f"{serve.host}:{serve.port}",
            "OLLAMA_KEEP_ALIVE": "-1",
            "OLLAMA_MAX_LOADED_MODELS": "1",
            "OLLAMA_LOAD_TIMEOUT": "0",  # a load is bounded by its stall, which Switchyard watches
            "OLLAMA_NO_CLOUD": "1",
            "OLLAMA_NOPRUNE": "1",
            "OLLAMA_NOHISTORY": "1",
        }
        if settings.parallel:
            env["OLLAMA_NUM_PARALLEL"] = str(settings.parallel)
        if settings.context_tokens is not None:  # Ollama's is that of one sequence
            env["OLLAMA_CONTEXT_LENGTH"] = str(settings.context_tokens // max(settings.parallel, 1))
        if settings.flash_attention is not None:
            env["OLLAMA_FLASH_ATTENTION"] = str(int(settings.flash_attention))
        if settings.kv_type is not None and settings.kv_type in KV_TYPES:
            env["OLLAMA_KV_CACHE_TYPE"] = settings.kv_type
        if settings.host_cache_mib is not None and _has_llama_server(installation.version):
            env["LLAMA_ARG_CACHE_RAM"] = str(settings.host_cache_mib)
        return {**env, **serve.own.env}

    def loads(self, header: Header, version: str | None = None) -> Loads:
        """As llama.cpp, which computes in every version of Ollama; an older copy of it where the version is one."""
        answer = support.loads(header)
        if answer.answer == "no" and (why := next(support.of_ollama(header), "")):
            return Loads("unknown", f"{why}; Ollama's own patches read some such files")
        return answer

    def clashes(self, settings: Settings, own: EngineArgs) -> list[str]:
        return []

    def memory_parts(self, case: MemoryCase) -> list[Part]:
        """llama.cpp's, which Ollama has copy the weights, and Ollama's own process, which reads the vocabulary."""
        copied, vocab = replace(case, own=EngineArgs(args=("--load-mode", "none"))), case.header.vocab_size or 0
        own = (10 * MIB + 50 * vocab, 16 * MIB + 80 * vocab, 100 * MIB + 160 * vocab)
        return [*memory.memory_parts(copied), Part("ollama", "ram", *own, "its own process")]

    def memory_notes(self, case: MemoryCase) -> list[str]:
        return memory.memory_notes(case)

    def unsupported(self, installation: Installation, serve: Serve) -> list[str]:
        """Settings Ollama cannot honour (read at 0.24.0 and 0.32.15)."""
        settings = serve.settings
        found = ["context_tokens: a prompt that does not fit is cut without an error; keep prompts short yourself"]
        if settings.api_key is not None:
            found.append("api_key: ollama checks no key; keep it on loopback behind something that does")
        if settings.ubatch_tokens is not None:
            found.append("ubatch_tokens: ollama has one batch size")
        if settings.mlock:
            found.append("mlock: ollama has no setting for it")
        if settings.cache_reuse_tokens:
            found.append("cache_reuse_tokens: ollama has no setting for it")
        if settings.host_cache_mib is not None and not _has_llama_server(installation.version):
            found.append("host_cache_mib: ollama before 0.30 keeps no prompts in host RAM")
        if settings.kv_type not in KV_TYPES:
            found.append(f"kv_type: ollama has no {settings.kv_type} KV cache; f16 is used")
        if not settings.jinja:
            found.append("jinja: a model's own template is always used")
        if not settings.prefill_assistant:
            found.append("prefill_assistant: a trailing assistant message is continued")
        if settings.chat_template is not None:
            found.append("chat_template: ollama's templates are Go's, not Jinja's; it takes its own for the model")
        if settings.tokenizer_json is not None:
            found.append("tokenizer_json: ollama reads the tokenizer from the GGUF only; the file is ignored")
        return found

    def cache_budget(self, settings: Settings) -> str:
        """That of the llama-server under it."""
        mib = 8192 if settings.host_cache_mib is None else settings.host_cache_mib
        return f"{mib} MiB of host RAM (llama-server under Ollama 0.30 and later)"

    def progress(self, answer: bytes) -> tuple[int, ...]:
        """None: Ollama answers nothing about a request in flight."""
        return ()

    def served_name(self, installation: Installation, model_id: str) -> str:
        return model_id

    def paths(self, installation: Installation, own: EngineArgs) -> Paths:
        return PATHS

    def public(self, own: EngineArgs) -> Public:
        return Public(origins="localhost")

    def dialect(self, installation: Installation) -> type[Dialect]:
        return OllamaDialect

    def neutral_body(self) -> dict[str, object] | None:
        """None: no field switches its prompt cache off, and what a template begins every prompt with is read once."""
        return None


def _has_llama_server(version: str) -> bool:
    """Whether models run in a llama-server of their own; a build without a version is taken for a late one."""
    parsed = parse_version(version)
    return parsed in (None, (0, 0, 0)) or parsed >= LLAMA_SERVER_SINCE


def _installation(binary: Path) -> Installation:
    env = {**scrubbed(os.environ, ("OLLAMA_",)), "OLLAMA_HOST": NOBODY}
    said = probe([str(binary)], "--version", env=env)
    if said is None:
        raise EngineNotFound(f"{binary} is there but does not run: try `{binary} --version`", engine="ollama")
    if (version := VERSION.search(said)) is None:
        raise another_program(binary, "an ollama", said)
    return Installation("ollama", "binary", (str(binary),), version.group(1), where=str(binary))
