"""Three days of a soak at 1 Hz in the records: their size, and what judging and reporting them costs.

    python -m benchmarks.soak_records             two minutes of a soak are recorded first, then replayed for 3 days
    python -m benchmarks.soak_records --record-s 20 --windows 48

A yard over fake engines of a known, human speed (60 ms to the first token, 15 ms a token) is soaked for real. What that
window came to (times of answers, memory of the engine and the yard second by second) is drawn from, window by window,
through the code that a window is stored with; then everything is judged and reported as at the end of a soak.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from engines.process.serving import free_port
from engines.yard.client import YardClient, wait_until_serving
from flows.soak import Target, put_window, write_soak_report
from tasks.evidence.soak.judge import DAY_S
from tasks.evidence.soak.judge_windows import judge_windows, window_summary
from tasks.evidence.soak.segment import empty_segment
from tasks.evidence.soak.window import Place, measure_window
from tasks.records.store import Records, open_records
from tasks.verdicts.limits import Limits
from tasks.verdicts.verdict import gate

ROOT = Path(__file__).parents[1]
RIG = ROOT / "tests" / "rig"
HABITS = "--ttft-ms 60 --itl-ms 15 --hold-mib 256"
WINDOWS, WINDOW_S = 432, 600.0  # three days
DATABASE_BYTES, REPORT_S, GROWTH_BYTES = 50e6, 5.0, 64e6  # to stay under
MODEL = "m"
LIMITS = Limits(
    failures_per_day=1.0,
    throughput_retention=0.9,
    ttft_p50_ratio=1.1,
    leak_bytes_per_day=50e6,
    failure_rate_margin=0.01,
)


@dataclass(frozen=True)
class Recorded:
    """A window as it was measured, and its series second by second."""

    window: Mapping[str, Any]
    memory: Sequence[int]
    yard_memory: Sequence[int]


class Replay:
    """A soak run whose windows are drawn from a recorded one, stored as `flows.soak` stores them."""

    def __init__(self, records: Records, recorded: Recorded, *, window_s: float, seed: int = 0) -> None:
        self.records, self.recorded, self.window_s = records, recorded, window_s
        self._random = random.Random(seed)
        plan: dict[str, Any] = {
            "name": "replay",
            "incumbent": {"engine": "llama.cpp"},
            "candidate": {"engine": "mistral.rs"},
        }
        plan["measure"], plan["limits"] = {"soak_s": WINDOWS * WINDOW_S}, {}
        self.run = records.start_run("soak", "replay", plan)
        environment = {"engine": "mistral.rs", "version": "replayed", "form": "binary", "argv": ["mistralrs", "serve"]}
        self.target = Target(MODEL, "mistral.rs", "replayed", environment, 0.0)
        self._began = time.time() - WINDOWS * WINDOW_S
        self._kept: list[int] = []
        self.samples = 0

    def add(self, index: int) -> None:
        """One window."""
        began = self._began + index * self.window_s
        seconds = int(self.window_s)
        memory, own = self._walk(self.recorded.memory, seconds), self._walk(self.recorded.yard_memory, seconds)
        with self.records.series_writer(self.run.id, MODEL, "candidate") as series:
            for second in range(seconds):
                at = began + second + self._random.uniform(0, 0.02)
                series.append("memory_bytes", at, memory[second])
                series.append("yard_memory_bytes", at, own[second])
        self.samples += 2 * seconds
        put_window(self.records, self.run.id, self.target, index, self._window(began, memory, own))

    def sizes(self) -> dict[str, Any]:
        """Bytes and rows so far, as the database holds them."""
        with self.records.engine.connect() as database:
            ask = database.exec_driver_sql
            packed, rows = ask("select sum(length(packed)), count(*) from sample").one()
            payload, windows = ask("select sum(length(payload)), count(*) from evidence").one()
        return {
            "samples": self.samples,
            "sample_bytes": packed,
            "sample_rows": rows,
            "evidence_bytes": payload,
            "evidence_rows": windows,
            "kept": self._kept,
        }

    def _walk(self, seen: Sequence[int], n: int) -> list[int]:
        """So many seconds with the recorded steps between two of them, about the recorded level."""
        steps = [after - before for before, after in itertools.pairwise(seen)] or [0]
        level, found = float(self._random.choice(seen)), []
        for _ in range(n):
            level += self._random.choice(steps) + (seen[0] - level) * 0.01
            found.append(int(level) // 4096 * 4096)
        return found

    def _window(self, began: float, memory: Sequence[int], own: Sequence[int]) -> dict[str, Any]:
        seen = self.recorded.window
        # what a window keeps of its answers has a limit; the recorded one is scaled up to it
        factor = self.window_s / seen["exposure_s"]
        kept = min(1000, int(len(seen["ttft_ms"]) * factor))
        self._kept.append(kept)
        drawn = {name: self._drawn(seen[name], kept) for name in ("ttft_ms", "decode_tok_s", "prompt_tokens")}
        ended = began + self.window_s
        life = {"life": "7@7", "from": began, "until": ended, "samples": len(memory)}
        return {
            **seen,
            **drawn,
            "requests": int(seen["requests"] * factor),
            "kinds": {kind: int(number * factor) for kind, number in seen["kinds"].items()},
            "exposure_s": self.window_s,
            "started_at": began,
            "ended_at": ended,
            "lives": [{**life, "memory_bytes": sorted(memory)[len(memory) // 2]}],
            "yard_memory_bytes": sorted(own)[len(own) // 2],
        }

    def _drawn(self, seen: Sequence[float | None], n: int) -> list[float | None]:
        # between two recorded values, so that no two windows compress as one
        found = []
        for _ in range(n):
            value, other = self._random.choice(seen), self._random.choice(seen)
            mixed = None if value is None or other is None else value + (other - value) * self._random.random()
            found.append(mixed if mixed is None else int(mixed) if isinstance(value, int) else round(mixed, 2))
        return found


def recorded_like(answers_per_s: float, seconds: float = 120.0) -> Recorded:
    """A made-up recording, for want of a real one: log-normal times, memory that wanders by pages."""
    drawn = random.Random(7)
    n = int(answers_per_s * seconds)
    window = {
        **empty_segment(),
        "exposure_s": seconds,
        "requests": n,
        "kinds": {"turn": n},
        "ttft_ms": [round(drawn.lognormvariate(4, 0.3), 2) for _ in range(n)],
        "decode_tok_s": [round(drawn.lognormvariate(4, 0.1), 2) for _ in range(n)],
        "prompt_tokens": [drawn.randint(20, 2000) for _ in range(n)],
        **{"ended": "", "outage": None, "yard_life": "1@1", "restarts_seen": 0, "unsettled": False},
    }
    steps = [drawn.choice((0, 0, 0, 4096, -4096, 65536, -65536)) for _ in range(int(seconds))]
    return Recorded(window, [500_000_000 + sum(steps[:i]) for i in range(len(steps))], [90_000_000] * len(steps))


def record(seconds: float) -> Recorded:
    """A window of `seconds` on a yard of fake engines, with its series."""
    with tempfile.TemporaryDirectory(prefix="soak-records-") as folder:
        home = Path(folder) / "home"
        home.mkdir()
        yard = _start_yard(home)
        client = YardClient(home)
        series: dict[str, list[int]] = {"memory_bytes": [], "yard_memory_bytes": []}
        try:
            wait_until_serving(client, [MODEL], yard.poll, say=lambda _: None)
            client.order("promote", model=MODEL, to="mistral.rs")
            place = Place(client=client, key=None, model_id=MODEL, engine="mistral.rs")
            window = measure_window(
                place, length_s=seconds, on_memory=lambda name, _, value: series[name].append(value or 0)
            )
        finally:
            yard.terminate()
            yard.wait(60)
    return Recorded(window, series["memory_bytes"], series["yard_memory_bytes"])


def _start_yard(home: Path) -> subprocess.Popen[bytes]:
    sys.path.insert(0, str(RIG))
    from gguf_files import write_gguf  # type: ignore[import-not-found]

    port, gguf = free_port(), write_gguf(home / "m.gguf")
    spec = {"home": str(home), "port": port, "gguf": str(gguf), "mistral.rs": HABITS.split()}
    (home / "spec.json").write_text(json.dumps(spec))
    argv = [
        sys.executable,
        str(RIG / "fake_migration.py"),
        "yard",
        str(home / "spec.json"),
        str(home),
    ]
    with (home / "yard.log").open("wb") as log:
        return subprocess.Popen(
            [*argv, str(port)], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=subprocess.STDOUT
        )


def main() -> int:
    """Exit code 1 when a target was missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--record-s", type=float, default=120.0, help="seconds of real soak that are replayed")
    parser.add_argument("--windows", type=int, default=WINDOWS, help=f"of {WINDOW_S:.0f} s each")
    options = parser.parse_args()
    out = Console()
    recorded = record(options.record_s)
    window = recorded.window
    out.print(
        f"recorded: {window['requests']} requests in {window['exposure_s']:.0f} s, {len(window['failures'])} failed"
    )
    with tempfile.TemporaryDirectory(prefix="soak-records-") as folder:
        figures = measure(recorded, Path(folder), options.windows)
    table = Table("figure", "measured", "target")
    for name, measured, target in figures["rows"]:
        table.add_row(name, measured, target)
    out.print(table)
    out.print("reached" if figures["reached"] else "not reached")
    return 0 if figures["reached"] else 1


