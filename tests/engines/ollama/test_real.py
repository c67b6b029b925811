"""Every Ollama that this machine has: one llama-server or runner under it, and nothing left of either.

One is got once for this user: `docs/engines.md` says how.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import installed
import psutil
import pytest
from processes import runs
from waiting import until

from engines.errors import EngineNotFound
from engines.home import engines_folder
from engines.ollama.driver import Ollama

pytestmark = pytest.mark.engine

# serves until it is ended, and says which processes are under it
OWNER = """
import json, signal, sys
from pathlib import Path
from engines.ollama.driver import Ollama
from engines.process.serving import free_port, serving
from engines.settings import Serve, Settings
binary, gguf, home = map(Path, sys.argv[1:])
driver = Ollama()
serve = Serve(model_id="m", gguf=gguf, port=free_port(), settings=Settings(context_tokens=512, threads=1))
with serving(driver, driver.find(binary=binary), serve, state_dir=home, log_path=home / "engine.log") as served:
    seen = [[one.pid, one.memory_info().rss] for one in served.process.tree()]
    print(json.dumps(seen), flush=True)
    signal.pause()
"""


def programs() -> list[Path]:
    """Each version that was got for this user, or the one that is found elsewhere."""
    if found := sorted(engines_folder().glob("ollama-*/bin/ollama")):
        return found
    try:
        return [Path(Ollama().find().program[0])]
    except EngineNotFound:
        return []


@pytest.fixture(params=programs() or [pytest.param(None, marks=pytest.mark.skip(reason="needs an ollama"))], ids=str)
def owner(request: pytest.FixtureRequest, tmp_path: Path):
    """A process of ours with an Ollama under it, and what runs there: Ollama, then its child."""
    code = textwrap.dedent(OWNER)
    command = [sys.executable, "-c", code, str(request.param), str(installed.smollm2()), str(tmp_path)]
    env = {**os.environ, "SWITCHYARD_HOME": str(tmp_path), "OLLAMA_MODELS": "/nowhere", "OLLAMA_KEEP_ALIVE": "0"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    seen = json.loads(process.stdout.readline())
    tree = [psutil.Process(pid) for pid, _ in seen]
    yield process, tree, [resident for _, resident in seen]
    process.kill()
    process.wait()
    for one in tree:
        if one.is_running():
            one.kill()


def test_nothing_is_left_when_whoever_started_it_is_killed(owner) -> None:
    """The kernel ends Ollama by SIGTERM, and Ollama its child, in which the model is. Its weights are in the sum."""
    process, tree, resident = owner
    assert len(tree) == 2
    assert sum(resident) > 90 * 1024 * 1024
    process.send_signal(signal.SIGKILL)
    until(lambda: not any(map(runs, tree)), "Ollama and its child to end", deadline_s=30)


def test_an_ollama_that_is_killed_leaves_no_child(owner) -> None:
    """Ollama's child would otherwise hold the model for ever; whoever supervises it ends it."""
    process, tree, _ = owner
    tree[0].kill()
    process.send_signal(signal.SIGINT)
    until(lambda: not any(map(runs, tree)), "Ollama and its child to end", deadline_s=30)
