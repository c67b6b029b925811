"""One model in several quants on both engines: which quant an engine has no fast path for.

    python -m benchmarks.quants [--rounds N] [--requests N]

SmolLM2 135M as Q4_0, Q4_1, Q8_0 and F16 (made from the packaged Q4_1: speed depends on the kind of the weights, not on
their values) and Gemma 3 270M as Q4_K_M. One thread each, the same prompts, greedy, the same number of tokens. Each
round starts every pair anew in random order and asks it alone; a ratio compares the two engines of one round.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from engines.client.client import client_session, stream_chat
from engines.model.requantize import requantize
from engines.process.serving import free_port, serving
from engines.registry import driver
from engines.settings import Endpoint, Serve
from migrations.demo import gemma3, smollm2
from migrations.plan import ModelPlan

ENGINES = {"llama.cpp": "binary", "mistral.rs": "hosted"}
QUANTS = ("Q4_0", "Q4_1", "Q8_0", "F16")
WORDS = ("river", "lamp", "stone", "garden", "letter", "bridge", "apple", "window", "music", "forest")
PROMPT_WORDS, TOKENS, WARMUP = 150, 32, 2


class Times(NamedTuple):
    """Milliseconds: to the first token (the prompt is read), and for each one after it."""

    first: float
    each: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=5, help="to each engine in a round")
    options = parser.parse_args()
    dice = random.Random(7)
    with tempfile.TemporaryDirectory() as folder:
        files = dict(weights(Path(folder)))
        measured: dict[tuple[str, str], list[Times]] = {(name, engine): [] for name in files for engine in ENGINES}
        for number in range(options.rounds):
            for name, engine in dice.sample(sorted(measured), len(measured)):
                measured[name, engine].append(measure(engine, files[name], Path(folder), options.requests, dice))
            print(f"round {number + 1} of {options.rounds}", flush=True)
    print(f"\n{os.cpu_count()} cores, 1 thread an engine; {PROMPT_WORDS} words in, {TOKENS} tokens out; medians\n")
    print(f"{'weights':22} {'to the first token, ms':>30} {'a token, ms':>30}")
    print(
        f"{'':22} {'llama.cpp':>10} {'mistral.rs':>10} {'ratio':>8} {'llama.cpp':>10} {'mistral.rs':>10} {'ratio':>8}"
    )
    for name in files:
        row = f"{name:22}"
        for at in (0, 1):
            ours, theirs = ([times[at] for times in measured[name, engine]] for engine in ENGINES)
            ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
            row += f" {statistics.median(ours):10.1f} {statistics.median(theirs):10.1f} {ratio:7.2f}x"
        print(row)


def weights(folder: Path) -> Iterator[tuple[str, ModelPlan]]:
    """Every model that is measured, by a name for the table."""
    packaged, gemma = smollm2(), gemma3(folder)
    for quant in QUANTS:
        if quant in packaged.gguf.name:
            yield f"smollm2-135m {quant}", packaged
        else:
            file = requantize(packaged.gguf, folder / f"{quant}.gguf", quant).path
            yield f"smollm2-135m {quant}", packaged.model_copy(update={"gguf": file})
    yield "gemma3-270m Q4_K_M", gemma


def measure(engine: str, model: ModelPlan, folder: Path, requests: int, dice: random.Random) -> Times:
    """Medians over so many requests to a fresh start of `engine`."""
    one = driver(engine)
    found = one.find(ENGINES[engine])  # type: ignore[arg-type]
    same = {"context_tokens": 1024, "threads": 1, "gpu_layers": 0, "host_cache_mib": 0}
    settings = model.settings.model_copy(update=same)
    serve = Serve(model_id="m", gguf=model.gguf, port=free_port(), settings=settings)
    with serving(one, found, serve, state_dir=folder, log_path=folder / "log") as served:
        times = asyncio.run(asked(served.endpoint, one.neutral_body() or {}, requests + WARMUP, dice))[WARMUP:]
    return Times(statistics.median(t.first for t in times), statistics.median(t.each for t in times))


async def asked(endpoint: Endpoint, neutral: dict[str, object], requests: int, dice: random.Random) -> list[Times]:
    times = []
    async with client_session() as session:
        for _ in range(requests):
            prompt = " ".join(dice.choices(WORDS, k=PROMPT_WORDS))
            asks = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, **neutral}
            record = await stream_chat(session, endpoint, {"messages": [{"role": "user", "content": prompt}], **asks})
            if record.error:
                raise SystemExit(f"{endpoint.engine}: {record.error}")
            times.append(Times(record.ttft_ms, record.tpot_ms))
    return times


if __name__ == "__main__":
    main()
