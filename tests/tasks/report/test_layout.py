"""How a report lies on a screen: words clear of lines in the plots, and no sideways scroll on a telephone."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.evidence.nights import NightSeries
from tasks.records.series import Series
from tasks.records.store import open_records
from tasks.report import plots
from tasks.report.report import write_report
from tasks.verdicts.drift import Change, Night, Shape
from tasks.verdicts.verdict import CheckResult, Verdict

CHAR, ABOVE, BELOW = 6.6, 9.0, 3.0  # of a text at 12 px: the width of a character, about, and its height over the line
NAMES = {"incumbent": "llama.cpp", "candidate": "mistral.rs"}
times = st.lists(st.floats(0.001, 200_000), min_size=1, max_size=30)


class Box(NamedTuple):
    """What a thing covers."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether the two share a pixel."""
        across = self.left + 0.5 < other.right and other.left + 0.5 < self.right
        return across and self.top + 0.5 < other.bottom and other.top + 0.5 < self.bottom


def texts(svg: ElementTree.Element) -> dict[str, Box]:
    """Every text by its words and place."""
    found = {}
    for one in svg.iter("text"):
        words, x, y = "".join(one.itertext()), float(one.attrib["x"]), float(one.attrib["y"])
        width = CHAR * len(words)
        left = x - {"end": width, "middle": width / 2}.get(one.attrib.get("text-anchor", ""), 0.0)
        found[f"{words} at {y:g}, {x:g}"] = Box(left, y - ABOVE, left + width, y + BELOW)
    return found


def drawn(svg: ElementTree.Element) -> Iterator[Box]:
    """Every line and mark; the places at which a path begins or to which it goes."""
    for one in svg.iter("line"):
        (x1, x2), (y1, y2) = (sorted(float(one.attrib[f"{axis}{end}"]) for end in "12") for axis in "xy")
        yield Box(x1 - 0.5, y1 - 0.5, x2 + 0.5, y2 + 0.5)
    for one in svg.iter("circle"):
        x, y, r = (float(one.attrib[name]) for name in ("cx", "cy", "r"))
        yield Box(x - r, y - r, x + r, y + r)
    for one in svg.iter("path"):
        for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", one.attrib["d"]):
            yield Box(float(x) - 0.5, float(y) - 0.5, float(x) + 0.5, float(y) + 0.5)


def assert_clear(figure: str) -> None:
    """No words on words, none under a line or a mark but a legend's own, all of them within the picture."""
    svg = ElementTree.fromstring(figure).find("svg")
    assert svg is not None
    width, height = map(float, svg.attrib["viewBox"].split()[2:])
    words, shapes = texts(svg), list(drawn(svg))
    for (a, here), (b, there) in itertools.combinations(words.items(), 2):
        assert not here.meets(there), f"{a} lies on {b}"
    for name, box in words.items():
        assert box.left >= -2, name
        assert box.right <= width + 2, name
        assert box.bottom <= height, name
        assert not [shape for shape in shapes if shape.meets(box)], name


@given(times, times)
@settings(max_examples=60, derandomize=True, deadline=None)
def test_words_over_latencies_are_clear(ours: list[float], theirs: list[float]) -> None:
    """Also between the two engines' rows, which share an axis."""
    assert_clear(plots.strips("Latency", "ms", {"incumbent": ours, "candidate": theirs}, NAMES))


@given(st.lists(st.tuples(st.lists(st.floats(0.05, 500), min_size=1, max_size=6), st.floats(1.01, 3)), min_size=1))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_words_over_ratios_are_clear(rows: list[tuple[list[float], float]]) -> None:
    """The limit, the line of equality and the grid stop short of every row's words."""
    made = [
        plots.RatioRow(
            "Throughput, 4 at a time", ratios, ratios[:1], max(ratios), min(ratios), 600.0, limit, "INCONCLUSIVE"
        )
        for ratios, limit in rows[:6]
    ]
    assert_clear(plots.ratios("Ratios", made))


@given(st.lists(st.floats(1e6, 4e11), min_size=2, max_size=20), st.floats(0.2, 400_000))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_words_over_memory_are_clear(values: list[float], step_s: float) -> None:
    """The legend and the unit stand above the curves."""
    series = Series(np.arange(len(values)) * step_s, np.array(values))
    assert_clear(plots.memory_lines("Memory", {"incumbent": series, "candidate": series}, NAMES))


@given(st.lists(st.tuples(st.integers(0, 2000), st.floats(0, 12)), min_size=1, max_size=20), st.floats(0.05, 4))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_words_over_divergences_are_clear(places: list[tuple[int, float]], tie_gap: float) -> None:
    """Marks may lie anywhere, on the limit too: its name stands above the axes."""
    found = [plots.Divergence(at, gap / 2, gap, gap < tie_gap) for at, gap in places]
    assert_clear(plots.divergences("Where", found, tie_gap))


