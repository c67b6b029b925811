"""Plots of a report as inline SVG: small, without scripts, scaled by their viewBox, drawn for light and dark.

The incumbent is a blue circle and the candidate an orange diamond, everywhere; `report_template.html` has the colours.
Each plot has a title and a description in words, and the width of a telephone; a page puts several side by side.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from engines.units import duration, figure, number_of, quantity, size
from tasks.evidence.nights import NightSeries, day_of
from tasks.evidence.soak.judge import DAY_S
from tasks.records.series import Series
from tasks.report.markup import Html, el, joined
from tasks.verdicts.drift import Change
from tasks.verdicts.statistics import percentile

WIDTH = 400
LEFT, RIGHT = 46.0, 380.0
LOG_FROM = 3.0  # medians further apart than this are drawn on a logarithmic axis
MAX_DOTS = 400
MAX_POINTS = 600
TICK_GAP = 42.0
CHAR = 6.8  # the width of a digit, about
ARMS = ("incumbent", "candidate")
Names = Mapping[str, str]


@dataclass(frozen=True)
class Scale:
    """Values `low` to `high` on pixels `start` to `end`, linear or logarithmic; a value outside is put on the edge."""

    low: float
    high: float
    start: float = LEFT
    end: float = RIGHT
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of `value`."""
        value = min(max(value, self.low), self.high)
        low, high, here = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (here - low) / (high - low) * (self.end - self.start)

    def ticks(self, gap: float = TICK_GAP) -> list[float]:
        """Round values, at least `gap` pixels apart."""
        if not self.log:
            least = (self.high - self.low) / max(abs(self.end - self.start) / gap, 1.0)
            power = 10.0 ** math.floor(math.log10(least))
            step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            return [number * step for number in range(first, last + 1)]
        chosen: list[float] = []
        for value in _round_values(self.low, self.high):
            if all(abs(self.at(value) - self.at(other)) >= gap for other in chosen):
                chosen.append(value)
        return sorted(chosen)


@dataclass(frozen=True)
class RatioRow:
    """One metric: ratios of counted and of discarded blocks, the interval, the limit and the verdict."""

    label: str
    counted: Sequence[float]
    void: Sequence[float]
    ratio: float | None
    low: float | None
    high: float | None
    limit: float
    verdict: str


@dataclass(frozen=True)
class Divergence:
    """Where two answers part: the position, and in nats the incumbent's top-two gap and its gap to the other's token.

    `explained` is None where no engine shows the logprobs there.
    """

    position: int
    top_gap: float | None
    choice_gap: float | None
    explained: bool | None


def strips(title: str, unit: str, samples: Mapping[str, Sequence[float]], names: Names) -> Html:
    """Every sample of both engines as a mark, with quartile box and median; logarithmic where medians differ much."""
    scale = _strip_scale([list(samples[arm]) for arm in ARMS])
    rows, summary, bands = [], [], []
    for arm, y in zip(ARMS, (44.0, 96.0), strict=True):
        values = sorted(samples[arm])
        words = _strip_words(values, unit)
        summary.append(f"{arm} {names[arm]}: {words}")
        rows += [_text(8, y - 20, f"{arm}: {words}", class_=f"label {arm}"), *_strip(values, scale, y, arm)]
        bands.append((y - 15, y + 15))
    words = f"{unit}, logarithmic axis" if scale.log else unit
    drawing = joined(_x_axis(scale, 122.0, words, bands), *rows)
    read = "One mark per request of the blocks that count; the box holds the middle half, the thick bar is the median."
    return _plot(title, "; ".join(summary), drawing, 154, read)


def ratios(title: str, rows: Sequence[RatioRow]) -> Html:
    """Per metric the ratio of every block, the interval and the limit, on one logarithmic axis; right of 1 is worse."""
    scale = _ratio_scale(rows)
    top, step = 8.0, 62.0
    bottom = top + step * len(rows)
    tops = [top + step * number for number in range(len(rows))]
    bands = [(here + 30, here + 59) for here in tops]  # a row's words stand above its band, clear of every line
    drawn: list[Html] = [_x_axis(scale, bottom, "candidate ÷ incumbent, per block; right of 1 is worse", bands)]
    drawn += [_line(scale.at(1.0), start, scale.at(1.0), end, class_="equal") for start, end in bands]
    for here, row in zip(tops, rows, strict=True):
        drawn += _ratio_row(row, scale, here)
    summary = "; ".join(f"{row.label} {row.verdict}: {_ratio_words(row)}" for row in rows)
    read = (
        "Dots: blocks (hollow: discarded, not counted). Diamond and bar: mean and interval. A metric passes where the "
        "whole bar is left of the dashed limit, fails where it is right of it, and is undecided where it crosses."
    )
    return _plot(title, summary, joined(*drawn), bottom + 32, read)


