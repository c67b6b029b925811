"""The soak of what serves: one window of load per scheduled run, for days, through the yard's public port.

    window      an agent's load on each model that the candidate serves; one piece of evidence, memory every second
    judge       all windows so far; a failure that cannot be made good ends the model's soak at once
    conclude    when every model has its time: verdicts, the report, and the run is done

Whatever was killed or restarted meanwhile, the next window joins the same run: all that is known is in its rows.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template
from prefect.artifacts import create_markdown_artifact, create_progress_artifact
from prefect.events import emit_event
from pydantic import SecretStr

from engines.driver import native_of
from engines.errors import SwitchyardError
from engines.home import home as default_home
from engines.home import host
from engines.notify import notify
from engines.units import duration, number_of
from engines.yard.client import YardClient
from engines.yard.state import StateFile
from flows.evaluation.estimate import spelled, takes
from flows.evaluation.outcome import model_outcome, report, run_outcome
from flows.experiment_lock import SOAK, Busy, alone
from flows.orchestrator.artifacts import check_rows
from flows.orchestrator.run import run_journal
from flows.progress import progress
from migrations.plan import Plan
from migrations.plan_file import load_plan, plan_path
from tasks.evidence.soak.judge_windows import ending, judge_windows, window_summary
from tasks.evidence.soak.segment import empty_segment
from tasks.evidence.soak.window import Place, measure_window
from tasks.records.journal import RunJournal
from tasks.records.store import Records, open_records
from tasks.records.tables import Run, Step
from tasks.verdicts.verdict import Verdict, gate, worst

KIND = "soak"
OVER, BREACH = "soaked", "breach"  # steps of a model: its end, and each failure that ended it
NOTHING = "nothing to soak"
LOOK_BACK = 50  # runs
EVENT = "switchyard.soak.breached"
EVENT_IDS = uuid.UUID("b3a4d5be-5d0d-4c58-9f5e-6a2f6c3a7a11")
STALE_S = 3600.0  # a breach that was not reported for so long is not acted upon any more
Say = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """A model that is served by the candidate, in whichever form."""

    model_id: str
    engine: str
    version: str
    reported: Mapping[str, Any]  # the engine, as the yard reports it
    moved_at: float  # s since the epoch; 0 when nobody knows

    @property
    def identity(self) -> tuple[str, str]:
        """What a window has to be of to count for it."""
        return self.engine, self.version


def targets(plan: Plan, home: Path) -> list[Target]:
    """The plan's models that the yard has committed to the candidate or its native form. Raises SwitchyardError."""
    forms = (plan.candidate.name, native_of(plan.candidate.name))
    moved = {name: route.moved_at or 0.0 for name, route in StateFile(home / "yard").read().models.items()}
    routes = {route["id"]: route for route in YardClient(home).status()["models"]}
    found = []
    for model in plan.models:
        route = routes.get(model.id)
        if route is None or route["committed"] not in forms:
            continue
        # one that is gone from this machine is a target too: the fallback that serves instead is its breach
        gone = {"engine": route["committed"], "version": "missing", "form": "", "argv": None}
        reported = next((engine for engine in route["engines"] if engine["engine"] == route["committed"]), gone)
        found.append(Target(model.id, reported["engine"], reported["version"], reported, moved.get(model.id, 0.0)))
    return found


def soak_window(
    plan: Plan, home: Path, records: Records, *, window_s: float, say: Say = lambda _: None, in_flow: bool = False
) -> dict[str, Any]:
    """One window of every model that is still to be soaked, and the result so far, as plain JSON.

    "result" is "window added", "done", "breached", or "nothing to soak" with a "why". `in_flow` reports breaches to
    Prefect. Whatever is raised, the windows that are recorded count.
    """
    try:
        with alone(home, SOAK):
            return SoakRun(plan, home, records, say=say, in_flow=in_flow).window(window_s)
    except Busy as busy:  # it measures, or moves traffic: the next window comes by itself
        return nothing(plan.name, str(busy))


def nothing(plan_name: str, why: str) -> dict[str, Any]:
    """The outcome where there is nothing to do."""
    return {"result": NOTHING, "why": why, "run_id": None, "plan": plan_name, "verdict": None, "models": []}


