"""What Ollama takes: its llama-server with the weights copied, and its own process, which holds the vocabulary."""

from __future__ import annotations

from dataclasses import replace

import installed
import pytest

from engines.fit import estimate
from engines.model.free_memory import FreeMemory
from engines.model.header import read_header
from engines.model.memory import GIB, MIB, MemoryCase
from engines.registry import driver
from engines.settings import Settings

SETTINGS = Settings(context_tokens=1024, parallel=1, kv_type="f16", threads=1, gpu_layers=0, host_cache_mib=0)


def test_the_estimate_is_what_was_measured() -> None:
    """Private memory of Ollama 0.32.15 with SmolLM2 (Q4_1), after a prompt that filled the context."""
    header = read_header(installed.smollm2())
    (need,) = estimate(header, SETTINGS, "ollama", memory=FreeMemory(64 * GIB)).needs
    assert need.expected / MIB == pytest.approx(166.2, rel=0.05)


@pytest.mark.parametrize(
    ("vocab_size", "measured_mib"),
    [(49_152, (14.5, 15.0, 18.4, 32.3, 35.8)), (262_144, (31.3, 32.1, 58.1))],  # SmolLM2, Gemma 3; up to 32.1 0.32.15
)
def test_its_own_process_is_in_the_interval(vocab_size: int, measured_mib: tuple[float, ...]) -> None:
    header = replace(read_header(installed.smollm2()), vocab_size=vocab_size)
    parts = driver("ollama").memory_parts(MemoryCase(header, SETTINGS, 1024, 0, FreeMemory(64 * GIB)))
    (own,) = [part for part in parts if part.name == "ollama"]
    assert own.low <= min(measured_mib) * MIB
    assert own.high >= max(measured_mib) * MIB
