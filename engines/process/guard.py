"""Ends what a killed process of ours leaves behind: `python -I -S guard.py`, one beside each that starts engines.

The kernel's parent-death signal (`launcher.py`) ends the engine that was started, and nothing that the engine started:
the workers of vLLM, the `llama-server` under Ollama. Its standard input closes with its owner, however that ended; then
it kills every process in the sessions of the engines that it was told of. Linux only: it reads /proc.
"""

import os
import signal
import sys
import time

ENDS_S = 5.0
LOOK_S = 0.02


def stat_of(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty where there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].decode().split()
    except OSError:
        return []


def began(pid: int) -> str:
    """When it began, in clock ticks after the boot; '' where it is gone."""
    fields = stat_of(pid)
    return fields[19] if fields else ""


def members(session: int) -> list[int]:
    """Processes of a session that have not ended."""
    found = ((int(name), stat_of(int(name))) for name in os.listdir("/proc") if name.isdigit())
    return [pid for pid, fields in found if fields and fields[3] == str(session) and fields[0] not in "ZX"]


def end(sessions: dict[int, str]) -> None:
    """Kill all members of the sessions; a number that has another leader by now is left alone."""
    ours = [pid for pid, start in sessions.items() if began(pid) in ("", start)]
    give_up = time.monotonic() + ENDS_S
    while left := [member for session in ours for member in members(session)]:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        if time.monotonic() > give_up:
            return
        time.sleep(LOOK_S)


def main() -> None:
    """Read `+PID` of what was started and `-PID` of what has ended, one a line, until the owner is gone."""
    if os.fork():
        return  # it is no child of its owner, which neither waits for it nor counts its memory
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with its owner
    sessions: dict[int, str] = {}
    for line in sys.stdin:
        pid = int(line[1:])
        if line[0] == "+":
            sessions[pid] = began(pid)
        else:
            sessions.pop(pid, None)
    end(sessions)


if __name__ == "__main__":
    main()
