"""`switchyard soak`: one window of the soak of the engine that serves."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from engines.home import home
from flows.cli import output
from flows.cli.options import Json, PlanFile
from flows.cli.output import EXIT_CODES, finish, print_checks, verdict_text
from flows.orchestrator.server import with_prefect
from migrations.plan_file import load_plan, plan_path


def soak(
    plan: PlanFile = None,
    window: Annotated[float, typer.Option(min=1, help="Seconds of load, shared by the models under soak.")] = 240,
    json_: Json = False,
) -> None:
    """Put load on the candidate through the yard for one window, and judge the soak so far.

    The windows add up until the plan's soak_s is on record; `switchyard up` adds them on a schedule.

    Exit code 0 before the soak is over, and when there is nothing to soak.
    """
    folder = home()
    path = plan_path(plan, folder)
    load_plan(path)  # what is wrong with it is better known before Prefect starts
    outcome = with_prefect(folder, "flows.deployments:soak")(str(path), window)
    finish({**outcome, "next": next_step(outcome)}, json_, show, exit_code(outcome))


def exit_code(outcome: Mapping[str, Any]) -> int:
    """By verdict once the soak is over; 0 before."""
    return EXIT_CODES[outcome["verdict"]] if outcome["result"] in ("done", "breached") else 0


def show(outcome: Mapping[str, Any], out: Console = output.out) -> None:
    """Print the models with their checks, and what to do next."""
    from flows.soak import progress_line  # imports Prefect, which has read its settings by now

    for model in outcome["models"]:
        out.print(Text.assemble("\n", verdict_text(model["verdict"]), f"  {progress_line(model)}"))
        print_checks(model["checks"], out)
        for why in model["breached"]:
            out.print(Text(f"  breached: {why}", style="red"))
    what = f"run {outcome['run_id']}: {outcome['result']}" if outcome["run_id"] else outcome["result"]
    out.print(f"\n{what}" if outcome["models"] else f"{what}: {outcome['why']}", markup=False)
    out.print(next_step(outcome), markup=False)


def next_step(outcome: Mapping[str, Any]) -> str:
    """What to do now, as the last line."""
    result = outcome["result"]
    if result == "window added":
        return "next: rerun this command for the next window; `switchyard up` does so every 10 minutes"
    if result == "done":
        return f"next: read the report: {outcome['report']}"
    if result == "breached":
        names = [model["model"] for model in outcome["models"] if model["breached"]]
        return f"next: switchyard rollback {names[0]}, then fix what is named above"
    return "next: see `switchyard status` for what serves"
