from typing import Annotated, Any

import typer

from engines.deadline import Background
from engines.home import host
from engines.redaction import redacted
from flows.cli.options import Json
from flows.cli.output import next_command, out, prepared_home, print_drift, print_json, run_table
from tasks.evidence.nights import known_drift
from tasks.records.store import DATABASE, LOCKED_S, READ_S, open_records
from tasks.records.tables import Run


def history(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many runs.")] = 20,
    json_: Json = False,
) -> None:
    """List the runs so far, newest first."""
    prepared_home()

    def read() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        with open_records(wait_s=LOCKED_S) as records:
            return [run_row(run) for run in records.history(limit)], known_drift(records, host())

    runs, drift = Background(DATABASE, read).result(READ_S)
    if json_:
        print_json({"runs": runs, "drift": drift})
    elif not runs:
        out.print("no run yet; " + next_command("switchyard evaluate demo"))
    else:
        out.print(run_table(runs), soft_wrap=False)
        print_drift(drift)
        evaluations = [run["run_id"] for run in runs if run["kind"] == "evaluate"]
        out.print(next_command(f"switchyard report {evaluations[0]}" if evaluations else "switchyard status"))


def run_row(run: Run) -> dict[str, Any]:
    """A recorded run as plain JSON."""
    took = (run.ended_at - run.started_at).total_seconds() if run.ended_at else None
    row = {
        "run_id": run.id,
        "host": run.owner_host,
        "kind": run.kind,
        "plan": run.name,
        "status": run.shown_status,
        "verdict": run.verdict,
        "started_at": run.started_at.isoformat(),
        "took_s": took,
        "error": run.error,
        "report": run.report_path,
    }
    return dict(redacted(row))  # what an older version stored may still hold a secret
