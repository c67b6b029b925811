"""The `switchyard` command as a child process."""

import json
import subprocess
import sys
from typing import Any


def command(*arguments: object) -> list[str]:
    """The argv of `switchyard ARG ...` in this Python environment."""
    return [sys.executable, "-m", "flows.cli", *map(str, arguments)]


def json_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON that a command printed on standard output."""
    assert done.stdout, done.stderr
    return json.loads(done.stdout)
