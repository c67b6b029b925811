"""Ollama with one model of a plan: `python -m engines.ollama.host --program OLLAMA --gguf FILE --store DIR ...`.

Imports the model into a store of our own, once for each set of its parameters, and becomes `ollama serve`: the process
that Switchyard watches is Ollama's. Only options that Ollama keeps with a model are flags here, the rest is in the
environment.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import httpx

from engines.errors import BadInput
from engines.model.digest import shards
from engines.model.header import Header, read_header
from engines.process.process import LAUNCHER
from engines.units import size
from engines.whole_file import write_whole

SPARE_BYTES = 512 * 1024 * 1024  # of the disk, after a copy
START_S = 60.0
POLL_S = 0.05
LAYER = "application/vnd.ollama.image"
# the options of a model that a setting has a word for (api/types.go)
PARAMETERS = {"threads": "num_thread", "batch": "num_batch", "gpu_layers": "num_gpu", "seed": "seed"}


class Parser(argparse.ArgumentParser):
    """An argument parser that refuses with one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def parser() -> Parser:
    parser = Parser(prog="python -m engines.ollama.host", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--program", required=True, help="the ollama to become")
    parser.add_argument("--gguf", type=Path, required=True, help="model file; of a split model the first part")
    parser.add_argument("--model-id", required=True, help="the name by which clients ask for the model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--store", type=Path, required=True, help="where our imported models lie")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--batch", type=int, help="prefill batch, in tokens")
    parser.add_argument("--gpu-layers", type=int, help="layers on the GPU")
    parser.add_argument("--seed", type=int, help="seed of the sampler")
    parser.add_argument(
        "--create", action="store_true", help="have this Ollama import the file, with a template of its own"
    )
    parser.add_argument("own", nargs="*", help="further words for `ollama serve`")
    return parser


class Store:
    """Imported models under one folder: blobs that all share, and a folder of manifests for each set of parameters.

    A blob is a hard link to the plan's file where the file system allows one, else a copy.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._blobs = folder / "blobs"
        self._blobs.mkdir(parents=True, exist_ok=True, mode=0o700)

    def add(self, content: object) -> dict[str, object]:
        """The layer of a small blob with this JSON."""
        data = json.dumps(content).encode()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        write_whole(self._blobs / digest.replace(":", "-"), data)
        return {"digest": digest, "size": len(data)}

    def models(self, key: str) -> Path:
        """The folder that Ollama is given as OLLAMA_MODELS; its blobs are those of the whole store."""
        models = self._folder / key
        models.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (models / "blobs").symlink_to(self._blobs)
        return models

    def blob(self, file: Path) -> str:
        """`sha256:...` of a blob with the content of `file`. BadInput where there is no room for a copy."""
        file = file.resolve()
        digest = self._digest(file)
        blob = self._blobs / digest.replace(":", "-")
        if not blob.exists():
            try:
                os.link(file, blob)
            except OSError:
                self._copy(file, blob)
        return digest

    def _copy(self, file: Path, blob: Path) -> None:
        needed, free = file.stat().st_size, shutil.disk_usage(self._blobs).free
        if free < needed + SPARE_BYTES:
            raise BadInput(
                f"{self._blobs}: {size(free)} free, and a copy of {file.name} takes {size(needed)}; "
                "free some, or set SWITCHYARD_HOME on the model's own disk, where a link is enough"
            )
        log(f"copying {file.name} ({size(needed)}): it lies on another file system")
        partial = blob.with_name(f"{blob.name}.{os.getpid()}.part")
        try:
            shutil.copyfile(file, partial)
            os.replace(partial, blob)
        finally:
            partial.unlink(missing_ok=True)

    def _digest(self, file: Path) -> str:
        """The digest of the whole file, computed once while it stays as it is."""
        known = self._folder / "digests"
        known.mkdir(exist_ok=True)
        state = file.stat()
        seen = hashlib.sha256(f"{file}\n{state.st_size}\n{state.st_mtime_ns}\n{state.st_ino}".encode()).hexdigest()
        entry = known / seen
        with contextlib.suppress(OSError):
            if re.fullmatch(r"sha256:[0-9a-f]{64}", text := entry.read_text()):
                return text
        log(f"reading {file.name} for its digest")
        with file.open("rb") as opened:
            digest = f"sha256:{hashlib.file_digest(opened, 'sha256').hexdigest()}"
        write_whole(entry, digest.encode())
        return digest


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def store_key(program: str, model_id: str, files: Mapping[str, str], parameters: Mapping[str, int]) -> str:
    """One folder of manifests for all that goes into one import."""
    state = os.stat(program)
    build = [program, state.st_size, state.st_mtime_ns]  # versions differ in the template that they take
    return hashlib.sha256(json.dumps([build, model_id, files, parameters], sort_keys=True).encode()).hexdigest()[:16]


def write_manifest(
    store: Store, manifest: Path, gguf: Path, digest: str, header: Header, parameters: Mapping[str, int]
) -> None:
    """A model as `ollama pull` leaves one: its file as it is, and no template beside the file's own.

    `ollama create` of 0.30 and later would write all of the file anew.
    """
    kind = {"model_format": "gguf", "model_family": header.architecture, "model_families": [header.architecture]}
    config = {**kind, "architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [digest]}}
    layers = [{"mediaType": f"{LAYER}.model", "digest": digest, "size": gguf.stat().st_size}]
    if parameters:
        layers.append({"mediaType": f"{LAYER}.params", **store.add(parameters)})
    whole = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": {"mediaType": "application/vnd.docker.container.image.v1+json", **store.add(config)},
        "layers": layers,
    }
    manifest.parent.mkdir(parents=True, exist_ok=True)
    write_whole(manifest, json.dumps(whole).encode())


@contextlib.contextmanager
def running(program: str, env: Mapping[str, str], base_url: str) -> Iterator[None]:
    """`ollama serve` without a model, ended with the block. BadInput when it ends by itself or is late."""
    command = [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid()), program, "serve"]
    child = subprocess.Popen(command, env=dict(env), stdin=subprocess.DEVNULL)
    try:
        late = time.monotonic() + START_S
        while not _answers(base_url):
            if child.poll() is not None:
                raise BadInput(f"ollama ended with {child.returncode} before it could import the model")
            if time.monotonic() > late:
                raise BadInput(f"ollama does not answer after {START_S:.0f} s")
            time.sleep(POLL_S)
        yield
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _answers(base_url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{base_url}/api/version", timeout=5, trust_env=False).status_code == 200
    return False


def create(base_url: str, request: Mapping[str, Any]) -> None:
    """Have Ollama make a model of blobs in its store, its steps in our log. BadInput with what it says against it."""
    with httpx.stream("POST", f"{base_url}/api/create", json=request, timeout=None, trust_env=False) as answer:
        for line in answer.iter_lines():
            step = json.loads(line) if line.strip() else {}
            if "error" in step:
                raise BadInput(f"ollama does not take the model: {step['error']}")
            log(f"import: {step.get('status', '')}")


def prepared(arguments: argparse.Namespace, env: Mapping[str, str]) -> dict[str, str]:
    """The environment for `ollama serve`, with the model in the store that it names. Raises BadInput."""
    store = Store(arguments.store)
    if len(shards(arguments.gguf)) > 1:
        raise BadInput(f"{arguments.gguf}: Ollama takes no split GGUF; merge it with llama-gguf-split --merge")
    files = {arguments.gguf.name: store.blob(arguments.gguf)}
    parameters = {name: getattr(arguments, ours) for ours, name in PARAMETERS.items()}
    parameters = {name: value for name, value in parameters.items() if value is not None}
    models = store.models(store_key(arguments.program, arguments.model_id, files, parameters))
    # its keys and settings are ours, too
    env = {**env, "OLLAMA_MODELS": str(models), "HOME": str(arguments.store)}
    header = read_header(arguments.gguf)
    if "OLLAMA_CONTEXT_LENGTH" not in env and header.context_length:
        env["OLLAMA_CONTEXT_LENGTH"] = str(
            header.context_length
        )  # its own default is small, and it cuts prompts to fit
    manifest = models / "manifests" / "registry.ollama.ai" / "library" / arguments.model_id / "latest"
    if manifest.exists():
        return env
    if not arguments.create:
        (digest,) = files.values()
        write_manifest(store, manifest, arguments.gguf, digest, header, parameters)
    else:
        base_url = f"http://{env.get('OLLAMA_HOST', f'127.0.0.1:{arguments.port}')}"
        with running(arguments.program, env, base_url):
            create(base_url, {"model": arguments.model_id, "files": files, "parameters": parameters})
    return env


def main(argv: list[str] | None = None) -> int:
    """Does not return where Ollama can be started. Exit code: 1 the model cannot be imported, 2 bad arguments."""
    arguments = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        env = prepared(arguments, os.environ)
    except (BadInput, OSError, ValueError, httpx.HTTPError) as error:
        log(f"error: {error}")
        return 1
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.execvpe(arguments.program, [arguments.program, "serve", *arguments.own], env)


if __name__ == "__main__":
    sys.exit(main())
