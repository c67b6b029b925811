"""The lifetime of every process we start: own session, dies with us, known by pid and start time, stopped for sure.

    start -> (running) -> stop          stop: TERM, a second TERM, KILL, a bounded wait; safe twice

SIGKILL does not end a process that waits in the kernel (a driver, a file server that is gone). Such a process is given
up: its register entry stays, and is removed when the kernel lets the process go.

Each process is written to a register (one small file) before anything waits for it. A later run reads the register and
ends what a killed run left behind (`end_orphans`). Nothing is ever signalled whose pid *and* start time do not match.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from engines import environment
from engines.redaction import redacted_text
from engines.whole_file import write_whole

LAUNCHER = Path(__file__).with_name("launcher.py")
GUARD = Path(__file__).with_name("guard.py")
LOG_BYTES = 4 * 1024 * 1024
TAIL_LINES = 40
KEPT_LOGS = 5  # of earlier processes
BUFFERS = "model buffer size"  # in lines that are kept beside the last ones: see `device`
KEPT_LINES = 64
KILLED_S, POLL_S = 5.0, 0.01
LEAVING = threading.Event()  # this process is about to end, and its engines before it: their end says nothing of them
GIVEN_UP = "given_up"  # in a register entry: SIGKILL did not end it
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True)
class Identity:
    """A process that cannot be mistaken for a later one with the same pid: pid and start time (s since the epoch)."""

    pid: int
    create_time: float

    @classmethod
    def of(cls, pid: int) -> Identity:
        """The identity of a running process; raises psutil.NoSuchProcess."""
        return cls(pid, psutil.Process(pid).create_time())

    def process(self) -> psutil.Process | None:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pid)
            if self.fits(process) and _runs(process):
                return process
        return None

    def fits(self, process: psutil.Process) -> bool:
        """True when `process` is this one, and not a later one with its pid. Raises psutil.NoSuchProcess."""
        # psutil derives the start time from clock ticks and boot time; the boot time may be re-read a tick apart
        return abs(float(process.create_time()) - self.create_time) < 0.05


class RotatingLog:
    """A bounded log: `path` and its predecessor `path.1`, at most `max_bytes` each; the last lines in memory.

    How earlier processes under the same path ended stays in `path.ended-1` (the last one) to `path.ended-5`.
    """

    def __init__(self, path: Path, max_bytes: int = LOG_BYTES) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.max_bytes = max_bytes
        self.bytes_seen = 0
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.buffer_lines: deque[str] = deque(maxlen=KEPT_LINES)
        with contextlib.suppress(OSError):
            if path.exists() and path.stat().st_size > 0:  # the end of an earlier log shows why its process ended
                for number in range(KEPT_LOGS, 1, -1):
                    with contextlib.suppress(FileNotFoundError):
                        os.replace(self._named(f"ended-{number - 1}"), self._named(f"ended-{number}"))
                os.replace(path, self._named("ended-1"))
                self._named("1").unlink(missing_ok=True)
        self._file = path.open("wb")

    def write(self, line: bytes) -> None:
        """Append one line. A full disk loses lines, never the engine."""
        self.bytes_seen += len(line)
        text = redacted_text(ANSI.sub("", line.decode("utf-8", "replace")).rstrip())
        if text:
            self._tail.append(text)
            if BUFFERS in text:
                self.buffer_lines.append(text)
        with contextlib.suppress(OSError):
            if self._file.tell() + len(line) > self.max_bytes:
                self._file.close()
                os.replace(self.path, self._named("1"))
                self._file = self.path.open("wb")
            self._file.write(text.encode() + b"\n")
            self._file.flush()

    def tail(self) -> tuple[str, ...]:
        return tuple(self._tail)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()

    def _named(self, suffix: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{suffix}")


class ManagedProcess:
    """One started program. Made by `start`; ended by `stop`."""

    def __init__(self, name: str, argv: Sequence[str], popen: subprocess.Popen[bytes], log: RotatingLog, entry: Path):
        self.name = name
        self.argv = list(argv)
        self.log = log
        self.ended_because = ""  # set by whoever supervises it, once it has ended or is being ended
        self.given_up = False  # SIGKILL has not ended it, or a child of it, yet
        self._popen = popen
        self._entry = entry
        self._known: dict[int, psutil.Process] = {}
        self._pump = threading.Thread(target=self._pump_output, name=f"log of {name}", daemon=True)
        self._pump.start()
        self._stopping = threading.Lock()
        _RUNNING.add(self)

    @property
    def pid(self) -> int:
        return self._popen.pid

    def poll(self) -> int | None:
        """The exit status (negative: the signal), or None while it runs."""
        return self._popen.poll()

    def wait(self) -> int:
        """Its exit status, once it has ended by whatever cause."""
        return self._popen.wait()

    @property
    def buffer_lines(self) -> tuple[str, ...]:
        """What it has printed of its buffers of weights."""
        return tuple(self.log.buffer_lines)

    @property
    def bytes_logged(self) -> int:
        return self.log.bytes_seen

    def tree(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self.pid)
            return [root, *root.children(recursive=True)]
        except psutil.Error:
            return []

    def listens_on(self, port: int) -> bool:
        """True when this process or a descendant of it is the listener on `port`."""
        for process in self.tree():
            with contextlib.suppress(psutil.Error):
                for connection in process.net_connections("tcp"):
                    if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                        return True
        return False

    def log_tail(self) -> tuple[str, ...]:
        """The last lines of its output; after its end, all of its output."""
        if self.poll() is not None:
            self._pump.join(timeout=2)
        return self.log.tail()

    def stop(self, *, grace_s: float = 5.0) -> int | None:
        """End it and all its descendants, and return its exit status; None when SIGKILL did not end one of them.

        TERM, after half the grace a second TERM (llama-server waits for its clients after the first one), then KILL.
        Takes `grace_s` and twice `KILLED_S` at most: what is still there then is `given_up`.
        """
        with self._stopping:  # an interrupt may stop it while its own block is doing so
            if self.given_up:  # SIGKILL is pending; nothing more can be done
                return None
            _RUNNING.discard(self)
            found = self.tree()
            # When it has died by itself its children are nobody's descendants, but of its session. Not once the
            # register let go of it, nor when its pid is in use again: it may be another process.
            if self.poll() is not None and self._entry.exists() and not psutil.pid_exists(self.pid):
                found += _session_members(self.pid)
            self._known |= {process.pid: process for process in found}
            for _ in range(2):
                if self._wait(0):
                    break
                self.send_signal(signal.SIGTERM)
                self.send_signal(signal.SIGCONT)  # a stopped process would not see the TERM
                if self._wait(grace_s / 2):
                    break
            for process in self._known.values():  # psutil checks the start time before it signals
                with contextlib.suppress(psutil.Error):
                    process.kill()
            ended = self._wait(KILLED_S)
            if not ended or _running_after(KILLED_S, self._known.values()):
                self._give_up()
                return None
            self._forget()
            return self._popen.returncode

    def _give_up(self) -> None:
        """Leave it to the kernel. Its entry stays, marked: a later run neither waits for it nor forgets it."""
        self.given_up = True
        _mark_given_up(self._entry)

        def wait_for_the_kernel() -> None:
            self._popen.wait()
            while any(_runs(process) for process in self._known.values()):
                time.sleep(1)
            self._forget()
            self.given_up = False

        threading.Thread(target=wait_for_the_kernel, name=f"end of {self.name}", daemon=True).start()

    def _forget(self) -> None:
        _GUARD.tell(f"-{self.pid}")
        self._pump.join(timeout=2)
        self.log.close()
        self._entry.unlink(missing_ok=True)

    def send_signal(self, number: int) -> None:
        self._popen.send_signal(number)  # Popen does not signal a pid that it has reaped

    def _wait(self, seconds: float) -> bool:
        try:
            self._popen.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _pump_output(self) -> None:
        assert self._popen.stdout is not None
        with self._popen.stdout as output:
            # bounded reads: a server that prints without newlines must not fill our memory
            while line := output.readline(64 * 1024):
                self.log.write(line)


def stop_all() -> None:
    """Stop every process of ours that still runs: what an interrupt does when threads are waiting for engines."""
    for child in list(_RUNNING):
        child.stop()


def start(
    name: str,
    argv: Sequence[str],
    *,
    state_dir: Path,
    log_path: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> ManagedProcess:
    """A running process in its own session, registered under `state_dir`; its output goes to `log_path`.

    `env`, by default ours, as `engines.environment.of_child` has it.
    Raises OSError when the register cannot be written (the process is ended first).
    """
    log = RotatingLog(log_path)
    command = [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid()), *argv]
    popen = _SPAWNER.run(
        lambda: subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment.of_child(os.environ if env is None else env),
            cwd=cwd,
        )
    )
    _GUARD.tell(f"+{popen.pid}")
    try:
        entry = _register(state_dir, name, popen.pid)
    except BaseException:
        popen.kill()
        popen.wait()
        raise
    return ManagedProcess(name, argv, popen, log, entry)


def end_orphans(state_dir: Path) -> list[str]:
    """Ends every registered process whose owner is gone, forgets the dead; returns what was ended: `name (pid N)`.

    What SIGKILL does not end keeps its entry; it is waited for once, never again.
    """
    ended: list[str] = []
    for entry in sorted(_register_dir(state_dir).glob("*.json")):
        record = _read_entry(entry)
        if record is None:
            entry.unlink(missing_ok=True)
            continue
        if Identity(**record["owner"]).process() is not None:
            continue
        identity, who = Identity(**record["process"]), f"{record['name']} (pid {record['process']['pid']})"
        known = bool(record.get(GIVEN_UP))
        found = end_tree(identity, grace_s=0 if known else 3.0)
        if found and _members(identity):
            _mark_given_up(entry)
            if not known:
                ended.append(f"{who}: SIGKILL has not ended it, the kernel holds it")
            continue
        if found:
            ended.append(who)
        entry.unlink(missing_ok=True)
    return ended


def registered(state_dir: Path) -> list[tuple[str, psutil.Process]]:
    records = [record for entry in sorted(_register_dir(state_dir).glob("*.json")) if (record := _read_entry(entry))]
    found = [(str(record["name"]), Identity(**record["process"]).process()) for record in records]
    return [(name, process) for name, process in found if process is not None]


def end_tree(identity: Identity, *, grace_s: float = 3.0) -> bool:
    """True when the process, or what it left behind in its session, ran and was ended."""
    members = _members(identity)
    if not members:
        return False
    for process in members:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    alive = _running_after(grace_s, members)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    _running_after(grace_s, alive)
    return True


def _members(identity: Identity) -> list[psutil.Process]:
    root = identity.process()
    with contextlib.suppress(psutil.Error):
        if root is None and not identity.fits(psutil.Process(identity.pid)):
            return []  # the pid belongs to another process by now
    members = {process.pid: process for process in _session_members(identity.pid)}
    if root is not None:
        with contextlib.suppress(psutil.Error):
            members |= {process.pid: process for process in [root, *root.children(recursive=True)]}
    ours = []
    for found in members.values():
        with contextlib.suppress(psutil.Error):
            # a session with this number that began before our process did is not ours
            if _runs(found) and found.create_time() >= identity.create_time - 0.05:
                ours.append(found)
    return ours


def boot_id() -> str:
    """This boot's id: a pid and start time recorded before a reboot means nothing after it. '' where unknown."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


