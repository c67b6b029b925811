"""What a header says of a model against what the engines do with it: never a wrong yes, never a wrong no."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_variants import CASES, Draft, draft
from installed import BOTH, smollm2

from engines.driver import Installation
from engines.errors import BadInput, EngineExited, EngineRefuses, EngineStalled, PortTaken, WrongListener
from engines.model.header import read_header
from engines.process.serving import free_port, serving
from engines.registry import driver
from engines.settings import Serve, Settings
from engines.support import loads

pytestmark = pytest.mark.engine
ENGINES = ("llama.cpp", "mistral.rs")


@pytest.fixture(scope="module")
def model() -> Draft:
    return draft(smollm2(*BOTH))


@pytest.fixture(scope="module")
def installations() -> dict[str, Installation]:
    return {"llama.cpp": driver("llama.cpp").find(), "mistral.rs": driver("mistral.rs").find("hosted")}


@pytest.mark.parametrize("name", CASES)
def test_the_header_never_contradicts_the_engine(
    name: str, model: Draft, installations: dict[str, Installation], tmp_path: Path
) -> None:
    """Unknown is allowed: it says that only a load tells."""
    changed = model.copy()
    CASES[name](changed)
    path = changed.write(tmp_path / "model.gguf")
    for engine in ENGINES:
        said, why = from_header(engine, path, installations[engine].version)
        loaded, trouble = really(engine, installations[engine], path)
        assert (said, loaded) not in {("yes", False), ("no", True)}, f"{engine}: {said}: {why}; {trouble}"


def from_header(engine: str, path: Path, version: str) -> tuple[str, str]:
    try:
        answer = loads(engine, read_header(path), version=version)
    except BadInput as error:
        return "no", str(error)
    return answer.answer, answer.why


def really(engine: str, installation: Installation, path: Path) -> tuple[bool, str]:
    """Whether it gives a token, and why not; a port that another process took first says nothing of the model."""
    log = path.with_name(f"{engine}.log")
    while True:
        serve = Serve(model_id="m", gguf=path, port=free_port(), settings=Settings(context_tokens=512, threads=1))
        try:
            with serving(driver(engine), installation, serve, state_dir=path.parent, log_path=log, stall_s=60):
                return True, ""
        except (PortTaken, WrongListener):
            continue
        except (EngineExited, EngineRefuses, EngineStalled) as error:
            return False, str(error)
