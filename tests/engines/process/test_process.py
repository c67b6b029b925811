"""Process lifetime: every process dies with its owner, is found again, and nothing else is ever signalled."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict

from processes import runs
from waiting import until

from engines.process import guard, process
from engines.process.process import Identity, end_orphans


def start_python(code, tmp_path, name="sleeper"):
    argv = [sys.executable, "-u", "-c", textwrap.dedent(code)]
    return process.start(name, argv, state_dir=tmp_path, log_path=tmp_path / "log" / f"{name}.log")


def registered(tmp_path):
    return list((tmp_path / "processes").glob("*.json"))


def test_stop_ends_the_process_and_its_descendants_and_is_safe_twice(tmp_path):
    child = start_python(
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        "print('ready'); time.sleep(600)",
        tmp_path,
    )
    until(lambda: "ready" in child.log_tail(), "the child to start its own child")
    until(lambda: len(child.tree()) == 2, "two processes in the tree")
    tree = child.tree()
    child.stop()
    child.stop()
    assert not any(map(runs, tree))
    assert registered(tmp_path) == []


NOBODY_REAPS = """
    import ctypes, subprocess, sys
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans are its children, and it waits for none
    subprocess.run([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], check=True)
"""
STOPS = """
    import pathlib, sys, time
    from engines.process import process
    process.KILLED_S = 600
    home = pathlib.Path(sys.argv[1])
    argv = ["/bin/sh", "-c", "sleep 600 & sleep 600"]
    child = process.start("sleeper", argv, state_dir=home, log_path=home / "log")
    while len(child.tree()) < 3:
        time.sleep(0.01)
    child.stop()
"""


def test_a_descendant_that_nobody_reaps_has_ended(tmp_path):
    """As in a container without an init: a zombie stays for ever, and no stop waits for it."""
    argv = [sys.executable, "-c", textwrap.dedent(NOBODY_REAPS), textwrap.dedent(STOPS), str(tmp_path)]
    with subprocess.Popen(argv) as stopped:
        try:
            until(lambda: stopped.poll() is not None, "the end of stop", 30)
        finally:
            stopped.kill()
    assert stopped.returncode == 0
    assert registered(tmp_path) == []


def test_a_process_that_ignores_sigterm_is_killed(tmp_path):
    child = start_python(
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf'); time.sleep(600)", tmp_path
    )
    until(lambda: "deaf" in child.log_tail(), "the child to ignore SIGTERM")
    assert child.stop(grace_s=0.4) == -signal.SIGKILL


def test_a_stopped_process_is_ended_too(tmp_path):
    child = start_python("import time; print('up'); time.sleep(600)", tmp_path)
    until(lambda: "up" in child.log_tail(), "the child to run")
    child.send_signal(signal.SIGSTOP)
    assert child.stop() in (-signal.SIGTERM, -signal.SIGKILL)


def test_a_chatty_process_neither_blocks_nor_fills_the_disk(tmp_path):
    log_path = tmp_path / "log" / "chatty.log"
    code = "import sys\nfor i in range(60000): print('x' * 200)\nprint('done')"
    child = process.start("chatty", [sys.executable, "-c", code], state_dir=tmp_path, log_path=log_path)
    until(lambda: child.poll() is not None, "the chatty process to finish")
    assert child.log_tail()[-1] == "done"
    child.stop()
    on_disk = sum(path.stat().st_size for path in log_path.parent.iterdir())
    assert child.log.bytes_seen > 12_000_000
    assert on_disk <= 2 * process.LOG_BYTES


def test_a_program_that_does_not_exist_ends_with_a_reason(tmp_path):
    child = process.start("ghost", ["/no/such/program"], state_dir=tmp_path, log_path=tmp_path / "ghost.log")
    until(lambda: child.poll() is not None, "the launcher to give up")
    assert "cannot run /no/such/program" in child.log_tail()[-1]
    assert child.stop() == 127


OWNER = """
    import sys, time
    from pathlib import Path
    from engines.process import process
    engine = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    child = process.start("engine", [sys.executable, "-c", engine + "; time.sleep(600)"],
                          state_dir=Path(sys.argv[1]), log_path=Path(sys.argv[1]) / "e.log")
    while len(child.tree()) < 2:
        time.sleep(0.01)
    print(*(one.pid for one in child.tree()), flush=True)
    time.sleep(600)
"""


def test_an_engine_and_its_children_die_when_its_owner_is_killed(tmp_path):
    """SIGKILL leaves no chance to clean up: the kernel and the guard do it, and the register knows."""
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(OWNER), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    tree = [Identity.of(int(pid)) for pid in owner.stdout.readline().split()]
    owner.kill()
    owner.wait()
    if sys.platform == "linux":
        until(lambda: not any(one.process() for one in tree), "the engine and its child to die with its owner")
    end_orphans(tmp_path)
    until(lambda: not any(one.process() for one in tree), "the orphans to be ended")
    assert registered(tmp_path) == []


def test_a_session_of_others_is_left_alone_by_the_guard(tmp_path):
    """Its number was an engine's; the process that leads it began at another time."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True) as other:
        assert guard.members(other.pid) == [other.pid]
        guard.end({other.pid: "1"})
        assert other.poll() is None
        guard.end({other.pid: guard.began(other.pid)})
        assert other.wait(10) == -signal.SIGKILL


def orphan_of_a_dead_owner(tmp_path, **changes):
    """A process and a register entry that says its owner is dead; `changes` overwrite the entry's process."""
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    owner = subprocess.Popen([sys.executable, "-c", "pass"])
    dead_owner = Identity(owner.pid, time.time())
    owner.wait()
    entry = {
        "name": "engine",
        "boot_id": process.boot_id(),
        "process": asdict(Identity.of(sleeper.pid)) | changes,
        "owner": asdict(dead_owner),
    }
    folder = tmp_path / "processes"
    folder.mkdir()
    (folder / "1.json").write_text(json.dumps(entry))
    return sleeper


def test_an_orphan_of_a_crashed_run_is_found_and_ended(tmp_path):
    sleeper = orphan_of_a_dead_owner(tmp_path)
    assert end_orphans(tmp_path) == [f"engine (pid {sleeper.pid})"]
    assert sleeper.wait(10) == -signal.SIGTERM
    assert registered(tmp_path) == []


def test_a_reused_pid_is_never_signalled(tmp_path):
    """Same pid, other start time: it is somebody else's process now."""
    sleeper = orphan_of_a_dead_owner(tmp_path, create_time=time.time() - 5000)
    assert end_orphans(tmp_path) == []
    assert sleeper.poll() is None
    sleeper.kill()
    sleeper.wait()


def test_the_child_of_a_living_owner_is_left_alone(tmp_path):
    child = start_python("import time; time.sleep(600)", tmp_path)
    assert end_orphans(tmp_path) == []
    assert child.poll() is None
    child.stop()


def test_a_garbage_register_entry_is_dropped(tmp_path):
    folder = tmp_path / "processes"
    folder.mkdir()
    (folder / "x.json").write_text('{"process": {"pid": "one"}}')
    assert end_orphans(tmp_path) == []
    assert registered(tmp_path) == []


def test_the_child_has_its_own_session(tmp_path):
    child = start_python("import time; time.sleep(600)", tmp_path)
    assert os.getsid(child.pid) == child.pid
    child.stop()
