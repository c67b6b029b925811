"""Speed: paired blocks that restart both engines, and the verdict of `tasks.verdicts.noninferiority` on them.

A block brings each engine up afresh, warms it up, sends both the same prompts and takes both down, in an order
drawn from the plan's seed. What a block holds is raw: every request's stamped events, the load time, memory, and what
else used the machine.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from engines.client.load import measure
from engines.client.record import StreamRecord, reconcile
from engines.errors import BadInput, EngineError
from engines.fit import estimate
from engines.model.header import read_header
from engines.process.serving import Served
from engines.process.telemetry import MemorySampler, Telemetry, interval, mapped_bytes, private_bytes, process_tree
from engines.settings import Endpoint
from engines.units import figure, number_of, quantity, size
from tasks.evidence.engine_under_test import EngineUnderTest
from tasks.verdicts.counts import no_more_than_incumbent
from tasks.verdicts.limits import Limits
from tasks.verdicts.noninferiority import Metric, block_orders, judge, judge_calibration
from tasks.verdicts.verdict import CheckResult, Verdict, not_measured

ARMS = ("incumbent", "candidate")
Name = TypeVar("Name", bound=str)
MAPPED = "mapped_weights_bytes"
CACHED = "cannot_switch_cache_off"  # in a block: engines for whose sake both kept their prompt caches
WARMUP_AGREEMENT = 0.10  # two requests in a row closer than this end the warm-up (measurement plan, C.2)
SAMPLE_EVERY_S = 0.25
WORDS = tuple("river window copper garden letter winter engine silver market bridge paper kitchen forest".split())  # noqa: SIM905


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every block sends: `requests` prompts of about `prompt_words` words, `max_tokens` tokens each, greedy.

    `concurrency` above 1 adds one closed-loop round per value, for throughput. `seed` fixes the prompts.
    """

    requests: int
    max_tokens: int
    prompt_words: int = 20
    warmup_min: int = 3
    warmup_max: int = 10
    concurrency: tuple[int, ...] = (1,)
    seed: int = 7


RATIOS = frozenset(  # the limits that blocks are judged by
    {"ttft_p50_ratio", "ttft_p95_ratio", "tpot_p50_ratio", "e2e_p50_ratio", "throughput_ratio", "memory_peak_ratio"}
)


def metrics(limits: Limits, workload: Workload) -> list[Metric]:
    """The primary metrics: promotion needs a PASS of every one of them."""
    primary = [
        Metric(name="ttft_p50", samples="ttft_ms", quantile=0.5, margin=limits.ttft_p50_ratio - 1, unit="ms"),
        Metric(name="ttft_p95", samples="ttft_ms", quantile=0.95, margin=limits.ttft_p95_ratio - 1, unit="ms"),
        Metric(name="tpot_p50", samples="tpot_ms", quantile=0.5, margin=limits.tpot_p50_ratio - 1, unit="ms"),
        Metric(name="e2e_p50", samples="e2e_ms", quantile=0.5, margin=limits.e2e_p50_ratio - 1, unit="ms"),
    ]
    shared: Any = {"quantile": 0.5, "margin": limits.throughput_ratio - 1, "unit": "tok/s", "higher_is_better": True}
    return primary + [
        Metric(name=f"throughput_c{level}", samples=f"throughput_c{level}_tok_s", **shared)
        for level in workload.concurrency
        if level > 1
    ]


def memory_metric(limits: Limits) -> Metric:
    """Peak memory of the process tree, judged from the same blocks as `with_mapped` gives them."""
    margin = limits.memory_peak_ratio - 1
    return Metric(name="memory_peak", samples="memory_judged_mib", quantile=0.5, margin=margin, unit="MiB")


