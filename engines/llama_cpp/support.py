"""What llama.cpp loads: the architectures and tensor types of the installed gguf package."""

from __future__ import annotations

import sys
from importlib import metadata

from engines.model.header import Header
from engines.model.loads import Loads, known_architectures


def loads(header: Header, version: str | None = None) -> Loads:
    """Whether llama.cpp loads the model, whatever its `version`; what the package does not know is unknown."""
    names, package = known_architectures(), f"gguf {metadata.version('gguf')}"
    if header.endianness != sys.byteorder:
        return Loads("no", f"the file is {header.endianness}-endian and this machine is not; llama.cpp refuses it")
    if header.architecture not in names:
        why = f"architecture {header.architecture!r} is not among the {len(names)} names of {package}"
        return Loads("unknown", f"{why}; a newer llama.cpp may know it")
    unknown = next((tensor for tensor in header.tensors if tensor.type.startswith("type ")), None)
    if unknown:
        return Loads("unknown", f"tensor {unknown.name} is of ggml {unknown.type}, which {package} does not know")
    return Loads("yes", f"architecture {header.architecture!r} is among the {len(names)} names of {package}")
