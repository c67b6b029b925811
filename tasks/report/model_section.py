"""The part of a report about one model: plots, verdicts, behaviours, answers, risks, and what was not measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from engines.units import NOT_MEASURED, duration, figure, number_of
from tasks.evidence.nights import FAILURES, NightSeries
from tasks.evidence.performance import RATIOS, Workload, memory_metric, metrics
from tasks.evidence.tool_calls.judge import KIND as TOOL_CALLS
from tasks.evidence.tool_calls.judge import batches_of, tool_call_differences, tool_call_rows
from tasks.report import plots
from tasks.report.markup import DASH, TEMPLATES, Html, el, joined, number, row, verdict_mark
from tasks.report.model_record import ModelRecord, by_area, decided_by, shortened
from tasks.report.plots import ARMS
from tasks.verdicts.limits import Limits
from tasks.verdicts.noninferiority import Metric, block_log_ratio, judge
from tasks.verdicts.statistics import percentile
from tasks.verdicts.verdict import CheckResult, Verdict

ANSWER_CHARS = 4000
MAX_ANSWERS = 80
NIGHTS_SHOWN = 3
LATENCIES = (
    ("ttft_ms", "Time to first token (TTFT)"),
    ("tpot_ms", "Time per output token (TPOT)"),
    ("e2e_ms", "Whole request (E2E)"),
)
AREAS = {
    "preflight": "Preflight: does it load, does it fit",
    "launch": "Launch: does each engine start with the model",
    "compatibility": "Compatibility: does the API behave as clients need",
    "parity": "Parity: same weights, same answers",
    "performance": "Speed",
    "memory": "Memory",
    "stability": "Stability",
    "faults": "Faults on purpose",
    "calibration": "Calibration: the incumbent against itself",
}


# --- the section -----------------------------------------------------------------------------------------------------


def model_section(model: ModelRecord, nights: Sequence[NightSeries] = ()) -> Html:
    """All about one model; `nights` are its series over the evaluations of its plan."""
    required = [result for result in model.checks if result.required]
    # dozens of behaviours that pass, without a number, would bury the rest
    quiet = [r for r in required if r.verdict is Verdict.PASS and r.value is None and r.check.startswith("compat")]
    seen = {arm: _behaviours(model.one(arm, "compatibility")) for arm in ARMS}
    unproven: dict[tuple[str, bool], list[str]] = {}
    for result in model.checks:
        if result.verdict is Verdict.INCONCLUSIVE:
            unproven.setdefault((result.why, result.required), []).append(result.check)
    tool_calls = batches_of(*(model.all(arm, TOOL_CALLS) for arm in ARMS))
    drawn = (_ratio_plot(model), _memory_plot(model), _divergence_plot(model), _token_plot(model))
    page = TEMPLATES.get_template("model.html.jinja").render(
        model=model,
        plots=[*_latency_plots(model), *drawn],
        nights=night_plots(nights),
        figures=_figures(model),
        quiet=quiet,
        shown=[result for result in required if result not in quiet],
        seen=seen,
        known={**seen["candidate"], **seen["incumbent"]},
        tally=_tally(seen),
        tool_calls=tool_call_rows(tool_calls),
        tool_differences=tool_call_differences(tool_calls),
        answers=_answers(model),
        failures=_failures(model),
        unproven=unproven,
        by_area=by_area,
        decided_by=decided_by,
        check_row=_check_row,
        shortened=shortened,
        spoken=_spoken,
        AREAS=AREAS,
        ANSWER_CHARS=ANSWER_CHARS,
    )
    return Html(page)


# --- plots -----------------------------------------------------------------------------------------------------------


def _latency_plots(model: ModelRecord) -> list[Html]:
    drawn = {title: latency_figure(model, key, title) for key, title in LATENCIES}
    if not any(drawn.values()):
        return [_absent("Latency", model, "performance.")]
    return [plot or _absent(title, model, "performance.") for title, plot in drawn.items()]


def latency_figure(model: ModelRecord, key: str, title: str) -> Html | None:
    """One latency of both engines, every request a mark; None where nothing was measured."""
    samples = pooled(model, key)
    return plots.strips(title, "ms", samples, model.names) if any(samples.values()) else None


def pooled(model: ModelRecord, key: str) -> dict[str, list[float]]:
    """By arm: every sample called `key` of the blocks that count."""
    counted = [block for block in model.blocks() if block.get("void") is None]
    return {arm: [value for block in counted for value in _listed(block[arm].get(key))] for arm in ARMS}


def _listed(found: Any) -> list[float]:
    if found is None:
        return []
    return [value for value in found if value is not None] if isinstance(found, list) else [found]


def _ratio_plot(model: ModelRecord) -> Html:
    title = "Candidate over incumbent, block by block"
    rows = [made for metric, check in _metrics(model) if (made := _ratio_row(model, metric, check)) is not None]
    return plots.ratios(title, rows) if rows else _absent(title, model, "performance.")


def _metrics(model: ModelRecord) -> list[tuple[Metric, str]]:
    """What the blocks are judged by, with the names of the checks."""
    limits, amounts = model.plan.get("limits") or {}, model.plan.get("measure") or {}
    if not limits.keys() >= RATIOS:  # of another Switchyard's plan
        return []
    workload = Workload(requests=1, max_tokens=1, concurrency=tuple(amounts.get("concurrency") or (1,)))
    held_to = Limits.model_construct(**{name: limits[name] for name in RATIOS})
    primary, peak = metrics(held_to, workload), memory_metric(held_to)
    return [(metric, f"performance.{metric.name}_ratio") for metric in primary] + [(peak, "memory.peak_ratio")]


def _ratio_row(model: ModelRecord, metric: Metric, check: str) -> plots.RatioRow | None:
    usable = [block for block in model.blocks() if all(_listed(block[arm].get(metric.key)) for arm in ARMS)]
    ratios = [(math.exp(block_log_ratio(metric, block)), block.get("void") is not None) for block in usable]
    if not ratios:
        return None
    looks = (model.plan.get("measure") or {}).get("looks") or (6, 12, 24)
    outcome, result = judge(metric, model.blocks(), tuple(looks)), model.check(check)
    return plots.RatioRow(
        label=_label(metric.name),
        counted=[ratio for ratio, void in ratios if not void],
        void=[ratio for ratio, void in ratios if void],
        ratio=outcome.ratio,
        low=outcome.ci_low,
        high=outcome.ci_high,
        limit=1 + metric.margin,
        verdict=(result.verdict if result else outcome.verdict).value,
    )


def _label(name: str) -> str:
    what, _, which = name.rpartition("_")
    words = {"p50": "median", "p95": "p95", "peak": "peak"}.get(which, f"{which.removeprefix('c')} at a time")
    return f"{what.upper() if what in ('ttft', 'tpot', 'e2e') else what.capitalize()}, {words}"


def _memory_plot(model: ModelRecord) -> Html:
    title = "Memory during the soak"
    known = {arm: series for arm, series in model.memory.items() if (series.values == series.values).any()}
    return plots.memory_lines(title, known, model.names) if known else _absent(title, model, "stability.", "memory.")


def _divergence_plot(model: ModelRecord) -> Html:
    title = "Where answers part"
    comparison = model.comparison
    if comparison is None or not comparison["positions"]:
        return _absent(title, model, "parity.top1_agreement", "parity.")
    found = [
        plots.Divergence(one["position"], one["gap_nats"], one["choice_gap_nats"], one["explained"])
        for one in comparison["divergences"]
    ]
    if found:
        return plots.divergences(title, found, model.tie_gap)
    summary = f"No answer parts from the incumbent's within {number_of(comparison['positions'], 'compared position')}."
    return el("div", el("b", title), f": {summary}", class_="absent")


def _token_plot(model: ModelRecord) -> Html:
    title = "Prompt tokens"
    ours, theirs = model.parity("tokens")
    pairs = []
    if ours and theirs:
        counts = [
            (found["tokens"], theirs["prompts"].get(key, {}).get("tokens")) for key, found in ours["prompts"].items()
        ]
        pairs = [(a, b) for a, b in counts if a is not None and b is not None]
    return plots.token_counts(title, pairs) if pairs else _absent(title, model, "parity.prompt_tokens")


def night_plots(series: Sequence[NightSeries]) -> list[Html]:
    """One plot a metric, of both engines; none of what has few nights, or of failures where there are none."""
    by_metric: dict[str, dict[str, NightSeries]] = {}
    for one in series:
        is_quiet = one.metric.endswith(FAILURES) and not any(night.value for night in one.nights)
        if len(one.nights) >= NIGHTS_SHOWN and not is_quiet:
            by_metric.setdefault(one.label, {})[one.arm] = one
    return [
        plots.nights(label[0].upper() + label[1:], {arm: arms[arm] for arm in ARMS if arm in arms})
        for label, arms in by_metric.items()
    ]


def _absent(title: str, model: ModelRecord, *prefixes: str) -> Html:
    """One line in place of a plot: what was not measured, and why."""
    found = [r.why for prefix in prefixes for r in model.checks if r.check.startswith(prefix) and r.value is None]
    # a check that ran has no word on what did not
    found = [why for why in found if why.startswith(NOT_MEASURED)] or found
    reasons = (why.removeprefix(NOT_MEASURED).lstrip(": ") for why in found)
    why = next(filter(None, reasons), "the records hold no evidence of it")
    return el("div", el("b", title), f": {NOT_MEASURED}; {shortened(why)}", class_="absent")


# --- figures ---------------------------------------------------------------------------------------------------------


def side_by_side(model: ModelRecord) -> list[tuple[str, str, dict[str, float | None]]]:
    """(what, unit, value by arm) of the figures that users ask for first, over all blocks that count and the soak."""
    found: list[tuple[str, str, dict[str, float | None]]] = []
    for key, label, quantile, unit in (
        ("ttft_ms", "TTFT, median", 0.5, "ms"),
        ("ttft_ms", "TTFT, p95", 0.95, "ms"),
        ("tpot_ms", "TPOT, median", 0.5, "ms"),
        ("e2e_ms", "E2E, median", 0.5, "ms"),
        ("prefill_tok_s", "prefill, median", 0.5, "tok/s"),
        ("decode_tok_s", "decode, median", 0.5, "tok/s"),
        ("load_s", "load to first token, median", 0.5, "s"),
        ("memory_peak_mib", "peak private memory, median of blocks", 0.5, "MiB"),
        ("mapped_weights_mib", "weights mapped from the file", 0.5, "MiB"),
    ):
        samples = pooled(model, key)
        found.append((label, unit, {a: percentile(v, quantile) if v else None for a, v in samples.items()}))
    soaked = {arm: model.all(arm, "soak") for arm in ARMS}
    for label, unit, count in (
        ("soak, time under load", "s", lambda segment: segment["exposure_s"]),
        ("soak, requests", "requests", lambda segment: segment["requests"]),
        ("soak, failures", "failures", lambda segment: len(segment["failures"])),
    ):
        found.append(
            (label, unit, {a: sum(map(count, segments)) if segments else None for a, segments in soaked.items()})
        )
    return found


def _figures(model: ModelRecord) -> list[tuple[str, Html, Html, Html]]:
    """What was measured of `side_by_side`: what, the incumbent's, the candidate's, and candidate over incumbent."""
    rows = []
    for what, unit, arms in side_by_side(model):
        ours, theirs = arms["incumbent"], arms["candidate"]
        if ours is None and theirs is None:
            continue
        times = theirs / ours if ours and theirs is not None and unit not in ("s", "failures", "requests") else None
        shown = duration if what.startswith("soak, time") else None
        compared = number(times, "ratio") if times is not None else DASH
        rows.append((what, number(ours, unit, shown), number(theirs, unit, shown), compared))
    return rows


# --- verdicts --------------------------------------------------------------------------------------------------------


def _check_row(result: CheckResult) -> Html:
    # a behaviour has no number: an empty cell says that better than "not measured"
    bare = result.value is None and result.limit is None and result.verdict in (Verdict.PASS, Verdict.FAIL)
    value = DASH if bare else number(result.value, result.unit, beside=result.limit)
    limit = number(result.limit, result.unit) if result.limit is not None else DASH
    name = Html(joined(result.check).replace(".", ".<wbr>"))
    return row(
        ("", verdict_mark(result.verdict.value)),
        ("", name),
        ("value", value),
        ("limit", limit),
        ("", result.why),
        check=result.check,
    )


# --- behaviours ------------------------------------------------------------------------------------------------------


def _behaviours(evidence: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    """The records by name; one that was redacted on its way into the records is not measured any more."""
    found = (evidence or {}).get("behaviours", {})
    return {name: record for name, record in found.items() if isinstance(record, Mapping)}


def _tally(seen: Mapping[str, Mapping[str, Any]]) -> str:
    words = []
    for arm in ARMS:
        outcomes = [record["outcome"] for record in seen[arm].values()]
        words.append(f"{arm} {outcomes.count('passed')} of {len(outcomes)}" if outcomes else f"{arm} {NOT_MEASURED}")
    return ", ".join(words)


# --- answers ---------------------------------------------------------------------------------------------------------


def _answers(model: ModelRecord) -> dict[str, Any] | None:
    """Both engines' answers that differ or are degenerate, each pair with how they part."""
    ours, theirs = model.parity("answers")
    if not ours or not theirs or model.comparison is None:
        return None
    others = {answer["id"]: answer for answer in theirs["answers"]}
    pairs = [(answer, others[answer["id"]]) for answer in ours["answers"] if answer["id"] in others]
    broken = model.comparison["degenerate"]
    unlike = [pair for pair in pairs if _spoken(pair[0]) != _spoken(pair[1]) or pair[0]["id"] in broken["candidate"]]
    counts = ", ".join(f"{len(broken[arm])} degenerate by the {arm}" for arm in ARMS)
    apart = {one["prompt"]: one for one in model.comparison["divergences"]}
    shown = []
    for a, b in unlike[:MAX_ANSWERS]:
        degenerate = [f"{arm} degenerate: {broken[arm][a['id']]}" for arm in ARMS if a["id"] in broken[arm]]
        words = "; ".join([*_parting(a, b, apart.get(a["id"])), *degenerate]) or "the texts differ"
        shown.append((a, b, words))
    summary = f"{len(unlike)} of {number_of(len(pairs), 'answer')} differ or are degenerate; {counts}."
    return {"summary": summary, "shown": shown, "left": len(unlike) - len(shown)}


