"""Figures as a reader wants them."""

from __future__ import annotations

import ast
import itertools
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.units import ago, duration, figure, number_of, quantity, size

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (None, "ms", "not measured"),
        (0.0, "failures", "0 failures"),
        (1, "failures", "1 failure"),
        (1, "failures/day", "1 failure/day"),
        (1.5, "failures/day", "1.5 failures/day"),
        (1, "unexplained divergences", "1 unexplained divergence"),
        (1, "ms", "1 ms"),
        (1, "s", "1 s"),
        (12345.678, "ms", "12,346 ms"),
        (11400.0, "tok/s", "11,400 tok/s"),
        (0.97654, "share", "97.7%"),
        (0.99996, "share", "99.996%"),
        (1.0512345, "ratio", "1.05×"),
        (0.09106, "ratio", "0.0911×"),
        (1.5 * 2**30, "bytes", "1.50 GiB"),
        (5e7, "bytes/day", "50 MB/day"),
        (0.0000123, "nats", "0.000012 nats"),
        (1e-9, "nats", "under 0.000001 nats"),
        (0.00281, "nats", "0.00281 nats"),
    ],
)
def test_quantities_read_alike_everywhere(value: float | None, unit: str, shown: str) -> None:
    """Three significant digits, the unit behind; what is missing is said."""
    assert quantity(value, unit) == shown


@pytest.mark.parametrize(
    ("value", "limit", "unit", "shown"),
    [
        (1.1004, 1.1, "ratio", "1.1004×"),
        (1.1, 1.1, "ratio", "1.1×"),
        (0.9696, 0.97, "share", "96.96%"),
        (2484.3, 2484.0, "ms", "2,484.3 ms"),
        (10.9, 1.1, "ratio", "10.9×"),
    ],
)
def test_a_value_beyond_its_limit_never_reads_like_the_limit(value: float, limit: float, unit: str, shown: str) -> None:
    """As many digits as set the two apart, and no more."""
    assert quantity(value, unit, beside=limit) == shown


@given(st.floats(-1e12, 1e12))
def test_any_figure_is_one_that_a_person_reads(number: float) -> None:
    """No exponent, thousands marked, and as near to the number as three digits can be."""
    shown = figure(number)
    assert re.fullmatch(r"(under )?-?\d{1,3}(,\d{3})*(\.\d{1,6})?", shown), shown
    if not shown.startswith("under"):
        assert float(shown.replace(",", "")) == pytest.approx(number, rel=5.1e-3, abs=1e-6)


def test_no_text_is_made_with_an_exponent() -> None:
    """`{x:.3g}` prints 11400 as 1.14e+04: people's figures go through `engines.units`."""
    found = []
    for file in [
        path for folder in ("engines", "tasks", "migrations", "flows") for path in ROOT.glob(f"{folder}/**/*.py")
    ]:
        specs = (
            one.format_spec for one in ast.walk(ast.parse(file.read_text())) if isinstance(one, ast.FormattedValue)
        )
        words = (
            "".join(str(part.value) for part in spec.values if isinstance(part, ast.Constant))
            for spec in specs
            if isinstance(spec, ast.JoinedStr)
        )
        found += [f"{file.relative_to(ROOT)}: {word}" for word in words if re.search(r"\.\d+[ge]$", word)]
    assert not found, "\n".join(found)


# what is counted in a user's text; a name before one of these may be a verb's (`mistral.rs answers`)
COUNTED = "windows processes cycles conversations prompts requests failures blocks positions divergences texts fields "
COUNTED += "parameters behaviours hosts models tokens pairs copies checks calls chunks pieces events connections"
# a name before a verb, a measured number
NO_COUNT = r"\.engine$|\['engine'\]$|model_id$|finishes$|^(figure|duration|number_of)\("
NEVER_ONE = {
    "needed": "blocks of a power, 3 or more",
    "outcomes[0].look": "a look, at 3 blocks or more",
    "ours[1]": "requests and starts",
    "theirs['prompt_tokens']": "differs from another number in the same words, and may be None",
}


def test_one_is_not_many() -> None:
    """`1 windows`: what is counted in a text goes through `number_of`, unless it is a constant."""
    words = "|".join(COUNTED.split())
    found = []
    for folder in ("tasks", "flows", "engines/yard", "engines/client"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for text in (one for one in ast.walk(ast.parse(file.read_text())) if isinstance(one, ast.JoinedStr)):
                for value, after in itertools.pairwise(text.values):
                    if not isinstance(value, ast.FormattedValue) or not isinstance(after, ast.Constant):
                        continue
                    shown = ast.unparse(value.value)
                    known = shown.isupper() or shown in NEVER_ONE or re.search(NO_COUNT, shown)
                    if not known and re.match(rf" ((?!of\b|gets\b)[a-z]+ )?({words})\b", str(after.value)):
                        found.append(f"{file.relative_to(ROOT)}:{value.lineno}: {shown}{after.value}")
    assert not found, "\n".join(found)


def test_numbers_of_things() -> None:
    assert [number_of(n, "window") for n in (0, 1, 2, 1204)] == ["0 windows", "1 window", "2 windows", "1,204 windows"]
    assert [number_of(2, noun) for noun in ("process", "copy", "entry", "key")] == [
        "2 processes", "2 copies", "2 entries", "2 keys",
    ]  # fmt: skip


def test_figures_keep_their_size() -> None:
    """Rounding does not lose a digit before the point."""
    assert [figure(n) for n in (100, 1000, 99999, 0.1, 123456789)] == ["100", "1,000", "99,999", "0.1", "123,456,789"]


def test_sizes_and_durations_choose_their_unit() -> None:
    """What is missing is said, and what has no end."""
    sizes = [size(n) for n in (None, 310, 2048, 47.6 * 2**20, 3 * 2**30, 5 * 2**40, 5 * 2**50)]
    assert sizes == ["not measured", "310 B", "2.0 KiB", "47.6 MiB", "3.00 GiB", "5.00 TiB", "5,120.00 TiB"]
    assert [duration(s) for s in (12, 150, 10_800, 259_200)] == ["12 s", "2.5 min", "3 h", "3 days"]
    assert figure(math.inf) == "infinite"


def test_ago_speaks_in_one_unit() -> None:
    """A clock that was set back is no negative time."""
    spoken = [ago(1000.0 - seconds, now=1000.0) for seconds in (-5, 0, 59, 60, 3600, 200_000)]
    assert spoken == ["0 s", "0 s", "59 s", "1 min", "1 h", "2 d"]