class _Spawner:
    """One thread that spawns all children and ends with the process.

    The kernel's parent-death signal is tied to the *thread* that forked: children spawned from a worker thread would
    die when that thread ends.
    """

    def __init__(self) -> None:
        self._jobs: queue.Queue[tuple[Callable[[], Any], Future[Any]]] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def run(self, job: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="spawner", daemon=True)
                self._thread.start()
        future: Future[subprocess.Popen[bytes]] = Future()
        self._jobs.put((job, future))
        return future.result()

    def _work(self) -> None:
        while True:
            job, future = self._jobs.get()
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)


class _Guard:
    """Our end of `guard.py`, which is started with the first engine and ends with this process."""

    def __init__(self) -> None:
        self._lock, self._writes_to, self._owner = threading.Lock(), -1, 0

    def tell(self, line: str) -> None:
        """Have it know of a session that began or ended."""
        if sys.platform != "linux":
            return
        with self._lock, contextlib.suppress(OSError):  # without it the register finds at the next start what is left
            if self._owner != os.getpid():
                self._start()
            os.write(self._writes_to, f"{line}\n".encode())

    def _start(self) -> None:
        if self._owner:  # we are a fork, and the guard of our parent must not wait for our end
            os.close(self._writes_to)
        reads, self._writes_to = os.pipe()
        with open(reads, "rb") as standard_input:
            subprocess.run(
                [sys.executable, "-I", "-S", str(GUARD)],
                stdin=standard_input,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env={name: os.environ[name] for name in environment.NEEDED & os.environ.keys()},
                check=False,
            )
        self._owner = os.getpid()


