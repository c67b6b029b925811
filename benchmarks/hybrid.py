"""A crowd on llama.cpp with one slot, on that with vLLM for what is too much for it, and on vLLM alone.

    python -m benchmarks.hybrid [--seconds N] [--users N] [--waiting N]

One yard over SmolLM2 135M as F16, which `switchyard convert` writes as a directory for vLLM. Each user has one
conversation after the other, three turns each, every answer of the same length, without a pause. All ways run in the
same yard, one after the other: the overflow off, the overflow on, and promoted to vLLM. What is printed: conversations
that were completed in the window, and the time to the first token that users saw, the wait for their turn included.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.table import Table

from engines.client.client import client_session, stream_chat
from engines.errors import EngineNotFound, SwitchyardError
from engines.model.requantize import requantize
from engines.process import process
from engines.process.serving import free_port
from engines.registry import driver
from engines.settings import Endpoint
from engines.vllm.convert import convert
from engines.yard.client import YardClient, wait_until_serving
from migrations.demo import smollm2

MODEL, FIRST, SECOND = "smollm2", "llama.cpp", "vllm"
WORDS = ("river", "lamp", "stone", "garden", "letter", "bridge", "apple", "window", "music", "forest")
TURNS, PROMPT_WORDS, TOKENS, CONTEXT = 3, 60, 48, 1024
SETTLE_S, UP_S, POLL_S, STALL_S = 20.0, 600.0, 0.5, 120.0
PLAN = """
[incumbent]
engine = "{first}"
[candidate]
engine = "{second}"
[candidate.env]
VLLM_CPU_KVCACHE_SPACE = "1"
[settings]
context_tokens = {context}
parallel = 1
threads = {threads}
[[models]]
id = "{model}"
gguf = "{gguf}"
[models.sources]
{second} = "{directory}"
[models.overflow]
engine = "{second}"
waiting = {waiting}
parallel = {users}
[yard]
port = {port}
"""


@dataclass
class Seen:
    """What the users of one way saw in the window."""

    conversations: int = 0
    ttft_ms: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    load: float = 0.0  # the machine's load average when it ended: what else ran is in the figures


def main() -> int:
    """Exit code 2 where an engine is not here."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=120, help="of each way, after it has settled")
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--waiting", type=int, default=1, help="requests that may wait for llama.cpp")
    options = parser.parse_args()
    out = Console()
    with tempfile.TemporaryDirectory(prefix="hybrid-") as folder:
        try:
            rows = _measured(Path(folder), options, lambda line: out.print(line, highlight=False))
        except EngineNotFound as error:
            out.print(f"not measured: {error}", highlight=False)
            return 2
    table = Table("served by", "conversations/min", "first token ms, p50", "p95", "failed", "load", "answers by engine")
    for way, seen, by in rows:
        table.add_row(*cells(way, seen, by, options.seconds))
    out.print(table)
    out.print(
        f"{os.cpu_count()} CPUs ({platform.machine()}); {options.users} users, {TURNS} turns, "
        f"{PROMPT_WORDS} words in and {TOKENS} tokens out each; {options.seconds:g} s a way; waiting {options.waiting}"
    )
    return 1 if any(seen.failed for _, seen, _ in rows) else 0


def cells(way: str, seen: Seen, by: Counter[str], seconds: float) -> list[str]:
    """A row of the table; a dash where fewer than two answers ended in the window."""
    low, high = "-", "-"
    if len(seen.ttft_ms) > 1:
        percent = statistics.quantiles(seen.ttft_ms, n=20, method="inclusive")
        low, high = f"{percent[9]:,.0f}", f"{percent[18]:,.0f}"
    shares = ", ".join(f"{engine} {count}" for engine, count in sorted(by.items()))
    return [
        way,
        f"{seen.conversations * 60 / seconds:.1f}",
        low,
        high,
        str(len(seen.failed)),
        f"{seen.load:.0f}",
        shares,
    ]


