"""A third engine: all that Switchyard is told of it stands in this folder, and one line in the registry."""

import sys
from pathlib import Path

from fake_driver import FakeDriver

from engines.driver import Form, Installation
from engines.model.header import Header
from engines.model.loads import Loads
from engines.settings import Serve

PROGRAM = Path(__file__).with_name("engine.py")


class ThirdEngine(FakeDriver):
    """Driver for `engine.py` beside it."""

    name = "third"

    def find(self, form: Form = "auto", binary: Path | None = None) -> Installation:
        return Installation(self.name, "binary", (sys.executable, str(PROGRAM)), "3.1", where=str(PROGRAM))

    def argv(self, installation: Installation, serve: Serve) -> list[str]:
        return [*installation.program, "-m", str(serve.gguf), "--port", str(serve.port), "--alias", serve.model_id]

    def loads(self, header: Header, version: str | None = None) -> Loads:
        return Loads("yes", f"third engine {version} loads every architecture")

    def unsupported(self, installation: Installation, serve: Serve) -> list[str]:
        return ["mlock: the third engine pins nothing"] if serve.settings.mlock else []

    def progress(self, answer: bytes) -> tuple[int, ...]:
        return ()
