"""A killed test run leaves no process behind."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from cgroups import ROOT
from processes import runs
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


FREEZER = ROOT / "freezer"
# a run that holds a process in state D, as a test of an unkillable engine does
HOLDS = f"""
import left_behind, subprocess, sys, time
from cgroups import frozen
left_behind.watch()
child = subprocess.Popen([sys.executable, "-c", {SLEEP!r}], start_new_session=True)
with frozen(child.pid):
    print(child.pid, flush=True)
    time.sleep(600)
"""


def test_a_killed_run_leaves_no_process_behind_that_it_held(monkeypatch):
    """SIGKILL does not reach it before its control group is thawed, and the group goes as well."""
    if not FREEZER.is_dir():
        pytest.skip("needs root and a version 1 freezer control group")
    monkeypatch.delenv("TEST_RUN", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(RIG))
    with subprocess.Popen([sys.executable, "-c", HOLDS], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        if not (line := run.stdout.readline()):
            pytest.skip("needs root and a version 1 freezer control group")
        held = psutil.Process(int(line))
        (group,) = FREEZER.glob(f"switchyard-test-{run.pid}-*")
        run.kill()
        until(lambda: not runs(held) and not group.exists(), "the end of what the run held")


def test_a_killed_run_leaves_no_process_behind(monkeypatch):
    """Neither its worker nor what that started, which has a session of its own."""
    monkeypatch.delenv("TEST_RUN", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(RIG))
    with subprocess.Popen([sys.executable, "-c", TESTS], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        started = psutil.Process(int(run.stdout.readline()))
        (worker,) = (child for child in psutil.Process(run.pid).children() if child.cmdline()[1] == "-c")
        run.kill()
        until(lambda: not runs(started) and not runs(worker), "the end of what the run started")
