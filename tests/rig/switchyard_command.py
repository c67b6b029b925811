"""The `switchyard` command as a child process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from processes import HOME


def command(*arguments: object) -> list[str]:
    """The argv of `switchyard ARG ...` in this Python environment."""
    return [sys.executable, "-m", "flows.cli", *map(str, arguments)]


def environment_of(home: Path) -> dict[str, str]:
    """The environment of a user who has set nothing but SWITCHYARD_HOME."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "SWITCHYARD_"))}
    return {**kept, "SWITCHYARD_HOME": str(home), HOME: str(home), "COLUMNS": "200"}


def json_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON that a command printed on standard output."""
    assert done.stdout, done.stderr
    return json.loads(done.stdout)
