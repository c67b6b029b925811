"""Options of `mistralrs serve`: what a plan passes on of them, what it says elsewhere, and what it must not hold.

`flags.txt` beside this file lists them; our host around the wheel knows few of them.
"""

from __future__ import annotations

from importlib.resources import files

from engines.own_args import Files, OwnArgs, read_options

OPTIONS = read_options((files("engines.mistral_rs") / "flags.txt").read_text(encoding="utf-8"))
ELSEWHERE = {
    "--host": "yard.host",
    "--port": "yard.port",
    "--model-id": "models.gguf",
    "--quantized-file": "models.gguf",
    "--format": "models.gguf",
    "--gguf": "models.gguf",
    "--tokenizer": "settings.tokenizer_json",
    "--jinja-explicit": "settings.chat_template",
    "--chat-template": "settings.chat_template",
    "--tokenizer-json": "settings.tokenizer_json",
    "--max-seqs": "settings.parallel",
    "--parallel": "settings.parallel",
    "--seed": "settings.seed",
    "--cpu": "settings.gpu_layers",
    "--device-layers": "settings.gpu_layers",
    "--max-num-batched-tokens": "settings.batch_tokens",
    "--pa-context-len": "settings.context_tokens",
    "--context": "settings.context_tokens",
    "--threads": "settings.threads",
    "RAYON_NUM_THREADS": "settings.threads",
    "CANDLE_NUM_THREADS": "settings.threads",
}
_ACTS = "it lets the model act on this machine or on the network"
_CLIENTS = "clients talk to the yard, not to the engine"
_ENDS = "mistralrs prints something and ends"
NEVER = {
    "--agent": _ACTS,
    "--agent-permission": _ACTS,
    "--enable-search": _ACTS,
    "--search-embedding-model": _ACTS,
    "--enable-code-execution": _ACTS,
    "--code-exec-python": _ACTS,
    "--code-exec-timeout": _ACTS,
    "--code-exec-workdir": _ACTS,
    "--max-tool-rounds": _ACTS,
    "--tool-dispatch-url": _ACTS,
    "--mcp-config": _ACTS,
    "--mcp-port": _ACTS,
    "--ui": _CLIENTS,
    "--no-ui": "Switchyard says it itself, where the build knows it",
    "--log": "it writes every request and answer into a file",
    "--token-source": "the engine runs offline; name a file that is here",
    "--help": _ENDS,
    "--version": _ENDS,
}
FILES: dict[str, Files] = {
    "--imatrix": "file",
    "--calibration-file": "file",
    "--topology": "file",
    "--xlora-order": "file",
    "--matformer-config-path": "file",
    "--hf-cache": "folder",
}
OWN_ARGS = OwnArgs(
    options=OPTIONS,
    elsewhere=ELSEWHERE,
    never=NEVER,
    files=FILES,
    prefixes=("MISTRALRS_", "RAYON_", "CANDLE_", "RUST_LOG", "HF_HUB_CACHE"),
)
