"""llama-server's own options: what a plan passes on of them, what it says elsewhere, and what it must not hold.

`flags.txt` beside this file lists them.
"""

from __future__ import annotations

from importlib.resources import files

from engines.own_args import Files, OwnArgs, read_options

OPTIONS = read_options((files("engines.llama_cpp") / "flags.txt").read_text(encoding="utf-8"))

# a neutral setting or another key of a plan has the word for it
ELSEWHERE = {
    "--model": "models.gguf",
    "--alias": "models.id and models.aliases",
    "--host": "yard.host",
    "--port": "yard.port",
    "--api-key": "api_key_env",
    "--api-key-file": "api_key_env",
    "--ctx-size": "settings.context_tokens",
    "--parallel": "settings.parallel",
    "--gpu-layers": "settings.gpu_layers",
    "--threads": "settings.threads",
    "--batch-size": "settings.batch_tokens",
    "--ubatch-size": "settings.ubatch_tokens",
    "--flash-attn": "settings.flash_attention",
    "--mlock": "settings.mlock",
    "--cache-reuse": "settings.cache_reuse_tokens",
    "--cache-ram": "settings.host_cache_mib",
    "--seed": "settings.seed",
    "--chat-template-file": "settings.chat_template",
    "--no-jinja": "settings.jinja",
    "--prefill-assistant": "settings.prefill_assistant",
    "--no-prefill-assistant": "settings.prefill_assistant",
}
_DOWNLOADS = "the engine runs offline; name a file that is here"
_ROUTER = "it makes llama-server a router of several models, and the yard is one; list the models in the plan"
_ACTS = "it lets the model or a web page act on this machine"
_CLIENTS = "clients talk to the yard, not to the engine"
_ENDS = "llama-server prints something and ends"
NEVER = {
    "--ssl-key-file": f"{_CLIENTS}; put what ends TLS in front of the yard",
    "--ssl-cert-file": f"{_CLIENTS}; put what ends TLS in front of the yard",
    "--api-prefix": f"{_CLIENTS}, and the yard serves without a prefix",
    "--reuse-port": _CLIENTS,
    "--no-slots": "the yard reads /slots to tell a busy engine from a wedged one",
    "--log-disable": "the yard keeps the engine's log, and an incident shows its last lines",
    "--log-file": "the yard keeps the engine's log itself",
    "--agent": _ACTS,
    "--tools": _ACTS,
    "--tools-runtime": _ACTS,
    "--mcp-servers-config": _ACTS,
    "--mcp-servers-json": _ACTS,
    "--ui-mcp-proxy": _ACTS,
    "--hf-repo": _DOWNLOADS,
    "--hf-file": _DOWNLOADS,
    "--hf-token": _DOWNLOADS,
    "--hf-repo-v": _DOWNLOADS,
    "--hf-file-v": _DOWNLOADS,
    "--model-url": _DOWNLOADS,
    "--docker-repo": _DOWNLOADS,
    "--mmproj-url": f"{_DOWNLOADS} with --mmproj",
    "--spec-draft-hf": f"{_DOWNLOADS} with --spec-draft-model",
    "--help": _ENDS,
    "--version": _ENDS,
    "--cache-list": _ENDS,
    "--list-devices": _ENDS,
    "--completion-bash": _ENDS,
}
# several models, or a model that llama-server chooses
ROUTING = {
    "--models-dir": _ROUTER,
    "--models-preset": _ROUTER,
    "--models-max": _ROUTER,
    "--models-autoload": _ROUTER,
    "--no-models-autoload": _ROUTER,
} | {
    name: "it chooses a model and its settings by itself, out of the network"
    for name in OPTIONS
    if name.endswith(("-default", "-spec")) and name != "--spec-default"
}
BESIDE = {
    "--cache-type-k": "kv_type",
    "--cache-type-v": "kv_type",
    "--load-mode": "mlock",
    "--chat-template": "chat_template",
}
FILES: dict[str, Files] = {
    "--mmproj": "file",
    "--lora": "files",
    "--lora-scaled": "scaled",
    "--control-vector": "files",
    "--control-vector-scaled": "scaled",
    "--spec-draft-model": "file",
    "--model-vocoder": "file",
    "--grammar-file": "file",
    "--json-schema-file": "file",
    "--ui-config-file": "file",
    "--lookup-cache-static": "file",
    "--lookup-cache-dynamic": "folder",  # written by the engine: no file of the plan's
    "--path": "folder",
    "--slot-save-path": "folder",
    "--media-path": "folder",
    "--log-prompts-dir": "folder",
}
NO_CHAT = {
    "--rerank": "a reranking server answers /v1/rerank and no chat",
    "--embedding": "an embedding server answers /v1/embeddings and no chat",
}
OWN_ARGS = OwnArgs(
    options=OPTIONS,
    elsewhere=ELSEWHERE,
    never=NEVER | ROUTING,
    beside=BESIDE,
    files=FILES,
    no_chat=NO_CHAT,
    prefixes=("LLAMA_ARG_", "LLAMA_CACHE", "LLAMA_LOG_"),
)