def memory_lines(title: str, series: Mapping[str, Series], names: Names) -> Html:
    """Memory of each engine over its own time since the start of its load, thinned without losing a peak."""
    shown = {arm: thinned(series[arm]) for arm in ARMS if arm in series and len(series[arm])}
    points = [point for parts in shown.values() for part in parts for point in part]
    lowest, highest = min(v for _, v in points), max(v for _, v in points)
    low = 0.0 if lowest < highest / 2 else lowest - 0.2 * (highest - lowest or highest * 0.1)
    x = Scale(0.0, max(max(t for t, _ in points), 1.0))
    y = Scale(low, highest * 1.02 if highest > low else low + 1.0, 194.0, 64.0)
    unit = 2**30 if y.high >= 2 * 2**30 else 2**20
    drawn = [_time_axis(x, 194.0), *_y_grid(Scale(y.low / unit, y.high / unit, y.start, y.end))]
    drawn.append(_text(8, 50, "GiB" if unit == 2**30 else "MiB"))
    summary = []
    for number, arm in enumerate(shown):
        words = _memory_words(series[arm])
        summary.append(f"{arm} {names[arm]}: {words}")
        drawn.append(_mark(arm, 14, 12.0 + 18 * number, 4))
        drawn.append(_text(24, 16.0 + 18 * number, f"{arm}: {words}", class_=f"label {arm}"))
        drawn += [el("path", d=_path(part, x, y), class_=f"curve {arm}") for part in shown[arm]]
    read = "Anonymous memory and swap of the engine's processes" + (
        "." if low == 0.0 else "; the axis does not start at 0."
    )
    return _plot(title, "; ".join(summary), joined(*drawn), 226, read)


def divergences(title: str, found: Sequence[Divergence], tie_gap: float) -> Html:
    """Position of every first difference against how near a tie it was; under the line a near tie explains it."""
    gaps = [gap for one in found for gap in (one.top_gap, one.choice_gap) if gap is not None and math.isfinite(gap)]
    x = Scale(0.0, max(1.0, *(one.position for one in found)) * 1.05)
    y = Scale(0.0, max([*gaps, tie_gap]) * 1.15, 200.0, 34.0)
    drawn: list[Html] = [_x_axis(x, 200.0, "tokens before the first difference"), *_y_grid(y)]
    drawn.append(_line(LEFT, y.at(tie_gap), RIGHT, y.at(tie_gap), class_="limit"))
    drawn += [_text(8, 15, "nats"), _line(LEFT, 11, LEFT + 24, 11, class_="limit")]
    drawn.append(_text(LEFT + 30, 15, f"limit of a near tie, {figure(tie_gap)} nats"))
    for one in found:
        drawn += _divergence(one, x, y)
    unexplained = sum(one.explained is False for one in found)
    unseen = sum(one.explained is None for one in found)
    differ = "1 answer parts" if len(found) == 1 else f"{number_of(len(found), 'answer')} part"
    summary = f"{differ} from the incumbent's; {unexplained} unexplained (cross), {unseen} not visible (hollow)."
    read = (
        f"{summary} Height: nats by which the incumbent prefers its own token to the candidate's; bar: to its second."
    )
    return _plot(title, summary, joined(*drawn), 232, read)


def token_counts(title: str, pairs: Sequence[tuple[int, int]]) -> Html:
    """Prompt tokens by the incumbent against the candidate; off the diagonal the engines read different prompts."""
    most, least = max(max(pair) for pair in pairs), min(min(pair) for pair in pairs)
    log = least > 0 and most > 10 * least
    low = least / 1.3 if log else 0.0
    x = Scale(low, most * 1.1, log=log)
    y = Scale(low, most * 1.1, 214.0, 30.0, log=log)
    off = sum(a != b for a, b in pairs)
    drawn: list[Html] = [_x_axis(x, 214.0, "tokens, incumbent" + (", logarithmic axes" if log else "")), *_y_grid(y)]
    drawn.append(_line(x.at(low), y.at(low), x.at(most * 1.1), y.at(most * 1.1), class_="equal"))
    drawn.append(_text(8, 14, "tokens, candidate"))
    for ours, theirs in pairs:
        at = x.at(ours), y.at(theirs)
        drawn.append(_cross(*at, "candidate") if ours != theirs else _mark("neutral", *at, 3.4))
    summary = (
        f"{len(pairs) - off} of {number_of(len(pairs), 'prompt')} have equally many tokens; {off} differ (crosses)."
    )
    return _plot(title, summary, joined(*drawn), 246, summary)


