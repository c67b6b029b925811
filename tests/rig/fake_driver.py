"""A driver for the fake engine: the seam at which process and serving tests plug it in."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from engines.driver import Installation, Installer
from engines.llama_cpp.driver import LlamaCpp
from engines.llama_cpp.paths import PATHS
from engines.llama_cpp.slots import SAVE_PATH, LlamaSlots
from engines.model.header import Header
from engines.model.loads import Loads
from engines.model.memory import MemoryCase, Part, exactly
from engines.openai.call import Refusal
from engines.openai.dialect import Dialect
from engines.openai.paths import COUNTS_TOKENS, Paths
from engines.openai.public import Public
from engines.own_args import OwnArgs
from engines.settings import EngineArgs, Serve, Settings

FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")

FEW = Paths(reads=frozenset({COUNTS_TOKENS, "/tokenize"}))


class NoGrammar(Dialect):
    """Refuses what others answer, as dialects of engines do that lack a field."""

    def request(self) -> bytes:
        if "grammar" in self.call.body:
            raise Refusal(400, "grammar: this engine does not know it")
        return super().request()


class FakeDriver:
    """Serves with tests/rig/fake_engine.py and the bad habits given."""

    name = "fake"
    installer = Installer(pip=())
    progress_path = "/slots"
    sees_prompt_progress = True
    probe_is_neutral = True
    own_args = OwnArgs()

    def __init__(self, *habits: str) -> None:
        self.habits = habits

    def find(self, form: str = "auto", binary: Path | None = None) -> Installation:
        return Installation(self.name, "binary", (sys.executable, str(FAKE_ENGINE)), "1")

    def argv(self, installation: Installation, serve: Serve) -> list[str]:
        slots = [SAVE_PATH, str(serve.slots)] if serve.slots else []
        return [*installation.program, "--port", str(serve.port), "--model-id", serve.model_id, *slots, *self.habits]

    def environment(self, installation: Installation, serve: Serve, base: Mapping[str, str]) -> dict[str, str]:
        return dict(base)

    def loads(self, header: Header, version: str | None = None) -> Loads:
        return Loads("yes", "a fake loads everything")

    def memory_parts(self, case: MemoryCase) -> list[Part]:
        return [exactly("weights", "ram", case.header.tensor_bytes, "all that a fake pretends to hold")]

    def clashes(self, settings: Settings, own: EngineArgs) -> list[str]:
        return []

    def memory_notes(self, case: MemoryCase) -> list[str]:
        return []

    def unsupported(self, installation: Installation, serve: Serve) -> list[str]:
        return []

    def cache_budget(self, settings: Settings) -> str:
        return "none"

    def neutral_body(self) -> dict[str, object]:
        return {}

    def progress(self, answer: bytes) -> tuple[int, ...]:
        return LlamaCpp().progress(answer) if "--keeps-slots" in self.habits else tuple(json.loads(answer))

    def paths(self, installation: Installation, own: EngineArgs) -> Paths:
        if "--keeps-slots" in self.habits:
            return dataclasses.replace(PATHS, slots=LlamaSlots())
        return FEW if "--few-paths" in self.habits else PATHS

    def public(self, own: EngineArgs) -> Public:
        return Public() if "--few-paths" in self.habits else LlamaCpp().public(own)

    def dialect(self, installation: Installation) -> type[Dialect]:
        return NoGrammar if "--few-paths" in self.habits else Dialect

    def served_name(self, installation: Installation, model_id: str) -> str:
        return model_id
