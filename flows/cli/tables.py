"""What the terminal shows: verdict tables, preflight, history, status. Text in, rich renderables out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

STYLES = {"PASS": "green", "INCONCLUSIVE": "yellow", "ERROR": "magenta", "FAIL": "red"}
LOADS = {"yes": "green", "no": "red", "unknown": "yellow"}
MEANING = {
    "PASS": "the gate is open: everything that was asked for passed",
    "INCONCLUSIVE": "the gate stays shut: nothing failed, but something could not be proven",
    "ERROR": "the gate stays shut: a check could not be carried out",
    "FAIL": "the gate stays shut: the candidate is worse, or broken, for this model",
}


def verdict_text(verdict: str) -> Text:
    """The verdict in its colour."""
    return Text(verdict, style=f"bold {STYLES.get(verdict, '')}")


def evaluation(outcome: Mapping[str, Any]) -> Group:
    """The verdict table of a run: per model the verdict, what decided it, and what else is worth a look."""
    parts: list[Any] = []
    for model in outcome["models"]:
        parts.append(Text.assemble("\n", (model["model"], "bold"), "  ", verdict_text(model["verdict"])))
        parts.append(Padding(Text(MEANING[model["verdict"]], style="dim"), (0, 0, 0, 2)))
        parts.append(_checks(model["checks"]))
    return Group(*parts)


def _checks(checks: Sequence[Mapping[str, Any]]) -> Table:
    """One row per area where all passed, one row per required check that did not; what a FAIL made pointless is one."""
    failed = any(check["required"] and check["verdict"] == "FAIL" for check in checks)
    pointless: list[str] = []
    table = Table(box=None, padding=(0, 2, 0, 2), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    for area in dict.fromkeys(check["check"].split(".")[0] for check in checks):
        required = [c for c in checks if c["required"] and c["check"].startswith(area + ".")]
        shut = [check for check in required if check["verdict"] != "PASS"]
        if required and not shut:
            table.add_row(area, verdict_text("PASS"), f"{len(required)} of {len(required)} required checks")
        for check in sorted(shut, key=lambda c: list(STYLES).index(c["verdict"]), reverse=True):
            if failed and check["verdict"] == "INCONCLUSIVE" and check["value"] is None:
                pointless.append(check["check"].split(".")[0])
                continue
            table.add_row(check["check"], verdict_text(check["verdict"]), check["why"])
    if pointless:
        areas = ", ".join(dict.fromkeys(pointless))
        table.add_row("not measured", "", Text(f"{areas}: the gate could not open any more", style="dim"))
    return table


def preflight(report: Mapping[str, Any]) -> Group:
    """What loads where, what it takes, and what to do instead."""
    parts: list[Any] = []
    for model in report["models"]:
        memory = model["memory"]
        parts.append(Text.assemble("\n", (model["model"], "bold"), f"  {model['architecture']}"))
        table = Table(box=None, padding=(0, 2, 0, 2), show_header=False)
        for entry in model["engines"]:
            table.add_row(entry["engine"], Text(entry["loads"], style=LOADS[entry["loads"]]), entry["why"])
            table.add_row("", entry["fit"]["verdict"], entry["fit"]["why"])
            for warning in entry["warnings"]:
                table.add_row("", Text("note", style="yellow"), warning)
        parts.append(table)
        parts.append(Padding(_memory_line(memory), (0, 0, 0, 2)))
        parts += [Padding(Text(f"instead: {option}", style="cyan"), (0, 0, 0, 2)) for option in model["alternatives"]]
    return Group(*parts)


def _memory_line(memory: Mapping[str, Any]) -> Text:
    if memory["kv_bytes_per_token"] is None:
        return Text(f"weights {size(memory['weights_bytes'])}; KV cache unknown: {memory['why_unknown']}")
    text = f"weights {size(memory['weights_bytes'])}, KV {memory['kv_bytes_per_token']:,} B per token"
    text += f" = {size(memory['kv_bytes'])} at {memory['context_tokens']:,} tokens"
    if memory["state_bytes_per_sequence"]:
        text += f", state {size(memory['state_bytes_per_sequence'])} per sequence"
    return Text(text)


def history(runs: Sequence[Mapping[str, Any]]) -> Table:
    """One row a run, newest first. On a narrow terminal what it was is cut, never what one types: the run's id."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("run", "started", "took", "what", "status", "verdict"):
        table.add_column(column, no_wrap=column != "what")
    for run in runs:
        took = "" if run["took_s"] is None else f"{run['took_s'] / 60:.1f} min"
        verdict = verdict_text(run["verdict"]) if run["verdict"] else Text("-")
        started = run["started_at"][5:16].replace("T", " ")  # the id has the year
        what = Text(f"{run['kind']} {run['plan']}", no_wrap=True, overflow="ellipsis")
        table.add_row(run["run_id"], started, took, what, run["status"], verdict)
    return table


def size(n_bytes: float | None) -> str:
    """Bytes for people: `47.6 MiB`, `3.00 GiB`, `not measured`."""
    if n_bytes is None:
        return "not measured"
    return f"{n_bytes / 2**20:.1f} MiB" if n_bytes < 2**30 else f"{n_bytes / 2**30:.2f} GiB"
