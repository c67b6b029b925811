"""`switchyard retire` and `restore`: phase 4, and its undo."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from engines.home import home
from flows.cli.options import EXIT_CODES, Json, PlanFile, print_json

app = typer.Typer()


@app.command()
def retire(
    plan: PlanFile = None,
    who: Annotated[str, typer.Option(help="Who approves it; recorded.")] = "",
    reason: Annotated[str, typer.Option(help="Why; recorded.")] = "",
    now: Annotated[
        bool, typer.Option("--now", help="Do not wait for the rollback window; needs --who and --reason.")
    ] = False,
    uninstall: Annotated[
        bool, typer.Option("--uninstall", help="Also remove what `switchyard install` brought, and nothing else.")
    ] = False,
    json_: Json = False,
) -> None:
    """Phase 4: retire the incumbent, or say who still needs it. Nothing starts it then; `switchyard restore` undoes it.

    Exit code 0: retired. 3: something still needs it. 4: its rollback window is open, or nobody has approved yet.
    """
    from flows.rollout.yard_config import plan_path
    from migrations.plan_file import load_plan

    folder = home()
    path = plan_path(plan, folder).absolute()
    load_plan(path)  # what is wrong with it is better known before Prefect starts
    outcome = _retired(path, folder, who=who, reason=reason, now=now, uninstall=uninstall)
    if json_:
        print_json({**outcome, "next": next_step(outcome)})
    else:
        _show(outcome)
    raise typer.Exit(EXIT_CODES[outcome["verdict"]])


@app.command()
def guide(
    plan: PlanFile = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder for guide.md and guide.html.")
    ] = None,
    json_: Json = False,
) -> None:
    """Write the migration guide from the records: what changed, what was lost, who stays and why, how to undo it."""
    from flows.rollout.guide import write_guide
    from flows.rollout.yard_config import plan_path
    from migrations.plan_file import load_plan
    from tasks.records.store import open_records

    folder = home()
    loaded = load_plan(plan_path(plan, folder).absolute())
    with open_records() as records:
        written = write_guide(records, loaded, folder, output)
    if json_:
        print_json({"files": [str(path) for path in written]})
    else:
        for path in written:
            Console().print(str(path), highlight=False, soft_wrap=True)


@app.command()
def restore(
    engine: Annotated[str, typer.Argument(help="The engine that was retired.")],
    json_: Json = False,
) -> None:
    """Bring a retired engine back, and what was uninstalled of it; it serves when you promote a model to it."""
    from flows.orchestrator.server import prepare_process

    folder = home()
    prepare_process(folder)
    from flows.deprecate import restore as restored

    errors = Console(stderr=True)
    done = restored(engine, folder, lambda step: errors.print(step, style="dim", highlight=False))
    if json_:
        print_json({"done": done})
    else:
        Console().print(done, highlight=False, soft_wrap=True)


def _retired(path: Path, folder: Path, **how: Any) -> dict[str, Any]:
    """The flow, under the user's Prefect server or a temporary one."""
    from flows.orchestrator.server import with_prefect

    def flow() -> Any:
        from flows.deployments import retire

        return retire

    return with_prefect(folder, flow)(str(path), **how)


def _show(outcome: Mapping[str, Any]) -> None:
    from flows.cli.tables import verdict_text

    out = Console()
    verdict = verdict_text(outcome["verdict"])
    out.print(Text.assemble((outcome["engine"], "bold"), "  ", verdict, f"  {outcome['result']}"))
    for check in outcome["checks"]:
        out.print(Text.assemble("  ", verdict_text(check["verdict"]), f"  {check['why']}"), soft_wrap=True)
    if outcome["archive"]:
        out.print(f"archive: {outcome['archive']}", soft_wrap=True, highlight=False)
    out.print(next_step(outcome), soft_wrap=True)


def next_step(outcome: Mapping[str, Any]) -> str:
    """The last line: what to do now."""
    engine = outcome["engine"]
    if outcome["verdict"] == "PASS":
        return f"next: watch it with `switchyard status`; `switchyard restore {engine}` brings {engine} back"
    if outcome["result"] == "waits for approval":
        return "next: switchyard retire --who NAME --reason TEXT"
    if outcome["verdict"] == "FAIL":
        return f"next: migrate the models named above, or keep {engine}: nothing was changed"
    return "next: the same command when the window is over; nothing was changed"
