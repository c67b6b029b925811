"""One model on trial: which evidence is gathered with which numbers of the plan, recorded as it happens, and judged.

Everything measured is stored before it is judged, and what is stored is not measured again: a killed run goes on where
it stopped. `judged` is pure: it makes the same verdicts from the same records at any later time.
"""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from pydantic import SecretStr

from engines import process
from engines.driver import Installation, driver
from engines.gguf_header import read_header
from engines.model_digest import model_digest
from engines.settings import Endpoint
from migrations.plan import ModelPlan, Plan, plan_hash
from tasks import compatibility, faults, parity, performance, preflight, soak
from tasks.contender import Arm, Contender, YardContender
from tasks.noninferiority import decision_reached
from tasks.performance import PerformanceLimits, Workload
from tasks.prompts import Prompt, load_prompts, load_transcripts
from tasks.records import Records
from tasks.verdict import CheckResult, Verdict, not_measured, overall

ARMS: tuple[Arm, Arm] = ("incumbent", "candidate")
BOTH: Literal["both"] = "both"
GLIMPSE_PROMPTS = 4  # answers still shown of a model that a cheap check has turned down
GLIMPSE_TOKENS = 24
FLOOR_SHARE = 12  # one prompt in so many also measures the engine's own noise
FLOOR_TOKENS = 16
SELF_TEST_ITL_MS = 10.0
SEGMENTS_IN_A_SOAK = 6
Say = Callable[[str], None]


@dataclass(kw_only=True)
class Bench:
    """What all models of a run share: the plan, the records, the two installations, and the client's own error."""

    plan: Plan
    records: Records
    run_id: str
    home: Path
    installations: Mapping[Arm, Installation]
    error_budget: Mapping[str, Any]
    api_key: SecretStr | None = None

    @cached_property
    def plan_hash(self) -> str:
        """What the plan means, by content: frozen before the first measurement."""
        return plan_hash(self.plan)


