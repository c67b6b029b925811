"""A killed test run leaves no process behind."""

import subprocess
import sys
from pathlib import Path

import psutil
from waiting import until

RIG = Path(__file__).parent / "rig"
# a run, its worker, and what the worker started in a session of its own
SLEEP = "import time; time.sleep(600)"
WORKER = f"""
import left_behind, subprocess, sys, time
left_behind.watch()
print(subprocess.Popen([sys.executable, "-c", {SLEEP!r}], start_new_session=True).pid, flush=True)
time.sleep(600)
"""
TESTS = f"""
import left_behind, subprocess, sys
left_behind.watch()
subprocess.run([sys.executable, "-c", {WORKER!r}])
"""


def test_a_killed_run_leaves_no_process_behind(monkeypatch):
    """Neither its worker nor what that started, which has a session of its own."""
    monkeypatch.delenv("TEST_RUN", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(RIG))
    with subprocess.Popen([sys.executable, "-c", TESTS], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        started = psutil.Process(int(run.stdout.readline()))
        (worker,) = (child for child in psutil.Process(run.pid).children() if child.cmdline()[1] == "-c")
        run.kill()
        until(lambda: not started.is_running() and not worker.is_running(), "the end of what the run started")
