"""`switchyard migrate`: the whole migration, or one of the two phases that move traffic."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import typer
from rich.text import Text

from engines.errors import BadInput
from engines.home import home
from flows.cli.options import Json, PlanFile, Reason
from flows.cli.output import finish, out, prepared_home, print_end, verdict_text
from flows.orchestrator.server import with_prefect
from flows.rollout.approval import asks, in_advance, on_terminal
from flows.rollout.orders import Orders
from migrations.plan_file import load_plan, plan_path
from tasks.records.store import open_records

PHASES = {
    "subprocess": "flows.subprocess_phase:subprocess_phase",
    "native": "flows.native_phase:native_phase",
}


def migrate(
    plan: PlanFile = None,
    phase: Annotated[
        Literal["all", "subprocess", "native"],
        typer.Option(help="All four phases with their gates, or only one of the two that move traffic."),
    ] = "all",
    model: Annotated[list[str] | None, typer.Option(help="Migrate only this model; may be repeated.")] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(help="Migrate this model although its phase 1 gate is closed; needs --who and --reason."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Approve every phase; needs --who and --reason.")] = False,
    who: Annotated[str, typer.Option(help="Who decides; recorded.")] = "",
    reason: Reason = "",
    without_canary: Annotated[
        bool, typer.Option("--without-canary", help="Move all traffic at once; needs --who and --reason.")
    ] = False,
    without_rehearsal: Annotated[
        bool, typer.Option("--without-rehearsal", help="Do not rehearse the fallback first; needs --who and --reason.")
    ] = False,
    json_: Json = False,
) -> None:
    """Migrate every model: evaluate, subprocess, native, retire, with a gate before each phase.

    Example: `switchyard migrate switchyard.toml --yes --who Ada --reason "change 42"`

    One model may be native while another stays on the incumbent, with the reason. If the plan has `approve = "ask"`,
    you are asked on the terminal. Rerun a killed or interrupted command to resume it; the yard serves meanwhile.
    """
    orders = Orders(
        models=tuple(model or ()),
        override=tuple(override or ()),
        who=who,
        reason=reason,
        without_canary=without_canary,
        without_rehearsal=without_rehearsal,
    )
    path = plan_path(plan, home())
    orders.checked(load_plan(path))
    if yes and not (who.strip() and reason.strip()):
        raise BadInput("an approval is recorded with a name and a reason: add --who and --reason")
    if phase == "all":
        asks.set(in_advance(who, reason) if yes else on_terminal)
        outcome = with_prefect(home(), "flows.deployments:migrate")(plan=str(path), **orders.model_dump(mode="json"))
    else:
        folder = prepared_home()
        with open_records():  # records that cannot be written are better known before anything moves
            pass
        outcome = with_prefect(folder, PHASES[phase])(path, orders)
    finish({**outcome, "next": next_step(outcome)}, json_, show)


def show(outcome: Mapping[str, Any]) -> None:
    """Print how far every model and the retirement came, the decisions on the way, and what to do next."""
    for model in outcome["models"]:
        print_end(model["model"], model)
        _print_decisions(model.get("decisions", ()))
    if (retirement := outcome.get("retirement")) is not None:
        print_end(retirement["engine"], {**retirement, "checks": ()})  # its reason is made of them
    _print_decisions(outcome.get("decisions", ()))
    if started := outcome.get("yard_started"):
        out.print(f"\na yard was started (pid {started['pid']}, log {started['log']}) and keeps serving")
        out.print("  to start it at every boot: `switchyard service install`; to stop it: `switchyard stop`")
    if outcome["run_id"]:
        out.print(f"\nrun {outcome['run_id']}: ", verdict_text(outcome["verdict"]), sep="")
    elif outcome["phase"] == "all":
        out.print("\nnothing had to be done")
    out.print(outcome["next"], markup=False)


def _print_decisions(decisions: Iterable[Mapping[str, Any]]) -> None:
    for made in decisions:
        what = f"{made['kind']} {made.get('model', '')}".strip()
        out.print(Text(f"  decided by {made['who']}: {what}: {made['why']}", style="yellow"))


def next_step(outcome: Mapping[str, Any]) -> str:
    """What to do after a migration, as its last line."""
    if outcome["phase"] != "all":
        return _next_of_phase(outcome)
    results = {end["result"] for end in (*outcome["models"], outcome["retirement"]) if end}
    if "waits for approval" in results:
        return "next: rerun this command with --yes --who NAME --reason TEXT, or on a terminal"
    if outcome["verdict"] == "PASS":
        return "next: watch it with `switchyard status`; `switchyard guide` documents what changed"
    stays = [model["model"] for model in outcome["models"] if model["verdict"] != "PASS"]
    if stays:
        return f"See `switchyard report` for why {', '.join(stays)} stays. Fix it, then rerun this command to resume."
    return "next: rerun this command when the rollback window is over; `switchyard rollback MODEL` is the way back"


def _next_of_phase(outcome: Mapping[str, Any]) -> str:
    by_result = {model["result"]: model["model"] for model in reversed(outcome["models"])}
    if outcome["verdict"] == "PASS":
        return "next: watch it with `switchyard status`; `switchyard rollback MODEL` is the way back"
    if closed := by_result.get("gate closed"):
        return f"next: switchyard evaluate, or --override {closed} --who NAME --reason TEXT; nothing was moved"
    if "fallen back" in by_result:
        return "next: see `switchyard status`; then `switchyard promote MODEL`, or `switchyard rollback MODEL`"
    if outcome["verdict"] == "FAIL":
        return "next: the incumbent serves; fix what the checks name, then migrate again"
    return "next: the incumbent serves; fix what is named above, then rerun this command to resume"
