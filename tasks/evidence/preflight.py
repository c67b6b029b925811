"""Before anything starts: will each engine load each model, and has this machine the memory? From the headers alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engines.errors import BadInput
from engines.fit import Fit, estimate, kv_types, largest_contexts
from engines.model.free_memory import FreeMemory, free_memory
from engines.model.header import Header, read_header
from engines.model.loads import known_architectures
from engines.model.memory import DEFAULT_UBATCH, kv_bytes, kv_bytes_per_token, state_bytes_per_sequence, why_unsized
from engines.registry import DRIVERS
from engines.settings import EngineArgs, Settings
from engines.support import alternatives, loads
from engines.units import size
from tasks.verdicts.verdict import CheckResult, Verdict, not_measured

_LOADS_VERDICTS = {"yes": Verdict.PASS, "no": Verdict.FAIL, "unknown": Verdict.INCONCLUSIVE}
# "tight" passes: it fits as expected, and only the upper bounds (a full host cache, a margin) do not
_FIT_VERDICTS = {
    "fits": Verdict.PASS,
    "tight": Verdict.PASS,
    "does not fit": Verdict.FAIL,
    "unknown": Verdict.INCONCLUSIVE,
}


def preflight(
    models: Sequence[tuple[str, Path]],
    *,
    settings_by_model: Mapping[str, Settings] | None = None,
    own_args: Mapping[tuple[str, str], EngineArgs] | None = None,
    engines: Mapping[str, str] | None = None,
    overflow: Mapping[str, tuple[str, Settings]] | None = None,
    context: int | None = None,
    versions: Mapping[str, str | None] | None = None,
    hosted: Collection[str] = (),
    memory: FreeMemory | None = None,
    corrections: Mapping[tuple[str, str], float] | None = None,
    largest: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """`{"models": [...]}`, one plain dict per model: what loads it, what it takes, what else could be done.

    `engines` are the incumbent and the candidate, the kind of each by its name (default: all); `context` (tokens, all
    sequences together) overrides each model's setting; `own_args` maps (model, engine) to what the engine is given
    beside it; `overflow` has a model's second engine, if it has one, with its settings there; `versions` maps an engine
    to its version; `hosted` are those that are a wheel in a Python process of ours; `corrections` maps (model, engine)
    to a measured ratio; `largest` adds the largest contexts that fit under each engine. Raises BadInput that names the
    first model it cannot read.
    """
    engines, free = engines or {kind: kind for kind in DRIVERS}, memory or free_memory()
    known_architectures()  # imports gguf and numpy once, a fifth of a second that is no model's own
    reports = []
    for model, path in models:
        progress(f"preflight: {model}")
        started = time.perf_counter()
        try:
            header = read_header(path)
        except BadInput as error:
            raise BadInput(f"model {model!r}: {error}") from error
        settings = (settings_by_model or {}).get(model, Settings())
        own = {engine: (own_args or {}).get((model, engine), EngineArgs()) for engine in engines}
        second = (overflow or {}).get(model)
        on = {engine: second[1] if second and engine == second[0] else settings for engine in engines}
        report = _report(
            model, header, on, engines, own, context, versions or {}, hosted, free, corrections or {}, largest
        )
        report |= {"overflow": second[0]} if second else {}
        reports.append({**report, "elapsed_ms": round((time.perf_counter() - started) * 1000, 1)})
    return {"models": reports, "free": {"ram_bytes": free.ram_bytes, "vram_bytes": free.vram_bytes}}


def _report(
    model: str,
    header: Header,
    settings_on: Mapping[str, Settings],
    kinds: Mapping[str, str],
    own: Mapping[str, EngineArgs],
    context: int | None,
    versions: Mapping[str, str | None],
    hosted: Collection[str],
    free: FreeMemory,
    corrections: Mapping[tuple[str, str], float],
    largest: bool,
) -> dict[str, Any]:
    engines = list(kinds)
    settings = settings_on[engines[0]]
    given = settings.tokenizer_json is not None
    answers = {
        engine: loads(kind, header, version=versions.get(engine), own_tokenizer=given) for engine, kind in kinds.items()
    }
    known: dict[str, dict[str, Any]] = {
        engine: {"own": own[engine], "memory": free, "correction": corrections.get((model, engine))}
        for engine in engines
    }
    fits = {
        engine: estimate(header, settings_on[engine], kind, context, **known[engine]) for engine, kind in kinds.items()
    }

    def contexts(engine: str) -> list[dict[str, Any]]:
        found = largest_contexts(header, settings_on[engine], kinds[engine], **known[engine])
        return [one.as_dict() for one in found]

    return {
        "model": model,
        "architecture": header.architecture,
        "engines": [
            {
                "engine": engine,
                "loads": answers[engine].answer,
                "why": answers[engine].why,
                "warnings": [*answers[engine].warnings, *map(str, answers[engine].slow)],
                "slow": [{**asdict(slow), "times": list(slow.times)} for slow in answers[engine].slow],
                "fit": fits[engine].as_dict(),
                **({"largest": contexts(engine)} if largest else {}),
            }
            for engine in engines
        ],
        "memory": _memory_report(header, settings, context, kv_types(kinds[engines[0]], settings, own[engines[0]])),
        "side_by_side": _side_by_side(fits, free),
        "header": _header_report(header),
        "alternatives": alternatives(
            answers, incumbent=engines[0], fits=all(fit.verdict != "does not fit" for fit in fits.values())
        ),
    }


def _memory_report(
    header: Header, settings: Settings, context: int | None, kv_types: tuple[str, str]
) -> dict[str, Any]:
    """The model's own figures in bytes, under any engine; None where the layout is not known."""
    unsized = why_unsized(header)
    tokens = context or settings.context_tokens or header.context_length
    sized = unsized is None
    total = None
    if sized and tokens is not None:
        total = kv_bytes(header, tokens, settings.sequences, settings.ubatch_tokens or DEFAULT_UBATCH, *kv_types)
    return {
        "weights_bytes": header.tensor_bytes,
        "kv_bytes_per_token": kv_bytes_per_token(header, *kv_types) if sized else None,
        "kv_bytes": total,
        "state_bytes_per_sequence": state_bytes_per_sequence(header) if sized else None,
        "context_tokens": tokens,
        "trained_context_tokens": header.context_length,
        "kv_type": " and ".join(dict.fromkeys(kv_types)),
        "why_unknown": unsized,
    }


