"""`switchyard migrate`: the whole migration, or one of the phases that move traffic; `switchyard demo`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text

from engines.errors import BadInput
from engines.home import home
from flows.cli.options import EXIT_CODES, Json, PlanFile, print_json

app = typer.Typer()


@app.command()
def migrate(
    plan: PlanFile = None,
    phase: Annotated[
        Literal["all", "subprocess", "native"],
        typer.Option(help="All four phases with their gates, or one of the two that move traffic, by itself."),
    ] = "all",
    model: Annotated[
        list[str] | None, typer.Option(help="Migrate this model only; repeat for several. All of them without.")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(help="Go on with this model although phase 1 has not opened its gate; needs --who and --reason."),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Approve every phase beforehand; needs --who and --reason.")
    ] = False,
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
    """Take every model from the incumbent to the candidate: evaluate, subprocess, native, retire; a gate before each.

    One model may be native while another stays where it is, with the reason. Where the plan says `approve = "ask"` you
    are asked on the terminal. `--phase subprocess` and `--phase native` carry out one move by itself. Killed or
    interrupted, the same command goes on where it stopped; meanwhile the yard serves.
    """
    from flows.rollout.orders import Orders
    from flows.rollout.yard_config import plan_path
    from migrations.plan_file import load_plan

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
    if yes and not (who.strip() and reason.strip()):
        raise BadInput("an approval is recorded with a name and a reason: add --who and --reason")
    if phase == "all":
        whole = _whole(path, orders, folder, yes=yes)
        _print_whole(whole, json_)
        raise typer.Exit(EXIT_CODES[whole["verdict"]])
    outcome = _migrated(phase, loaded, orders, path, folder)
    if json_:
        print_json({**outcome, "next": next_step(outcome)})
    else:
        _show(outcome)
    raise typer.Exit(EXIT_CODES[outcome["verdict"]])


@app.command()
def demo(json_: Json = False) -> None:
    """The whole way on two real engines and two real models (half an hour on 2 cores), with a client on the port.

    One model goes through all phases under the demo's own CPU limits, the other stays on llama.cpp, with the reason; so
    llama.cpp cannot be retired. At the end the model is rolled back, and the yard stopped.
    """
    from flows.cli.demo_traffic import traffic
    from flows.rollback import Wish, roll_back
    from flows.rollout.orders import Orders
    from migrations.demo import whole_demo_file

    folder, errors = home(), Console(stderr=True)
    path = whole_demo_file(folder)
    try:
        with traffic(folder) as client:
            outcome = _whole(path, Orders(), folder, yes=False)
            back = [
                roll_back(folder, model["model"], Wish(who="demo", reason="to show the way back"))
                for model in outcome["models"]
                if "subprocess" in model["phases_done"]
            ]
    finally:
        _stop_yard(folder)
    outcome |= {"rolled_back": back, "client": client.told()}
    _print_whole(outcome, json_)
    if not json_:
        for one in back:
            errors.print(f"rolled back: {one['done']}", highlight=False, soft_wrap=True)
        errors.print(f"the client on the port, meanwhile: {client.told()}", highlight=False, soft_wrap=True)
    raise typer.Exit(EXIT_CODES[outcome["verdict"]])


def _stop_yard(folder: Path) -> None:
    from engines.yard.client import YardClient

    yard = YardClient(folder)
    if yard.runs():
        yard.order("stop")


def _whole(path: Path, orders: Any, folder: Path, *, yes: bool) -> dict[str, Any]:
    """All four phases under the user's Prefect server or a temporary one, with questions on the terminal."""
    from flows.orchestrator.server import with_prefect
    from flows.rollout.approval import asks, in_advance, on_terminal

    def flow() -> Callable[..., dict[str, Any]]:
        from flows.deployments import migrate

        return migrate

    asks.set(in_advance(orders.who, orders.reason) if yes else on_terminal)
    run = with_prefect(folder, flow)
    return run(
        plan=str(path),
        models=list(orders.models),
        override=list(orders.override),
        who=orders.who,
        reason=orders.reason,
        without_canary=orders.without_canary,
        without_rehearsal=orders.without_rehearsal,
    )


def _print_whole(outcome: dict[str, Any], json_: bool) -> None:
    if json_:
        print_json({**outcome, "next": next_of_whole(outcome)})
        return
    out = Console()
    for model in outcome["models"]:
        _print_end(out, model["model"], model)
        if model["phases_done"]:
            out.print(Text(f"  done: {', '.join(model['phases_done'])}", style="dim"))
    if (retirement := outcome["retirement"]) is not None:
        _print_end(out, retirement["engine"], retirement)
    for made in outcome["decisions"]:
        out.print(Text(f"decided by {made['who']}: {made['kind']} {made['model']}: {made['why']}", style="yellow"))
    if outcome["run_id"]:
        from flows.cli.tables import verdict_text

        out.print(f"\nrun {outcome['run_id']}: ", verdict_text(outcome["verdict"]), sep="")
    else:
        out.print("\nnothing had to be done")
    out.print(next_of_whole(outcome), soft_wrap=True)


def _print_end(out: Console, what: str, end: Mapping[str, Any]) -> None:
    from flows.cli.tables import verdict_text

    heading = Text.assemble("\n", (what, "bold"), "  ", verdict_text(end["verdict"]), f"  {end['result']}")
    out.print(heading, soft_wrap=True)
    out.print(Text(f"  {end['why']}"), soft_wrap=True)


def next_of_whole(outcome: Mapping[str, Any]) -> str:
    """The last line of a whole migration: what to do now."""
    results = {model["result"] for model in outcome["models"]}
    retirement = outcome["retirement"] or {}
    if "waits for approval" in {*results, retirement.get("result")}:
        return "next: the same command, with --yes --who NAME --reason TEXT, or on a terminal"
    if outcome["verdict"] == "PASS":
        return "next: watch it with `switchyard status`; `switchyard guide` tells others what changed"
    stays = [model["model"] for model in outcome["models"] if model["verdict"] != "PASS"]
    if stays:
        return f"next: `switchyard report` says why of {', '.join(stays)}; the same command goes on when it is mended"
    return "next: the same command when the rollback window is over; `switchyard rollback MODEL` is the way back"


def _migrated(phase: str, plan: Any, orders: Any, path: Path, folder: Path) -> dict[str, Any]:
    """The flow, under the user's Prefect server or a temporary one, with progress on standard error."""
    from engines.process.process import end_orphans
    from flows.orchestrator.server import with_prefect
    from tasks.records.store import open_records

    errors = Console(stderr=True)
    for ended in end_orphans(folder):
        errors.print(f"ended, left behind by a killed run: {ended}", style="dim", highlight=False)
    with open_records():  # records that cannot be written are better known before anything moves
        pass
    return with_prefect(folder, lambda: _flow(phase))(path, orders)


def _flow(phase: str) -> Callable[..., dict[str, Any]]:
    if phase == "native":
        from flows.native_phase import native_phase

        return native_phase
    from flows.subprocess_phase import subprocess_phase

    return subprocess_phase


def _show(outcome: Mapping[str, Any]) -> None:
    from flows.cli.tables import verdict_text

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
