"""Another quant of a model file, tensor by tensor, by the `gguf` package: one to try an engine's kernels with.

It writes F16, BF16, Q8_0 and the simple 4 and 5 bit kinds; no K quants, which only llama.cpp's own tool writes.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from engines.errors import BadInput

# the file's kind in its header (llama.cpp include/llama.h, enum llama_ftype)
FILE_TYPES = {"F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}
FLOATING = frozenset({Kind.F32, Kind.F16, Kind.BF16})
# never quantised (llama.cpp src/llama-quant.cpp, tensor_allows_quantization)
KEPT = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|altup|laurel|per_layer_model_proj|position_embd|token_types|ssm_conv1d|"
    r"shortconv\.conv|time_mix_(first|w0|w1|w2|v0|v1|v2|a0|a1|a2|g1|g2|decay|lerp)|attn_rel_b|\.bias$"
)
Progress = Callable[[int, int], None]  # tensors done, and all of them
OUTSIDE = ("token_embd.weight", "output.weight")  # at 4 and 5 bits llama.cpp keeps these at 6 or 8


@dataclass(frozen=True)
class Requantized:
    """What was written, and what of the weights was lost by it: root mean square errors, relative to the weights'."""

    path: Path
    n_bytes: int
    n_tensors: int
    error: float
    worst_error: float
    worst_tensor: str
    was_quantised: bool  # the source had lost precision before


def requantize(
    source: Path, target: Path, kind: str, *, force: bool = False, progress: Progress = lambda *_: None
) -> Requantized:
    """Write the model of `source` as `target` with its weights as `kind`; `progress(done, all)` in tensors.

    Raises BadInput before anything is written: no such kind, a part of a split model, a row that is not a multiple of
    the kind's block, a target that is there (unless `force`), too little disk. What is broken off leaves no file.
    """
    if kind not in FILE_TYPES:
        raise BadInput(f"--to {kind}: not a kind that can be written; there are {', '.join(FILE_TYPES)}")
    if target.exists() and not force:
        raise BadInput(f"{target}: is there already; choose another --output, or overwrite it with --force")
    try:
        reader = gguf.GGUFReader(source)
    except (OSError, ValueError, IndexError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise BadInput(f"{source}: cannot be read as GGUF: {why}") from None
    if reader.get_field("general.architecture") is None:
        raise BadInput(f"{source}: cannot be read as GGUF: its header names no architecture")
    parts = reader.get_field("split.count")
    if parts is not None and int(parts.contents()) > 1:
        raise BadInput(f"{source}: a part of a split model; merge it first with llama-gguf-split --merge")
    kinds = [_kind_of(tensor, Kind[kind]) for tensor in reader.tensors]
    sizes = [_n_bytes(tensor, new) for tensor, new in zip(reader.tensors, kinds, strict=True)]
    needed = sum(sizes) + os.path.getsize(source) - sum(tensor.n_bytes for tensor in reader.tensors)
    free = shutil.disk_usage(target.absolute().parent).free
    if needed > free:
        raise BadInput(f"{target}: needs {needed / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB are free there")
    partial = target.with_name(f"{target.name}.part")
    try:
        errors = _write(reader, kinds, sizes, partial, kind, progress)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    worst = max(errors, key=lambda name: errors[name][0] / max(errors[name][1], 1e-30), default="")
    lost, all_squares = (sum(pair[at] for pair in errors.values()) for at in (0, 1))
    return Requantized(
        target,
        target.stat().st_size,
        len(errors),
        (lost / all_squares) ** 0.5 if all_squares else 0.0,
        (errors[worst][0] / max(errors[worst][1], 1e-30)) ** 0.5 if worst else 0.0,
        worst,
        any(tensor.tensor_type not in FLOATING for tensor in reader.tensors),
    )


def _kind_of(tensor: Any, kind: Kind) -> Kind:
    if len(tensor.shape) < 2 or KEPT.search(tensor.name):
        return Kind(tensor.tensor_type)
    if tensor.name in OUTSIDE and kind in (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1):
        kind = Kind.Q8_0
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if int(tensor.shape[0]) % block:
        raise BadInput(f"--to {kind.name}: rows of {tensor.name} have {tensor.shape[0]} values, no multiple of {block}")
    return kind


def _n_bytes(tensor: Any, kind: Kind) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(tensor.n_elements) // block * size


def _write(
    reader: gguf.GGUFReader,
    kinds: list[Kind],
    sizes: list[int],
    path: Path,
    kind: str,
    progress: Progress,
) -> dict[str, tuple[float, float]]:
    """Write the file; for each tensor that changed the sum of squared errors, and of squared weights."""
    writer = gguf.GGUFWriter(path, str(reader.fields["general.architecture"].contents()))
    alignment = reader.get_field("general.alignment")
    if alignment is not None:
        writer.data_alignment = int(alignment.contents())
    for field in reader.fields.values():
        if field.name == "general.architecture" or field.name.startswith("GGUF."):
            continue
        value = FILE_TYPES[kind] if field.name == "general.file_type" else field.contents()
        of = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, field.types[0], sub_type=of)
    for tensor, new, size in zip(reader.tensors, kinds, sizes, strict=True):
        shape = [int(length) for length in reversed(tensor.shape)]
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), size, raw_dtype=new)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    errors: dict[str, tuple[float, float]] = {}
    try:
        for number, (tensor, new) in enumerate(zip(reader.tensors, kinds, strict=True), start=1):
            data = tensor.data
            if new != tensor.tensor_type:
                weights = gguf.dequantize(data, tensor.tensor_type)
                data = gguf.quantize(weights, new)
                lost = gguf.dequantize(data, new).astype(np.float64) - weights
                errors[tensor.name] = float(np.square(lost).sum()), float(np.square(weights, dtype=np.float64).sum())
            writer.write_tensor_data(np.ascontiguousarray(data))
            progress(number, len(kinds))
    finally:
        writer.close()
    return errors
