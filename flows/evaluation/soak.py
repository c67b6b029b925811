"""The soak of both engines in an evaluation: measured for the planned time, or taken from an earlier evaluation."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any

from engines.home import host
from engines.process import process
from flows.evaluation.trial import ARMS, BOTH, SOAK_OF, Trial, Unmeasured
from tasks.evidence.engine_under_test import Arm
from tasks.evidence.soak import soak as load
from tasks.evidence.unmeasured import SOAK_LEFT_OUT, left_out, summary

SEGMENTS_IN_A_SOAK = 6
LOOK_BACK = 200  # evaluations


def soak(trial: Trial) -> None:
    """An agent's load on both engines for the planned time: at once where both fit into memory, else in turn."""
    if trial.soak_run != trial.run_id:
        return
    if not trial.fits_together:
        for arm in ARMS:
            _recorded(trial, arm, partial(_soak, trial, arm, threading.Event()))
        return
    stop = threading.Event()
    with ThreadPoolExecutor(len(ARMS), thread_name_prefix="soak") as pool:
        soaks = {pool.submit(contextvars.copy_context().run, _soak, trial, arm, stop): arm for arm in ARMS}
        try:
            for running in as_completed(soaks):
                _recorded(trial, soaks[running], running.result)
        except Exception:
            stop.set()  # the other soak ends with the request under way
            raise
        except BaseException:
            # the threads see no signal: end their engines under them, and they end
            stop.set()
            process.stop_all()
            raise


def _recorded(trial: Trial, arm: Arm, work: Callable[[], None]) -> None:
    """The soak of one engine; what ends it early is recorded as that engine's."""
    try:
        work()
    except Exception as error:
        trial.broke(arm, "soak", error)
        raise Unmeasured(f"{arm}: {summary(error)}") from error


def _soak(trial: Trial, arm: Arm, stop: threading.Event) -> None:
    """Saved in segments, memory every second."""
    soak_s, engine, done = trial.plan.measure.soak_s, trial.engines[arm], trial.payloads(arm, "soak")
    if sum(segment["exposure_s"] for segment in done) >= soak_s:
        return

    def save(index: int, segment: dict[str, Any]) -> None:
        trial.put(arm, "soak", segment, key=f"{index:05d}")

    with trial.records.series_writer(trial.run_id, trial.model.id, arm) as series:
        load.soak(
            engine,
            soak_s=soak_s,
            done=done,
            save=save,
            on_memory=lambda t, value: series.append("memory_bytes", t, value),
            segment_s=min(60.0, soak_s / SEGMENTS_IN_A_SOAK),
            seed=trial.plan.measure.seed,
            stop=stop,
            progress=lambda what: trial.say(f"{arm}: {what}"),
        )


def leave_soak_out(trial: Trial) -> None:
    """No soak of its own: that of an earlier evaluation of just this counts, else it is recorded as left out."""
    if _is_soaked(trial, trial.run_id) or trial.soak_run != trial.run_id:
        return
    # the latest evaluation on this host whose whole soak was of this plan, model file and versions
    wanted = {arm: found.version for arm, found in trial.bench.installations.items()}
    evaluations = trial.records.history(LOOK_BACK, kind="evaluate", host=host())
    others = (run.id for run in evaluations if run.id != trial.run_id and run.status == "done")
    earlier = next((run_id for run_id in others if _is_soaked(trial, run_id, wanted)), None)
    if earlier is not None:
        trial.put(BOTH, SOAK_OF, {"run_id": earlier})
        return
    why = "not measured: this evaluation left the soak out, as scheduled ones do, and no earlier one of the same "
    why += f"plan, model file and engines has one; `switchyard evaluate --resume {trial.run_id}` adds it"
    trial.put_unmeasured(BOTH, SOAK_LEFT_OUT, left_out(why))


def _is_soaked(trial: Trial, run_id: str, versions: Mapping[Arm, str] | None = None) -> bool:
    """Whether a run soaked both engines for the planned time; of `versions`, under this very plan, where given."""
    for arm in ARMS:
        rows = trial.records.list_evidence(run_id, model_id=trial.model.id, arm=arm, kind="soak")
        if sum(row.payload["exposure_s"] for row in rows) < trial.plan.measure.soak_s:
            return False
        for seen in (row.environment for row in rows if versions is not None):
            engine = seen["engines"][0]["version"] if seen.get("engines") else None
            under = (seen.get("plan_hash"), seen.get("model_digest"), engine)
            if under != (trial.bench.content_hash, trial.digest, (versions or {})[arm]):
                return False
    return True
