"""The part of a report about one model: plots, verdicts, behaviours, answers, risks, and what was not measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from engines.units import NOT_MEASURED, duration, figure, quantity
from tasks.evidence.performance import RATIOS, Workload, memory_metric, metrics
from tasks.report import plots
from tasks.report.markup import DASH, Html, el, joined, number, row, table, verdict_mark
from tasks.report.model_record import ModelRecord, area, areas, shortened
from tasks.report.plots import ARMS
from tasks.verdicts.limits import Limits
from tasks.verdicts.noninferiority import Metric, block_log_ratio, judge
from tasks.verdicts.statistics import percentile
from tasks.verdicts.verdict import CheckResult, Verdict

ANSWER_CHARS = 4000
MAX_ANSWERS = 80
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


def model_section(model: ModelRecord) -> Html:
    """All about one model."""
    return el(
        "section",
        el("h2", model.name, " ", verdict_mark(model.verdict), id=model.anchor),
        *_reasons(model),
        el(
            "div",
            *_latency_plots(model),
            _ratio_plot(model),
            _memory_plot(model),
            _divergence_plot(model),
            _token_plot(model),
            class_="plots",
        ),
        _side_by_side(model),
        _verdicts(model),
        _matrix(model),
        _answers(model),
        _failures(model),
        _risks(model),
        _unmeasured(model),
    )


def _reasons(model: ModelRecord) -> list[Html]:
    items = [_area_reason([r for r in model.closed_by if area(r) == name]) for name in areas(model.closed_by)]
    parts = [el("p", model.counts), el("ul", *items) if items else None, el("p", model.next_step, class_="next")]
    return [part for part in parts if part is not None]


def _area_reason(closed: Sequence[CheckResult]) -> Html:
    """What keeps the gate closed in one area: how many checks, and the words of the worst."""
    worst = closed[0]
    more = f" and {len(closed) - 1} more" if len(closed) > 1 else ""
    return el("li", verdict_mark(worst.verdict.value), " ", el("b", worst.check), f"{more}: {shortened(worst.why)}")


# --- plots -----------------------------------------------------------------------------------------------------------


def _latency_plots(model: ModelRecord) -> list[Html]:
    samples = {key: pooled(model, key) for key, _ in LATENCIES}
    if not any(values for arms in samples.values() for values in arms.values()):
        return [_absent("Latency", model, "performance.")]
    return [
        plots.strips(title, "ms", samples[key], model.names)
        if any(samples[key].values())
        else _absent(title, model, "performance.")
        for key, title in LATENCIES
    ]


def latency_figure(model: ModelRecord) -> Html | None:
    """Time to first token of both engines, every request a mark; None where nothing was measured."""
    (key, title), *_ = LATENCIES
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
    summary = f"No answer parts from the incumbent's within {comparison['positions']} compared positions."
    return el("div", el("b", title), f": {summary}", class_="absent")


def _token_plot(model: ModelRecord) -> Html:
    title = "Prompt tokens"
    ours, theirs = (model.one(arm, "parity.tokens") for arm in ARMS)
    pairs = []
    if ours and theirs:
        counts = [
            (found["tokens"], theirs["prompts"].get(key, {}).get("tokens")) for key, found in ours["prompts"].items()
        ]
        pairs = [(a, b) for a, b in counts if a is not None and b is not None]
    return plots.token_counts(title, pairs) if pairs else _absent(title, model, "parity.prompt_tokens")


def _absent(title: str, model: ModelRecord, *prefixes: str) -> Html:
    """One line in place of a plot: what was not measured, and why."""
    reasons = [
        result.why.removeprefix("not measured").lstrip(": ")
        for prefix in prefixes
        for result in model.checks
        if result.check.startswith(prefix) and result.value is None
    ]
    why = next((reason for reason in reasons if reason), "the records hold no evidence of it")
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
        ("memory_peak_mib", "peak memory, median of blocks", 0.5, "MiB"),
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


def _side_by_side(model: ModelRecord) -> Html | None:
    figures = [
        (what, unit, arms) for what, unit, arms in side_by_side(model) if any(v is not None for v in arms.values())
    ]
    if not figures:
        return None
    rows = []
    for what, unit, arms in figures:
        ours, theirs = arms["incumbent"], arms["candidate"]
        times = theirs / ours if ours and theirs is not None and unit not in ("s", "failures", "requests") else None
        cells = [(arm, _timed(arms[arm]) if what.startswith("soak, time") else number(arms[arm], unit)) for arm in ARMS]
        compared = number(times, "ratio") if times is not None else DASH
        rows.append(row(("", el("b", what)), *cells, ("candidate ÷ incumbent", compared)))
    note = "Pooled over all blocks that count; the gate compares block by block, so its ratios differ a little."
    heads = ("", "Incumbent", "Candidate", "Candidate ÷ incumbent")
    return joined(el("h3", "Side by side"), table(heads, rows), el("p", note, class_="soft"))


def _timed(seconds: float | None) -> Html:
    words = NOT_MEASURED if seconds is None else duration(seconds)
    return el("span", words, class_="num", data_value=None if seconds is None else repr(seconds))


# --- verdicts --------------------------------------------------------------------------------------------------------


def _verdicts(model: ModelRecord) -> Html:
    required = [result for result in model.checks if result.required]
    # dozens of behaviours that pass, without a number, would bury the rest
    quiet = [r for r in required if r.verdict is Verdict.PASS and r.value is None and r.check.startswith("compat")]
    shown = [result for result in required if result not in quiet]
    return joined(
        el("h3", "Verdicts that hold the gate"),
        _check_table(shown) if shown else el("p", "No required check was measured.", class_="absent"),
        _folded(f"{len(quiet)} required behaviours that pass", quiet),
        _folded("Reported, does not hold the gate", [result for result in model.checks if not result.required]),
    )


def _folded(words: str, results: Sequence[CheckResult]) -> Html | None:
    if not results:
        return None
    bad = sum(result.verdict is not Verdict.PASS for result in results)
    counts = f" ({len(results)}, of which {bad} did not pass)" if bad else ""
    return el("details", el("summary", words + counts), _check_table(results), class_="block")


def _check_table(results: Sequence[CheckResult]) -> Html:
    rows: list[Html] = []
    for name in areas(results):
        rows.append(el("tr", el("th", AREAS.get(name, name), colspan=5), class_="area"))
        rows += [_check_row(result) for result in results if area(result) == name]
    return table(("Verdict", "Check", "Value", "Limit", "Why"), rows)


def _check_row(result: CheckResult) -> Html:
    # a behaviour has no number: an empty cell says that better than "not measured"
    bare = result.value is None and result.limit is None and result.verdict in (Verdict.PASS, Verdict.FAIL)
    value = DASH if bare else number(result.value, result.unit)
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


def _matrix(model: ModelRecord) -> Html | None:
    seen = {arm: _behaviours(model.one(arm, "compatibility")) for arm in ARMS}
    known = {**seen["candidate"], **seen["incumbent"]}
    if not known:
        return None
    rows = []
    for group in dict.fromkeys(record["group"] for record in known.values()):
        rows.append(el("tr", el("th", str(group), colspan=4), class_="area"))
        for name, record in known.items():
            if record["group"] == group:
                rows.append(_behaviour(model, name, record, {arm: seen[arm].get(name) for arm in ARMS}))
    heads = ("Behaviour", "Incumbent", "Candidate", "Holds the gate")
    summary = el("summary", f"API behaviours side by side: {_tally(seen)}")
    return el("details", summary, table(heads, rows), class_="block")


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


def _behaviour(model: ModelRecord, name: str, record: Mapping[str, Any], arms: Mapping[str, Any]) -> Html:
    result = model.check(f"compatibility.{name}")
    holds = NOT_MEASURED if result is None else ("yes" if result.required else "no")
    judged = el("span", f"{holds} ", verdict_mark(result.verdict.value) if result else None, class_="num")
    cells = [(arm, _outcome(arms[arm])) for arm in ARMS]
    return row(("", joined(el("b", name), el("br"), str(record["claim"]))), *cells, ("holds the gate", judged))


def _outcome(record: Mapping[str, Any] | None) -> Html:
    if record is None:
        return joined(NOT_MEASURED)
    outcome = str(record["outcome"])
    colour = {"passed": "PASS", "failed": "FAIL", "errored": "ERROR"}.get(outcome)
    summary = el("summary", el("span", outcome.replace("_", " "), class_=colour))
    return el("details", summary, el("div", str(record["observed"])))


# --- answers ---------------------------------------------------------------------------------------------------------


def _answers(model: ModelRecord) -> Html | None:
    ours, theirs = (model.one(arm, "parity.answers") for arm in ARMS)
    if not ours or not theirs or model.comparison is None:
        return None
    others = {answer["id"]: answer for answer in theirs["answers"]}
    pairs = [(answer, others[answer["id"]]) for answer in ours["answers"] if answer["id"] in others]
    broken = model.comparison["degenerate"]
    unlike = [pair for pair in pairs if _spoken(pair[0]) != _spoken(pair[1]) or pair[0]["id"] in broken["candidate"]]
    counts = ", ".join(f"{len(broken[arm])} degenerate by the {arm}" for arm in ARMS)
    summary = f"{len(unlike)} of {len(pairs)} answers differ or are degenerate; {counts}."
    apart = {one["prompt"]: one for one in model.comparison["divergences"]}
    shown = [_answer_pair(a, b, apart.get(a["id"]), broken) for a, b in unlike[:MAX_ANSWERS]]
    left = len(unlike) - len(shown)
    more = el("p", f"{left} more are in the records.", class_="soft") if left else None
    return joined(el("h3", "Answers that differ"), el("p", summary), *shown, more)


def _answer_pair(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], apart: Mapping[str, Any] | None, broken: Mapping[str, Any]
) -> Html:
    degenerate = [f"{arm} degenerate: {broken[arm][ours['id']]}" for arm in ARMS if ours["id"] in broken[arm]]
    words = "; ".join([*_parting(ours, theirs, apart), *degenerate]) or "the texts differ"
    return el(
        "details",
        el("summary", el("b", str(ours["id"])), f": {words}"),
        el("p", "Prompt (its end)", class_="soft"),
        el("pre", str(ours["prompt"])),
        el("div", *(_answer(arm, one) for arm, one in (("incumbent", ours), ("candidate", theirs))), class_="pair"),
        class_="answer",
    )


def _parting(ours: Mapping[str, Any], theirs: Mapping[str, Any], apart: Mapping[str, Any] | None) -> list[str]:
    if ours["error"] or theirs["error"]:
        return ["one engine gave no answer"]
    if ours["prompt_tokens"] != theirs["prompt_tokens"]:
        return [f"another prompt to begin with ({ours['prompt_tokens']} and {theirs['prompt_tokens']} tokens)"]
    if apart is None:
        return []
    tokens = f"{apart['incumbent_token']!r} or {apart['candidate_token']!r} after {apart['position']} tokens"
    kind = {True: "near tie", False: "unexplained", None: "logprobs not shown there"}[apart["explained"]]
    gap = apart["choice_gap_nats"]
    return [f"{tokens}, {kind}" + (f" ({figure(gap)} nats)" if gap is not None else "")]


def _answer(arm: str, answer: Mapping[str, Any]) -> Html:
    tokens = quantity(answer["completion_tokens"], "tokens")
    words = f"{arm}: {tokens}, finish reason {answer['finish_reason'] or NOT_MEASURED}"
    return el("div", el("p", words, class_="soft"), el("pre", _spoken(answer)[:ANSWER_CHARS] or "(empty)"))


def _spoken(answer: Mapping[str, Any]) -> str:
    """All of the engine's answer: error, reasoning, text and tool calls."""
    calls = [json.dumps(call, ensure_ascii=False) for call in answer["tool_calls"]]
    error = [f"error: {answer['error']}"] if answer["error"] else []
    return "\n".join(part for part in (*error, answer.get("reasoning") or "", answer["text"], *calls) if part)