def _side_by_side(fits: Mapping[str, Fit], free: FreeMemory) -> dict[str, Any]:
    """Whether all the engines fit at once, at their expected figures: a switch without a gap needs that."""
    if any(fit.verdict == "unknown" for fit in fits.values()):
        return {"fits": None, "why": "the memory of one of the engines is not known"}
    reasons, fitting = [], True
    for device in ("ram", "vram"):
        needs = [need for fit in fits.values() for need in fit.needs if need.device == device]
        if not needs:
            continue
        total, free_bytes = sum(need.expected for need in needs), needs[0].free or 0
        fitting = fitting and total <= free_bytes
        reasons.append(f"{device.upper()}: {size(total)} together, {size(free_bytes)} free")
    return {"fits": fitting, "why": "; ".join(reasons)}


def _header_report(header: Header) -> dict[str, Any]:
    return {
        "name": header.name,
        "n_layers": header.n_layers,
        "file_bytes": header.file_bytes,
        "n_shards": len(header.shards),
        "quant_types": dict(header.quant_types),
        "tokenizer_model": header.tokenizer_model,
        "tokenizer_pre": header.tokenizer_pre,
        "vocab_size": header.vocab_size,
        "has_chat_template": header.chat_template is not None,
        "template_shows_tools": header.template_shows_tools,
        "sliding_window": header.sliding_window,
        "notes": list(header.notes),
    }


