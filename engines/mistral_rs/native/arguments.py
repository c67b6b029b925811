"""The command line and the environment of a process that holds mistral.rs: our HTTP server and the yard's worker."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import signal
import sys
from pathlib import Path
from typing import Any

from engines.environment import is_loopback
from engines.errors import BadInput
from engines.mistral_rs.native.model import LoadedModel, first_line, on_cpu

KEY_VARIABLE = "SWITCHYARD_ENGINE_API_KEY"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gguf", type=Path, required=True, help="model file; of a split model the first part")
    parser.add_argument("--model-id", required=True, help="the name by which clients ask for the model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--context", type=int, help="usable context of one sequence, in tokens (default: the model's)")
    parser.add_argument(
        "--parallel", type=int, default=1, help="sequences at the same time; on the CPU they take turns"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: the engine's)")
    parser.add_argument("--seed", type=int, help="seed of the process; the engine has none on the CPU")
    parser.add_argument("--tokenizer-json", type=Path, help="a tokenizer.json instead of the GGUF's own")
    parser.add_argument("--chat-template", type=Path, help="a Jinja file instead of the GGUF's own template")
    parser.add_argument("--prefix-cache", type=int, help="sequences kept in the prefix cache; 0 = off")
    parser.add_argument("--cpu", action="store_true", help="keep off the GPU")
    parser.add_argument("--host", default="127.0.0.1", help=f"other than loopback only with a key in {KEY_VARIABLE}")


def read_arguments(parser: argparse.ArgumentParser, argv: list[str] | None, *, needs_key: bool) -> tuple[Any, str]:
    """The checked arguments, and the key that clients must send; ends the process with 2 for what cannot be served."""
    add_model_arguments(parser)
    arguments, key = parser.parse_args(argv), os.environ.pop(KEY_VARIABLE, "")
    try:
        if needs_key and not key:
            raise BadInput(f"{KEY_VARIABLE} is not set: a worker answers only whoever started it")
        check(arguments, key)
        prepare(arguments)
    except (BadInput, importlib.metadata.PackageNotFoundError) as error:
        log(f"error: {error}")
        sys.exit(2)
    return arguments, key


def check(arguments: argparse.Namespace, key: str | None) -> None:
    if not is_loopback(arguments.host) and not key:
        raise BadInput(f"--host {arguments.host} is open to others: set a key in {KEY_VARIABLE}, or use 127.0.0.1")
    for name in ("context", "parallel", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise BadInput(f"--{name} {value}: must be at least 1")
    for name in ("chat_template", "tokenizer_json"):
        file = getattr(arguments, name)
        if file is not None and not file.is_file():
            raise BadInput(f"--{name.replace('_', '-')} {file}: there is no such file")
    if not 1 <= arguments.port <= 65535:
        raise BadInput(f"--port {arguments.port}: must be from 1 to 65535")


def prepare(arguments: argparse.Namespace) -> None:
    """Settle what depends on the device, and the environment that the engine reads at import."""
    if arguments.threads:
        os.environ["RAYON_NUM_THREADS"] = os.environ["CANDLE_NUM_THREADS"] = str(arguments.threads)
    if arguments.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    arguments.serial = on_cpu(arguments.cpu)
    arguments.slots = 1 if arguments.serial else arguments.parallel
    if arguments.serial and arguments.parallel > 1:
        log(f"--parallel {arguments.parallel}: on the CPU generations take turns")
    if arguments.serial and arguments.seed is not None:
        log(f"--seed {arguments.seed}: not honoured, this engine cannot seed its CPU sampler")


def load(arguments: argparse.Namespace) -> LoadedModel:
    """The loaded model. Ends the process with 1, and logs why, when loading fails."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handlers wait for the lock that loading holds
    log(f"loading {arguments.gguf.name} with mistralrs {importlib.metadata.version('mistralrs')}")
    try:
        model = LoadedModel(arguments)
    except BaseException as error:
        log(f"error: cannot load {arguments.gguf}: {first_line(error)}")
        os._exit(1)
    log(f"model loaded, context {model.context} tokens")
    return model


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