@given(st.lists(st.tuples(st.integers(1, 60_000), st.integers(1, 60_000)), min_size=1, max_size=20))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_words_over_token_counts_are_clear(pairs: list[tuple[int, int]]) -> None:
    """Of prompts from one token to a whole context."""
    assert_clear(plots.token_counts("Tokens", pairs))


@given(
    st.lists(st.floats(0.05, 50_000), min_size=3, max_size=40),
    st.lists(st.integers(1, 39), max_size=4),
    st.integers(2, 30),
    st.sampled_from(["ttft_ms", "load_s", "speed", "failures", "throughput_c4_tok_s"]),
)
@settings(max_examples=60, derandomize=True, deadline=None)
def test_words_over_nights_are_clear(values: list[float], builds: list[int], since: int, metric: str) -> None:
    """Builds that come, steps and ramps are lines below the legend."""
    at = [1.79e9 + number * 86_400 for number in range(len(values))]
    nights = [
        Night(when, value, build=f"mistral.rs 0.{sum(number >= one for one in builds)}")
        for number, (when, value) in enumerate(zip(at, values, strict=True))
    ]
    n = min(since, len(values) - 1)
    shapes: tuple[Shape, ...] = ("failures",) if metric == "failures" else ("step", "ramp")
    changes = [
        Change(
            shape=shape,
            since=at[-n],
            found=at[-1],
            before=values[0],
            now=values[-1],
            nights=n,
            nights_before=len(values) - n,
            z=5.0,
            limit=4.0,
        )
        for shape in shapes
    ]
    one = NightSeries("m", "candidate", "mistral.rs 0.1", metric, tuple(nights), tuple(changes))
    assert_clear(plots.nights("Nights", {"incumbent": replace(one, changes=()), "candidate": one}))


# --- the page, in a browser


LONG = "x" * 300
PLAN: dict[str, Any] = {
    "name": "n" * 128,
    "incumbent": {"engine": "llama.cpp"},
    "candidate": {"engine": "mistral.rs"},
    "models": [{"id": LONG, "gguf": f"/models/{LONG}.gguf"}],
    "measure": {"looks": [3, 6], "concurrency": [1]},
    "limits": {},
}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A report in which every word that comes from outside has no place to break."""
    with open_records(tmp_path / "records.db") as records:
        environment = {
            "packages": {"p" * 200: LONG},
            "cpu": LONG,
            "command": ["switchyard", "evaluate", f"/{LONG}.toml"],
        }
        run = records.start_run("evaluate", PLAN["name"], PLAN, environment=environment)
        arms = [{"arm": arm, "engine": LONG, "version": LONG, "form": LONG} for arm in ("incumbent", "candidate")]
        engines = [{**one, "argv": [LONG, "--x", LONG], "unsupported": [f"{LONG}: {LONG}"]} for one in arms]
        for arm in ("incumbent", "candidate"):
            behaviours = {LONG: {"group": LONG, "claim": LONG, "outcome": "passed", "observed": LONG}}
            records.put_evidence(
                run.id, LONG, arm, "compatibility", {"behaviours": behaviours}, environment={"engines": engines}
            )
        checks = [
            CheckResult(
                check=f"parity.{LONG}", verdict=Verdict.FAIL, value=1e9, limit=1.0, unit="failures/day", why=LONG
            ),
            CheckResult(check="performance.ttft_p50_ratio", verdict=Verdict.INCONCLUSIVE, why=f"'{LONG}'"),
        ]
        outcome = {
            "run_id": run.id,
            "verdict": "FAIL",
            "models": [
                {
                    "model": LONG,
                    "verdict": "FAIL",
                    "checks": [check.model_dump(mode="json") for check in checks],
                    "risks": [
                        dict.fromkeys(("risk", "likelihood", "impact", "mitigation"), LONG)
                        | {"verdict": "FAIL", "decided_by": [LONG]}
                    ],
                }
            ],
            "cannot_prove": [LONG],
        }
        return write_report(records, run.id, outcome, tmp_path / "report.html")


@pytest.mark.parametrize("width", [320, 390, 660, 1280])
def test_nothing_is_wider_than_the_screen(page: Path, width: int) -> None:
    """With everything unfolded, whatever is in it."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs a browser's driver: pip install playwright")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs a browser: apt install chromium, or put google-chrome on the PATH")
    with sync_api.sync_playwright() as playwright, playwright.chromium.launch(executable_path=program) as browser:
        view = browser.new_page(viewport={"width": width, "height": 800})
        view.goto(page.as_uri())
        view.evaluate("() => document.querySelectorAll('details').forEach(one => one.open = true)")
        assert view.evaluate("() => document.documentElement.scrollWidth") <= width
