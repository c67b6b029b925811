"""The instruction sets that a build of llama.cpp was compiled for, and whether this CPU has them.

A build for another CPU starts, and reports its version; the first product of matrices ends it with SIGILL.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from functools import cache
from pathlib import Path

from engines.cpu import cpu_flags
from engines.driver import probe

# what `ggml_cpu_has_...` reports (ggml/src/ggml-cpu/ggml-cpu.c), and the flag of Linux; not AMX, which a build uses
# only where it finds it
FLAGS = {
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "bmi2": "bmi2",
    "avx512": "avx512f",
    "avx512_vbmi": "avx512vbmi",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx_vnni": "avx_vnni",
}
# a process of its own: a library is not loaded into this one to be asked
ASK = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
has = [getattr(library, "ggml_cpu_has_" + name, None) for name in sys.argv[2:]]
print(*(name for name, is_compiled_in in zip(sys.argv[2:], has) if is_compiled_in and is_compiled_in()))
"""
ASK_S = 10.0


def compiled_for_another_cpu(program: Path) -> str:
    """`was compiled for a CPU with AVX-VNNI, which this one lacks`; "" where it runs, or nothing is known of it."""
    lacking = lacking_instruction_sets(compiled_for(program), cpu_flags())
    return f"was compiled for a CPU with {', '.join(lacking)}, which this one lacks" if lacking else ""


def lacking_instruction_sets(wanted: Collection[str], flags: Collection[str]) -> tuple[str, ...]:
    """Those of `wanted` (ggml's names) that a CPU with `flags` lacks, as people write them; () without flags."""
    lacking = (name for name, flag in FLAGS.items() if flags and name in wanted and flag not in flags)
    return tuple(name.upper().replace("_", "-") for name in lacking)


@cache
def compiled_for(program: Path) -> frozenset[str]:
    """The instruction sets that `libggml-cpu.so` beside `program` was compiled for; empty where that is not known.

    A build that chooses them at run time has a library for each CPU, of other names.
    """
    library = program.parent / "libggml-cpu.so"
    if not library.is_file():
        return frozenset()
    env = {**os.environ, "LD_LIBRARY_PATH": str(library.parent)}
    said = probe([sys.executable, "-I", "-c", ASK], str(library), *FLAGS, env=env, timeout_s=ASK_S)
    return frozenset((said or "").split()) & FLAGS.keys()
