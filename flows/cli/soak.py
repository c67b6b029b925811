"""`switchyard soak`: one window of the soak of what serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from engines.home import home
from flows.cli.options import EXIT_CODES, Json, PlanFile, print_json

app = typer.Typer()


@app.command()
def soak(
    plan: PlanFile = None,
    window: Annotated[
        float, typer.Option(min=1, help="Seconds of load in this window, shared by the models that are soaked.")
    ] = 240,
    json_: Json = False,
) -> None:
    """Load what the candidate serves for one window, through the yard, and judge the soak so far.

    The windows of all calls add up until the plan's soak_s is on record; `switchyard up` makes them on a schedule.
    Exit code 0 while it goes on, or when there is nothing to soak.
    """
    from flows.orchestrator.server import with_prefect
    from flows.rollout.yard_config import plan_path
    from migrations.plan_file import load_plan

    folder = home()
    path = plan_path(plan, folder).absolute()
    load_plan(path)  # what is wrong with it is better known before Prefect starts
    outcome = with_prefect(folder, _flow)(str(path), window)
    if json_:
        print_json({**outcome, "next": next_step(outcome)})
    else:
        show(outcome)
    raise typer.Exit(exit_code(outcome))


def _flow() -> Callable[..., dict[str, Any]]:
    from flows.deployments import soak as flow

    return flow


def exit_code(outcome: Mapping[str, Any]) -> int:
    """By verdict once the soak is over; 0 before."""
    over = outcome["result"] in ("done", "breached")
    return EXIT_CODES[outcome["verdict"]] if over else 0


def show(outcome: Mapping[str, Any], out: Console | None = None) -> None:
    """The models with their checks, and what to do next, for people."""
    from flows.cli.tables import verdict_text
    from flows.soak import progress_line

    out = out or Console()
    for model in outcome["models"]:
        out.print(Text.assemble("\n", verdict_text(model["verdict"]), f"  {progress_line(model)}"), soft_wrap=True)
        for check in model["checks"]:
            line = Text.assemble("  ", verdict_text(check["verdict"]), f"  {check['check']}: {check['why']}")
            out.print(line, soft_wrap=True)
        for why in model["breached"]:
            out.print(Text(f"  breached: {why}", style="red"), soft_wrap=True)
    what = f"run {outcome['run_id']}: {outcome['result']}" if outcome["run_id"] else outcome["result"]
    out.print(f"\n{what}" if outcome["models"] else f"{what}: {outcome['why']}", highlight=False, soft_wrap=True)
    out.print(next_step(outcome), highlight=False, soft_wrap=True)


def next_step(outcome: Mapping[str, Any]) -> str:
    """The last line: what to do now."""
    result = outcome["result"]
    if result == "window added":
        return "next: the same command adds the next window; `switchyard up` does so every 10 minutes"
    if result == "done":
        return f"next: read the report: {outcome['report']}"
    if result == "breached":
        names = [model["model"] for model in outcome["models"] if model["breached"]]
        return f"next: switchyard rollback {names[0]}, then mend what is named above"
    return "next: see `switchyard status` for what serves"
