"""`switchyard migrate`: the phases that move traffic."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text

from engines.home import home
from flows.options import EXIT_CODES, Json, PlanFile

app = typer.Typer()


@app.command()
def migrate(
    plan: PlanFile = None,
    phase: Annotated[
        Literal["subprocess", "native"], typer.Option(help="The phase to carry out; native follows on subprocess.")
    ] = "subprocess",
    model: Annotated[
        list[str] | None, typer.Option(help="Migrate this model only; repeat for several. All of them without.")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(help="Go on with this model although phase 1 has not opened its gate; needs --who and --reason."),
    ] = None,
    who: Annotated[str, typer.Option(help="Who decides that; recorded.")] = "",
    reason: Annotated[str, typer.Option(help="Why; recorded.")] = "",
    without_canary: Annotated[
        bool, typer.Option("--without-canary", help="Move all traffic at once; needs --who and --reason.")
    ] = False,
    without_rehearsal: Annotated[
        bool, typer.Option("--without-rehearsal", help="Do not rehearse the fallback first; needs --who and --reason.")
    ] = False,
    json_: Json = False,
) -> None:
    """Phases 2 and 3: put the candidate behind the real port: fallback rehearsed, canary judged, then all of it.

    Phase 3 (`--phase native`) does the same once more without a server between, after it has compared both forms.
    Killed or interrupted, the same command goes on where it stopped; meanwhile the yard serves. Exit code 0 means that
    every model is served by the candidate.
    """
    from flows.migration import Orders
    from flows.serve import plan_path
    from migrations.plan import load_plan

    folder = home()
    path = plan_path(plan, folder).absolute()
    orders = Orders(
        models=tuple(model or ()),
        override=tuple(override or ()),
        who=who,
        reason=reason,
        without_canary=without_canary,
        without_rehearsal=without_rehearsal,
    )
    loaded = load_plan(path)
    orders.checked(loaded)
    outcome = _migrated(phase, loaded, orders, path, folder)
    if json_:
        json.dump({**outcome, "next": next_step(outcome)}, sys.stdout, indent=2, ensure_ascii=False)
        print()
    else:
        _show(outcome)
    raise typer.Exit(EXIT_CODES[outcome["verdict"]])


def _migrated(phase: str, plan: Any, orders: Any, path: Path, folder: Path) -> dict[str, Any]:
    """The flow, under the user's Prefect server or a temporary one, with progress on standard error."""
    from engines.process import end_orphans
    from flows.prefect_server import with_prefect
    from tasks.records import open_records

    errors = Console(stderr=True)
    for ended in end_orphans(folder):
        errors.print(f"ended, left behind by a killed run: {ended}", style="dim", highlight=False)
    with open_records():  # records that cannot be written are better known before anything moves
        pass
    return with_prefect(folder, lambda: _flow(phase))(plan, orders, path)


def _flow(phase: str) -> Callable[..., dict[str, Any]]:
    if phase == "native":
        from flows.native_phase import native_phase

        return native_phase
    from flows.subprocess_phase import subprocess_phase

    return subprocess_phase


def _show(outcome: Mapping[str, Any]) -> None:
    from flows.tables import verdict_text

    out = Console()
    for model in outcome["models"]:
        heading = (f"{model['model']}", "bold")
        out.print(
            Text.assemble("\n", heading, "  ", verdict_text(model["verdict"]), f"  {model['result']}"), soft_wrap=True
        )
        out.print(Text(f"  {model['why']}"), soft_wrap=True)
        for check in model["checks"]:
            line = Text.assemble("  ", verdict_text(check["verdict"]), f"  {check['check']}: {check['why']}")
            out.print(line, soft_wrap=True)
        for made in model["decisions"]:
            out.print(
                Text(f"  decided by {made['who']}: {made['kind']}: {made['why']}", style="yellow"), soft_wrap=True
            )
    if started := outcome["yard_started"]:
        out.print(
            f"\na yard was started (pid {started['pid']}, log {started['log']}) and goes on serving", soft_wrap=True
        )
        out.print(
            "  to have it at every boot: `switchyard service install`; to stop it: `switchyard stop`", soft_wrap=True
        )
    if outcome["run_id"]:
        out.print(f"\nrun {outcome['run_id']}: ", verdict_text(outcome["verdict"]), sep="")
    out.print(next_step(outcome), soft_wrap=True)


def next_step(outcome: Mapping[str, Any]) -> str:
    """The last line of a migration: what to do now."""
    by_result: dict[str, list[str]] = {}
    for model in outcome["models"]:
        by_result.setdefault(model["result"], []).append(model["model"])
    verdict = outcome["verdict"]
    if verdict == "PASS":
        return "next: watch it with `switchyard status`; `switchyard rollback MODEL` is the way back"
    if closed := by_result.get("gate closed"):
        return f"next: switchyard evaluate, or --override {closed[0]} --who NAME --reason TEXT; nothing was moved"
    if "fallen back" in by_result:
        return "next: see `switchyard status`; then `switchyard promote MODEL`, or `switchyard rollback MODEL`"
    if verdict == "FAIL":
        return "next: the incumbent serves; mend what the checks name, then migrate again"
    return "next: the incumbent serves; mend what is named above, then the same command goes on where this one stopped"