def _parting(ours: Mapping[str, Any], theirs: Mapping[str, Any], apart: Mapping[str, Any] | None) -> list[str]:
    if ours["error"] or theirs["error"]:
        return ["one engine gave no answer"]
    if ours["prompt_tokens"] != theirs["prompt_tokens"]:
        return [f"another prompt to begin with ({ours['prompt_tokens']} and {theirs['prompt_tokens']} tokens)"]
    if apart is None:
        return []
    tokens = (
        f"{apart['incumbent_token']!r} or {apart['candidate_token']!r} after {number_of(apart['position'], 'token')}"
    )
    kind = {True: "near tie", False: "unexplained", None: "logprobs not shown there"}[apart["explained"]]
    gap = apart["choice_gap_nats"]
    return [f"{tokens}, {kind}" + (f" ({figure(gap)} nats)" if gap is not None else "")]


def _spoken(answer: Mapping[str, Any]) -> str:
    """All of the engine's answer: error, reasoning, text and tool calls."""
    calls = [json.dumps(call, ensure_ascii=False) for call in answer["tool_calls"]]
    error = [f"error: {answer['error']}"] if answer["error"] else []
    return "\n".join(part for part in (*error, answer.get("reasoning") or "", answer["text"], *calls) if part)


def _failures(model: ModelRecord) -> list[str]:
    """The failures of the soak, in the words of client and engine."""
    return [
        f"{arm}, after {duration(failure['at_s'])}: {failure['type']}: {failure.get('error') or ''}"
        for arm in ARMS
        for segment in model.all(arm, "soak")
        for failure in segment["failures"]
    ]
