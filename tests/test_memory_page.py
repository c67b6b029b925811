"""docs/memory.md is what its command makes of measured cells, and the estimate still predicts them."""

from __future__ import annotations

import statistics
from dataclasses import replace

import installed

from benchmarks.memory import ENGINES, HELD_OUT, RESULTS, Row, cells_of, chosen, picture, predicted, read, written
from engines.model.header import read_header
from migrations.plan import ModelPlan

CELLS = read(RESULTS)


def errors(rows: list[Row]) -> list[float]:
    return sorted(abs(row.error) for row in rows)


def test_the_page_and_its_picture_are_what_the_command_makes() -> None:
    page = RESULTS.with_suffix(".md").read_text(encoding="utf-8")
    assert written(page, CELLS) == page
    assert RESULTS.with_suffix(".svg").read_text(encoding="utf-8") == picture(CELLS)


def test_sixty_cells_are_within_5_percent_in_the_median_and_15_at_p95() -> None:
    """Of each engine; at least 95% of all lie in their interval."""
    cells = [row for row in CELLS if row.cell not in HELD_OUT]
    assert len(cells) >= 60
    for engine in ENGINES:
        off = errors([row for row in cells if row.cell.engine == engine])
        assert statistics.median(off) <= 0.05, engine
        assert statistics.quantiles(off, n=20, method="inclusive")[18] <= 0.15, engine
    assert sum(row.is_covered for row in cells) >= 0.95 * len(cells)


def test_cells_held_out_are_within_the_same_and_in_tables_of_their_own() -> None:
    held_out = [row for row in CELLS if row.cell in HELD_OUT]
    assert {row.cell for row in held_out} == set(HELD_OUT)
    off = errors(held_out)
    assert statistics.median(off) <= 0.05
    assert statistics.quantiles(off, n=20, method="inclusive")[18] <= 0.15
    before, _, behind = RESULTS.with_suffix(".md").read_text(encoding="utf-8").partition("### Held out")
    for row in CELLS:
        line = f"| {' | '.join(cells_of(row))} |"
        assert ((line in before), (line in behind)) == (row not in held_out, row in held_out)


def test_the_estimate_is_the_one_of_the_page() -> None:
    """Of the model that is installed; a changed estimate needs `python -m benchmarks.memory` again."""
    plan = ModelPlan(id="m", gguf=installed.smollm2())
    header = read_header(plan.gguf)
    ours = [row for row in CELLS if row.cell.model == "smollm2-135m Q4_1"]
    assert ours
    for row in ours:
        assert predicted(replace(row, low=0, expected=0, high=0, expected_mapped=0), plan, header) == row


def test_a_run_that_was_broken_off_measures_the_rest() -> None:
    """So many cells of each engine and those held out in all, those before it among them, and none twice."""
    whole = chosen(10, set(), ENGINES)
    assert len(whole) == len(set(whole)) == 10 * len(ENGINES) + len(HELD_OUT)
    rest = chosen(10, set(whole[:7]), ENGINES)
    assert {*whole[:7], *rest} == set(whole)
    assert len(rest) == len(whole) - 7
    assert {cell.engine for cell in chosen(10, set(), ["mistral.rs"])} == {"mistral.rs"}
