"""What commands print: JSON, steps, verdicts with their checks, and the tables that several commands show."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from engines.home import home
from engines.process.process import end_orphans
from engines.redaction import redacted
from engines.units import duration, number_of

EXIT_CODES = {"PASS": 0, "FAIL": 3, "INCONCLUSIVE": 4, "ERROR": 5}
STYLES = {"PASS": "green", "INCONCLUSIVE": "yellow", "ERROR": "magenta", "FAIL": "red"}
MEANING = {
    "PASS": "the gate is open: all required checks passed",
    "INCONCLUSIVE": "the gate stays closed: nothing failed, but something could not be proven",
    "ERROR": "the gate stays closed: a check could not be carried out",
    "FAIL": "the gate stays closed: the candidate is worse, or broken, for this model",
}
LEFT_OUT = "not measured: "
# a line is never broken: the terminal does that, and a copied line stays whole
out = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print the result of a command on standard output as JSON, without secrets."""
    sys.stdout.write(json.dumps(redacted(value), indent=2, ensure_ascii=False) + "\n")


def print_result(result: Any, json_: bool, show: Callable[[Any], None]) -> None:
    """Print the result of a command, as JSON or by `show`."""
    if json_:
        print_json(result)
    else:
        show(result)


def print_lines(result: Any, lines: Sequence[str], json_: bool) -> None:
    """Print the result of a command, as JSON or as these lines."""
    print_result(result, json_, lambda _: out.print("\n".join(lines), markup=False))


def print_done(done: str, json_: bool) -> None:
    """Print the one-line result of an order."""
    print_lines({"done": done}, [done], json_)


def finish(outcome: Mapping[str, Any], json_: bool, show: Callable[[Any], None], code: int | None = None) -> NoReturn:
    """Print the outcome of a command, as JSON or by `show`, and exit by its verdict."""
    print_result(outcome, json_, show)
    raise typer.Exit(EXIT_CODES[outcome["verdict"]] if code is None else code)


def print_step(step: str) -> None:
    """Print a step of a running command on standard error."""
    errors.print(step, style="dim", markup=False)


def next_command(command: str) -> str:
    """The last line of many commands: what to run next."""
    return f"next: [bold]{command}[/bold]"


def prepared_home() -> Path:
    """Switchyard's folder, once the processes that a killed run left behind are ended."""
    folder = home()
    for ended in end_orphans(folder):
        print_step(f"ended a process left behind by a killed run: {ended}")
    return folder


# --- verdicts


def verdict_text(verdict: str) -> Text:
    """The verdict in its colour."""
    return Text(verdict, style=f"bold {STYLES.get(verdict, '')}")


def print_end(subject: str, end: Mapping[str, Any]) -> None:
    """Print how it ended for a model or an engine: verdict, result, reason, then any checks and phases."""
    out.print(Text.assemble("\n", (subject, "bold"), "  ", verdict_text(end["verdict"]), f"  {end['result']}"))
    out.print(Text(f"  {end['why']}"))
    print_checks(end.get("checks", ()))
    if end.get("phases_done"):
        out.print(Text(f"  done: {', '.join(end['phases_done'])}", style="dim"))


def print_checks(checks: Iterable[Mapping[str, Any]], out: Console = out) -> None:
    """Print one line a check: verdict, name, reason."""
    for check in checks:
        out.print(Text.assemble("  ", verdict_text(check["verdict"]), f"  {check['check']}: {check['why']}"))


# --- tables


def evaluation_table(outcome: Mapping[str, Any]) -> Group:
    """The verdicts of a run: per model the verdict, what decided it, and what else is worth a look."""
    parts: list[Any] = []
    for model in outcome["models"]:
        parts.append(Text.assemble("\n", (model["model"], "bold"), "  ", verdict_text(model["verdict"])))
        parts.append(Padding(Text(MEANING[model["verdict"]], style="dim"), (0, 0, 0, 2)))
        parts.append(_check_table(model["checks"]))
        if another := model.get("another_quant"):
            parts.append(Padding(Text(another, style="cyan"), (0, 0, 0, 2)))
    return Group(*parts)


def _check_table(checks: Sequence[Mapping[str, Any]]) -> Table:
    """One row an area that passed, one row a required check that did not; what one reason left out shares a row."""
    left_out: dict[str, list[str]] = {}
    table = Table(box=None, padding=(0, 2, 0, 2), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    for area in dict.fromkeys(check["check"].split(".")[0] for check in checks):
        required = [c for c in checks if c["required"] and c["check"].startswith(area + ".")]
        closed = [check for check in required if check["verdict"] != "PASS"]
        if required and not closed:
            table.add_row(
                area, verdict_text("PASS"), f"{len(required)} of {number_of(len(required), 'required check')}"
            )
        for check in sorted(closed, key=lambda c: list(STYLES).index(c["verdict"]), reverse=True):
            if check["verdict"] == "INCONCLUSIVE" and check["why"].startswith(LEFT_OUT):
                left_out.setdefault(check["why"].removeprefix(LEFT_OUT), []).append(area)
                continue
            table.add_row(check["check"], verdict_text(check["verdict"]), check["why"])
    for why, areas in left_out.items():
        line = Text(f"{', '.join(dict.fromkeys(areas))}: {why}", style="dim")
        table.add_row("not measured", verdict_text("INCONCLUSIVE"), line)
    return table


def print_drift(changes: Sequence[Mapping[str, Any]]) -> None:
    """Print one line a change for the worse over the nights, and where its plot is."""
    for one in changes:
        out.print(f"drift: {one['what']}", style="yellow", markup=False, highlight=False)
    if changes:
        out.print(f"  plots: switchyard report {changes[0]['run_id']}", markup=False)


def run_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """One row a run, newest first; a narrow terminal cuts the host and the plan's name, never what people type."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for column in ("run", "started", "took", "host", "what", "status", "verdict"):
        table.add_column(column, no_wrap=column not in ("host", "what"), min_width=6)
    for run in runs:
        took = "" if run["took_s"] is None else duration(run["took_s"])
        verdict = verdict_text(run["verdict"]) if run["verdict"] else Text("-")
        started = run["started_at"][5:16].replace("T", " ")  # the id has the year
        cut = [Text(text, no_wrap=True, overflow="ellipsis") for text in (run["host"], f"{run['kind']} {run['plan']}")]
        table.add_row(run["run_id"], started, took, *cut, run["status"], verdict)
    return table
