"""The gate on real runs: one engine as both arms, the candidate's slowed down for real, beside three usual judges.

    python -m benchmarks.gate_real                        0, 10 and 30% slower, 6 blocks each, some 6 minutes
    python -m benchmarks.gate_real --record blocks.json   also writes the equal pair's blocks, for gate.py --recorded

The slow-down is a duty cycle: the candidate's process is stopped and continued every 20 ms, so that it is on the CPU
for 1 / (1 + slow-down) of the time. What a request then really takes is measured, not assumed: the table shows it.
Needs the demo's engine and model (`make demo`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.gate import kayenta_like, single_run_threshold, welch
from engines.errors import SwitchyardError
from engines.process.serving import Served
from engines.registry import driver
from engines.settings import Settings
from migrations.demo import smollm2
from tasks.evidence.engine_under_test import Arm, EngineUnderTest
from tasks.evidence.performance import Workload, measure_block
from tasks.verdicts.noninferiority import Metric, judge

LOOKS = (3, 6)
PERIOD_S = 0.02
METRIC = Metric(name="e2e_p50", samples="e2e_ms", quantile=0.5, margin=0.10, unit="ms")


@dataclass(frozen=True, kw_only=True)
class SlowedEngine(EngineUnderTest):
    """An engine that, once ready, gets the CPU for 1 / (1 + slowdown) of the time."""

    slowdown: float = 0.0

    @contextlib.contextmanager
    def up(self, progress: Any = lambda _: None) -> Iterator[Served]:
        """The engine, slowed down while the block runs."""
        with super().up(progress) as served, duty_cycle(served.process.pid, 1 / (1 + self.slowdown)):
            yield served


@contextlib.contextmanager
def duty_cycle(pid: int, share: float) -> Iterator[None]:
    """The process runs for `share` of every PERIOD_S; it runs freely again after the block."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(PERIOD_S * share):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(PERIOD_S * (1 - share))
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=work, daemon=True)
    if share < 1:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if share < 1:
            thread.join()


def blocks_at(slowdown: float, n_blocks: int, requests: int, home: Path, console: Console) -> list[dict[str, Any]]:
    """Real blocks of llama.cpp against itself, the candidate slowed down."""
    model = smollm2()
    llama = driver("llama.cpp")
    settings = Settings(context_tokens=2048, host_cache_mib=0, threads=max((os.cpu_count() or 2) - 1, 1))

    def engine(arm: Arm, slower: float) -> SlowedEngine:
        return SlowedEngine(
            arm=arm,
            driver=llama,
            installation=llama.find(),
            model_id=model.id,
            gguf=model.gguf,
            settings=settings,
            home=home,
            slowdown=slower,
        )

    workload = Workload(requests=requests, max_tokens=16, warmup_min=1, warmup_max=3)
    blocks = []
    for index in range(n_blocks):
        with console.status(f"slowed by {slowdown:.0%}: block {index + 1} of {n_blocks}"):
            pair = engine("incumbent", 0.0), engine("candidate", slowdown)
            blocks.append(measure_block(*pair, workload, index=index, foreign_cpu_limit=0.10))
    return blocks


def usual_answers(blocks: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a single run of each engine, its first block, would have been judged by three usual rules."""
    a, b = (np.array([blocks[0][arm]["e2e_ms"]]) for arm in ("incumbent", "candidate"))
    return ["promotes" if bool(rule(a, b)[0]) else "blocks" for rule in (single_run_threshold, welch, kayenta_like)]


def main() -> int:
    """Exit code 0 when no slowed engine was promoted by our gate, 1 when one was, 5 when an engine did not run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--slowdowns", type=float, nargs="+", default=[0.0, 0.10, 0.30])
    parser.add_argument("--blocks", type=int, default=LOOKS[-1])
    parser.add_argument("--requests", type=int, default=8, help="per engine and block")
    parser.add_argument("--record", type=Path, help="write the blocks of the equal pair here")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table(
        title="Real runs of llama.cpp against itself, margin 10%, median time of a request", title_justify="left"
    )
    for column in ("asked", "measured", "our gate", "single run, mean <= 1.10", "Welch t-test", "Kayenta-like", "why"):
        table.add_column(column)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for slowdown in options.slowdowns:
            try:
                blocks = blocks_at(slowdown, options.blocks, options.requests, Path(folder), console)
            except SwitchyardError as error:
                print(error, file=sys.stderr)
                return 5
            outcome = judge(METRIC, blocks, LOOKS)
            if slowdown == 0 and options.record:
                options.record.write_text(json.dumps(blocks))
            valid = [block for block in blocks if block["void"] is None] or blocks
            ratios = [
                math.log(
                    statistics.median(block["candidate"]["e2e_ms"]) / statistics.median(block["incumbent"]["e2e_ms"])
                )
                for block in valid
            ]
            real = math.exp(statistics.fmean(ratios)) - 1
            wrong += outcome.verdict == "PASS" and slowdown > METRIC.margin
            usual = usual_answers(valid)
            table.add_row(f"{slowdown:.0%}", f"{real:+.1%}", outcome.verdict.value, *usual, outcome.why)
    console.print(table)
    console.print("The usual rules judge one run of each engine (here the first valid block); ours judges all blocks.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
