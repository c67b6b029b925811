"""llama.cpp's server from the `xllamacpp` wheel: `python -m engines.llama_cpp.host -m FILE --port PORT ...`.

Takes the flags of `llama-server` that Switchyard's driver uses and sets the same fields of llama.cpp's `common_params`
(llama.cpp `common/arg.cpp`). The server behind them is llama.cpp's own: its port opens at once and answers 503 until
the model is loaded.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

KEY_VARIABLE = "LLAMA_API_KEY"
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}
LOAD_MODES = {"auto": -1, "none": 0, "mmap": 1, "mlock": 2, "mmap+mlock": 3, "dio": 4}


class Parser(argparse.ArgumentParser):
    """An argument parser that refuses with one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def gpu_layers(text: str) -> int:
    """llama-server's layer count: a number, "auto" (-1) or "all" (-2)."""
    return {"auto": -1, "all": -2}[text] if text in ("auto", "all") else int(text)


def parser() -> Parser:
    """llama-server's flags, as far as they are known here; a default of None leaves llama.cpp's own."""
    parser = Parser(
        prog="python -m engines.llama_cpp.host", description=(__doc__ or "").split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("-m", "--model", type=Path, required=True, help="GGUF file")
    parser.add_argument("--host", default="127.0.0.1", help=f"other than loopback only with a key in {KEY_VARIABLE}")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("-a", "--alias", help="the name of the model in answers")
    parser.add_argument("-c", "--ctx-size", type=int, help="context of all slots together, in tokens; 0 = the model's")
    parser.add_argument("-np", "--parallel", type=int, help="slots")
    parser.add_argument("-ngl", "--n-gpu-layers", "--gpu-layers", type=gpu_layers, help="layers on the GPU")
    parser.add_argument("-t", "--threads", type=int, help="CPU threads")
    parser.add_argument("-b", "--batch-size", type=int, help="logical batch, in tokens")
    parser.add_argument("-ub", "--ubatch-size", type=int, help="physical batch, in tokens")
    parser.add_argument("-fa", "--flash-attn", choices=FLASH_ATTENTION)
    parser.add_argument("-ctk", "--cache-type-k", choices=KV_TYPES)
    parser.add_argument("-ctv", "--cache-type-v", choices=KV_TYPES)
    parser.add_argument("--cache-reuse", type=int, help="smallest chunk of cache to reuse by shifting, in tokens")
    parser.add_argument("-cram", "--cache-ram", type=int, help="prompt cache in host RAM, in MiB; -1 = no limit")
    parser.add_argument("--jinja", action=argparse.BooleanOptionalAction, help="render the chat template with Jinja")
    parser.add_argument(
        "--prefill-assistant", action=argparse.BooleanOptionalAction, help="continue a last assistant turn"
    )
    parser.add_argument("--metrics", action="store_true", help="serve /metrics")
    parser.add_argument("-s", "--seed", type=int, help="seed of the sampler; -1 = random")
    parser.add_argument("-lm", "--load-mode", choices=LOAD_MODES)
    parser.add_argument("--chat-template-file", type=Path, help="a Jinja file instead of the model's own template")
    parser.add_argument("--slot-save-path", type=Path, help="folder in which slots are saved")
    parser.add_argument("--sse-ping-interval", type=int, help="seconds between pings of a silent stream; -1 = none")
    parser.add_argument("--offline", action="store_true", help="never use the network")
    parser.add_argument("-lv", "--verbosity", type=int, help="log level, 0 to 5")
    return parser


def settings_of(arguments: argparse.Namespace, key: str | None) -> dict[str, Any]:
    """Fields of `common_params` by dotted name, for what was asked; the rest keeps llama.cpp's defaults."""
    asked = {
        "model.path": str(arguments.model),
        "hostnames": [arguments.host],
        "port": arguments.port,
        "model_alias": {arguments.alias} if arguments.alias else None,
        "n_ctx": arguments.ctx_size,
        "n_parallel": arguments.parallel,
        "n_gpu_layers": arguments.n_gpu_layers,
        # llama-server uses -t for prefill too unless -tb is given
        "cpuparams.n_threads": arguments.threads,
        "cpuparams_batch.n_threads": arguments.threads,
        "n_batch": arguments.batch_size,
        "n_ubatch": arguments.ubatch_size,
        "n_cache_reuse": arguments.cache_reuse,
        "cache_ram_mib": arguments.cache_ram,
        "use_jinja": arguments.jinja,
        "prefill_assistant": arguments.prefill_assistant,
        "endpoint_metrics": arguments.metrics or None,
        "sampling.seed": None if arguments.seed is None else arguments.seed % 2**32,
        "chat_template": arguments.chat_template_file.read_text() if arguments.chat_template_file else None,
        "slot_save_path": f"{arguments.slot_save_path}{os.sep}" if arguments.slot_save_path else None,
        "sse_ping_interval": arguments.sse_ping_interval,
        "offline": arguments.offline or None,
        "verbosity": arguments.verbosity,
        "api_keys": [key] if key else None,
    }
    return {name: value for name, value in asked.items() if value is not None}


def parameters(xllamacpp: ModuleType, arguments: argparse.Namespace, key: str | None) -> Any:
    """`common_params` of this version of xllamacpp, from 0.2.14 on; ValueError where it lacks what was asked."""
    params = xllamacpp.CommonParams()
    fields, mode = settings_of(arguments, key), arguments.load_mode
    if not hasattr(params, "hostnames"):  # before 2026.10: one
        fields["hostname"] = fields.pop("hostnames")[0]
    if mode and (mode == "dio" or hasattr(params, "load_mode")):
        fields["load_mode"] = LOAD_MODES[mode]
    elif mode and mode != "auto":  # before 2026.8: two switches
        fields |= {"use_mmap": "mmap" in mode, "use_mlock": "mlock" in mode}
    for name, value in fields.items():
        owner, _, field = name.rpartition(".")
        try:
            setattr(getattr(params, owner) if owner else params, field, value)
        except AttributeError:
            raise ValueError(f"xllamacpp {xllamacpp.__version__} has no {name}: leave its flag out") from None
    if arguments.flash_attn:
        params.flash_attn_type = xllamacpp.llama_flash_attn_type(FLASH_ATTENTION[arguments.flash_attn])
    for side in ("k", "v"):
        kind = getattr(arguments, f"cache_type_{side}")
        if kind:
            setattr(params, f"cache_type_{side}", getattr(xllamacpp.ggml_type, f"GGML_TYPE_{kind.upper()}"))
    return params


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 ended by a signal once ready, 1 the model does not load or the port is taken, 2 bad arguments."""
    given = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(given[1:] if given[:1] == ["--"] else given)
    key = os.environ.pop(KEY_VARIABLE, "") or None
    if arguments.host not in ("127.0.0.1", "::1", "localhost") and not key:
        parser().error(f"--host {arguments.host} is open to others: set a key in {KEY_VARIABLE}, or use 127.0.0.1")
    if not arguments.model.is_file():
        log(f"error: cannot load {arguments.model}: no such file")
        return 1
    import xllamacpp  # optional, and `--help` does without

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # loading does not return to Python: let the kernel end it
    log(f"loading {arguments.model.name} with xllamacpp {xllamacpp.__version__}")
    try:
        server = xllamacpp.Server(parameters(xllamacpp, arguments, key))
    except (RuntimeError, OSError, ValueError) as error:
        log(f"error: cannot load {arguments.model}: {error}; see the lines above")
        return 1
    for number in (signal.SIGINT, signal.SIGTERM):
        # Not a graceful end: llama.cpp would wait for its clients, for as long as they stay.
        signal.signal(number, lambda *_: os._exit(0))
    log(f"listening on {server.listening_address}")
    threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