def _measured(
    folder: Path, options: argparse.Namespace, say: Callable[[str], None]
) -> list[tuple[str, Seen, Counter[str]]]:
    found = driver(SECOND).find()
    gguf, directory, port = folder / "F16.gguf", folder / "hf", free_port()
    requantize(smollm2().gguf, gguf, "F16")
    convert(found, gguf, directory, folder)
    plan = folder / "plan.toml"
    how = {"first": FIRST, "second": SECOND, "model": MODEL, "gguf": gguf, "directory": directory, "context": CONTEXT}
    how |= {"port": port, "threads": os.cpu_count(), "waiting": options.waiting, "users": options.users}
    plan.write_text(PLAN.format(**how))
    child = process.start(
        "yard",
        [sys.executable, "-m", "flows.cli", "serve", str(plan)],
        state_dir=folder,
        log_path=folder / "yard.log",
        env={**os.environ, "SWITCHYARD_HOME": str(folder / "home")},
    )
    yard, rows = YardClient(folder / "home"), []
    try:
        wait_until_serving(yard, [MODEL], child.poll, stall_s=STALL_S, say=lambda _: None)
        ways: list[tuple[str, dict[str, Any]]] = [
            ("overflow", {"on": False}),
            ("overflow", {"on": True}),
            ("promote", {"to": SECOND}),
        ]
        for way, (order, fields) in zip((FIRST, f"{FIRST} + {SECOND}", SECOND), ways, strict=True):
            say(yard.order(order, say, model=MODEL, **fields))
            _settled(yard, overflows=fields.get("on", False))
            before = time.time()
            seen = asyncio.run(_crowd(f"http://127.0.0.1:{port}", way, options.users, options.seconds))
            by = Counter(one["engine"] for one in yard.samples(MODEL) if one["at"] >= before)
            rows.append((way, seen, by))
            say(f"{way}: {seen.conversations} conversations; failed: {seen.failed[:1]}")
    finally:
        child.stop()
    return rows


def _settled(yard: YardClient, *, overflows: bool) -> None:
    deadline = time.monotonic() + UP_S
    while True:
        (route,) = yard.status()["models"]
        if route["overflow"]["takes"] == overflows:
            return
        if time.monotonic() > deadline:
            raise SwitchyardError(f"the overflow is not as ordered: {route['overflow']['why']}")
        time.sleep(POLL_S)


async def _crowd(address: str, way: str, users: int, seconds: float) -> Seen:
    """So many users at once; what ends in the window that begins SETTLE_S later counts."""
    seen = Seen()
    begins = time.monotonic() + SETTLE_S
    ends = begins + seconds
    async with client_session() as session, asyncio.timeout(SETTLE_S + seconds + UP_S):
        await asyncio.gather(
            *(_user(session, address, f"{way}, {number}", begins, ends, seen) for number in range(users))
        )
    seen.load = os.getloadavg()[0]
    return seen


async def _user(
    session: aiohttp.ClientSession, address: str, user: str, begins: float, ends: float, seen: Seen
) -> None:
    dice = random.Random(user)  # a conversation of an earlier way would stay where it was
    endpoint = Endpoint(base_url=address, model_id=MODEL, engine="yard")
    while time.monotonic() < ends:
        messages = [{"role": "system", "content": f"You talk with user {user}: {dice.random()}"}]
        for _ in range(TURNS):
            messages.append({"role": "user", "content": " ".join(dice.choices(WORDS, k=PROMPT_WORDS))})
            body = {"messages": messages, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
            record = await stream_chat(session, endpoint, body)
            now = time.monotonic()
            if record.error:
                seen.failed.append(record.error)
                break
            if begins <= now < ends:
                seen.ttft_ms.append(record.ttft_ms)
            messages.append({"role": "assistant", "content": record.text or ""})
        else:
            seen.conversations += begins <= time.monotonic() < ends


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
