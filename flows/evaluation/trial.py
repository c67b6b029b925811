"""One model on trial: which evidence is gathered with which numbers of the plan, recorded as it happens, and judged.

Everything measured is stored before it is judged, and what is stored is not measured again: a killed run goes on where
it stopped. `judged` is pure: it makes the same verdicts from the same records at any later time.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import SecretStr

from engines.driver import Installation
from engines.errors import BadInput, EngineExited, SwitchyardError
from engines.home import host
from engines.model.digest import model_digest
from engines.model.header import read_header
from engines.process import process
from engines.process.serving import Served, exit_reason
from engines.registry import driver
from engines.settings import Endpoint
from migrations.plan import ModelPlan, Plan, content_hash
from tasks.evidence import compatibility, faults, performance, preflight
from tasks.evidence.engine_under_test import Arm, EngineUnderTest, YardContender
from tasks.evidence.parity import judge as parity
from tasks.evidence.parity.answers import measure_answers, measure_floor
from tasks.evidence.parity.parameters import measure_ignored_parameters, with_behaviours
from tasks.evidence.parity.tokens import judge_prompt_tokens, measure_prompt_tokens
from tasks.evidence.performance import Workload
from tasks.evidence.prompts import Prompt, load_prompts, load_transcripts
from tasks.evidence.soak import soak
from tasks.evidence.soak.judge import judge_leak, judge_stability
from tasks.evidence.unmeasured import (
    KIND,
    LAUNCH,
    SOAK_LEFT_OUT,
    broken,
    can_be_retried,
    ends_the_run,
    judge_unmeasured,
    left_out,
    summary,
)
from tasks.records.store import Records
from tasks.verdicts.noninferiority import decision_reached
from tasks.verdicts.verdict import CheckResult, Verdict, gate, not_measured

ARMS: tuple[Arm, Arm] = ("incumbent", "candidate")
BOTH: Literal["both"] = "both"
GLIMPSE_PROMPTS = 4  # answers still shown of a model that a cheap check has turned down
GLIMPSE_TOKENS = 24
FLOOR_SHARE = 12  # one prompt in so many also measures the engine's own noise
FLOOR_TOKENS = 16
SELF_TEST_ITL_MS = 10.0
SEGMENTS_IN_A_SOAK = 6
SOAK_OF = "soak.of"  # evidence: the earlier run whose soak counts
LOOK_BACK = 200  # evaluations
DYING_S = 5.0  # a dying engine closes its connections first
POLL_S = 0.05
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
    def content_hash(self) -> str:
        """What the plan means, by content: frozen before the first measurement."""
        return content_hash(self.plan)


class Unmeasured(SwitchyardError):
    """A check could not be carried out; the records say why."""


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
        """What the GGUF header says: loads, fits, alternatives. A file that cannot be read fails its model alone."""
        try:
            read_header(self.model.gguf)
        except BadInput as error:
            self._put_unmeasured(BOTH, "preflight", {"verdict": Verdict.FAIL.value, "why": str(error), "log": []})
            raise Unmeasured(str(error)) from error

        def measure() -> dict[str, Any]:
            report = preflight.preflight(
                [(self.model.id, self.model.gguf)],
                settings_by_model={self.model.id: self.contenders["incumbent"].settings},
                engines=self._engines(),
                versions={c.driver.name: c.installation.version for c in self.contenders.values()},
                corrections=self._corrections(),
            )
            found: dict[str, Any] = report["models"][0]
            return found

        try:
            self._gather("both", "preflight", measure)
        except BadInput as error:  # of this model's header: the plan itself was checked before the run
            self._put_unmeasured(BOTH, "preflight", {"verdict": Verdict.ERROR.value, "why": str(error), "log": []})
            raise Unmeasured(str(error)) from error

    def prompt_tokens(self, arm: Arm) -> None:
        """How many tokens each prompt is to this engine: the cheapest way to see another tokenizer or template."""
        self._gather_served(
            arm, {"parity.tokens": lambda e: measure_prompt_tokens(e, self._prompts(), progress=self.say)}
        )

    def compatibility(self, arm: Arm) -> None:
        """The battery of API behaviours, and the effect of parameters beyond OpenAI's."""
        plan = self.bench.plan
        names = None if plan.measure.every_behaviour else sorted(required_behaviours(plan))
        self._gather_served(
            arm,
            {
                "compatibility": lambda e: compatibility.measure_compatibility(e, names=names, progress=self.say),
                "parity.parameters": lambda e: measure_ignored_parameters(e, progress=self.say),
            },
        )

    def answers(self, arm: Arm) -> None:
        """Greedy answers with logprobs and the engine's own noise; of a model turned down already, a glimpse."""
        amounts, prompts = self.bench.plan.measure, self._prompts()
        asked: dict[str, Any] = {
            "max_tokens": amounts.parity_tokens,
            "top_logprobs": amounts.top_logprobs,
            "progress": self.say,
        }
        floor_tokens = min(FLOOR_TOKENS, amounts.parity_tokens)
        noisy = prompts[: max(2, len(prompts) // FLOOR_SHARE)]
        if self.turned_down():
            glimpse = prompts[:GLIMPSE_PROMPTS]
            asked["max_tokens"] = GLIMPSE_TOKENS
            self._gather_served(arm, {"parity.answers": lambda e: measure_answers(e, glimpse, **asked)})
            return
        self._gather_served(
            arm,
            {
                "parity.answers": lambda e: measure_answers(e, prompts, **asked),
                "parity.floor": lambda e: measure_floor(e, noisy, **{**asked, "max_tokens": floor_tokens}),
            },
        )

    def calibration(self) -> None:
        """The incumbent against itself: this machine's own noise."""
        incumbent = self.contenders["incumbent"]
        for index in range(self.bench.plan.measure.calibration_blocks):
            self._block("calibration", incumbent, incumbent, index)

    def performance(self) -> None:
        """Paired blocks until a look decides; void blocks are repeated, within the plan's allowance, and counted."""
        amounts, workload = self.bench.plan.measure, self._workload()
        metrics = performance.metrics(self.bench.plan.limits, workload)
        errors = {metric.name: error for metric in metrics if (error := self._client_error(metric.key)) is not None}
        for index in range(amounts.looks[-1] + amounts.max_discarded_blocks):
            self._block("performance", self.contenders["incumbent"], self.contenders["candidate"], index)
            blocks = self._payloads(BOTH, "performance")
            decision = decision_reached(metrics, blocks, amounts.looks, client_errors=errors)
            if decision.stop:
                self.say(f"speed: {decision.why}")
                break
        self._learn_memory()

    def leave_soak_out(self) -> None:
        """Without a soak of its own: that of an earlier evaluation of just this, else a word on what is missing."""
        if self._fully_soaked(self.bench.run_id) or self._soak_run() != self.bench.run_id:
            return
        records, run_id = self.bench.records, self.bench.run_id
        if (earlier := self._earlier_soak()) is not None:
            environment = self._environment([self.contenders[arm] for arm in ARMS])
            records.put_evidence(run_id, self.model.id, BOTH, SOAK_OF, {"run_id": earlier}, environment=environment)
            return
        why = "not measured: this evaluation left the soak out, as scheduled ones do, and no earlier one of the same "
        why += f"plan, model file and engines has one; `switchyard evaluate --resume {run_id}` adds it"
        self._put_unmeasured(BOTH, SOAK_LEFT_OUT, left_out(why))

    def _earlier_soak(self) -> str | None:
        """The latest evaluation on this host whose whole soak was of this plan, model file and versions."""
        wanted = {arm: found.version for arm, found in self.bench.installations.items()}
        for run in self.bench.records.history(LOOK_BACK, kind="evaluate", host=host()):
            if run.id != self.bench.run_id and run.status == "done" and self._fully_soaked(run.id, wanted):
                return run.id
        return None

    def _fully_soaked(self, run_id: str, versions: Mapping[Arm, str] | None = None) -> bool:
        """Whether a run soaked both engines for the planned time; of `versions`, under this very plan, where given."""
        for arm in ARMS:
            rows = self.bench.records.list_evidence(run_id, model_id=self.model.id, arm=arm, kind="soak")
            if sum(row.payload["exposure_s"] for row in rows) < self.bench.plan.measure.soak_s:
                return False
            if versions is None:
                continue
            for seen in (row.environment for row in rows):
                engine = seen["engines"][0]["version"] if seen.get("engines") else None
                under = (seen.get("plan_hash"), seen.get("model_digest"), engine)
                if under != (self.bench.content_hash, self._digest, versions[arm]):
                    return False
        return True

    def _soak_run(self) -> str:
        """The run whose soak counts for this one."""
        taken = self._payload(BOTH, SOAK_OF)
        return self.bench.run_id if taken is None else str(taken["run_id"])

    def soak(self) -> None:
        """An agent's load on both engines for the planned time: at once where both fit into memory, else in turn."""
        if self._soak_run() != self.bench.run_id:
            return
        if not self._fit_side_by_side():
            for arm in ARMS:
                self._soaked(arm, partial(self._soak, arm, threading.Event()))
            return
        stop = threading.Event()
        with ThreadPoolExecutor(len(ARMS), thread_name_prefix="soak") as pool:
            soaks = {pool.submit(contextvars.copy_context().run, self._soak, arm, stop): arm for arm in ARMS}
            try:
                for running in as_completed(soaks):
                    self._soaked(soaks[running], running.result)
            except Exception:
                stop.set()  # the other soak ends with the request under way
                raise
            except BaseException:
                # the threads see no signal: end their engines under them, and they end
                stop.set()
                process.stop_all()
                raise

    def _soaked(self, arm: Arm, soak: Callable[[], None]) -> None:
        """Run the soak of one engine; what ends it early is recorded as that engine's."""
        try:
            soak()
        except Exception as error:
            self.broke(arm, "soak", error)
            raise Unmeasured(f"{arm}: {summary(error)}") from error

    def _soak(self, arm: Arm, stop: threading.Event) -> None:
        """Saved in segments, memory every second."""
        records, run_id, model = self.bench.records, self.bench.run_id, self.model.id
        soak_s = self.bench.plan.measure.soak_s
        done = self._payloads(arm, "soak")
        if sum(segment["exposure_s"] for segment in done) >= soak_s:
            return
        contender = self.contenders[arm]

        def save(index: int, segment: dict[str, Any]) -> None:
            records.put_evidence(
                run_id, model, arm, "soak", segment, key=f"{index:05d}", environment=self._environment([contender])
            )

        with records.series_writer(run_id, model, arm) as series:
            soak.soak(
                contender,
                soak_s=soak_s,
                done=done,
                save=save,
                on_memory=lambda t, value: series.append("memory_bytes", t, value),
                segment_s=min(60.0, soak_s / SEGMENTS_IN_A_SOAK),
                seed=self.bench.plan.measure.seed,
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
        cheap = [*self._judge_launches(), *self._judge_preflight(), *self._judge_prompt_tokens()]
        return [result for result in cheap if result.required and result.verdict is Verdict.FAIL]

    # --- what could not be measured ---

    def broke(self, arm: Arm | Literal["both"], what: str, error: BaseException) -> None:
        """Record that `error` ended a check; raises it where it ends the whole run."""
        if ends_the_run(error):
            raise error
        key = self.bench.api_key
        secrets = [key.get_secret_value()] if key else []
        self._put_unmeasured(arm, what, broken(arm, error, secrets=secrets))

    def does_not_start(self) -> list[CheckResult]:
        """The engines that do not start with this model: nothing can be compared without them."""
        return [result for result in self._judge_launches() if result.verdict is not Verdict.PASS]

    def forget_unmeasured(self) -> None:
        """Let a resumed run carry out again what broke off or was left out; what FAILed stands."""
        found = self._unmeasured()
        if any(not can_be_retried(record) for _, _, record in found):
            return
        for arm, what, _ in found:
            self.bench.records.drop_evidence(self.bench.run_id, self.model.id, arm, KIND, key=what)

    def _unmeasured(self) -> list[tuple[Arm | Literal["both"], str, dict[str, Any]]]:
        """(engine, check, record) of what was not measured."""
        found = self.bench.records.list_evidence(self.bench.run_id, model_id=self.model.id, kind=KIND)
        return [(cast("Arm", row.arm), row.key, row.payload) for row in found]

    def _put_unmeasured(self, arm: Arm | Literal["both"], what: str, record: dict[str, Any]) -> None:
        used = [self.contenders[one] for one in (ARMS if arm == "both" else (arm,))]
        environment: dict[str, Any] = {}
        with contextlib.suppress(Exception):  # what broke the check may break its description as well
            environment = self._environment(used)
        records, run_id = self.bench.records, self.bench.run_id
        records.put_evidence(run_id, self.model.id, arm, KIND, record, key=what, environment=environment)

    # --- judging ---

    def judged(self) -> list[CheckResult]:
        """Every check for which there is evidence, and a word on what was not measured and why. Pure."""
        results = [*self._judge_launches(), *self._judge_preflight()]
        results += self._judge_unmeasured()
        for area, judge in (
            ("compatibility", self._judge_compatibility),
            ("parity", self._judge_parity),
            ("performance", self._judge_performance),
            ("stability", self._judge_soak),
            ("faults", self._judge_faults),
        ):
            results += _judged(area, judge)
        return results

    def verdict(self) -> Verdict:
        """The worst required verdict of `judged`."""
        return gate(self.judged())

    def _judge_launches(self) -> list[CheckResult]:
        return [judge_unmeasured(arm, what, record) for arm, what, record in self._unmeasured() if what == LAUNCH]

    def _judge_unmeasured(self) -> list[CheckResult]:
        """All but those that stand with their area."""
        first = (LAUNCH, "preflight", SOAK_LEFT_OUT)
        return [judge_unmeasured(arm, what, record) for arm, what, record in self._unmeasured() if what not in first]

    def _judge_preflight(self) -> list[CheckResult]:
        for arm, what, record in self._unmeasured():
            if what == "preflight":
                return [judge_unmeasured(arm, what, record)]
        report = self._payload(BOTH, "preflight")
        if report is None:
            return [self._missing("preflight.loads")]
        incumbent, candidate = (self.contenders[arm].driver.name for arm in ARMS)
        return _judged("preflight", lambda: preflight.judge_preflight(report, incumbent, candidate))

    def _judge_prompt_tokens(self) -> list[CheckResult]:
        return _judged("parity", self._compare_prompt_tokens)

    def _compare_prompt_tokens(self) -> list[CheckResult]:
        tokens = {arm: self._payload(arm, "parity.tokens") for arm in ARMS}
        if tokens["incumbent"] is None or tokens["candidate"] is None:
            return []
        return judge_prompt_tokens(tokens["incumbent"], tokens["candidate"], self.bench.plan.limits)

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
            limits=self.bench.plan.limits,
        )
        return results

    def _parameters(self, arm: Arm) -> dict[str, Any] | None:
        probed, behaviours = self._payload(arm, "parity.parameters"), self._payload(arm, "compatibility")
        return None if probed is None or behaviours is None else with_behaviours(probed, behaviours)

    def _judge_performance(self) -> list[CheckResult]:
        amounts, workload, limits = self.bench.plan.measure, self._workload(), self.bench.plan.limits
        blocks = self._payloads(BOTH, "performance")
        if not blocks:
            return [self._missing("performance.ttft_p50_ratio", limit=limits.ttft_p50_ratio, unit="ratio")]
        errors = {
            key: error for key in ("ttft_ms", "tpot_ms", "e2e_ms") if (error := self._client_error(key)) is not None
        }
        results = performance.judge_performance(blocks, limits, workload, amounts.looks, client_error_ms=errors)
        results.append(performance.judge_client(self.bench.error_budget, self.bench.plan.limits.client_cpu))
        results.append(performance.judge_memory(blocks, limits, amounts.looks))
        budgets: dict[str, str] = {arm: c.driver.cache_budget(c.settings) for arm, c in self.contenders.items()}
        results.append(performance.memory_figures(blocks, budgets))
        calibration = self._payloads(BOTH, "calibration")
        if calibration:
            results += performance.judge_noise(calibration, limits, workload, amounts.looks, client_error_ms=errors)
        return results

    def _judge_soak(self) -> list[CheckResult]:
        limits, soak_s = self.bench.plan.limits, self.bench.plan.measure.soak_s
        records, model, run_id = self.bench.records, self.model.id, self._soak_run()
        segments = {
            arm: [row.payload for row in sorted(rows, key=lambda row: row.key)]
            for arm in ARMS
            for rows in [records.list_evidence(run_id, model_id=model, arm=arm, kind="soak")]
        }
        if not segments["candidate"]:
            out = [
                judge_unmeasured(arm, what, record) for arm, what, record in self._unmeasured() if what == SOAK_LEFT_OUT
            ]
            return out or [self._missing("stability.failures", unit="failures")]
        series = records.read_samples(run_id, model, "candidate", "memory_bytes")
        points = series.points()
        results = [
            *judge_stability(
                segments["incumbent"],
                segments["candidate"],
                soak_s=soak_s,
                failures_per_day=limits.failures_per_day,
                throughput_retention=limits.throughput_retention,
            ),
            judge_leak(
                [t for t, _ in points],
                [value for _, value in points],
                soak_s=soak_s,
                limit_bytes_per_day=limits.leak_bytes_per_day,
            ),
        ]
        if run_id == self.bench.run_id:
            return results
        return [one.model_copy(update={"why": f"{one.why} (the soak of run {run_id})"}) for one in results]

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
        return not_measured(check, f"not measured{self._why_missing(check)}", limit=limit, unit=unit)

    def _why_missing(self, check: str) -> str:
        if check.startswith("preflight"):
            return ""
        if stopped := self.does_not_start():
            return f": {stopped[0].check}: an engine that does not start cannot be compared"
        if not check.startswith("parity.prompt_tokens") and (down := self.turned_down()):
            return f": {down[0].check} failed first, and the gate cannot open any more"
        return ""

    # --- how the plan's numbers reach the tasks ---

    def _workload(self) -> Workload:
        amounts = self.bench.plan.measure
        context = self.contenders["incumbent"].settings.context_tokens or 4096
        return Workload(
            requests=amounts.requests_per_block,
            max_tokens=amounts.max_tokens,
            # "long" is half of the context, at about 1.4 tokens a word
            prompt_words=20 if amounts.prompt_set == "short" else int(context / 2 / 1.4),
            warmup_min=amounts.warmup_min,
            warmup_max=amounts.warmup_max,
            concurrency=amounts.concurrency,
            seed=amounts.seed,
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
        return [*own, *load_prompts(self.bench.plan.measure.parity_prompts)]

    def _contender(self, arm: Arm) -> EngineUnderTest:
        choice = getattr(self.bench.plan, arm)
        settings = self.bench.plan.settings_for(self.model.id, api_key=self.bench.api_key)
        # one core is left to the measuring client: it must not disturb what it measures
        threads = settings.threads or max((os.cpu_count() or 2) - 1, 1)
        # a native engine has no port of its own: then both are met as the user will meet them
        kind = YardContender if self.behind_yards else EngineUnderTest
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

    def _block(self, kind: str, incumbent: EngineUnderTest, candidate: EngineUnderTest, index: int) -> None:
        limits, amounts = self.bench.plan.limits, self.bench.plan.measure
        wanted = amounts.calibration_blocks if kind == "calibration" else amounts.looks[-1]
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
        with contextlib.ExitStack() as launched:
            try:
                served = launched.enter_context(eager.up(self.say))
            except Exception as error:
                self.broke(arm, LAUNCH, error)
                raise Unmeasured(summary(error)) from error
            self._gather_from(served, arm, missing, eager)

    def _gather_from(
        self, served: Served, arm: Arm, measures: Mapping[str, Callable[[Endpoint], Any]], contender: EngineUnderTest
    ) -> None:
        """Each kind of evidence from one engine that serves; a kind that breaks off does not take the others along."""
        failed: Exception | None = None
        for kind, measure in measures.items():
            try:
                _require_alive(served)
                self._gather(arm, kind, partial(_while_alive, served, measure), contenders=(contender,))
            except Exception as error:
                self.broke(arm, kind, error)
                failed = failed or error
        if failed is not None:
            raise Unmeasured(summary(failed)) from failed

    def _gather(
        self,
        arm: Arm | Literal["both"],
        kind: str,
        measure: Callable[[], Any],
        *,
        key: str = "",
        contenders: Sequence[EngineUnderTest] = (),
    ) -> None:
        records, run_id, model = self.bench.records, self.bench.run_id, self.model.id
        if not records.has_evidence(run_id, model, arm, kind, key=key):
            payload = measure()
            used = contenders or [self.contenders[one] for one in (ARMS if arm == "both" else (arm,))]
            records.put_evidence(run_id, model, arm, kind, payload, key=key, environment=self._environment(used))

    def _payload(self, arm: Arm | Literal["both"], kind: str) -> Any:
        found = self.bench.records.get_evidence(self.bench.run_id, self.model.id, arm, kind)
        return None if found is None else found.payload

    def _payloads(self, arm: Arm | Literal["both"], kind: str) -> list[Any]:
        found = self.bench.records.list_evidence(self.bench.run_id, model_id=self.model.id, arm=arm, kind=kind)
        return [evidence.payload for evidence in sorted(found, key=lambda evidence: evidence.key)]

    @cached_property
    def _digest(self) -> str:
        return model_digest(self.model.gguf)

    def _environment(self, contenders: Sequence[EngineUnderTest]) -> dict[str, Any]:
        return {
            "model_digest": self._digest,
            "plan_hash": self.bench.content_hash,
            "seed": self.bench.plan.measure.seed,
            "engines": [contender.environment() for contender in contenders],
        }


def required_behaviours(plan: Plan) -> Collection[str]:
    """The API behaviours that hold the gate: the plan's own list, else what a tool-calling agent uses."""
    return plan.client.requires or compatibility.DEFAULT_REQUIRED


def _judged(area: str, judge: Callable[[], list[CheckResult]]) -> list[CheckResult]:
    """The results of `judge`; evidence that it cannot read is an ERROR of its area, and the other areas are judged."""
    try:
        return judge()
    except Exception as error:
        if ends_the_run(error):
            raise
        why = f"the evidence could not be judged: {summary(error)}"
        return [CheckResult(check=f"{area}.judged", verdict=Verdict.ERROR, why=why)]


def _while_alive(served: Served, measure: Callable[[Endpoint], Any]) -> Any:
    """What `measure` returns of an engine that lives; raises EngineExited in its last words where it died meanwhile.

    A measurement takes refused connections for answers, so a death is looked for behind it as well.
    """
    try:
        payload = measure(served.endpoint)
    except Exception:
        deadline = time.monotonic() + DYING_S
        while served.process.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        _require_alive(served)
        raise
    _require_alive(served)
    return payload


def _require_alive(served: Served) -> None:
    returncode = served.process.poll()
    if returncode is not None:
        raise EngineExited(
            f"{served.endpoint.engine} ended with {exit_reason(served.process)} while it was measured",
            returncode=returncode,
            engine=served.endpoint.engine,
            log_tail=served.process.log_tail(),
        )
