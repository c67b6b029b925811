"""Ends what a test run leaves behind, also when pytest itself is killed and no fixture can.

`python left_behind.py RUN` is started by `watch`; it ends with its standard input, which only the test run holds open.
"""

import contextlib
import os
import subprocess
import sys
import time
import uuid

import psutil
from cgroups import groups_of, thaw
from processes import of_home

RUN = "TEST_RUN"  # inherited by all that a run starts, engines included; workers of the run find it set
UNTIL_GONE_S = 10
_held = []  # the watcher's standard input: the kernel closes it, however this process ends


def watch():
    """Start the watcher of this run, where no one did."""
    if RUN not in os.environ:
        os.environ[RUN] = uuid.uuid4().hex
        argv = [sys.executable, __file__, os.environ[RUN]]
        environment = {name: value for name, value in os.environ.items() if name != RUN}
        _held.append(subprocess.Popen(argv, stdin=subprocess.PIPE, env=environment, start_new_session=True).stdin)


def main(run):
    """Kill every process of `run`, once nothing more is read; what they start meanwhile too, and what is frozen."""
    sys.stdin.read()
    give_up, groups = time.monotonic() + UNTIL_GONE_S, set()
    while (left := of_home(run, RUN)) and time.monotonic() < give_up:
        for process in left:
            try:
                print(f"left behind by the tests: {process.pid} {' '.join(process.cmdline())[:200]}", file=sys.stderr)
                process.kill()
            except psutil.NoSuchProcess:
                continue
            groups |= groups_of(process.pid)
        for group in groups:
            thaw(group)
        psutil.wait_procs(left, timeout=1)
    for group in groups:
        with contextlib.suppress(OSError):
            group.rmdir()


if __name__ == "__main__":
    main(sys.argv[1])
