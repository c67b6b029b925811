"""The proofs that take too long for every run: `make proofs`, or `python tests/proofs.py NAME ...` for some of them.

Each is a test of the suite at its full count. One line each at the end, and exit code 1 when one failed.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SERVE = "tests/flows/cli/test_serve.py"
RECOVERY = "tests/engines/yard/engine/test_recovery.py"
# name -> variable, value, file, and what `pytest -k` takes
PROOFS = {
    "streams": ("STREAMS", "64", SERVE, "every_move_under_load"),
    "prompt": ("PROMPT_WORDS", "1500", SERVE, "minute_of_prompt"),
    "stalled-client": ("STALL_S", "150", SERVE, "reads_nothing"),
    "kills": ("KILLS", "100", RECOVERY, "killed_during_any_step"),
    "loads": ("LOADS", "25", SERVE, "take_turns_in_the_room"),
    "moves": ("CYCLES", "200", SERVE, "cycles_of_promote"),
    "requests": ("REQUESTS", "500", SERVE, "many_requests_natively"),
    "phases": ("EVERY_PHASE", "1", "tests/flows/test_kills.py", ""),
}


def main(names: list[str]) -> int:
    """Run them one after the other."""
    if unknown := set(names) - PROOFS.keys():
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PROOFS)}")
    lines, failed = [], False
    for name in names or PROOFS:
        variable, value, file, wanted = PROOFS[name]
        print(f"== {name}: SWITCHYARD_TEST_{variable}={value} pytest {file} -k '{wanted}'", flush=True)
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", file, *(["-k", wanted] if wanted else [])],
            cwd=ROOT,
            env={**os.environ, f"SWITCHYARD_TEST_{variable}": value},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        print(done.stdout, flush=True)
        counted = re.findall(r"\d+ passed", done.stdout)
        good = done.returncode == 0 and bool(counted)  # none selected is no proof
        failed |= not good
        took = time.monotonic() - began
        lines.append(f"{name:15} {'passed' if good else 'FAILED'}  {variable}={value:5} {took / 60:5.1f} min")
    print("\n".join(lines))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
