"""The flags of this CPU, as Linux lists them."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.cpu import cpu_flags

X86 = (
    "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512f\nvmx flags\t: vnmi ept\nbugs\t\t: spectre_v1\n"
)
ARM = "processor\t: 0\nFeatures\t: fp asimd sve\n"


@pytest.mark.parametrize(("text", "flags"), [(X86 * 2, {"fpu", "avx2", "avx512f"}), (ARM, set()), (None, set())])
def test_they_are_read_where_there_are_any(tmp_path: Path, text: str | None, flags: set[str]) -> None:
    """None on another system than Linux, or another CPU than x86."""
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert cpu_flags(tmp_path / "cpuinfo") == flags
