"""Orders from a command to the running yard."""

import contextlib
import time
from pathlib import Path
from typing import Any

from engines.errors import SwitchyardError
from engines.home import home
from engines.process.process import Identity
from engines.yard.client import YardClient
from flows.cli.output import errors, print_done, print_step

DOWN_S = 90.0


def order(name: str, json_: bool, **body: Any) -> None:
    """Have the yard carry out `name` and print the result; options that are None are left out."""
    given = {key: value for key, value in body.items() if value is not None}
    print_done(YardClient(home()).order(name, print_step, **given), json_)


def stop_yard(folder: Path) -> None:
    """Stop the yard of this home, if one runs, and wait for its end."""
    yard = YardClient(folder)
    if not yard.runs():
        return
    errors.print("stopping the yard; requests in flight are finished first")
    pid = yard.status()["pid"]
    with contextlib.suppress(SwitchyardError):
        identity = Identity.of(pid)
        yard.order("stop")
        deadline = time.monotonic() + DOWN_S
        while identity.process() is not None and time.monotonic() < deadline:
            time.sleep(0.1)
