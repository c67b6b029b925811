from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from engines.home import home
from engines.units import ago
from engines.yard.engine.incident import evidence, incidents
from engines.yard.ports.notes import one_line, whole
from flows.cli.options import Json
from flows.cli.output import next_command, out, print_json

SHOWN_CHARS = 4000  # of each file


def incident(
    incident_id: Annotated[str | None, typer.Argument(metavar="[ID]", help="The incident; without it, all.")] = None,
    json_: Json = False,
) -> None:
    """Show what was kept of an engine before it was killed (log, threads, stacks), or list such incidents.

    Example: `switchyard incident 20261129-101502-7f3a`
    """
    if incident_id is None:
        _list(incidents(home()), json_)
        return
    folder, files = evidence(home(), incident_id)
    if json_:
        print_json({"id": incident_id, "path": str(folder), "files": files})
        return
    out.print(f"{folder}", markup=False)
    for name, text in files.items():
        out.print(Text(f"\n{name}", style="bold"))
        out.print(whole(text, SHOWN_CHARS), markup=False)
        if len(text) > SHOWN_CHARS:
            out.print(f"... {len(text) - SHOWN_CHARS:,} more characters: {folder / name}", markup=False)


def _list(found: Sequence[Mapping[str, Any]], json_: bool) -> None:
    if json_:
        print_json({"incidents": found})
        return
    if not found:
        out.print("no engine was killed with its evidence kept")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for one in found:
        about = f"{one_line(one['model'])} {one_line(one['engine'])}"
        table.add_row(one["id"], f"{ago(one['at'])} ago", about, one_line(one["why"]))
    out.print(table, soft_wrap=False)
    out.print(next_command(f"switchyard incident {found[0]['id']}"))
