"""Processes that a test's program started, found by what they carry in their environment."""

import psutil

HOME = "TEST_HOME"  # what is Switchyard's own does not reach engines


def of_home(home, variable=HOME):
    """Those alive that carry `home`: whatever a program started there and did not end."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(variable) == str(home) and runs(process):
                found.append(process)
        except psutil.Error:
            continue
    return found


def runs(process):
    """True until it, or the one of this number, has ended.

    A zombie has: it waits for its parent, which may be an init that never looks.
    """
    try:
        process = psutil.Process(process) if isinstance(process, int) else process
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
