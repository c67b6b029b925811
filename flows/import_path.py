"""Takes the caller's folder off this process's import path; imported by the command before anything else is.

`python -m` puts the working directory in front, and so does a relative or empty entry of PYTHONPATH: what is called
`json.py` or `tasks/` there would be run in place of ours. Only what Python itself has loaded is used here.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _from_elsewhere() -> list[str]:
    here = os.path.abspath(os.curdir)
    named = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if not os.path.isabs(entry)]
    foreign = {os.path.abspath(entry) for entry in named} if os.environ.get("PYTHONPATH") else set()
    absolute = {entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(entry)}
    first = 0 if sys.flags.safe_path or sys.path[:1] not in ([""], [here]) else 1
    return [entry for entry in sys.path[first:] if os.path.abspath(entry) not in foreign - absolute - {ROOT}]


try:
    kept = _from_elsewhere()
except FileNotFoundError:  # the working directory was removed: nothing can be imported from it
    kept = list(sys.path)
sys.path[:] = kept if ROOT in kept or ROOT not in sys.path else [ROOT, *kept]
