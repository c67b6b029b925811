"""One model on trial: its two engines, and what the records have of it.

Everything measured is stored before it is judged, and what is stored is not measured again: a killed run resumes where
it stopped.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import SecretStr

from engines.driver import Installation
from engines.errors import SwitchyardError
from engines.process import process
from engines.process.serving import Served
from engines.registry import driver
from migrations import carried
from migrations.plan import ModelPlan, Plan, content_hash
from tasks.evidence.engine_under_test import Arm, EngineBehindYard, EngineClock, EngineUnderTest
from tasks.evidence.first_look import whole_or_first
from tasks.evidence.performance import Workload
from tasks.evidence.unmeasured import KIND, broken, can_be_retried, ends_the_run
from tasks.records.store import Records

Side = Arm | Literal["both"]
Engines = Sequence[EngineUnderTest]
ARMS: tuple[Arm, Arm] = ("incumbent", "candidate")
BOTH: Literal["both"] = "both"
SELF_TEST_ITL_MS = 10.0
QUICK = "quick"  # the kind of a run that took a first look only
SOAK_OF = "soak.of"  # evidence: the earlier run whose soak counts


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
    quick: bool = False  # a first look only
    clock: EngineClock = field(default_factory=EngineClock)

    @cached_property
    def content_hash(self) -> str:
        """What the plan means, by content: frozen before the first measurement."""
        return content_hash(self.plan)


class Unmeasured(SwitchyardError):
    """A check could not be carried out; the records say why."""


class Running:
    """The engines of a model that stay up between measurements which need no fresh start.

    Both at once where `together()` says that both fit into memory, else one in place of the other.
    """

    def __init__(self, start: Callable[[Arm], AbstractContextManager[Served]], together: Callable[[], bool]) -> None:
        self._start, self._together = start, together
        self._up: dict[Arm, tuple[contextlib.ExitStack, Served]] = {}
        self._loads_s: dict[str, float] = {}

    def get(self, arm: Arm) -> Served:
        """The engine that is up; started where none is, or where it has died."""
        if arm in self._up and self._up[arm][1].process.poll() is None:
            return self._up[arm][1]
        self.end(arm) if self._together() else self.end()
        with contextlib.ExitStack() as launched:
            served = launched.enter_context(self._start(arm))
            self._up[arm] = (launched.pop_all(), served)
            self._loads_s[arm] = served.load_s
        return served

    @property
    def starts_s(self) -> dict[str, float]:
        """Seconds of the latest start of both engines; empty where one was not started."""
        return self._loads_s if len(self._loads_s) == len(ARMS) else {}

    def end(self, *arms: Arm) -> None:
        """End these engines, by default all."""
        for arm in arms or tuple(self._up):
            if arm in self._up:
                self._up.pop(arm)[0].close()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class Trial:
    """One model of an evaluation: its engines, its evidence, and the plan's numbers as its measurements take them."""

    def __init__(self, bench: Bench, model: ModelPlan, say: Callable[[str], None] = lambda _: None) -> None:
        self.bench, self.model, self.say = bench, model, say
        self.plan, self.records, self.run_id = bench.plan, bench.records, bench.run_id
        # a native engine has no port of its own: then both are met behind a yard, as the user will meet them
        self.behind_yards = any(found.form == "native" for found in bench.installations.values())
        self.engines = {arm: self._engine(arm) for arm in ARMS}
        self.running = Running(lambda arm: self.untimed(arm).up(self.say), lambda: self.fits_together)

    def _engine(self, arm: Arm) -> EngineUnderTest:
        settings = self.plan.settings_for(self.model.id, api_key=self.bench.api_key)
        # one core is left to the measuring client: it must not disturb what it measures
        threads = settings.threads or max((os.cpu_count() or 2) - 1, 1)
        kind = EngineBehindYard if self.behind_yards else EngineUnderTest
        found = self.bench.installations[arm]
        return kind(
            arm=arm,
            driver=driver(getattr(self.plan, arm).engine),
            installation=found,
            model_id=self.model.id,
            gguf=self.plan.given(self.model.id, found.engine),
            settings=settings if found.url else settings.model_copy(update={"threads": threads}),
            own=self.plan.own_args(self.model.id, found.engine),
            request_defaults=carried.request_defaults(self.plan, self.model.id, found),
            name_there=self.plan.name_there(self.model.id, found.engine),
            not_given=carried.not_given(self.plan, self.model.id, found),
            home=self.bench.home,
            stall_s=self.plan.yard.load_stall_s,
            clock=self.bench.clock,
        )

    def untimed(self, arm: Arm) -> EngineUnderTest:
        """The engine for what is not timed to a few per cent: with all cores, where the plan says nothing."""
        engine = self.engines[arm]
        if engine.is_attached:
            return engine
        threads = self.plan.settings_for(self.model.id).threads or os.cpu_count()
        return replace(engine, settings=engine.settings.model_copy(update={"threads": threads}))

    @property
    def fits_together(self) -> bool:
        """Whether both engines fit into memory at once, as the header says."""
        report = self.payload(BOTH, "preflight")
        return any(map(self.is_attached, ARMS)) or bool(report and report["side_by_side"]["fits"])

    def is_attached(self, arm: Arm) -> bool:
        """Whether others run that engine."""
        return self.engines[arm].is_attached

    # --- evidence

    @cached_property
    def digest(self) -> str:
        """The content digest of the model file."""
        return self.model.digest

    def environment(self, engines: Engines) -> dict[str, Any]:
        """What a piece of evidence was measured under: stored with it."""
        return {
            "model_digest": self.digest,
            "plan_hash": self.bench.content_hash,
            "seed": self.plan.measure.seed,
            "engines": [engine.environment() for engine in engines],
        }

    def gather(self, arm: Side, kind: str, measure: Callable[[], Any], *, key: str = "", engines: Engines = ()) -> None:
        """Store what `measure` returns, unless the records have it; `engines` default to those of `arm`."""
        if not self.has(arm, kind, key):
            self.put(arm, kind, measure(), key=key, engines=engines)

    def put(self, arm: Side, kind: str, payload: Any, *, key: str = "", engines: Engines = ()) -> None:
        """Store one piece of evidence with its environment."""
        self._store(arm, kind, payload, key, self.environment(engines or self._of(arm)))

    def _store(self, arm: Side, kind: str, payload: Any, key: str, environment: Mapping[str, Any]) -> None:
        recorded = self._recorded
        self.records.put_evidence(self.run_id, self.model.id, arm, kind, payload, key=key, environment=environment)
        if (stored := self.records.get_evidence(self.run_id, self.model.id, arm, kind, key=key)) is not None:
            recorded[arm, kind, key] = stored.payload, stored.environment

    @cached_property
    def _recorded(self) -> dict[tuple[str, str, str], tuple[Any, Mapping[str, Any]]]:
        """Payload and environment of the evidence by arm, kind and key: read once, and what is stored is added."""
        rows = self.records.list_evidence(self.run_id, model_id=self.model.id)
        return {(row.arm, row.kind, row.key): (row.payload, row.environment) for row in rows}

    def has(self, arm: Side, kind: str, key: str = "") -> bool:
        """Whether it was recorded."""
        return (arm, kind, key) in self._recorded

    def payload(self, arm: Side, kind: str) -> Any:
        """One piece of evidence; None when it was not recorded."""
        return self._recorded[arm, kind, ""][0] if self.has(arm, kind) else None

    def threads(self, kind: str) -> int | None:
        """CPU threads of the engines while evidence of this kind about both was gathered; None where unknown."""
        seen = next((seen for (arm, of, _), (_, seen) in list(self._recorded.items()) if (arm, of) == (BOTH, kind)), {})
        engines = seen.get("engines")
        return (engines[-1].get("settings") or {}).get("threads") if engines else None

    def parity(self, kind: str) -> list[Any]:
        """Both engines' evidence of a kind, or that of the first look; None of an engine that was not asked."""
        return whole_or_first(self.payload, kind)

    def payloads(self, arm: Side, kind: str, *, run_id: str | None = None) -> list[Any]:
        """All evidence of a kind in the order of its keys; of another run with `run_id`."""
        if run_id in (None, self.run_id):
            keys = sorted(key for of, what, key in list(self._recorded) if (of, what) == (arm, kind))
            return [self._recorded[arm, kind, key][0] for key in keys]
        found = self.records.list_evidence(run_id, model_id=self.model.id, arm=arm, kind=kind)
        return [evidence.payload for evidence in sorted(found, key=lambda evidence: evidence.key)]

    @property
    def soak_run(self) -> str:
        """The run whose soak counts for this one: itself, where no earlier one was taken."""
        taken = self.payload(BOTH, SOAK_OF)
        return self.run_id if taken is None else str(taken["run_id"])

    def _of(self, arm: Side) -> list[EngineUnderTest]:
        return [self.engines[one] for one in (ARMS if arm == "both" else (arm,))]

    # --- what could not be measured

    def broke(self, arm: Side, what: str, error: BaseException) -> None:
        """Record that `error` ended a check; raises it where it ends the whole run."""
        if ends_the_run(error):
            raise error
        if process.LEAVING.is_set():
            raise KeyboardInterrupt from error
        key = self.bench.api_key
        self.put_unmeasured(arm, what, broken(arm, error, secrets=[key.get_secret_value()] if key else []))

    def put_unmeasured(self, arm: Side, what: str, record: Mapping[str, Any]) -> None:
        """Store why a check was not carried out."""
        environment: dict[str, Any] = {}
        with contextlib.suppress(Exception):  # what broke the check may break its description as well
            environment = self.environment(self._of(arm))
        self._store(arm, KIND, record, what, environment)

    def unmeasured(self) -> list[tuple[Side, str, dict[str, Any]]]:
        """(engine, check, record) of what was not measured."""
        found = [(at, payload) for at, (payload, _) in list(self._recorded.items()) if at[1] == KIND]
        return [(cast("Side", arm), what, payload) for (arm, _, what), payload in found]

    def forget_unmeasured(self) -> None:
        """Let a resumed run carry out again what broke off or was left out; what FAILed stands."""
        found = self.unmeasured()
        if all(can_be_retried(record) for _, _, record in found):
            for arm, what, _ in found:
                self.records.drop_evidence(self.run_id, self.model.id, arm, KIND, key=what)
                del self._recorded[arm, KIND, what]

    # --- how the plan's numbers reach the measurements

    @property
    def workload(self) -> Workload:
        """The requests of one block."""
        amounts = self.plan.measure
        context = self.engines["incumbent"].settings.context_tokens or 4096
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

    @property
    def client_errors(self) -> dict[str, float]:
        """The measuring client's own p99 error in ms by kind of sample; E2E is as exact as TTFT."""
        budget = self.bench.error_budget
        ttft_ms, percent = budget["ttft_error_p99_ms"], budget["tpot_error_percent"]
        tpot_ms = None if percent is None else percent / 100 * SELF_TEST_ITL_MS
        errors = {"ttft_ms": ttft_ms, "tpot_ms": tpot_ms, "e2e_ms": ttft_ms}
        return {key: error for key, error in errors.items() if error is not None}