def nights(title: str, shown: Mapping[str, NightSeries]) -> Html:
    """One figure of both engines over the nights, what was found in it, and when another build or plan came."""
    unit = next(iter(shown.values())).unit
    points = {arm: [(night.at, night.value) for night in one.nights] for arm, one in shown.items()}
    times, values = zip(*(point for found in points.values() for point in found), strict=True)
    low, high = min(values), max(values)
    room = max(0.08 * (high - low), 0.02 * high, 1e-9)
    x = Scale(min(times), max(max(times), min(times) + DAY_S))
    y = Scale(max(low - room, 0.0), high + room, 194.0, 64.0)
    days = Scale(0.0, (x.high - x.low) / DAY_S, x.start, x.end)
    drawn = [
        _x_axis(days, 194.0, f"days since {day_of(x.low)}"),
        *_y_grid(y),
        _text(8, 50, "first nights = 1" if unit == "ratio" else unit),
    ]
    summary = []
    for number, (arm, one) in enumerate(shown.items()):
        words = f"{quantity(one.nights[-1].value, unit)} in the latest of {number_of(len(one.nights), 'night')}"
        summary.append(f"{arm} {one.engine}: {words}")
        drawn += [
            _mark(arm, 14, 12.0 + 18 * number, 4),
            _text(24, 16.0 + 18 * number, f"{arm}: {words}", class_=f"label {arm}"),
        ]
        drawn += [_mark(arm, x.at(at), y.at(value), 2.2) for at, value in points[arm]]
        drawn += [_line(x.at(at), 64.0, x.at(at), 194.0, class_="equal") for at, _ in one.begun_anew()]
        drawn += [line for change in one.changes for line in _change(one, change, x, y)]
    anew = sorted({(at, what) for one in shown.values() for at, what in one.begun_anew()})
    lines = "; ".join(f"{what} from {day_of(at)}" for at, what in anew)
    found = "; ".join(one.words(change) for one in shown.values() for change in one.changes)
    read = "One mark per evaluation." + f" Upright lines: {lines}." * bool(lines) + f" Dashed: {found}." * bool(found)
    return _plot(title, "; ".join([*summary, *filter(None, [found])]), joined(*drawn), 226, read)


def thinned(series: Series, limit: int = MAX_POINTS) -> list[list[tuple[float, float]]]:
    """(seconds since the first sample, value) in unbroken runs: at most `limit` points, minima and maxima among them.

    A run ends where the sampling paused for ten times its usual interval.
    """
    known = ~np.isnan(series.values)
    t, values = series.t[known] - (series.t[0] if len(series) else 0.0), series.values[known]
    if not len(t):
        return []
    steps = np.diff(t)
    usual = float(np.median(steps)) if len(steps) else 0.0
    run = np.concatenate(([0], np.cumsum(steps > max(10 * usual, 5.0))))
    kept = _extremes(values, limit)
    points = [(int(run[i]), (float(t[i]), float(values[i]))) for i in kept]
    return [[point for _, point in part] for _, part in itertools.groupby(points, key=lambda pair: pair[0])]


