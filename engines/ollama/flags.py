"""Variables of `ollama serve` (envconfig/config.go) and of the llama-server under it: what a plan may pass on."""

from __future__ import annotations

from engines.own_args import OwnArgs

ELSEWHERE = {
    "OLLAMA_HOST": "yard.port",
    "OLLAMA_MODELS": "models.gguf",
    "OLLAMA_CONTEXT_LENGTH": "settings.context_tokens",
    "OLLAMA_NUM_PARALLEL": "settings.parallel",
    "OLLAMA_FLASH_ATTENTION": "settings.flash_attention",
    "OLLAMA_KV_CACHE_TYPE": "settings.kv_type",
    "LLAMA_ARG_CACHE_RAM": "settings.host_cache_mib",
}
_ONE = "Switchyard serves one model and unloads it itself"
NEVER = {
    "OLLAMA_KEEP_ALIVE": _ONE,
    "OLLAMA_MAX_LOADED_MODELS": _ONE,
    "OLLAMA_NOPRUNE": "the blobs of our store are shared",
    "OLLAMA_NO_CLOUD": "the engine runs offline",
    "OLLAMA_REMOTES": "the engine runs offline",
    "OLLAMA_ORIGINS": "clients talk to the yard, not to the engine",
    "OLLAMA_DEBUG_LOG_REQUESTS": "it writes every request into a file",
}
OWN_ARGS = OwnArgs(elsewhere=ELSEWHERE, never=NEVER, prefixes=("OLLAMA_", "LLAMA_ARG_"))
