"""What a build was compiled for, against what a CPU has."""

from __future__ import annotations

from pathlib import Path

import installed
import pytest

from engines.cpu import cpu_flags
from engines.llama_cpp.instruction_sets import (
    FLAGS,
    compiled_for,
    compiled_for_another_cpu,
    lacking_instruction_sets,
)

DESKTOP = {"fpu", "avx", "avx2", "fma", "f16c", "bmi1", "bmi2"}
ZEN_4 = DESKTOP | {"avx512f", "avx512vbmi", "avx512_vnni", "avx512_bf16"}


@pytest.mark.parametrize(
    ("wanted", "flags", "lacking"),
    [
        (FLAGS, ZEN_4 | {"avx_vnni"}, ()),
        (FLAGS, ZEN_4, ("AVX-VNNI",)),
        (FLAGS, DESKTOP, ("AVX512", "AVX512-VBMI", "AVX512-VNNI", "AVX512-BF16", "AVX-VNNI")),
        (("avx2", "fma"), DESKTOP, ()),
        ((), DESKTOP, ()),
        (FLAGS, (), ()),
    ],
)
def test_what_lacks_is_what_was_compiled_in_and_is_no_flag(wanted, flags, lacking) -> None:
    """Of a CPU whose flags are not known nothing lacks."""
    assert lacking_instruction_sets(wanted, flags) == lacking


def test_of_a_build_that_cannot_be_asked_nothing_is_known(tmp_path: Path) -> None:
    """One without the library, and one whose library is none."""
    assert compiled_for(tmp_path / "a" / "llama-server") == set()
    (tmp_path / "libggml-cpu.so").write_text("no library")
    assert compiled_for(tmp_path / "llama-server") == set()
    assert compiled_for_another_cpu(tmp_path / "llama-server") == ""


@pytest.mark.engine
def test_the_wheels_library_is_asked() -> None:
    """Whether it runs here or not."""
    pytest.importorskip(installed.LLAMA_SERVER)
    wanted = compiled_for(installed.llama_server())
    assert {"avx", "avx2", "fma"} <= wanted
    assert bool(compiled_for_another_cpu(installed.llama_server())) == any(
        FLAGS[name] not in cpu_flags() for name in wanted
    )
