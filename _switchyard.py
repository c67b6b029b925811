"""The start of the `switchyard` command: takes the caller's folder off the import path before anything is imported.

`python -m` puts the working directory in front, and so does a relative or empty entry of PYTHONPATH: what is called
`json.py` or `flows/` there would run in place of ours. Only modules that Python itself has loaded are used here, and
this file has a name that nobody else's project has.
"""

import os
import sys

ROOT = os.path.dirname(os.path.abspath(__file__))


def without_callers_folder(path: list[str]) -> list[str]:
    """The entries of `path` that were not put there by way of the working directory; our own folder stays."""
    named = os.environ.get("PYTHONPATH", "")
    entries = named.split(os.pathsep) if named else []
    theirs = {os.path.abspath(entry) for entry in entries if not os.path.isabs(entry)}
    theirs -= {ROOT, *filter(os.path.isabs, entries)}
    here = os.path.abspath(os.curdir)
    from_here = not sys.flags.safe_path and here != ROOT and path[:1] in ([""], [here])
    return [entry for entry in path[from_here:] if os.path.abspath(entry) not in theirs]


try:  # noqa: SIM105  contextlib may be theirs
    sys.path[:] = without_callers_folder(sys.path)
except FileNotFoundError:
    pass  # the working directory was removed: nothing is imported from it


def main() -> None:
    """Run the command."""
    from flows.cli.app import main as command  # not before the path is clean

    command()