class SoakRun:
    """One window of a plan's soak; whatever it knows of earlier ones it has from the records."""

    def __init__(self, plan: Plan, home: Path, records: Records, *, say: Say, in_flow: bool) -> None:
        self.plan, self.home, self.records, self.say, self.in_flow = plan, home, records, say, in_flow
        self.soak_s = plan.measure.soak_s
        self.asked = plan.model_dump(mode="json")

    def window(self, window_s: float) -> dict[str, Any]:
        """Measure and judge one window of every model that needs one."""
        try:
            found = targets(self.plan, self.home)
        except SwitchyardError as error:
            return nothing(self.plan.name, str(error))
        if not found:
            return nothing(self.plan.name, f"no model of {self.plan.name} is served by {self.plan.candidate.name}")
        key = self.plan.api_key(os.environ)
        if self.in_flow:
            self._report_late(found)
        unfinished = self.records.unfinished(self.asked, kind=KIND)
        if unfinished is not None and unfinished.verdict is not None:
            unfinished = None  # a breach ended it
        closing: dict[str, Any] = {
            "on_error": "interrupted",
            "interrupted_by": lambda error: f"broken off: {type(error).__name__}",
        }
        with run_journal(self.records, KIND, self.asked, unfinished=unfinished, **closing) as run:
            ends = [self._end_of(target) for target in found]
            if going := [target for target, end in zip(found, ends, strict=True) if end is None]:
                left_s = sum(max(self.soak_s - _exposure_s(self._windows(run, target)), 0.0) for target in going)
                window = takes(min(window_s, left_s))
                progress.get().note(f"{self.plan.name}: this window {window}; {spelled(left_s)} of soak are left")
                return self._conclude(run, [self._soaked(run, target, window_s / len(going), key) for target in going])
            if run.known_id is not None:  # killed after the last model's end and before its own
                self._finish(run)
            return nothing(self.plan.name, "; ".join(end for end in ends if end))

    # --- one model

    def _soaked(self, run: RunJournal, target: Target, window_s: float, key: SecretStr | None) -> dict[str, Any]:
        """One more window of a model, measured, stored, and judged with those before it."""
        before = self._windows(run, target)
        exposure_s = _exposure_s(before)
        index = _next_index(run, target.model_id)
        with self.records.series_writer(run.id, target.model_id, "candidate") as series:
            window = measure_window(
                Place(client=YardClient(self.home), key=key, model_id=target.model_id, engine=target.engine),
                length_s=min(window_s, max(self.soak_s - exposure_s, 0.0)),
                offset_s=exposure_s,
                before=before[-1] if before else None,
                seed=self.plan.measure.seed + index,
                on_memory=series.append,
            )
        put_window(self.records, run.id, target, index, window)
        self._put_incumbent(run, target.model_id)
        return self._judged(run, target, [*before, window_summary(window)])

    def _judged(self, run: RunJournal, target: Target, windows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The checks on all windows, stored; the model's end, where this was its last window."""
        exposure_s = _exposure_s(windows)
        is_over = exposure_s >= self.soak_s
        rows = self.records.list_evidence(run.id, model_id=target.model_id, arm="incumbent", kind=KIND)
        incumbent, limits = [row.payload for row in rows], self.plan.limits
        results = judge_windows(incumbent, windows, soak_s=self.soak_s, limits=limits, is_over=is_over)
        run.put_checks(target.model_id, results)
        ended_by, verdict = ending(results), gate(results)
        if ended_by:
            self._breach(run, target, f"{ended_by[0].check}: {ended_by[0].why}")
        elif is_over:
            engine = {"engine": target.engine, "version": target.version}
            run.put_step(target.model_id, OVER, "done", **engine, verdict=verdict.value)
        return {
            "model": target.model_id,
            "engine": target.engine,
            "version": target.version,
            "windows": len(windows),
            "exposure_s": exposure_s,
            "soak_s": self.soak_s,
            "verdict": verdict.value,
            "breached": [f"{result.check}: {result.why}" for result in ended_by],
            "ended": str(windows[-1]["ended"]),
            "over": is_over or bool(ended_by),
            "checks": [result.model_dump(mode="json") for result in results],
        }

    def _windows(self, run: RunJournal, target: Target) -> list[dict[str, Any]]:
        """Summaries of the windows that count: of this engine and version, since its last breach in this run."""
        broke = max((step.at for step in self._steps(run.id, target, BREACH)), default=None)
        rows = self.records.list_evidence(run.id, model_id=target.model_id, arm="candidate", kind=KIND)
        windows = []
        for row in sorted(rows, key=lambda row: row.key):
            engine = row.environment["engines"][0]
            is_of_it = (engine["engine"], engine["version"]) == target.identity
            if is_of_it and (broke is None or row.recorded_at > broke):
                windows.append(window_summary(row.payload))
        return windows

    def _put_incumbent(self, run: RunJournal, model_id: str) -> None:
        """The incumbent's soak in the evaluation that opened the model's gate, summed up once for comparison."""
        if self.records.has_evidence(run.id, model_id, "incumbent", KIND, key="evaluation"):
            return
        run_id = self._evaluation(run.run.plan_hash, model_id)
        rows = self.records.list_evidence(run_id, model_id=model_id, arm="incumbent", kind=KIND) if run_id else []
        if rows:
            environment = {**rows[-1].environment, "run": run_id}
            total = summed(row.payload for row in rows)
            self.records.put_evidence(
                run.id, model_id, "incumbent", KIND, total, key="evaluation", environment=environment
            )

    def _evaluation(self, plan_hash: str, model_id: str) -> str | None:
        """The run that the migration of just this plan went by; without a migration, the latest one of the plan."""
        for run in self.records.history(LOOK_BACK, kind="migrate", host=host()):
            for step in self.records.steps(run.id, model_id) if run.plan_hash == plan_hash else ():
                if step.step == "precondition" and step.detail.get("phase_1_run"):
                    return str(step.detail["phase_1_run"])
        runs = self.records.history(LOOK_BACK, kind="evaluate", host=host())
        return next((run.id for run in runs if run.plan_hash == plan_hash and run.status == "done"), None)

    # --- breaches and ends

    def _breach(self, run: RunJournal, target: Target, why: str) -> None:
        """Record it, then report it: the event has an id of its own, should the process be killed between the two."""
        name = f"{BREACH} {_next_index(run, target.model_id) - 1:05d}"
        detail = {"engine": target.engine, "version": target.version, "why": why, "at": time.time()}
        self.say(f"{target.model_id}: the soak is breached: {why}")
        notify(self.plan.notify, "soak breach", target.model_id, why, target.engine)
        run.put_step(target.model_id, name, "intent", **detail)
        self._report(run.id, target, name, detail)

    def _report(self, run_id: str, target: Target, name: str, detail: Mapping[str, Any]) -> None:
        if self.in_flow:  # an automation may answer it with a rollback
            emit_event(
                EVENT,
                resource={
                    "prefect.resource.id": f"switchyard.model.{target.model_id}",
                    "prefect.resource.name": target.model_id,
                    "switchyard.host": host(),  # another host's model of the same name is another model
                },
                payload={"model": target.model_id, "engine": target.engine, "run_id": run_id, "why": detail["why"]},
                id=uuid.uuid5(EVENT_IDS, f"{run_id} {target.model_id} {name}"),  # one, however often it is sent
            )
        self.records.put_step(run_id, target.model_id, name, "done", {**detail, "told": self.in_flow})

    def _report_late(self, found: Sequence[Target]) -> None:
        """A breach whose event was not sent before we were killed, while it is still about what serves now."""
        for run in self._runs():
            for target in found:
                for step in self._steps(run.id, target, BREACH):
                    at = step.at.timestamp()
                    if step.state == "intent" and time.time() - at < STALE_S and at > target.moved_at:
                        self._report(run.id, target, step.step, step.detail)

    def _end_of(self, target: Target) -> str | None:
        """How this engine's soak ended, and in which run; None while it is not over, or the model was moved anew."""
        for run in self._runs():
            for step in (*self._steps(run.id, target, OVER), *self._steps(run.id, target, BREACH)):
                if step.at.timestamp() >= target.moved_at:
                    over, detail = step.step == OVER, step.detail
                    how = f"ended with {detail['verdict']}" if over else f"was breached: {detail['why']}"
                    return f"the soak of {target.model_id} on {target.engine} {target.version} {how} (run {run.id})"
        return None

    def _steps(self, run_id: str, target: Target, name: str) -> list[Step]:
        return [
            step
            for step in self.records.steps(run_id, target.model_id)
            if step.step.split(" ")[0] == name and (step.detail["engine"], step.detail["version"]) == target.identity
        ]

    def _runs(self) -> list[Run]:
        """The soaks of this home with just this plan, latest first."""
        runs = self.records.history(LOOK_BACK, kind=KIND, name=self.plan.name, host=host())
        return [run for run in runs if run.plan == self.asked]

    # --- the run

    def _conclude(self, run: RunJournal, models: list[dict[str, Any]]) -> dict[str, Any]:
        """The run waits for the next window, or it is over: with the verdict on every model that it has."""
        breached = any(model["breached"] for model in models)
        is_going = any(not model["over"] for model in models)
        outcome: dict[str, Any] = {
            "result": "breached" if breached else "window added" if is_going else "done",
            "why": "; ".join(progress_line(model) for model in models),
            "run_id": run.id,
            "plan": self.plan.name,
            "verdict": self._verdict(run).value,
            "models": models,
        }
        self.say(outcome["why"])
        if is_going:
            run.finish("interrupted", error=f"the next window follows; {outcome['why']}")
            return outcome
        return {**outcome, "report": str(self._finish(run))}

    def _finish(self, run: RunJournal) -> Path:
        """The run ended with the verdict on what it has recorded, and where its report is."""
        verdict = self._verdict(run)
        broke = "; ".join(str(step.detail["why"]) for step in run.steps() if step.step.startswith(BREACH))
        failed = bool(broke) and verdict is Verdict.FAIL
        run.finish("failed" if failed else "done", verdict=verdict, error=broke if failed else None)
        return write_soak_report(self.records, run.id, self.plan.name, self.home)

    def _verdict(self, run: RunJournal) -> Verdict:
        return worst(gate(results) for results in self.records.checks(run.id).values())


def _next_index(run: RunJournal, model_id: str) -> int:
    rows = run.records.list_evidence(run.id, model_id=model_id, arm="candidate", kind=KIND)
    return 1 + max((int(row.key) for row in rows), default=-1)


# --- shared with the benchmark


def put_window(records: Records, run_id: str, target: Target, index: int, window: Mapping[str, Any]) -> None:
    """One window as evidence, with the engine that it was of."""
    engine = {"arm": "candidate", **{name: target.reported[name] for name in ("engine", "version", "form", "argv")}}
    records.put_evidence(
        run_id,
        target.model_id,
        "candidate",
        KIND,
        window,
        key=f"{index:05d}",
        environment={"engines": [{**engine, "argv": engine["argv"] or []}]},
    )


def write_soak_report(records: Records, run_id: str, plan_name: str, home: Path) -> Path:
    """Write the HTML report of the run: its path."""
    models = [model_outcome(model_id, results) for model_id, results in records.checks(run_id).items()]
    return Path(report(records, home, run_outcome(run_id, plan_name, models))["report"])


def summed(segments: Iterator[Mapping[str, Any]]) -> dict[str, Any]:
    """Many segments as one, without the times of single answers."""
    total = empty_segment()
    for segment in segments:
        for name in ("exposure_s", "requests", "restarts", "silent_empty"):
            total[name] += segment[name]
        total["failures"] += segment["failures"]
        for kind, number in segment["kinds"].items():
            total["kinds"][kind] = total["kinds"].get(kind, 0) + number
    return total


def progress_line(model: Mapping[str, Any]) -> str:
    """`m: 12% of 3 days in 52 windows of mistral.rs 0.9.5, INCONCLUSIVE`."""
    line = (
        f"{model['model']}: {_percent(model):g}% of {duration(model['soak_s'])} in "
        f"{number_of(model['windows'], 'window')} of {model['engine']} {model['version']}, {model['verdict']}"
    )
    return f"{line} ({model['ended']})" if model["ended"] else line


def _percent(model: Mapping[str, Any]) -> float:
    return float(round(min(100.0, 100 * model["exposure_s"] / model["soak_s"]), 1))


def _exposure_s(windows: Sequence[Mapping[str, Any]]) -> float:
    return float(sum(window["exposure_s"] for window in windows))


# --- Prefect


def publish(outcome: dict[str, Any]) -> None:
    """How far the soak is, as artifacts of the Prefect run: a percentage, and the table so far."""
    if not outcome["models"]:
        return
    slug = re.sub(r"[^a-z0-9]+", "-", str(outcome["plan"]).lower()).strip("-") or "plan"
    done = sum(_percent(model) for model in outcome["models"]) / len(outcome["models"])
    said = f"Run {outcome['run_id']}: {outcome['result']}"
    create_progress_artifact(round(done, 1), key=f"switchyard-soak-progress-{slug}", description=said)
    create_markdown_artifact(markdown(outcome), key=f"switchyard-soak-{slug}", description=said)


def markdown(outcome: dict[str, Any]) -> str:
    """The windows, exposure and checks of every model as tables."""
    template = Template(Path(__file__).with_name("soak.md.jinja").read_text())
    now = f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
    models = [{**model, "checks": check_rows([model])} for model in outcome["models"]]
    text: str = template.render({**outcome, "models": models}, progress_line=progress_line, now=now)
    return text


def soak(plan: str = "", window_s: float = 240) -> dict[str, Any]:
    """Load what the candidate serves for one window, and judge the soak so far; `plan` as `deployments.soak` has it."""
    folder = default_home()
    path = plan_path(Path(plan) if plan else None, folder)
    say = progress.get().say
    if not plan and not path.is_file():
        outcome = nothing(path.stem, "no yard has served a plan on this home yet")
    else:
        with open_records() as records:
            outcome = soak_window(load_plan(path), folder, records, window_s=window_s, say=say, in_flow=True)
    if outcome["result"] == NOTHING:
        say(f"{NOTHING}: {outcome['why']}")
    publish(outcome)
    return outcome