def _extremes(values: NDArray[np.float64], limit: int) -> list[int]:
    """Indices in order: the least and the greatest of each of `limit`/2 equal parts, with the first and the last."""
    if len(values) <= limit:
        return list(range(len(values)))
    edges = np.linspace(0, len(values), limit // 2, dtype=int)
    kept = {0, len(values) - 1}
    for start, end in itertools.pairwise(edges.tolist()):
        part = values[start:end]
        kept |= {start + int(part.argmin()), start + int(part.argmax())}
    return sorted(kept)


# --- strips ----------------------------------------------------------------------------------------------------------


def _strip_scale(arms: Sequence[Sequence[float]]) -> Scale:
    middles = [median(values) for values in arms if values]
    values = [value for arm in arms for value in arm]
    least, most = min(values), max(values)
    if least > 0 and max(middles) > LOG_FROM * min(middles):
        return Scale(least / 1.15, most * 1.15, log=True)
    return Scale(0.0, most * 1.05 or 1.0)


def _strip_words(values: Sequence[float], unit: str) -> str:
    if not values:
        return "not measured"
    p95 = percentile(values, 0.95)
    return f"median {figure(median(values))} {unit}, p95 {figure(p95)} {unit}, n = {len(values):,}"


def _strip(values: Sequence[float], scale: Scale, y: float, arm: str) -> list[Html]:
    if not values:
        return []
    low, middle, high = (scale.at(percentile(values, q)) for q in (0.25, 0.5, 0.75))
    # every k-th of the sorted samples keeps the shape; ends are kept
    step = max(1, math.ceil(len(values) / MAX_DOTS))
    dots = sorted({*values[::step], values[0], values[-1]}) if step > 1 else list(values)
    marks = [_mark(arm, scale.at(v), y + 9 * _jitter(n), 2.6, "dot") for n, v in enumerate(dots)]
    box = el("rect", x=low, y=y - 11, width=max(high - low, 0.5), height=22, class_=f"box {arm}")
    return [*marks, box, _line(middle, y - 15, middle, y + 15, class_=f"median {arm}")]


def _jitter(number: int) -> float:
    """-1 to 1, evenly spread and the same every time (multiples of the golden ratio)."""
    return 2 * ((number * 0.618034) % 1.0) - 1


# --- ratios ----------------------------------------------------------------------------------------------------------


def _ratio_scale(rows: Sequence[RatioRow]) -> Scale:
    dots = [ratio for row in rows for ratio in (*row.counted, *row.void)]
    bounds = [row.limit for row in rows] + [1.0, *dots]
    # a hopelessly wide interval is cut at the edge, it must not squeeze the blocks together
    widest = max(4.0, max(bounds) / min(bounds))
    ends = [end for row in rows for end in (row.low, row.high) if end is not None]
    bounds += [end for end in ends if min(bounds) / widest <= end <= max(bounds) * widest]
    low, high = min(bounds), max(bounds)
    room = max((high / low) ** 0.06, 1.04)
    return Scale(low / room, high * room, 14.0, RIGHT, log=True)


def _ratio_row(row: RatioRow, scale: Scale, top: float) -> list[Html]:
    y = top + 38
    drawn = [
        _text(14, top + 12, row.label, class_="label"),
        _text(RIGHT, top + 12, row.verdict, anchor="end", class_=f"label v-{row.verdict}"),
        _text(14, top + 26, _ratio_words(row)),
        _line(scale.at(row.limit), top + 30, scale.at(row.limit), top + 59, class_="limit"),
    ]
    drawn += [_mark("neutral", scale.at(ratio), y + 3 * _jitter(n), 3.2, "dot") for n, ratio in enumerate(row.counted)]
    drawn += [_mark("neutral", scale.at(ratio), y, 3.4, "hollow") for ratio in row.void]
    if row.ratio is not None and row.low is not None and row.high is not None:
        low, high = scale.at(row.low), scale.at(row.high)
        drawn.append(_line(low, y + 13, high, y + 13, class_="interval"))
        drawn += [_line(end, y + 9, end, y + 17, class_="interval") for end in (low, high)]
        drawn.append(_mark("candidate", scale.at(row.ratio), y + 13, 5))
    return drawn


def _ratio_words(row: RatioRow) -> str:
    if row.ratio is None:
        return f"not measured (limit {figure(row.limit)}×)"
    between = f" ({figure(row.low)} to {figure(row.high)})" if row.low is not None and row.high is not None else ""
    return f"{figure(row.ratio)}×{between}, limit {figure(row.limit)}×"


# --- memory ----------------------------------------------------------------------------------------------------------


def _memory_words(series: Series) -> str:
    known = series.values[~np.isnan(series.values)]
    if not len(known):
        return "not measured"
    first, peak, last = (size(float(value)) for value in (known[0], known.max(), known[-1]))
    return f"{first} to {last}, peak {peak}"


def _time_axis(x: Scale, y: float) -> Html:
    for length, unit in ((86_400, "days"), (3600, "h"), (60, "min"), (1, "s")):
        if x.high >= 2 * length or length == 1:
            return _x_axis(Scale(0.0, x.high / length, x.start, x.end), y, f"{unit} of load ({duration(x.high)})")
    raise AssertionError("seconds fit everything")


def _path(points: Sequence[tuple[float, float]], x: Scale, y: Scale) -> str:
    places = [f"{x.at(t):.1f} {y.at(value):.1f}" for t, value in points]
    return "M" + "L".join(places) + ("h.1" if len(places) == 1 else "")


# --- nights ---------------------------------------------------------------------------------------------------------


def _change(series: NightSeries, change: Change, x: Scale, y: Scale) -> list[Html]:
    """The levels before and since a step, or the line of a ramp; of failures, which have no level, when they began."""
    began = next(number for number, night in enumerate(series.nights) if night.at == change.since)
    first, since, last = (
        x.at(at) for at in (series.nights[began - change.nights_before].at, change.since, change.found)
    )
    if change.shape == "failures":
        return [_line(since, 64.0, since, 194.0, class_="limit")]
    before, now = y.at(change.before), y.at(change.now)
    if change.shape == "ramp":
        return [_line(since, before, last, now, class_="limit")]
    return [_line(first, before, since, before, class_="limit"), _line(since, now, last, now, class_="limit")]


# --- divergences -----------------------------------------------------------------------------------------------------


def _divergence(one: Divergence, x: Scale, y: Scale) -> list[Html]:
    at = x.at(one.position)
    if one.choice_gap is None:
        return [_mark("neutral", at, y.at(0.0), 3.6, "hollow")]
    here = y.at(one.choice_gap)
    drawn = []
    if one.top_gap is not None:
        drawn.append(_line(at, here, at, y.at(one.top_gap), class_="grid"))
        drawn.append(_line(at - 4, y.at(one.top_gap), at + 4, y.at(one.top_gap), class_="tick"))
    drawn.append(_cross(at, here, "candidate") if one.explained is False else _mark("neutral", at, here, 3.4))
    return drawn


# --- axes and marks --------------------------------------------------------------------------------------------------


def _plot(title: str, summary: str, drawing: Html, height: float, read: str) -> Html:
    """A figure: `summary` are its numbers in words, for those who do not see it, and `read` is how to read it."""
    view = f"0 0 {WIDTH} {height:g}"
    svg = el("svg", el("title", title), el("desc", summary), drawing, viewBox=view, role="img", aria_label=title)
    return el("figure", el("h4", title), svg, el("figcaption", read), class_="plot")


def _x_axis(scale: Scale, y: float, words: str, bands: Sequence[tuple[float, float]] = ()) -> Html:
    """The axis at `y` with its ticks, whose lines cross the `bands` (from, to) alone."""
    drawn = []
    widest = max((len(figure(value)) for value in scale.ticks()), default=1)
    edge = WIDTH - CHAR * widest / 2
    for value in scale.ticks(max(TICK_GAP, CHAR * widest + 12)):
        at = scale.at(value)
        drawn += [_line(at, start, at, end, class_="grid") for start, end in bands]
        drawn += [_line(at, y, at, y + 4, class_="axis"), _text(min(at, edge), y + 15, figure(value), anchor="middle")]
    axis = _line(scale.start, y, scale.end, y, class_="axis")
    return joined(*drawn, axis, _text((scale.start + scale.end) / 2, y + 28, words, anchor="middle"))


def _y_grid(scale: Scale) -> list[Html]:
    drawn = []
    for value in scale.ticks(28.0):
        at = scale.at(value)
        drawn += [_line(LEFT, at, RIGHT, at, class_="grid"), _text(LEFT - 5, at + 3, figure(value), anchor="end")]
    return drawn


def _text(x: float, y: float, words: str, *, anchor: str | None = None, class_: str | None = None) -> Html:
    return el("text", words, x=float(x), y=float(y), text_anchor=anchor, class_=class_)


def _line(x1: float, y1: float, x2: float, y2: float, *, class_: str) -> Html:
    return el("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def _mark(arm: str, x: float, y: float, size: float, extra: str = "") -> Html:
    """A circle, or the candidate's diamond."""
    names = f"mark {arm} {extra}".strip()
    if arm == "candidate":
        r = size * 1.3
        return el("path", d=f"M{x:.1f} {y - r:.1f}l{r:.1f} {r:.1f}l{-r:.1f} {r:.1f}l{-r:.1f} {-r:.1f}z", class_=names)
    return el("circle", cx=float(x), cy=float(y), r=float(size), class_=names)


def _cross(x: float, y: float, arm: str) -> Html:
    return el("path", d=f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8", class_=f"cross {arm}")


def _round_values(low: float, high: float) -> list[float]:
    """Round values between `low` and `high`, the roundest first: 1, powers of ten, then 2, 5 and so on."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = ((1.0,), (2.0, 5.0), (3.0,), (1.5,), (7.0,), (1.2, 4.0, 6.0, 8.0), (1.1, 9.0, 9.5), (1.05,))
    ordered = [10.0**p * f for group in factors for p in sorted(powers, key=abs) for f in group]
    return [value for value in ordered if low <= value <= high]