class Trial:
    """The evaluation of one model. Each method gathers one kind of evidence unless the records have it already."""

    def __init__(self, bench: Bench, model: ModelPlan, say: Say = lambda _: None) -> None:
        self.bench = bench
        self.model = model
        self.say = say
        self.behind_yards = any(found.form == "native" for found in bench.installations.values())
        self.contenders = {arm: self._contender(arm) for arm in ARMS}

    # --- gathering ---

    def preflight(self) -> None:
        """What the GGUF header says: loads, fits, alternatives."""

        def measure() -> dict[str, Any]:
            report = preflight.preflight(
                [(self.model.id, self.model.gguf)],
                settings_by_model={self.model.id: self.contenders["incumbent"].settings},
                engines=self._engines(),
                versions={c.driver.name: _version_number(c) for c in self.contenders.values()},
                corrections=self._corrections(),
            )
            found: dict[str, Any] = report["models"][0]
            return found

        self._gather("both", "preflight", measure)

    def prompt_tokens(self, arm: Arm) -> None:
        """How many tokens each prompt is to this engine: the cheapest way to see another tokenizer or template."""
        self._gather_served(
            arm, {"parity.tokens": lambda e: parity.measure_prompt_tokens(e, self._prompts(), progress=self.say)}
        )

    def compatibility(self, arm: Arm) -> None:
        """The battery of API behaviours, and the effect of parameters beyond OpenAI's."""
        plan = self.bench.plan
        names = None if plan.sampling.every_behaviour else sorted(required_behaviours(plan))
        self._gather_served(
            arm,
            {
                "compatibility": lambda e: compatibility.measure_compatibility(e, names=names, progress=self.say),
                "parity.parameters": lambda e: parity.measure_ignored_parameters(e, progress=self.say),
            },
        )

    def answers(self, arm: Arm) -> None:
        """Greedy answers with logprobs and the engine's own noise; of a model turned down already, a glimpse."""
        sampling, prompts = self.bench.plan.sampling, self._prompts()
        asked: dict[str, Any] = {
            "max_tokens": sampling.parity_tokens,
            "top_logprobs": sampling.top_logprobs,
            "progress": self.say,
        }
        floor_tokens = min(FLOOR_TOKENS, sampling.parity_tokens)
        noisy = prompts[: max(2, len(prompts) // FLOOR_SHARE)]
        if self.turned_down():
            glimpse = prompts[:GLIMPSE_PROMPTS]
            asked["max_tokens"] = GLIMPSE_TOKENS
            self._gather_served(arm, {"parity.answers": lambda e: parity.measure_answers(e, glimpse, **asked)})
            return
        self._gather_served(
            arm,
            {
                "parity.answers": lambda e: parity.measure_answers(e, prompts, **asked),
                "parity.floor": lambda e: parity.measure_floor(e, noisy, **{**asked, "max_tokens": floor_tokens}),
            },
        )

    def calibration(self) -> None:
        """The incumbent against itself: this machine's own noise."""
        incumbent = self.contenders["incumbent"]
        for index in range(self.bench.plan.sampling.calibration_blocks):
            self._block("calibration", incumbent, incumbent, index)

    def performance(self) -> None:
        """Paired blocks until a look decides; void blocks are repeated, within the plan's allowance, and counted."""
        sampling, workload = self.bench.plan.sampling, self._workload()
        metrics = performance.metrics(self._limits(), workload)
        errors = {metric.name: error for metric in metrics if (error := self._client_error(metric.key)) is not None}
        for index in range(sampling.looks[-1] + sampling.max_void_blocks):
            self._block("performance", self.contenders["incumbent"], self.contenders["candidate"], index)
            blocks = self._payloads(BOTH, "performance")
            decision = decision_reached(metrics, blocks, sampling.looks, client_errors=errors)
            if decision.stop:
                self.say(f"speed: {decision.why}")
                break
        self._learn_memory()

    def soak(self) -> None:
        """An agent's load on both engines for the planned time: at once where both fit into memory, else in turn."""
        if not self._fit_side_by_side():
            for arm in ARMS:
                self._soak(arm, threading.Event())
            return
        stop = threading.Event()
        with ThreadPoolExecutor(len(ARMS), thread_name_prefix="soak") as pool:
            soaks = [pool.submit(contextvars.copy_context().run, self._soak, arm, stop) for arm in ARMS]
            try:
                for running in as_completed(soaks):
                    running.result()
            except BaseException:
                # the threads see no signal: end their engines under them, and they end
                stop.set()
                process.stop_all()
                raise

    def _soak(self, arm: Arm, stop: threading.Event) -> None:
        """Saved in segments, memory every second."""
        records, run_id, model = self.bench.records, self.bench.run_id, self.model.id
        soak_s = self.bench.plan.sampling.soak_s
        done = self._payloads(arm, "soak")
        if sum(segment["exposure_s"] for segment in done) >= soak_s:
            return
        contender = self.contenders[arm]

        def save(index: int, segment: dict[str, Any]) -> None:
            records.put_evidence(
                run_id, model, arm, "soak", segment, key=f"{index:05d}", circumstances=self._circumstances([contender])
            )

        with records.series_writer(run_id, model, arm) as series:
            soak.soak(
                contender,
                soak_s=soak_s,
                done=done,
                save=save,
                on_memory=lambda t, value: series.append("memory_bytes", t, value),
                segment_s=min(60.0, soak_s / SEGMENTS_IN_A_SOAK),
                seed=self.bench.plan.sampling.seed,
                stop=stop,
                progress=lambda what: self.say(f"{arm}: {what}"),
            )

    def _fit_side_by_side(self) -> bool:
        report = self._payload(BOTH, "preflight")
        return bool(report and report["side_by_side"]["fits"])

    def faults(self) -> None:
        """Drills on the candidate: killed, frozen, cut model file, taken port. Behind a yard, that one is rehearsed."""
        if self.behind_yards:
            return
        self._gather("candidate", "faults", lambda: faults.measure_faults(self.contenders["candidate"], self.say))

    def turned_down(self) -> list[CheckResult]:
        """Cheap checks that have failed already: the costly ones could not open the gate any more."""
        cheap = [*self._judge_preflight(), *self._judge_prompt_tokens()]
        return [result for result in cheap if result.required and result.verdict is Verdict.FAIL]

    # --- judging ---

    def judged(self) -> list[CheckResult]:
        """Every check for which there is evidence, and a word on what was not measured and why. Pure."""
        results = [*self._judge_preflight(), *self._judge_compatibility(), *self._judge_parity()]
        results += [*self._judge_performance(), *self._judge_soak(), *self._judge_faults()]
        return results

    def verdict(self) -> Verdict:
        """The worst required verdict of `judged`."""
        return overall(self.judged())

    def _judge_preflight(self) -> list[CheckResult]:
        report = self._payload(BOTH, "preflight")
        if report is None:
            return [self._missing("preflight.loads")]
        incumbent, candidate = (self.contenders[arm].driver.name for arm in ARMS)
        return preflight.judge_preflight(report, incumbent, candidate)

    def _judge_prompt_tokens(self) -> list[CheckResult]:
        tokens = {arm: self._payload(arm, "parity.tokens") for arm in ARMS}
        if tokens["incumbent"] is None or tokens["candidate"] is None:
            return []
        return parity.judge_prompt_tokens(tokens["incumbent"], tokens["candidate"], self._parity_limits())

    def _judge_compatibility(self) -> list[CheckResult]:
        seen = {arm: self._payload(arm, "compatibility") for arm in ARMS}
        if seen["incumbent"] is None or seen["candidate"] is None:
            return [self._missing("compatibility.required_passed", limit=1.0, unit="share")]
        return compatibility.judge_compatibility(
            seen["incumbent"], seen["candidate"], required_behaviours(self.bench.plan)
        )

    def _judge_parity(self) -> list[CheckResult]:
        found = {
            (arm, kind): self._payload(arm, f"parity.{kind}") for arm in ARMS for kind in ("tokens", "answers", "floor")
        }
        ours, theirs = found["incumbent", "tokens"], found["candidate", "tokens"]
        if ours is None or theirs is None:
            return [self._missing("parity.prompt_tokens", limit=1.0, unit="share")]
        results = parity.judge_parity(
            ours,
            theirs,
            found["incumbent", "answers"],
            found["candidate", "answers"],
            floors=[floor for arm in ARMS if (floor := found[arm, "floor"]) is not None],
            ignored_incumbent=self._parameters("incumbent"),
            ignored_candidate=self._parameters("candidate"),
            required_parameters=self.bench.plan.client.required_parameters,
            limits=self._parity_limits(),
        )
        return results

    def _parameters(self, arm: Arm) -> dict[str, Any] | None:
        probed, behaviours = self._payload(arm, "parity.parameters"), self._payload(arm, "compatibility")
        return None if probed is None or behaviours is None else parity.with_behaviours(probed, behaviours)

    def _judge_performance(self) -> list[CheckResult]:
        sampling, workload, limits = self.bench.plan.sampling, self._workload(), self._limits()
        blocks = self._payloads(BOTH, "performance")
        if not blocks:
            return [self._missing("performance.ttft_p50_ratio", limit=limits.ttft_p50_ratio, unit="ratio")]
        errors = {
            key: error for key in ("ttft_ms", "tpot_ms", "e2e_ms") if (error := self._client_error(key)) is not None
        }
        results = performance.judge_performance(blocks, limits, workload, sampling.looks, client_error_ms=errors)
        results.append(performance.judge_client(self.bench.error_budget, self.bench.plan.limits.client_cpu))
        results.append(performance.judge_memory(blocks, limits, sampling.looks))
        budgets: dict[str, str] = {arm: c.driver.cache_budget(c.settings) for arm, c in self.contenders.items()}
        results.append(performance.memory_figures(blocks, budgets))
        calibration = self._payloads(BOTH, "calibration")
        if calibration:
            results += performance.judge_noise(calibration, limits, workload, sampling.looks, client_error_ms=errors)
        return results

    def _judge_soak(self) -> list[CheckResult]:
        limits, soak_s = self.bench.plan.limits, self.bench.plan.sampling.soak_s
        segments = {arm: self._payloads(arm, "soak") for arm in ARMS}
        if not segments["candidate"]:
            return [self._missing("stability.failures", unit="failures")]
        series = self.bench.records.read_samples(self.bench.run_id, self.model.id, "candidate", "memory_bytes")
        points = series.points()
        return [
            *soak.judge_stability(
                segments["incumbent"],
                segments["candidate"],
                soak_s=soak_s,
                failures_per_day=limits.failures_per_day,
                throughput_retention=limits.throughput_retention,
            ),
            soak.judge_leak(
                [t for t, _ in points],
                [value for _, value in points],
                soak_s=soak_s,
                limit_bytes_per_day=limits.leak_bytes_per_day,
            ),
        ]

    def _judge_faults(self) -> list[CheckResult]:
        if self.behind_yards:
            return []
        evidence = self._payload("candidate", "faults")
        if evidence is None:
            return [self._missing("faults.sigkill")]
        limits = self.bench.plan.limits
        return faults.judge_faults(
            evidence,
            kill_detect_s=limits.kill_detect_s,
            hang_detect_s=limits.hang_detect_s,
            recover_s=limits.recover_s,
        )

    def _missing(self, check: str, *, limit: float | None = None, unit: str = "") -> CheckResult:
        down = self.turned_down() if not check.startswith(("preflight", "parity.prompt_tokens")) else []
        why = (
            f"not measured: {down[0].check} failed first, and the gate cannot open any more" if down else "not measured"
        )
        return not_measured(check, why, limit=limit, unit=unit)

    # --- how the plan's numbers reach the tasks ---

    def _limits(self) -> PerformanceLimits:
        limits = self.bench.plan.limits
        return PerformanceLimits(
            ttft_p50_ratio=limits.ttft_p50_ratio,
            ttft_p95_ratio=limits.ttft_p95_ratio,
            tpot_p50_ratio=limits.tpot_p50_ratio,
            e2e_p50_ratio=limits.e2e_p50_ratio,
            throughput_ratio=limits.throughput_ratio,
            memory_peak_ratio=limits.memory_peak_ratio,
            foreign_cpu=limits.foreign_cpu,
        )

    def _parity_limits(self) -> parity.ParityLimits:
        limits = self.bench.plan.limits
        return parity.ParityLimits(
            top1_agreement=limits.top1_agreement,
            top1_lower_bound=limits.top1_lower,
            mean_kld=limits.mean_kld,
            p99_kld=limits.p99_kld,
            tie_gap_nats=limits.tie_gap_nats,
        )

    def _workload(self) -> Workload:
        sampling = self.bench.plan.sampling
        context = self.contenders["incumbent"].settings.context_tokens or 4096
        return Workload(
            requests=sampling.requests_per_block,
            max_tokens=sampling.max_tokens,
            # "long" is half of the context, at about 1.4 tokens a word
            prompt_words=20 if sampling.prompt_set == "short" else int(context / 2 / 1.4),
            warmup_min=sampling.warmup_min,
            warmup_max=sampling.warmup_max,
            concurrency=sampling.concurrency,
            seed=sampling.seed,
        )

    def _client_error(self, key: str) -> float | None:
        """The measuring client's own p99 error in ms for samples called `key`; E2E is as exact as TTFT."""
        budget = self.bench.error_budget
        if key == "tpot_ms":
            percent = budget["tpot_error_percent"]
            return None if percent is None else percent / 100 * SELF_TEST_ITL_MS
        return budget["ttft_error_p99_ms"] if key in ("ttft_ms", "e2e_ms") else None

    def _prompts(self) -> list[Prompt]:
        own = load_transcripts(self.model.transcripts) if self.model.transcripts else []
        return [*own, *load_prompts(self.bench.plan.sampling.parity_prompts)]

    def _contender(self, arm: Arm) -> Contender:
        choice = getattr(self.bench.plan, arm)
        settings = self.bench.plan.settings_for(self.model.id, api_key=self.bench.api_key)
        # one core is left to the measuring client: it must not disturb what it measures
        threads = settings.threads or max((os.cpu_count() or 2) - 1, 1)
        # a native engine has no port of its own: then both are met as the user will meet them
        kind = YardContender if self.behind_yards else Contender
        return kind(
            arm=arm,
            driver=driver(choice.engine),
            installation=self.bench.installations[arm],
            model_id=self.model.id,
            gguf=self.model.gguf,
            settings=settings.model_copy(update={"threads": threads}),
            home=self.bench.home,
        )

    def _engines(self) -> list[str]:
        return list(dict.fromkeys(contender.driver.name for contender in self.contenders.values()))

    def _corrections(self) -> dict[tuple[str, str], float]:
        """What earlier launches taught about the memory estimate of this model's architecture."""
        architecture = read_header(self.model.gguf).architecture
        learned = {name: self.bench.records.correction(name, architecture) for name in self._engines()}
        return {(self.model.id, name): found.ratio for name, found in learned.items() if found is not None}

    def _learn_memory(self) -> None:
        """Measured against estimated memory of each engine, stored for the next preflight."""
        report, blocks = self._payload(BOTH, "preflight"), self._payloads(BOTH, "performance")
        if report is None:
            return
        for arm in ARMS:
            name = self.contenders[arm].driver.name
            ratio = preflight.measured_over_estimated(report, name, [block[arm].get("pss_bytes") for block in blocks])
            if ratio is not None:
                self.bench.records.learn_correction(name, report["architecture"], ratio)

    # --- records ---

    def _block(self, kind: str, incumbent: Contender, candidate: Contender, index: int) -> None:
        limits, sampling = self._limits(), self.bench.plan.sampling
        wanted = sampling.calibration_blocks if kind == "calibration" else sampling.looks[-1]
        self._gather(
            BOTH,
            kind,
            lambda: performance.measure_block(
                incumbent,
                candidate,
                self._workload(),
                index=index,
                foreign_cpu_limit=limits.foreign_cpu,
                progress=lambda what: self.say(f"{kind} block {index + 1} of {wanted}: {what}"),
            ),
            key=f"{index:05d}",
        )

    def _gather_served(self, arm: Arm, measures: Mapping[str, Callable[[Endpoint], Any]]) -> None:
        """Several kinds of evidence from one launch; none where the records have them all."""
        recorded, run_id = self.bench.records.has_evidence, self.bench.run_id
        missing = {kind: what for kind, what in measures.items() if not recorded(run_id, self.model.id, arm, kind)}
        if not missing:
            return
        # behaviour and answers are not timed: all cores
        contender = self.contenders[arm]
        threads = self.bench.plan.settings_for(self.model.id).threads or os.cpu_count()
        eager = replace(contender, settings=contender.settings.model_copy(update={"threads": threads}))
        with eager.up(self.say) as served:
            for kind, measure in missing.items():
                self._gather(arm, kind, partial(measure, served.endpoint), contenders=(eager,))

    def _gather(
        self,
        arm: Arm | Literal["both"],
        kind: str,
        measure: Callable[[], Any],
        *,
        key: str = "",
        contenders: Sequence[Contender] = (),
    ) -> None:
        records, run_id, model = self.bench.records, self.bench.run_id, self.model.id
        if not records.has_evidence(run_id, model, arm, kind, key=key):
            payload = measure()
            used = contenders or [self.contenders[one] for one in (ARMS if arm == "both" else (arm,))]
            records.put_evidence(run_id, model, arm, kind, payload, key=key, circumstances=self._circumstances(used))

    def _payload(self, arm: Arm | Literal["both"], kind: str) -> Any:
        found = self.bench.records.get_evidence(self.bench.run_id, self.model.id, arm, kind)
        return None if found is None else found.payload

    def _payloads(self, arm: Arm | Literal["both"], kind: str) -> list[Any]:
        found = self.bench.records.list_evidence(self.bench.run_id, model_id=self.model.id, arm=arm, kind=kind)
        return [evidence.payload for evidence in sorted(found, key=lambda evidence: evidence.key)]

    @cached_property
    def _digest(self) -> str:
        return model_digest(self.model.gguf)

    def _circumstances(self, contenders: Sequence[Contender]) -> dict[str, Any]:
        return {
            "model_digest": self._digest,
            "plan_hash": self.bench.plan_hash,
            "seed": self.bench.plan.sampling.seed,
            "engines": [contender.circumstances() for contender in contenders],
        }


def required_behaviours(plan: Plan) -> Collection[str]:
    """The API behaviours that hold the gate: the plan's own list, else what a tool-calling agent uses."""
    return plan.client.requires or compatibility.DEFAULT_REQUIRED


def _version_number(contender: Contender) -> str | None:
    """The version where it is comparable with the support lists; a hosted wheel carries the engine's own."""
    return contender.installation.version if contender.driver.name == "mistral.rs" else None
