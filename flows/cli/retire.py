"""`switchyard retire`: phase 4."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.text import Text

from engines.home import home
from flows.cli.options import Json, PlanFile, Reason
from flows.cli.output import finish, out, verdict_text
from flows.orchestrator.server import with_prefect
from migrations.plan_file import load_plan, plan_path


def retire(
    plan: PlanFile = None,
    who: Annotated[str, typer.Option(help="Who approves it; recorded.")] = "",
    reason: Reason = "",
    now: Annotated[bool, typer.Option("--now", help="Skip the rollback window; needs --who and --reason.")] = False,
    uninstall: Annotated[bool, typer.Option("--uninstall", help="Also remove what Switchyard installed.")] = False,
    json_: Json = False,
) -> None:
    """Phase 4: retire the incumbent, or list what still needs it; `switchyard restore` undoes it.

    Example: `switchyard retire --who Ada --reason "two quiet weeks"`

    A retired engine is never started. Exit code 0: retired. 3: something still needs it. 4: its rollback window is
    open, or nobody has approved yet.
    """
    folder = home()
    path = plan_path(plan, folder)
    load_plan(path)  # what is wrong with it is better known before Prefect starts
    flow = with_prefect(folder, "flows.deployments:retire")
    outcome = flow(str(path), who=who, reason=reason, now=now, uninstall=uninstall)
    finish({**outcome, "next": _next_step(outcome)}, json_, _show)


def _show(outcome: Mapping[str, Any]) -> None:
    verdict = verdict_text(outcome["verdict"])
    out.print(Text.assemble((outcome["engine"], "bold"), "  ", verdict, f"  {outcome['result']}"))
    for check in outcome["checks"]:
        out.print(Text.assemble("  ", verdict_text(check["verdict"]), f"  {check['why']}"))
    if outcome["archive"]:
        out.print(f"archive: {outcome['archive']}")
    out.print(outcome["next"])


def _next_step(outcome: Mapping[str, Any]) -> str:
    engine = outcome["engine"]
    if outcome["verdict"] == "PASS":
        return f"next: watch it with `switchyard status`; `switchyard restore {engine}` brings {engine} back"
    if outcome["result"] == "waits for approval":
        return "next: switchyard retire --who NAME --reason TEXT"
    if outcome["verdict"] == "FAIL":
        return f"next: migrate the models named above, or keep {engine}; nothing was changed"
    return "next: rerun this command when the window is over; nothing was changed"
