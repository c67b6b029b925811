"""Becomes another program that dies with its parent: `python -I -S launcher.py PARENT_PID PROGRAM [ARG ...]`.

Runs between fork and exec of every engine, so that no Python code of ours runs in a forked copy of a threaded process.
Keeps its process id. On Linux the kernel sends SIGKILL when the parent's spawning thread ends (prctl(2),
PR_SET_PDEATHSIG), and `guard.py` ends what the engine itself had started; elsewhere an orphan lives until the next
start finds it in the register (`engines.process.process`).
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, program = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the request above took effect
        sys.exit(1)
    try:
        os.execvp(program[0], program)
    except OSError as error:
        print(f"cannot run {program[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127)


if __name__ == "__main__":
    main()