_SPAWNER = _Spawner()
_GUARD = _Guard()
_RUNNING: set[ManagedProcess] = set()


def _register_dir(state_dir: Path) -> Path:
    return state_dir / "processes"


def _register(state_dir: Path, name: str, pid: int) -> Path:
    directory = _register_dir(state_dir)
    directory.mkdir(parents=True, exist_ok=True)
    record = {
        "name": name,
        "boot_id": boot_id(),
        "process": asdict(Identity.of(pid)),
        "owner": asdict(Identity.of(os.getpid())),
        "started_at": time.time(),
    }
    entry = directory / f"{pid}-{time.time_ns()}.json"
    write_whole(entry, json.dumps(record))
    return entry


def _read_entry(entry: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(entry.read_text())
        Identity(**record["process"]), Identity(**record["owner"]), record["name"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return record if record.get("boot_id") == boot_id() else None


def _mark_given_up(entry: Path) -> None:
    """Note in a register entry that SIGKILL did not end the process. A full disk leaves the entry as it was."""
    record = _read_entry(entry)
    if record is not None:
        with contextlib.suppress(OSError):
            write_whole(entry, json.dumps({**record, GIVEN_UP: True}))


def _runs(process: psutil.Process) -> bool:
    """True while it holds memory: not ended, and no zombie (one whose threads are still there is none)."""
    with contextlib.suppress(psutil.Error, OSError):
        if not process.is_running():
            return False
        return process.status() != psutil.STATUS_ZOMBIE or len(os.listdir(f"/proc/{process.pid}/task")) > 1
    return False


def _running_after(seconds: float, processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that still run after `seconds`; returns at once when none does, reaped by its parent or not."""
    running, deadline = [process for process in processes if _runs(process)], time.monotonic() + seconds
    while running and time.monotonic() < deadline:
        time.sleep(POLL_S)
        running = [process for process in running if _runs(process)]
    return running


def _session_members(session: int) -> list[psutil.Process]:
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == session:
                members.append(process)
    return members