def _failures(model: ModelRecord) -> Html | None:
    """The failures of the soak, in the words of client and engine."""
    lines = [
        el("li", f"{arm}, after {duration(failure['at_s'])}: {failure['type']}: {failure.get('error') or ''}")
        for arm in ARMS
        for segment in model.all(arm, "soak")
        for failure in segment["failures"]
    ]
    if not lines:
        return None
    more = el("li", f"{len(lines) - 100} more are in the records") if len(lines) > 100 else None
    summary = el("summary", f"Failures during the soak: {len(lines)}")
    return el("details", summary, el("ul", *lines[:100], more), class_="block")


# --- risks and gaps --------------------------------------------------------------------------------------------------


def _risks(model: ModelRecord) -> Html | None:
    if not model.risks:
        return None
    rows = [
        row(
            ("", el("b", str(risk["risk"]))),
            ("likelihood", str(risk["likelihood"])),
            ("impact", str(risk["impact"])),
            ("", verdict_mark(str(risk["verdict"]))),
            ("decided by", ", ".join(risk["decided_by"]) or "every check on it passed"),
            ("mitigation", str(risk["mitigation"])),
        )
        for risk in model.risks
    ]
    heads = ("Risk", "Likelihood", "Impact", "Verdict", "Decided by", "Mitigation")
    return joined(el("h3", "Risks"), table(heads, rows))


def _unmeasured(model: ModelRecord) -> Html | None:
    """What stayed open, each reason once with all the checks that have it."""
    by_reason: dict[tuple[str, bool], list[str]] = {}
    for result in model.checks:
        if result.verdict is Verdict.INCONCLUSIVE:
            by_reason.setdefault((result.why, result.required), []).append(result.check)
    if not by_reason:
        return None
    items = [
        el("li", el("b", ", ".join(checks)), f"{'' if required else ' (does not hold the gate)'}: {why}")
        for (why, required), checks in by_reason.items()
    ]
    return joined(el("h3", "Not measured, or not proven"), el("ul", *items))
