"""How fast the yard notices a killed engine and serves again, beside the limits that the design sets.

    python -m benchmarks.recovery             ten kills of llama.cpp and of mistral.rs (as a subprocess and native)

A yard of its own over SmolLM2 135M; the engine that serves is killed (SIGKILL), and a request of one token is asked at
once. Detected: until the yard noted the death. Beyond the load: until that request was answered, less the engine's own
load time and what such an answer takes of an engine that is up; the yard's back-off is in it. Needs the demo's engines.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from engines.errors import EngineNotFound, SwitchyardError
from engines.process import process
from engines.process.serving import free_port
from engines.registry import driver
from engines.settings import Settings
from engines.yard.client import YardClient, wait_until_serving
from engines.yard.engine.launch_spec import LaunchSpec
from migrations.demo import smollm2
from tasks.evidence.rehearsal import engine_of, one_token, route_of

ENGINES = ("llama.cpp", "mistral.rs", "mistral.rs-native")
DETECTED_S, BEYOND_LOAD_S = 1.0, 1.0  # to reach
STALL_S = 120.0


def main() -> int:
    """Exit code 1 when a limit was not reached, 2 where there is no engine to try."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=10, help="of each engine")
    kills = parser.parse_args().kills
    out, reached = Console(), True
    table = Table("engine", "kills", "detected s, median", "most", "load s", "beyond the load s, median", "most")
    for engine in ENGINES:
        with tempfile.TemporaryDirectory(prefix="recovery-") as folder:
            try:
                seen = _killed(_recipe(engine, Path(folder)), Path(folder), kills)
            except EngineNotFound as error:
                out.print(f"not measured: {error}", highlight=False)
                continue
        detected, beyond = [one["detect_s"] for one in seen], [one["beyond_s"] for one in seen]
        loads = statistics.median(one["load_s"] for one in seen)
        figures = (statistics.median(detected), max(detected), loads, statistics.median(beyond), max(beyond))
        table.add_row(engine, str(kills), *(f"{figure:.2f}" for figure in figures))
        reached = reached and max(detected) < DETECTED_S and max(beyond) < BEYOND_LOAD_S
    out.print(table)
    out.print(f"{'reached' if reached else 'not reached'}: detected < {DETECTED_S:g} s, load + {BEYOND_LOAD_S:g} s")
    return 0 if reached else 1


def _recipe(engine: str, home: Path) -> LaunchSpec:
    model = smollm2()
    threads = max((os.cpu_count() or 2) - 1, 1)
    settings = Settings(context_tokens=2048, threads=threads)
    return LaunchSpec.of(driver(engine).find(), model.id, model.gguf, settings)


def _killed(spec: LaunchSpec, home: Path, kills: int) -> list[dict[str, Any]]:
    (home / "spec.json").write_text(spec.model_dump_json(), encoding="utf-8")
    port = free_port()
    argv = [sys.executable, "-m", "engines.yard.single", str(home / "spec.json"), str(home), str(port), str(kills)]
    child = process.start("yard", argv, state_dir=home, log_path=home / "yard.log")
    try:
        client, address = YardClient(home), f"http://127.0.0.1:{port}"
        wait_until_serving(client, [spec.model_id], child.poll, stall_s=STALL_S, say=lambda _: None)
        return [_kill(client, address, spec) for _ in range(kills)]
    finally:
        child.stop()


def _kill(client: YardClient, address: str, spec: LaunchSpec) -> dict[str, Any]:
    usual = one_token(address, spec.model_id, None, wait_s=STALL_S)
    engine = engine_of(route_of(client, spec.model_id), spec.engine)
    killed_at = time.time()
    os.kill(engine["pid"], signal.SIGKILL)
    answer = one_token(address, spec.model_id, None, wait_s=STALL_S)
    answered_at = time.time()
    if not (usual["answered"] and answer["answered"]):
        raise SwitchyardError(f"{spec.engine} was not served: {usual['error'] or answer['error']}")
    deaths = [e["at"] for e in client.status()["events"] if e["at"] >= killed_at and e["what"].startswith("dead")]
    load_s = engine_of(route_of(client, spec.model_id), spec.engine)["load_s"]
    beyond_s = answered_at - killed_at - load_s - usual["took_s"]
    return {"detect_s": deaths[0] - killed_at, "load_s": load_s, "beyond_s": beyond_s}


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