def with_mapped(blocks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`blocks` with the memory that is judged: of one kind on both sides.

    Private memory, and the weights that an engine serves from the mapped file, where every block that counts has both
    of both engines; else (of an earlier version, or a model that cannot be sized) private memory alone.
    """
    counted = [block[arm] for block in blocks if block.get("void") is None for arm in ARMS]
    both = bool(counted) and all(arm.get(MAPPED) is not None for arm in counted)
    return [{**block, **{arm: _judged(block[arm], both) for arm in ARMS}} for block in blocks]


def _judged(arm: Mapping[str, Any], both: bool) -> dict[str, Any]:
    mapped = (arm.get(MAPPED) or 0) / 2**20
    judged = [peak + mapped * both for peak in arm.get("memory_peak_mib") or ()]
    return {**arm, "memory_judged_mib": judged, "mapped_weights_mib": [mapped] if both and judged else []}


def held_bytes(arm: Mapping[str, Any]) -> int | None:
    """What an engine held at the end of a block, its weights counted once; None where that was not read."""
    private, mapped = arm.get("memory_steady_bytes"), arm.get(MAPPED)
    both: int | None = None if private is None or mapped is None else private + mapped
    return arm.get("pss_bytes") if both is None else both  # what earlier versions recorded


def measure_block(
    incumbent: EngineUnderTest,
    candidate: EngineUnderTest,
    workload: Workload,
    *,
    index: int,
    foreign_cpu_limit: float,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """One block's evidence, in the form of `tasks.verdicts.noninferiority`; its `void` says why it is discarded."""
    order = block_orders(index + 1, workload.seed)[index]
    arms: dict[str, dict[str, Any]] = {}
    named = {"A": ("incumbent", incumbent), "B": ("candidate", candidate)}
    neutral, cached = without_caches({"incumbent": incumbent, "candidate": candidate})
    for letter in order:
        name, engine = named[letter]
        progress(f"{name} ({engine.name})")
        try:
            with engine.up() as served:
                arms[name] = _measure_served(served, engine, workload, index, neutral[name])
        except EngineError as error:
            arms[name] = {"failed": str(error).splitlines()[0], "machine": {}, "records": []}
    foreign = {name: arm["machine"].get("foreign_cpu_fraction") for name, arm in arms.items()}
    discarded = _reason_to_discard(arms, foreign, foreign_cpu_limit)
    block = {"index": index, "order": order, **arms, "foreign_cpu": foreign, "void": discarded}
    return block | ({CACHED: cached} if cached else {})


def judge_performance(
    blocks: Sequence[Mapping[str, Any]],
    limits: Limits,
    workload: Workload,
    looks: Sequence[int],
    *,
    client_error_ms: Mapping[str, float],
) -> list[CheckResult]:
    """The gate on every primary metric and on failed requests, and figures reported beside it."""
    if not blocks:
        return [not_measured("performance.ttft_p50_ratio", "no block was measured", limit=limits.ttft_p50_ratio)]
    gated = [
        judge(metric, blocks, looks, client_error=client_error_ms.get(metric.key)).check_result()
        for metric in metrics(limits, workload)
    ]
    return [*gated, _judge_errors(blocks), *_reported(blocks)]


def judge_memory(blocks: Sequence[Mapping[str, Any]], limits: Limits, looks: Sequence[int]) -> CheckResult:
    """`memory.peak_ratio`: peak memory, judged block by block like a latency; says which kind, and shows both."""
    judged = with_mapped(blocks)
    result = judge(memory_metric(limits), judged, looks).check_result()
    counted = [block for block in judged if block["void"] is None]
    mapped = {arm: _median_over(counted, arm, "mapped_weights_mib") for arm in ARMS}
    kind = "judged: private memory alone, mapped weights were not recorded"
    if None not in mapped.values():
        private = {arm: _median_over(counted, arm, "memory_peak_mib") for arm in ARMS}
        shown = "; ".join(f"{arm} {figure(private[arm])} + {figure(mapped[arm])} MiB" for arm in ARMS[::-1])
        kind = f"judged: private memory + weights mapped from the file ({shown})"
    return result.model_copy(update={"check": "memory.peak_ratio", "why": f"{result.why}; {kind}"})


def judge_client(budget: Mapping[str, Any], limit: float) -> CheckResult:
    """Whether our own client was light enough to measure: its share of one core in the self-test."""
    share = budget["client_cpu_share"]
    if share is None:
        return not_measured("performance.client", "the self-test gave no CPU figure", limit=limit, unit="core")
    late = quantity(budget["lateness_p99_ms"], "ms")
    why = f"the measuring client used {share:.1%} of a core in its self-test; it stamped chunks {late} late (p99)"
    verdict = Verdict.PASS if share <= limit else Verdict.INCONCLUSIVE
    return CheckResult(check="performance.client", verdict=verdict, value=share, limit=limit, unit="core", why=why)


def memory_figures(blocks: Sequence[Mapping[str, Any]], budgets: Mapping[str, str]) -> CheckResult:
    """`memory.steady`: what each engine holds at the end of a block, beside the cache it was allowed to fill."""
    counted = [block for block in blocks if block["void"] is None]
    values = {arm: _median_over(counted, arm, "memory_steady_bytes") for arm in ARMS}
    in_mib = {arm: None if value is None else value / 2**20 for arm, value in values.items()}
    steady = _figure("memory.steady", in_mib, "MiB", "private memory at the end of a block")
    mapped = ""
    weights = {arm: _median_over(counted, arm, MAPPED) for arm in ARMS}
    if None not in weights.values():
        # llama.cpp maps the model file: its weights are page cache, which private memory leaves out
        mapped = f"; weights mapped from the file: {size(weights['candidate'])} against {size(weights['incumbent'])}"
    allowed = "; ".join(f"{arm}'s cache budget: {budgets[arm]}" for arm in ARMS)
    return steady.model_copy(update={"why": f"{steady.why}{mapped} ({allowed})"})


def judge_noise(
    blocks: Sequence[Mapping[str, Any]],
    limits: Limits,
    workload: Workload,
    looks: Sequence[int],
    *,
    client_error_ms: Mapping[str, float],
) -> list[CheckResult]:
    """The A/A calibration of this machine; reported only, as the blocks carry their own noise to the gate."""
    errors = {m.name: client_error_ms[m.key] for m in metrics(limits, workload) if m.key in client_error_ms}
    results = judge_calibration(metrics(limits, workload), blocks, looks, client_errors=errors)
    return [result.model_copy(update={"required": False}) for result in results]


def prompt(words: int, opening: str, seed: int) -> str:
    """A question of about `words` words that opens with `opening`: a unique opening defeats prefix caches."""
    chosen = random.Random(seed).choices(WORDS, k=max(words - 12, 4))
    return f"{opening}: {' '.join(chosen)}. Write a story that uses every one of these words."


def body(text: str, max_tokens: int, extra: Mapping[str, object]) -> dict[str, Any]:
    """A greedy request for exactly `max_tokens` tokens: an early stop would make an engine look fast."""
    messages = [{"role": "user", "content": text}]
    return {"messages": messages, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **extra}


def without_caches(engines: Mapping[Name, EngineUnderTest]) -> tuple[dict[Name, dict[str, object]], list[str]]:
    """By arm the fields that keep prompts from its cache, and the names of engines that have no such field.

    Where one has none both keep their caches: the beginning that a template gives to every prompt would be free for
    one of them alone.
    """
    fields = {arm: engine.driver.neutral_body() for arm, engine in engines.items()}
    cached = [engines[arm].name for arm, found in fields.items() if found is None]
    return {arm: {} if cached else found or {} for arm, found in fields.items()}, cached


def _measure_served(
    served: Served, engine: EngineUnderTest, workload: Workload, index: int, extra: Mapping[str, object]
) -> dict[str, Any]:
    warm = _warm_up(served.endpoint, workload, extra, index)
    telemetry = Telemetry(served.process.pid)
    with MemorySampler(served.process.pid, SAMPLE_EVERY_S) as sampler:
        before = telemetry.snapshot()
        records = measure(served.endpoint, _bodies(workload, extra, index, "request"), keep_text=False)
        if all(map(_came_in_one_go, records)):  # held up here once, or an engine that buffers its streams
            records += measure(served.endpoint, _bodies(workload, extra, index, "request again"), keep_text=False)
        levels = [level for level in workload.concurrency if level > 1]
        rounds = {level: _throughput(served.endpoint, workload, extra, index, level) for level in levels}
        after = telemetry.snapshot()
    tree = process_tree(served.process.pid)
    arm: dict[str, Any] = {
        "load_s": served.load_s,
        "warmup_requests": warm,
        "records": [record.to_dict() for record in records],
        "reconciled": [finding for record in records for finding in reconcile(record)],
        "machine": interval(before, after),
        "memory_peak_mib": [] if sampler.peak is None else [sampler.peak / 2**20],
        "memory_steady_bytes": private_bytes(tree),
        MAPPED: mapped_weights(engine, tree),
        # a figure, not a gate: once is enough
        "prefix_cache": _prefix_cache(served.endpoint, workload, index) if index == 0 else None,
        "errors": [record.error_type for record in records if not record.ok],
    }
    arm |= {f"throughput_c{level}_tok_s": [rate] for level, rate in rounds.items() if rate}
    arm["icl_ms"] = [gap for record in records if record.ok for gap in record.measured("icl_ms") or ()]
    for name in ("ttft_ms", "tpot_ms", "e2e_ms", "prefill_tok_s", "decode_tok_s"):
        values = (record.measured(name) for record in records if record.ok)
        arm[name] = [value for value in values if value is not None and value > 0]
    return arm


def _came_in_one_go(record: StreamRecord) -> bool:
    """All chunks bear one time: a TPOT of 0 would be refused by the judge, or pass as the fastest engine of all."""
    return record.ok and record.measured("tpot_ms") == 0


def mapped_weights(engine: EngineUnderTest, tree: Sequence[int]) -> int | None:
    """Bytes of the model that the engine serves from the mapped file; None where they cannot be known.

    Pages that it mapped to copy them, into its own memory or its own layout, are no second set of weights.
    """
    if engine.gguf.is_dir():
        return 0  # what takes a directory copies its weights
    try:
        header = read_header(engine.gguf)
        fit = estimate(header, engine.settings, engine.driver.name, own=engine.own)
    except BadInput:
        return None
    resident = mapped_bytes(tree, header.shards)
    if resident is None or not fit.parts:
        return None
    return min(resident, sum(part.expected for part in fit.parts if part.kind == "mapped"))


def _bodies(workload: Workload, extra: Mapping[str, object], index: int, what: str) -> list[dict[str, Any]]:
    # the same prompts go to both engines of a block; every block has its own
    seed = workload.seed * 1000 + index * 100
    texts = (prompt(workload.prompt_words, f"{what} {index}-{n}", seed + n) for n in range(workload.requests))
    return [body(text, workload.max_tokens, extra) for text in texts]


def _warm_up(endpoint: Endpoint, workload: Workload, extra: Mapping[str, object], index: int) -> int:
    """Requests sent and thrown away: `warmup_min`, then until two in a row are alike, `warmup_max` at most."""
    times: list[float] = []
    for number in range(workload.warmup_max):
        text = prompt(workload.prompt_words, f"warm-up {index}-{number}", workload.seed + number)
        (record,) = measure(endpoint, [body(text, workload.max_tokens, extra)], keep_text=False)
        elapsed = record.measured("e2e_ms")
        if elapsed is not None:
            times.append(elapsed)
        alike = len(times) >= 2 and abs(times[-1] / times[-2] - 1) < WARMUP_AGREEMENT
        if number + 1 >= workload.warmup_min and alike:
            return number + 1
    return workload.warmup_max


def _throughput(
    endpoint: Endpoint, workload: Workload, extra: Mapping[str, object], index: int, level: int
) -> float | None:
    """Output tokens per second over one closed-loop round at `level` requests at a time; None where one failed."""
    bodies = _bodies(workload, extra, index, f"round of {level}")
    records = measure(endpoint, bodies, concurrency=level, keep_text=False)
    if not all(record.ok and record.completion_tokens for record in records):
        return None
    started = min(record.sent_ns for record in records)
    ended = max(record.sent_ns + record.events[-1].t_ns for record in records)
    return sum(record.completion_tokens or 0 for record in records) / ((ended - started) / 1e9)


def _prefix_cache(endpoint: Endpoint, workload: Workload, index: int) -> dict[str, float | None]:
    """TTFT of one long prompt sent twice, its cache left on: what a growing conversation gains."""
    text = prompt(workload.prompt_words * 3, f"prefix {index}", workload.seed)
    first, second = measure(endpoint, [body(text, 2, {})] * 2, keep_text=False)
    return {
        "cold_ttft_ms": first.measured("ttft_ms"),
        "cached_ttft_ms": second.measured("ttft_ms"),
        "cached_tokens": second.cached_tokens,
        "prompt_tokens": second.prompt_tokens,
    }


def _reason_to_discard(
    arms: Mapping[str, Mapping[str, Any]], foreign: Mapping[str, float | None], limit: float
) -> str | None:
    for name, share in foreign.items():
        if share is not None and share > limit:
            used = quantity(share, "share", limit)
            return f"other processes used {used} of the CPU while the {name} ran, limit {quantity(limit, 'share')}"
    for name, arm in arms.items():
        if arm.get("failed"):
            return f"the {name} did not come up: {arm['failed']}"
        if not arm["ttft_ms"]:
            return f"no request to the {name} succeeded"
    return None


def _judge_errors(blocks: Sequence[Mapping[str, Any]]) -> CheckResult:
    """Failed requests and failed starts of the candidate; those of a discarded block count too."""
    failed = {arm: sum(len(b[arm].get("errors", [])) + bool(b[arm].get("failed")) for b in blocks) for arm in ARMS}
    sent = {arm: sum(len(b[arm].get("records", [])) + bool(b[arm].get("failed")) for b in blocks) for arm in ARMS}
    ours, theirs = ((failed[arm], sent[arm]) for arm in ("candidate", "incumbent"))
    why = f"{ours[0]} of {ours[1]} requests and starts failed on the candidate, {theirs[0]} of {theirs[1]} on the "
    return no_more_than_incumbent("performance.errors", ours, theirs, "requests", f"{why}incumbent")


def _reported(blocks: Sequence[Mapping[str, Any]]) -> list[CheckResult]:
    """Figures that a user asks for and that do not hold the gate."""
    counted = [block for block in blocks if block["void"] is None]
    figures = (
        ("load_s", "s", "load to first token"),
        ("prefill_tok_s", "tok/s", "prefill"),
        ("decode_tok_s", "tok/s", "decode"),
        ("icl_ms", "ms", "gap between chunks"),
    )
    results = [
        _figure(f"performance.{name}", {arm: _median_over(counted, arm, name) for arm in ARMS}, unit, what)
        for name, unit, what in figures
    ]
    saved = {arm: _prefix_gain(counted, arm) for arm in ARMS}
    what = "TTFT of a repeated prompt over the first"
    results.append(_figure("performance.prefix_cache_ttft_ratio", saved, "ratio", what))
    ours, theirs = (sum(len(b[arm].get("reconciled", [])) for b in blocks) for arm in ("candidate", "incumbent"))
    disagree = (number_of(ours, "time"), number_of(theirs, "time"))
    why = "client, usage and engine timing disagree {} on the candidate, {} on the incumbent".format(*disagree)
    verdict = Verdict.INCONCLUSIVE if ours else Verdict.PASS
    check, unit = "performance.accounting", "findings"
    results.append(CheckResult(check=check, verdict=verdict, value=ours, unit=unit, why=why, required=False))
    if cached := {name: None for block in counted for name in block.get(CACHED, ())}:
        why = f"both kept their prompt caches, as that of {' and '.join(cached)} cannot be switched off"
        check, why = "performance.prompt_cache", f"{why}: what begins every prompt was read once"
        results.append(CheckResult(check=check, verdict=Verdict.PASS, why=why, required=False))
    return results


def _figure(check: str, values: Mapping[str, float | None], unit: str, what: str) -> CheckResult:
    candidate, incumbent = values["candidate"], values["incumbent"]
    if candidate is None or incumbent is None:
        return not_measured(check, f"{what}: not measured on both engines", unit=unit, required=False)
    why = f"{what}: candidate {quantity(candidate, unit)}, incumbent {quantity(incumbent, unit)}"
    return CheckResult(check=check, verdict=Verdict.PASS, value=candidate, unit=unit, why=why, required=False)


def _median_over(blocks: Sequence[Mapping[str, Any]], arm: str, name: str) -> float | None:
    values: list[float] = []
    for block in blocks:
        found = block[arm].get(name)
        values += found if isinstance(found, list) else [found] if found is not None else []
    return statistics.median(values) if values else None


def _prefix_gain(blocks: Sequence[Mapping[str, Any]], arm: str) -> float | None:
    ratios = [
        pair["cached_ttft_ms"] / pair["cold_ttft_ms"]
        for block in blocks
        if (pair := block[arm].get("prefix_cache")) and pair["cold_ttft_ms"] and pair["cached_ttft_ms"]
    ]
    return statistics.median(ratios) if ratios else None
