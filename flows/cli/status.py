"""`switchyard status`: the yard's routes, engines and incidents on the terminal, and the evaluations."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from engines.deadline import Background
from engines.errors import BadInput, SwitchyardError
from engines.home import home, host
from engines.process.process import end_orphans, registered
from engines.units import ago, quantity, size
from engines.yard.client import YardClient
from engines.yard.ports.notes import notes, one_line, retired
from flows.cli.history import run_row
from flows.cli.options import Json
from flows.cli.output import next_command, out, prepared_home, print_drift, print_json, run_table
from migrations.demo import WHOLE_DEMO_NAME
from tasks.evidence.nights import known_drift
from tasks.records.store import DATABASE, LOCKED_S, READ_S, open_records

STATES = {
    "ready": "green",
    "busy": "green",
    "loading": "yellow",
    "stopped": "dim",
    "wedged": "bold red",
    "failing": "bold red",
    "dead": "bold red",
}
RESUMED_BY = {  # the command that continues a run of this kind
    "evaluate": "switchyard evaluate --resume {run_id}",
    "whole": "switchyard migrate",
    "migrate": "switchyard migrate --phase subprocess",
    "migrate-native": "switchyard migrate --phase native",
    "soak": "switchyard soak",
    "deprecate": "switchyard retire",
    "rollback": "switchyard rollback",
}
KINDS = {"bad": "bold red", "wait": "yellow", "news": "cyan", "muted": "dim"}
DAY_S = 86_400
SHOWN_INCIDENTS = 8
EVERY_S = 1.0
NUMBERS = ("in flight", "tok/s", "first token", "memory", "restarts")


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Show the yard live, once a second, until Ctrl-C.")] = False,
    json_: Json = False,
) -> None:
    """Show what runs now (the yard, its routes and engines, evaluations) and how the last run ended."""
    client = YardClient(home())
    if watch:
        if json_:
            raise BadInput("--watch and --json cannot be combined")
        watch_yard(client, Console())
        return
    folder, (yard, why) = prepared_home(), _ask(client)
    if json_:
        print_json({**current(folder), "yard": yard})
        return
    out.print(yard_view(yard, why), "", soft_wrap=yard is None)  # before anything waits for the database
    models = yard["models"] if yard else []
    _print_evaluations(current(folder), {engine["pid"] for model in models for engine in model["engines"]})


def _print_evaluations(state: Mapping[str, Any], of_yard: set[int | None]) -> None:
    """Runs under way, their engines (without the yard's, shown above), and the last run."""
    if state["records"]:
        out.print(f"records: {state['records']}; history not shown", markup=False)
    elif not state["running"]:
        out.print("no evaluation is running")
    for run in state["running"]:
        what = f"run {run['run_id']} ({run['plan']}) is running"
        out.print(f"{what}: {run['kind']} on {run['host']}, pid {run['pid']}, evidence: {run['evidence']}")
    for engine in state["processes"]:
        if engine["pid"] not in of_yard:
            out.print(f"  {engine['name']} (pid {engine['pid']}), {size(engine['memory_bytes'])}")
    for ended in state["ended"]:
        out.print(f"  ended a process left behind by a killed run: {ended}")
    print_drift(state["drift"])
    if last := state["last"]:
        out.print(run_table([last]), soft_wrap=False)
        if last["error"] and last["status"] != "done":
            out.print(f"  {one_line(last['error'], 400)}", markup=False)
        if (command := next_of_run(last)) is not None:
            out.print(next_command(command))


def next_of_run(run: Mapping[str, Any]) -> str | None:
    """The command that continues a run which broke off, or shows what an evaluation found; None: nothing is left."""
    if run["status"] == "done":
        return f"switchyard report {run['run_id']}" if run["kind"] == "evaluate" else None
    if run["status"] == "running":
        return None
    if run["kind"] == "whole" and run["plan"] == WHOLE_DEMO_NAME:
        return "switchyard demo"
    command = RESUMED_BY.get(run["kind"])
    return None if command is None else command.format(**run)


def current(home: Path) -> dict[str, Any]:
    """Runs and processes that are alive, what was left behind and ended just now, and the last run.

    `records` is None, or one line that says why no run is shown: they are locked, unreadable or out of reach.
    """

    def read() -> tuple[list[dict[str, Any]], dict[str, Any] | None, list[dict[str, Any]]]:
        with open_records(wait_s=LOCKED_S) as records:
            runs = records.history(50)
            return (
                [
                    {**run_row(run), "pid": run.owner_pid, "evidence": len(records.list_evidence(run.id))}
                    for run in runs
                    if run.shown_status == "running"
                ],
                next((run_row(run) for run in runs if run.owner_host == host()), None),
                known_drift(records, host()),
            )

    reading = Background(DATABASE, read)
    ended = end_orphans(home)
    running: list[dict[str, Any]] = []
    drift: list[dict[str, Any]] = []
    last = problem = None
    try:
        running, last, drift = reading.result(READ_S)
    except SwitchyardError as error:
        problem = str(error)
    return {
        "records": problem,
        "running": running,
        "processes": [
            {"name": name, "pid": process.pid, "memory_bytes": _rss(process)} for name, process in registered(home)
        ],
        "ended": ended,
        "last": last,
        "drift": drift,
    }


def _rss(process: psutil.Process) -> int | None:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return None


# --- the yard


def _ask(client: YardClient) -> tuple[dict[str, Any] | None, str]:
    """The yard's status; None and the reason where there is none."""
    try:
        return client.status(), ""
    except SwitchyardError as error:
        return None, str(error)


def watch_yard(client: YardClient, out: Console, *, pause: Callable[[float], None] = time.sleep) -> None:
    """Show the yard once a second until Ctrl-C, also while it is away."""
    last = yard_view(*_ask(client))
    live = Live(last, console=out, screen=out.is_terminal, auto_refresh=False)
    try:
        live.start(refresh=True)  # not `with`: interrupted in its beginning, that would leave the terminal as it is
        while True:
            pause(EVERY_S)
            last = yard_view(*_ask(client))
            live.update(last, refresh=True)
    except KeyboardInterrupt:
        pass
    finally:
        live.stop()
    if out.is_terminal:  # the other screen is gone, and the last picture with it
        out.print(last)


def yard_view(status: Mapping[str, Any] | None, why: str = "", now: float | None = None) -> RenderableType:
    """Address, model by model its route and engines, the incidents of the last day; or `why` there is no yard."""
    if status is None:
        return Text(why, style="dim")
    moment = time.time() if now is None else now
    since = f"  pid {status['pid']}, up {ago(status['since'], moment)}"
    parts: list[RenderableType] = [Text.assemble(("yard ", "bold"), str(status["address"]), (since, "dim"))]
    for model in status["models"]:
        serving = Text(one_line(model["serving"] or "nothing"), "bold cyan" if model["serving"] else "bold red")
        parts += ["", Text.assemble((one_line(model["id"]), "bold"), " → ", serving)]
        parts += [Padding(Text(one_line(note, 400), KINDS[kind]), (0, 0, 0, 2)) for kind, note in notes(model)]
        parts += _engines(model, moment)
    parts += [Text(one_line(line, 400), "dim") for line in retired(status)]
    return Group(*parts, *_incidents(status["incidents"], moment))


def _engines(model: Mapping[str, Any], now: float) -> list[RenderableType]:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("", "engine", "state"):
        table.add_column(column, no_wrap=True)
    for column in NUMBERS:
        table.add_column(column, justify="right")
    for engine in model["engines"]:
        table.add_row(*_engine(engine, serves=engine["engine"] == model["serving"]))
    return [table, *(Padding(_evidence(engine, now), (0, 0, 0, 3)) for engine in model["engines"])]


def _engine(engine: Mapping[str, Any], *, serves: bool) -> list[RenderableType]:
    first = engine["ttft_ms_series"]
    runs = engine["pid"] is not None
    memory = Text(size(engine["memory_bytes"])) if runs else Text("-", style="dim")
    if runs and engine["vram_bytes"] is not None:
        memory.append(f"\nGPU {size(engine['vram_bytes'])}")
    return [
        Text("●" if serves else " ", style="green" if engine["state"] in ("ready", "busy") else "red"),
        Text(one_line(engine["engine"]), style="bold" if serves else ""),
        Text(engine["state"], style=STATES.get(engine["state"], "")),
        str(engine["in_flight"]),
        _measured(engine["tokens_per_s"], "", runs),
        _measured(first[-1] if first else None, "ms", runs),
        memory,
        str(engine["restarts"]),
    ]


def _measured(value: float | None, unit: str, runs: bool) -> Text:
    if value is None and not runs:
        return Text("-", style="dim")
    return Text(quantity(value, unit), style="dim" if value is None else "")


def _evidence(engine: Mapping[str, Any], now: float) -> Text:
    """The last transition of state, and the process."""
    since = "" if engine["since"] is None else f", {ago(engine['since'], now)} ago"
    process = "" if engine["pid"] is None else f", pid {engine['pid']}"
    loading = f" ({one_line(engine['loading'])})" if engine["loading"] else ""
    return Text.assemble(
        (f"{one_line(engine['engine'])}: ", "dim"),
        f"{one_line(engine['why'])}{loading}{since}",
        (f" [{one_line(engine['version'])}, {engine['form']}{process}]", "dim"),
    )


def _incidents(incidents: Sequence[Mapping[str, Any]], now: float) -> list[RenderableType]:
    recent = [incident for incident in incidents if now - incident["at"] <= DAY_S]
    if not recent:
        return ["", Text("no incident in the last day", style="dim")]
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(justify="right", no_wrap=True, style="dim")
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    for incident in recent[: -SHOWN_INCIDENTS - 1 : -1]:
        engine = one_line(incident.get("engine", ""))
        table.add_row(
            f"{ago(incident['at'], now)} ago",
            Text(f"{one_line(incident['model'])} {engine}".strip()),
            Text(one_line(incident["what"])),
        )
    more = len(recent) - SHOWN_INCIDENTS
    title = f"incidents of the last day: {len(recent)}" + (f", the latest {SHOWN_INCIDENTS}" if more > 0 else "")
    return ["", Text(title, style="yellow"), table]
