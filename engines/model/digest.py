"""Content digest of a model file, independent of name and path."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from engines.errors import BadInput
from engines.model.gguf import shard_paths

EDGE_BYTES = 16 * 1024 * 1024
SAMPLE_BYTES = 64 * 1024
SAMPLES = 256
WHOLE_UP_TO_BYTES = 2 * EDGE_BYTES + SAMPLES * SAMPLE_BYTES


def model_digest(path: Path) -> str:
    """`sha256:...` of the whole file, or `sampled-sha256:...` of a large one; of all shards for a split GGUF.

    A sampled digest covers the size, the first and last 16 MiB (the GGUF header with its tokenizer and template lies
    in the first) and 256 evenly spaced pieces of 64 KiB: 48 MiB read, whatever the size. It differs for other models,
    other quants, other fine-tunes, edited templates and truncated files. It does not prove that every byte between the
    samples is intact. The prefix keeps the two kinds from comparing equal.
    """
    digests = [_file_digest(shard) for shard in shards(path)]
    if len(digests) == 1:
        return digests[0]
    kind = max(digests).partition(":")[0]  # one sampled shard makes the whole sampled
    return f"{kind}:{hashlib.sha256(' '.join(digests).encode()).hexdigest()}"


def directory_digest(folder: Path) -> str:
    """`sha256:...` of the files in a model's directory, by their names and contents."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    digests = [f"{file.name} {_file_digest(file)}" for file in files]
    return f"sha256:{hashlib.sha256(chr(10).join(digests).encode()).hexdigest()}"


def shards(path: Path) -> list[Path]:
    """The files of a split GGUF (`name-00001-of-00003.gguf`) in order, or just `path`; all of them must exist."""
    files = shard_paths(path)
    if len(files) == 1:
        return files
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise BadInput(f"{path}: {len(missing)} of {len(files)} shards are missing; fetch {missing[0]}")
    return files


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= WHOLE_UP_TO_BYTES:
                return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
            digest = hashlib.sha256(str(size).encode())
            digest.update(file.read(EDGE_BYTES))
            inner = size - 2 * EDGE_BYTES - SAMPLE_BYTES
            for index in range(SAMPLES):
                file.seek(EDGE_BYTES + inner * index // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
            file.seek(size - EDGE_BYTES)
            digest.update(file.read(EDGE_BYTES))
            return f"sampled-sha256:{digest.hexdigest()}"
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error