def measure(recorded: Recorded, home: Path, windows: int) -> dict[str, Any]:
    """The figures: of the writing, of the judging, of the report."""
    path = home / "switchyard.db"
    with open_records(path) as records:
        replay = Replay(records, recorded, window_s=WINDOW_S)
        replay.add(0)
        begin = _rss()
        wrote_s = _timed(lambda: _add(replay, windows))
        written = _rss()
        soak_s = windows * WINDOW_S
        results: list[Any] = []
        judge_s = _timed(lambda: results.extend(_judged(records, replay, soak_s)))
        judged = _rss()
        records.put_checks(replay.run.id, MODEL, results)
        report_s = _timed(lambda: write_soak_report(records, replay.run.id, "replay", home))
        size = replay.sizes()
    database = sum(file.stat().st_size for file in home.glob("switchyard.db*"))
    growth = max(written, judged) - begin
    rows = [
        ("windows and days", f"{windows}, {windows * WINDOW_S / DAY_S:.2f}", ""),
        ("database", f"{database / 1e6:.1f} MB", f"< {DATABASE_BYTES / 1e6:.0f} MB"),
        ("rows", f"{size['sample_rows']} of series, {size['evidence_rows']} windows", ""),
        ("bytes per sample", f"{size['sample_bytes'] / size['samples']:.2f}", ""),
        ("bytes per window", f"{size['evidence_bytes'] / size['evidence_rows']:.0f}", ""),
        ("write, a window", f"{1000 * wrote_s / max(windows - 1, 1):.0f} ms", ""),
        ("judge all", f"{judge_s:.2f} s, {gate(results).value}", ""),
        ("report", f"{report_s:.2f} s", f"< {REPORT_S:g} s"),
        ("memory, growth while written and judged", f"{growth / 1e6:.1f} MB", f"< {GROWTH_BYTES / 1e6:.0f} MB"),
        ("memory, peak of the process, report included", f"{_peak() / 1e6:.0f} MB", ""),
    ]
    reached = database < DATABASE_BYTES and report_s < REPORT_S and growth < GROWTH_BYTES
    return {"rows": rows, "reached": reached}


def _add(replay: Replay, windows: int) -> None:
    for index in range(1, windows):
        replay.add(index)


def _judged(records: Records, replay: Replay, soak_s: float) -> list[Any]:
    rows = records.list_evidence(replay.run.id, model_id=MODEL, arm="candidate", kind="soak")
    summaries = [window_summary(row.payload) for row in sorted(rows, key=lambda row: row.key)]
    return judge_windows([], summaries, soak_s=soak_s, limits=LIMITS, is_over=True)


def _timed(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _rss() -> int:
    return int(psutil.Process().memory_info().rss)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
