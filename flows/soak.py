"""The soak of what serves: one window of load per scheduled run, for days, through the yard's public port.

    window      an agent's load on each model that the candidate serves; one piece of evidence, memory every second
    judge       all windows so far; a failure that cannot be made good ends the model's soak at once
    conclude    when every model has its time: verdicts, the report, and the run is done

The rows are the truth: whatever was killed or started anew meanwhile, the next window joins the same run.
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

from prefect.runtime import flow_run

from engines.driver import native_of
from engines.errors import SwitchyardError
from engines.home import home as default_home
from engines.home import host
from engines.yard.client import YardClient
from engines.yard.state import StateFile
from flows.experiment_lock import SOAK, Busy, alone
from flows.progress import progress
from flows.rollout.yard_config import plan_path
from migrations.plan import Plan
from migrations.plan_file import load_plan
from tasks.evidence.environment import machine_environment
from tasks.evidence.soak.judge import duration
from tasks.evidence.soak.judge_windows import ending, judge_windows, window_summary
from tasks.evidence.soak.segment import empty_segment
from tasks.evidence.soak.window import Place, measure_window
from tasks.records.store import Records, open_records
from tasks.records.tables import Evidence, Run, Step
from tasks.report.report import write_report
from tasks.verdicts.verdict import Verdict, gate, reasons, worst

KIND = "soak"
OVER, BREACH = "soaked", "breach"  # steps of a model: its end, and each failure that ended it
NOTHING = "nothing to soak"
LOOK_BACK = 50  # runs
EVENT = "switchyard.soak.breached"
EVENT_IDS = uuid.UUID("b3a4d5be-5d0d-4c58-9f5e-6a2f6c3a7a11")
STALE_S = 3600.0  # a breach that nobody was told of for so long is not acted upon any more
Say = Callable[[str], None]
Outcome = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A model that is served by the candidate, in whichever form."""

    model_id: str
    engine: str
    version: str
    told: Mapping[str, Any]  # the engine, as the yard tells it
    moved_at: float  # s since the epoch; 0 when nobody knows

    @property
    def identity(self) -> tuple[str, str]:
        """What a window has to be of to count for it."""
        return self.engine, self.version


def targets(plan: Plan, home: Path) -> list[Target]:
    """The plan's models that the yard has committed to the candidate or its native form. Raises SwitchyardError."""
    forms = (plan.candidate.engine, native_of(plan.candidate.engine))
    moved = {name: route.moved_at or 0.0 for name, route in StateFile(home / "yard").read().models.items()}
    routes = {route["id"]: route for route in YardClient(home).status()["models"]}
    found = []
    for model in plan.models:
        route = routes.get(model.id)
        if route is None or route["committed"] not in forms:
            continue
        # one that is gone from this machine is a target too: the fallback that serves instead is its breach
        gone = {"engine": route["committed"], "version": "missing", "form": "", "argv": None}
        told = next((engine for engine in route["engines"] if engine["engine"] == route["committed"]), gone)
        found.append(Target(model.id, told["engine"], told["version"], told, moved.get(model.id, 0.0)))
    return found


def soak_window(
    plan: Plan, home: Path, records: Records, *, window_s: float, say: Say = lambda _: None, in_flow: bool = False
) -> Outcome:
    """One window of every model that is still to be soaked, and what it all comes to so far, as plain JSON.

    "result" is "window added", "done", "breached", or "nothing to soak" with a "why". `in_flow` tells breaches to
    Prefect. Whatever is raised, the windows that are recorded count.
    """
    try:
        with alone(home, SOAK):
            return _Soak(plan, home, records, window_s=window_s, say=say, in_flow=in_flow).window()
    except Busy as busy:  # it measures, or moves traffic: the next window comes by itself
        return nothing(plan.name, str(busy))


def nothing(plan_name: str, why: str) -> Outcome:
    """The outcome where there is nothing to do."""
    return {"result": NOTHING, "why": why, "run_id": None, "plan": plan_name, "verdict": None, "models": []}