def judge_preflight(report: Mapping[str, Any], incumbent: str, candidate: str) -> list[CheckResult]:
    """The candidate's two required checks, then the incumbent's and the pair's as information.

    `report` is one entry of `preflight(...)["models"]`. An engine that it does not cover is INCONCLUSIVE.
    """
    pair = report["side_by_side"]
    verdict = {True: Verdict.PASS, False: Verdict.FAIL, None: Verdict.INCONCLUSIVE}[pair["fits"]]
    return [
        *_judge_engine(report, candidate, "preflight", required=True),
        *_judge_engine(report, incumbent, "preflight.incumbent", required=False),
        CheckResult(check="preflight.side_by_side", verdict=verdict, why=pair["why"], required=False),
    ]


def judge_memory_estimate(report: Mapping[str, Any], incumbent: str, candidate: str, limit: float) -> list[CheckResult]:
    """A FAIL where even the least RAM of the candidate is beyond `limit` times the most of the incumbent; else nothing.

    What it rests on are estimates: where they leave it open, `memory.peak_ratio` measures it.
    """
    fits = {entry["engine"]: entry["fit"]["needs"] for entry in report["engines"]}
    least, most = (
        sum(need[level] for need in fits.get(engine, ()) if need["device"] == "ram")
        for engine, level in ((candidate, "low"), (incumbent, "high"))
    )
    if not most or least <= limit * most:
        return []
    ratio = least / most
    why = (
        f"{candidate} takes {size(least)} of RAM or more, {incumbent} {size(most)} at most, by estimate: {ratio:.1f} "
        f"times as much; limits.memory_peak_ratio is {limit:g}: set what you accept, and evaluate again"
    )
    return [CheckResult(check="memory.estimate", verdict=Verdict.FAIL, value=ratio, limit=limit, unit="ratio", why=why)]


def _judge_engine(report: Mapping[str, Any], engine: str, prefix: str, *, required: bool) -> list[CheckResult]:
    entry = next((entry for entry in report["engines"] if entry["engine"] == engine), None)
    if entry is None:
        why = f"preflight did not look at {engine}"
        return [not_measured(f"{prefix}.{check}", why, required=required) for check in ("loads", "fit")]
    return [
        CheckResult(
            check=f"{prefix}.loads",
            verdict=_LOADS_VERDICTS[entry["loads"]],
            why=f"{engine}: {entry['loads']}: {entry['why']}",
            required=required,
        ),
        _judge_fit(entry["fit"], f"{prefix}.fit", engine, required=required),
    ]


def _judge_fit(fit: Mapping[str, Any], check: str, engine: str, *, required: bool) -> CheckResult:
    """The device that is fullest at the expected figure gives the value and the limit, in bytes."""
    measured = [need for need in fit["needs"] if need["free"] is not None]
    unknown = "unknown: " if fit["verdict"] == "unknown" else ""  # each other reason names its verdict
    fullest = max(measured, key=lambda need: need["expected"] - need["free"], default=None)
    return CheckResult(
        check=check,
        verdict=_FIT_VERDICTS[fit["verdict"]],
        value=fullest["expected"] if fullest else None,
        limit=fullest["free"] if fullest else None,
        unit="bytes",
        why=f"{engine}: {unknown}{fit['why']}",
        required=required,
    )


def measured_over_estimated(report: Mapping[str, Any], engine: str, measured: Sequence[int | None]) -> float | None:
    """Measured over expected RAM of an engine: what corrects its next estimate. None without both.

    At least 1: prompts that leave most of the context empty take less, and full ones will not.
    """
    entry = next((entry for entry in report["engines"] if entry["engine"] == engine), None)
    needs = [need for need in (entry or {}).get("fit", {}).get("needs", []) if need["device"] == "ram"]
    seen = [value for value in measured if value]
    if not needs or not seen or not needs[0]["expected"]:
        return None
    return max(1.0, statistics.median(seen) / float(needs[0]["expected"]))
