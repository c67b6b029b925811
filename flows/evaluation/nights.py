"""After an evaluation: its medians put on record, and the series over the nights looked at for drift."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engines.notify import notify
from flows.evaluation.trial import BOTH, Bench, Trial
from flows.progress import progress
from tasks.evidence.nights import DRIFT, NIGHT, drift_found, night_of, nights_until


def look_at_nights(bench: Bench, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """What has drifted in the nights up to this one, as plain JSON; what this night shows first is said, once."""
    for trial in trials:
        if blocks := trial.payloads(BOTH, "performance"):
            night = night_of(blocks)
            if night != trial.payload(BOTH, NIGHT):  # a resumed run may have measured more blocks, or none
                trial.put(BOTH, NIGHT, night)
    run = bench.records.find_run(bench.run_id)
    found = drift_found(bench.records, run, nights_until(bench.records, run))
    if not bench.records.has_evidence(run.id, "-", "-", DRIFT):
        new = [one for one in found if one["is_new"] and one["is_worse"]]
        for one in new:
            progress.get().note(f"drift: {one['what']}")
        for model_id in dict.fromkeys(one["model"] for one in new):
            of_model = [one for one in new if one["model"] == model_id]
            engines = " and ".join(dict.fromkeys(one["engine"] for one in of_model))
            notify(bench.plan.notify, "drift", model_id, "; ".join(one["what"] for one in of_model), engines)
    bench.records.put_evidence(run.id, "-", "-", DRIFT, {"changes": found})
    return found
