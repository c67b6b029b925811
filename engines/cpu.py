"""What the CPU of this machine can do."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path


@cache
def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What this CPU supports, in Linux's words (`avx2`, `avx512f`); empty where that is not known."""
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        return frozenset()
    flags = re.search(r"^flags\s*:(.*)", text, re.MULTILINE)  # x86; the first of the cores stands for all
    return frozenset(flags[1].split()) if flags else frozenset()
