"""Plans of these tests, as files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a plan.toml beside a model file called small.gguf."""
    (tmp_path / "small.gguf").write_bytes(b"GGUF small")

    def _write(text: str, name: str = "plan.toml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return _write
