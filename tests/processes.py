"""Processes that a test's program started, found by what they carry in their environment."""

import psutil


def of_home(home, variable="SWITCHYARD_HOME"):
    """Those alive that carry `home`: whatever a program started there and did not end."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(variable) == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found
