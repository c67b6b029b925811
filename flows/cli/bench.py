"""`switchyard bench`: what the yard costs on this machine."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.table import Table

from engines.client.self_test import reference_server
from engines.process import process
from engines.process.serving import free_port
from engines.settings import Endpoint
from engines.units import number_of
from engines.yard.client import YardClient, wait_until_serving
from flows.cli.options import Json
from flows.cli.output import out, print_result, print_step
from tasks.evidence.proxy_cost import ITL_MS, TOKENS, TTFT_MS, Way, measure_proxy_cost

ROUND_S = 10.0  # about
PLAN = """
name = "bench"
[incumbent]
name = "reference"
engine = "openai"
url = "{url}"
[candidate]
name = "beside"
engine = "openai"
url = "{url}"
[settings]
parallel = 16
[[models]]
id = "{model}"
[yard]
port = {port}
"""


def bench(
    rounds: Annotated[int, typer.Option(min=2, max=1000, help="Rounds of both ways; about 10 s each.")] = 6,
    json_: Json = False,
) -> None:
    """Measure what the yard adds on this machine: to the first token, to a call, and in CPU a chunk.

    A server of known timing takes the engine's place. A yard of its own stands before it: yours is neither used nor
    changed. Both ways, direct and through the yard, take turns.

    Example: `switchyard bench --rounds 12`
    """
    print_step(f"takes about {(rounds + 1) * ROUND_S:.0f} s; let nothing else run meanwhile")
    with (
        tempfile.TemporaryDirectory(prefix="switchyard-bench-") as folder,
        reference_server(ttft_ms=TTFT_MS, itl_ms=ITL_MS, tokens=TOKENS) as direct,
        _yard_before(direct, Path(folder)) as (address, pid),
    ):
        ways = {"direct": Way(direct, None), "through": Way(direct.model_copy(update={"base_url": address}), pid)}
        found = measure_proxy_cost(ways, rounds=rounds, progress=print_step)
    found["machine"] = {"cores": os.cpu_count(), "load_average": psutil.getloadavg()[0]}
    print_result(found, json_, lambda _: _show(found))


@contextlib.contextmanager
def _yard_before(engine: Endpoint, home: Path) -> Iterator[tuple[str, int]]:
    """Address and pid of a yard that serves `engine`, in a home of its own."""
    port, plan = free_port(), home / "plan.toml"
    plan.write_text(PLAN.format(url=engine.base_url, model=engine.model_id, port=port), encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SWITCHYARD_")}
    child = process.start(
        "bench yard",
        [sys.executable, "-m", "flows.cli", "serve", str(plan)],
        state_dir=home / "started",
        log_path=home / "yard.log",
        env={**kept, "SWITCHYARD_HOME": str(home)},
        cwd=home,
    )
    try:
        client, log = YardClient(home), child.log_tail
        wait_until_serving(client, [engine.model_id], child.poll, lambda: "\n".join(log()), say=lambda _: None)
        yield f"http://127.0.0.1:{port}", child.pid
    finally:
        child.stop()


def _show(found: Mapping[str, Any]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("ms", "direct", "yard", "added", "95%", "CPU of the yard"):
        table.add_column(column, justify="left" if column == "ms" else "right", no_wrap=True)
    streams = found["streams"].items()
    rows = [(f"first token, {what} stream{'s' * (what != '1')}", "chunk", one) for what, one in streams]
    for what, each, one in [*rows, ("call without a stream", "call", found["calls"])]:
        spread = f"{one['added_low_ms']:.2f} to {one['added_high_ms']:.2f}"
        times = [f"{one[name]:.2f}" for name in ("direct_ms", "through_ms", "added_ms")]
        table.add_row(what, *times, spread, f"{one['cpu_us']:.0f} us a {each}")
    out.print(table, soft_wrap=False)
    direct, through = (max(one[f"late_{way}"] for _, one in streams) for way in ("direct", "through"))
    out.print(f"gaps over twice the engine's: {direct:.2%} direct, {through:.2%} through the yard")
    load, cores = found["machine"]["load_average"], found["machine"]["cores"]
    out.print(
        f"{number_of(found['rounds'], 'round')}, {number_of(cores, 'core')}, load average {load:.1f} at the end "
        "(both ways and the client)"
    )