class _Soak:
    """One window of a plan's soak; whatever it knows of earlier ones it has from the records."""

    def __init__(self, plan: Plan, home: Path, records: Records, *, window_s: float, say: Say, in_flow: bool) -> None:
        self.plan, self.home, self.records, self.say = plan, home, records, say
        self.window_s, self.in_flow = window_s, in_flow
        self.soak_s = plan.measure.soak_s
        self.key = plan.api_key(os.environ)
        self._as_json = plan.model_dump(mode="json")
        self._run: Run | None = None

    def window(self) -> Outcome:
        """See `soak_window`."""
        try:
            found = targets(self.plan, self.home)
        except SwitchyardError as error:
            return nothing(self.plan.name, str(error))
        if not found:
            return nothing(self.plan.name, f"no model of {self.plan.name} is served by {self.plan.candidate.engine}")
        if self.in_flow:
            self._tell_late(found)
        going = [target for target in found if self._end_of(target) is None]
        if not going:
            self._conclude_late()
            return nothing(self.plan.name, "; ".join(self._over_already(target) for target in found))
        self._run = self._opened()
        try:
            return self._carried_out(going)
        except SwitchyardError as error:
            self.records.finish_run(self.run_id, "interrupted", error=str(error))
            raise
        except BaseException as error:  # Ctrl-C and Prefect's cancellation are no Exceptions
            self.records.finish_run(self.run_id, "interrupted", error=f"broken off: {type(error).__name__}")
            raise

    @property
    def run_id(self) -> str:
        """The id of the run that all windows are in."""
        assert self._run is not None
        return self._run.id

    def _carried_out(self, going: Sequence[Target]) -> Outcome:
        models = []
        for target in going:
            before = self._windows(target)
            left_s = self.soak_s - _exposure_s(before)
            window = self._measure(target, min(self.window_s / len(going), max(left_s, 0.0)), before)
            models.append(self._judged(target, [*before, window_summary(window)]))
        return self._concluded(models)

    # --- one model

    def _measure(self, target: Target, length_s: float, before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        place = Place(client=YardClient(self.home), key=self.key, model_id=target.model_id, engine=target.engine)
        index = self._next_index(target.model_id)
        with self.records.series_writer(self.run_id, target.model_id, "candidate") as series:
            window = measure_window(
                place,
                length_s=length_s,
                offset_s=_exposure_s(before),
                before=before[-1] if before else None,
                seed=self.plan.measure.seed + index,
                on_memory=series.append,
            )
        put_window(self.records, self.run_id, target, index, window)
        self._put_incumbent(target.model_id)
        return window

    def _next_index(self, model_id: str) -> int:
        rows = self.records.list_evidence(self.run_id, model_id=model_id, arm="candidate", kind=KIND)
        return 1 + max((int(row.key) for row in rows), default=-1)

    def _judged(self, target: Target, windows: Sequence[Mapping[str, Any]]) -> Outcome:
        """The checks on all windows, stored; the model's end, where this was its last window."""
        exposure_s = _exposure_s(windows)
        is_over = exposure_s >= self.soak_s
        incumbent = self._incumbent(target.model_id)
        limits = self.plan.limits
        results = judge_windows(incumbent, windows, soak_s=self.soak_s, limits=limits, is_over=is_over)
        self.records.put_checks(self.run_id, target.model_id, results)
        ended_by = ending(results)
        verdict = gate(results)
        if ended_by:
            self._breach(target, f"{ended_by[0].check}: {ended_by[0].why}")
        elif is_over:
            self._put_end(target, verdict)
        ended = str(windows[-1]["ended"])
        return {
            "model": target.model_id,
            "engine": target.engine,
            "version": target.version,
            "windows": len(windows),
            "exposure_s": exposure_s,
            "soak_s": self.soak_s,
            "verdict": verdict.value,
            "breached": [f"{result.check}: {result.why}" for result in ended_by],
            "ended": ended,
            "over": is_over or bool(ended_by),
            "checks": [result.model_dump(mode="json") for result in results],
        }

    def _windows(self, target: Target) -> list[dict[str, Any]]:
        """The gists of the windows that count: of this engine and version, since its last breach in this run."""
        broke = max((step.at for step in self._steps(self.run_id, target, BREACH)), default=None)
        rows = self.records.list_evidence(self.run_id, model_id=target.model_id, arm="candidate", kind=KIND)
        return [
            window_summary(row.payload)
            for row in sorted(rows, key=lambda row: row.key)
            if _identity(row) == target.identity and (broke is None or row.recorded_at > broke)
        ]

    # --- the incumbent's soak, for comparison

    def _incumbent(self, model_id: str) -> list[dict[str, Any]]:
        rows = self.records.list_evidence(self.run_id, model_id=model_id, arm="incumbent", kind=KIND)
        return [row.payload for row in rows]

    def _put_incumbent(self, model_id: str) -> None:
        """The incumbent's soak in the evaluation that opened the model's gate, summed up once into this run."""
        if self.records.has_evidence(self.run_id, model_id, "incumbent", KIND, key="evaluation"):
            return
        run_id = self._evaluation(model_id)
        rows = self.records.list_evidence(run_id, model_id=model_id, arm="incumbent", kind=KIND) if run_id else []
        if rows:
            environment = {**rows[-1].environment, "run": run_id}
            total = summed(row.payload for row in rows)
            self.records.put_evidence(
                self.run_id, model_id, "incumbent", KIND, total, key="evaluation", environment=environment
            )

    def _evaluation(self, model_id: str) -> str | None:
        """The run that the migration of just this plan went by; without a migration, the latest one of the plan."""
        mine = self._opened_hash()
        for run in self.records.history(LOOK_BACK, kind="migrate", host=host()):
            for step in self.records.steps(run.id, model_id) if run.plan_hash == mine else ():
                if step.step == "precondition" and step.detail.get("phase_1_run"):
                    return str(step.detail["phase_1_run"])
        runs = self.records.history(LOOK_BACK, kind="evaluate", host=host())
        return next((run.id for run in runs if run.plan_hash == mine and run.status == "done"), None)

    def _opened_hash(self) -> str:
        assert self._run is not None
        return self._run.plan_hash

    # --- ends and breaches

    def _put_end(self, target: Target, verdict: Verdict) -> None:
        self.records.put_step(
            self.run_id,
            target.model_id,
            OVER,
            "done",
            {"engine": target.engine, "version": target.version, "verdict": verdict.value},
        )

    def _breach(self, target: Target, why: str) -> None:
        """Recorded, and told to Prefect once: the event has an id of its own, should we be killed between the two."""
        name = f"{BREACH} {self._next_index(target.model_id) - 1:05d}"
        detail = {"engine": target.engine, "version": target.version, "why": why, "at": time.time()}
        self.say(f"{target.model_id}: the soak is breached: {why}")
        self.records.put_step(self.run_id, target.model_id, name, "intent", detail)
        self._tell(self.run_id, target, name, detail)

    def _tell(self, run_id: str, target: Target, name: str, detail: Mapping[str, Any]) -> None:
        if self.in_flow:
            emit_breach(run_id, target.model_id, target.engine, name, str(detail["why"]))
        self.records.put_step(run_id, target.model_id, name, "done", {**detail, "told": self.in_flow})

    def _tell_late(self, found: Sequence[Target]) -> None:
        """A breach whose event was not sent before we were killed, while it is still about what serves now."""
        for run in self._runs():
            for target in found:
                for step in self._steps(run.id, target, BREACH):
                    fresh = time.time() - step.at.timestamp() < STALE_S and step.at.timestamp() > target.moved_at
                    if step.state == "intent" and fresh:
                        self._tell(run.id, target, step.step, step.detail)

    def _end_of(self, target: Target) -> tuple[Run, Step] | None:
        """The run and the step by which this engine's soak is over; it is not after the model was moved anew."""
        for run in self._runs():
            for step in (*self._steps(run.id, target, OVER), *self._steps(run.id, target, BREACH)):
                if step.at.timestamp() >= target.moved_at:
                    return run, step
        return None

    def _over_already(self, target: Target) -> str:
        over = self._end_of(target)
        assert over is not None
        run, step = over
        came_to = f"came to {step.detail['verdict']}" if step.step == OVER else f"was breached: {step.detail['why']}"
        return f"the soak of {target.model_id} on {target.engine} {target.version} {came_to} (run {run.id})"

    def _steps(self, run_id: str, target: Target, name: str) -> list[Step]:
        return [
            step
            for step in self.records.steps(run_id, target.model_id)
            if step.step.split(" ")[0] == name and (step.detail["engine"], step.detail["version"]) == target.identity
        ]

    # --- the run

    def _runs(self) -> list[Run]:
        """The soaks of this home with just this plan, latest first."""
        runs = self.records.history(LOOK_BACK, kind=KIND, name=self.plan.name, host=host())
        return [run for run in runs if run.plan == self._as_json]

    def _opened(self) -> Run:
        """The run to go on with: the unfinished one of this plan, else a new one."""
        run = self._unfinished()
        if run is not None:
            return self.records.resume_run(run.id, flow_run_id=flow_run.id)
        environment = machine_environment()
        return self.records.start_run(
            KIND, self.plan.name, self._as_json, environment=environment, flow_run_id=flow_run.id
        )

    def _unfinished(self) -> Run | None:
        """One that has a verdict was ended by a breach; another host's yard is another soak."""
        run = self.records.unfinished(self._as_json, kind=KIND)
        return run if run is not None and run.verdict is None else None

    def _concluded(self, models: list[Outcome]) -> Outcome:
        """The run goes on with the next window, or it is over: with the verdict on every model that it has."""
        breached = any(model["breached"] for model in models)
        going = [model for model in models if not model["over"]]
        verdict = worst(gate(results) for results in self.records.checks(self.run_id).values())
        outcome: Outcome = {
            "result": "breached" if breached else "window added" if going else "done",
            "why": "; ".join(progress_line(model) for model in models),
            "run_id": self.run_id,
            "plan": self.plan.name,
            "verdict": verdict.value,
            "models": models,
        }
        self.say(outcome["why"])
        if going:
            self.records.finish_run(self.run_id, "interrupted", error=f"the next window follows; {outcome['why']}")
            return outcome
        return {**outcome, "report": str(self._finish())}

    def _finish(self) -> Path:
        """The run ended with the verdict on what it has recorded, and where its report is."""
        verdict = worst(gate(results) for results in self.records.checks(self.run_id).values())
        steps = self.records.steps(self.run_id)
        broke = "; ".join(str(step.detail["why"]) for step in steps if step.step.startswith(BREACH))
        failed = bool(broke) and verdict is Verdict.FAIL
        error = broke if failed else None
        self.records.finish_run(self.run_id, "failed" if failed else "done", verdict=verdict, error=error)
        return report(self.records, self.run_id, self.plan.name, self.home)

    def _conclude_late(self) -> None:
        """A run that was killed after the last model's end and before its own."""
        run = self._unfinished()
        if run is not None:
            self._run = self.records.resume_run(run.id)
            self._finish()


# --- shared with the benchmark


def put_window(records: Records, run_id: str, target: Target, index: int, window: Mapping[str, Any]) -> None:
    """One window as evidence, with the engine that it was of."""
    engine = {"arm": "candidate", **{name: target.told[name] for name in ("engine", "version", "form", "argv")}}
    records.put_evidence(
        run_id,
        target.model_id,
        "candidate",
        KIND,
        window,
        key=f"{index:05d}",
        environment={"engines": [{**engine, "argv": engine["argv"] or []}]},
    )


def report(records: Records, run_id: str, plan_name: str, home: Path) -> Path:
    """Where the HTML report of the run was written."""
    models = [
        {
            "model": model_id,
            "verdict": gate(results).value,
            "checks": [result.model_dump(mode="json") for result in results],
            "closed_by": [result.check for result in reasons(results)],
            "risks": [],
        }
        for model_id, results in records.checks(run_id).items()
    ]
    verdict = worst(Verdict(str(model["verdict"])) for model in models)
    outcome = {"run_id": run_id, "plan": plan_name, "verdict": verdict.value, "models": models, "cannot_prove": ()}
    path = write_report(records, run_id, outcome, home / "reports" / f"{run_id}.html")
    records.note_run(run_id, report_path=path)
    return path


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
    """`m: 12 % of 3.0 days in 52 windows, INCONCLUSIVE`."""
    line = (
        f"{model['model']}: {_percent(model):g} % of {duration(model['soak_s'])} in {model['windows']} windows of "
        f"{model['engine']} {model['version']}, {model['verdict']}"
    )
    return f"{line} ({model['ended']})" if model["ended"] else line


def _percent(model: Mapping[str, Any]) -> float:
    return round(min(100.0, 100 * model["exposure_s"] / model["soak_s"]), 1)


def _exposure_s(windows: Sequence[Mapping[str, Any]]) -> float:
    return float(sum(window["exposure_s"] for window in windows))


def _identity(row: Evidence) -> tuple[str, str]:
    engine = row.environment["engines"][0]
    return str(engine["engine"]), str(engine["version"])


# --- Prefect


def emit_breach(run_id: str, model_id: str, engine: str, step: str, why: str) -> None:
    """The event that an automation may answer with a rollback; the same breach has the same id, however often told."""
    from prefect.events import emit_event

    emit_event(
        EVENT,
        resource={
            "prefect.resource.id": f"switchyard.model.{model_id}",
            "prefect.resource.name": model_id,
            "switchyard.host": host(),  # another host's model of the same name is another model
        },
        payload={"model": model_id, "engine": engine, "run_id": run_id, "why": why},
        id=uuid.uuid5(EVENT_IDS, f"{run_id} {model_id} {step}"),
    )


def publish(outcome: Outcome) -> None:
    """How far the soak is, as artifacts of the Prefect run: a percentage, and the table so far."""
    from prefect.artifacts import create_markdown_artifact, create_progress_artifact

    if not outcome["models"]:
        return
    slug = re.sub(r"[^a-z0-9]+", "-", str(outcome["plan"]).lower()).strip("-") or "plan"
    done = sum(_percent(model) for model in outcome["models"]) / len(outcome["models"])
    said = f"Run {outcome['run_id']}: {outcome['result']}"
    create_progress_artifact(round(done, 1), key=f"switchyard-soak-progress-{slug}", description=said)
    create_markdown_artifact(markdown(outcome), key=f"switchyard-soak-{slug}", description=said)


def markdown(outcome: Outcome) -> str:
    """The windows, exposure and checks of every model as tables."""
    lines = [f"# Soak of {outcome['plan']}: {outcome['result']}", ""]
    for model in outcome["models"]:
        lines += [f"## {model['model']}: {model['verdict']}", "", progress_line(model), ""]
        lines += [f"**Breached**: {why}" for why in model["breached"]]
        lines += ["", "| check | verdict | why |", "|---|---|---|"]
        lines += [f"| {c['check']} | {c['verdict']} | {_cell(c['why'])} |" for c in model["checks"]]
        lines.append("")
    now = datetime.now().astimezone()
    return "\n".join([*lines, f"{now:%Y-%m-%d %H:%M %Z}, run {outcome['run_id']}"])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def soak(plan: str = "", window_s: float = 240) -> Outcome:
    """Load what the candidate serves for one window, and judge the soak so far; `plan` as `deployments.soak` has it."""
    folder = default_home()
    path = plan_path(Path(plan) if plan else None, folder).absolute()
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
