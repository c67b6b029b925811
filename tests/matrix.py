"""`make matrix`: the tests that need no real engine under other Pythons, other dependencies, and as it is installed.

`python tests/matrix.py [ROW ...]`. Each row has an environment of its own, made anew by uv outside of the clone
($XDG_CACHE_HOME/switchyard-matrix). One line each at the end, and exit code 1 when one failed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[1]
FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "switchyard-matrix"
# every layer, the yard over fake engines, Prefect with its endings, and the command over played engines
TESTS = (
    *("tests/migrations", "tests/tasks/records", "tests/tasks/report", "tests/tasks/verdicts", "tests/engines/openai"),
    *("tests/engines/yard/ports", "tests/flows/test_endings.py", "tests/flows/test_unmeasured.py"),
    "tests/flows/cli/test_app.py::test_help_teaches_every_command",
)


@dataclass(frozen=True)
class Row:
    """One environment. `needs` narrow its dependencies; `installed` from the checkout, a wheel or an sdist."""

    python: str = "3.11"
    resolution: Literal["highest", "lowest-direct"] = "highest"
    needs: tuple[str, ...] = ()
    installed: Literal["checkout", "wheel", "sdist"] = "checkout"


DEFAULT = ("-c", str(ROOT / "constraints.txt"))  # the pins of `make test`
ROWS = {
    "python-3.11": Row("3.11", needs=DEFAULT),
    "python-3.12": Row("3.12", needs=DEFAULT),
    "python-3.13": Row("3.13", needs=DEFAULT),
    "oldest": Row(resolution="lowest-direct"),
    "newest": Row(python="3.13"),
    "prefect-oldest": Row(needs=("prefect==3.8.8", "sqlalchemy<2.1")),
    "prefect-newest": Row(needs=("prefect>=3.9.1",)),
    "wheel": Row(needs=DEFAULT, installed="wheel"),
    "sdist": Row(needs=DEFAULT, installed="sdist"),
}


def main(names: list[str]) -> int:
    """Run the rows one after the other."""
    if unknown := set(names) - ROWS.keys():
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    lines, failed = [], False
    for name in names or ROWS:
        began = time.monotonic()
        print(f"== {name}", flush=True)
        try:
            said, good = tested(name, ROWS[name])
        except subprocess.CalledProcessError as error:
            said, good = f"not installed: {' '.join(map(str, error.cmd[:4]))} ... ended with {error.returncode}", False
        failed |= not good
        took = (time.monotonic() - began) / 60
        lines.append(f"{name:15} {'passed' if good else 'FAILED'}  {took:5.1f} min  {said}")
        print(lines[-1], flush=True)
    print("\n".join(lines))
    return int(failed)


def tested(name: str, row: Row) -> tuple[str, bool]:
    """Pytest's last line with the versions that count, and whether all passed. Raises CalledProcessError."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    environment, where = folder / "env", ROOT
    run("uv", "venv", "--quiet", "--python", python_of(row.python), environment)
    what = f"{ROOT}[test]"
    if row.installed == "checkout":
        what = f"-e{what}"
    else:
        where = folder / "copy"  # without the packages: they can only come from what is installed
        for part in ("tests", "docs", "examples", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            where.mkdir(exist_ok=True)
            copy(ROOT / part, where / part)
        # both, the wheel from the sdist: a wheel built in the checkout also holds what an earlier one left in build/
        run("uv", "build", "--quiet", "--out-dir", folder / "built", ROOT)
        (built,) = (folder / "built").glob({"wheel": "*.whl", "sdist": "*.tar.gz"}[row.installed])
        what = f"switchyard-llm[test] @ {built.as_uri()}"
    python = environment / "bin" / "python"
    run("uv", "pip", "install", "--quiet", "--python", python, "--resolution", row.resolution, what, *row.needs)
    argv = [python, "-m", "pytest", "-q", "-n", "2", "-m", "not engine", *TESTS]
    done = subprocess.run(argv, cwd=where, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, flush=True)
    counted = re.findall(r"^.*\d+ passed.*$", done.stdout, re.MULTILINE)
    asked = "import sys, importlib.metadata as m; print('Python %d.%d' % sys.version_info[:2], *("
    asked += "f'{name} {m.version(name)}' for name in ('prefect', 'fastapi', 'sqlalchemy', 'pydantic')), sep=', ')"
    versions = subprocess.run([python, "-c", asked], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    return f"{counted[-1].strip('= ') if counted else 'no test passed'}; {versions}", done.returncode == 0 and bool(
        counted
    )


def python_of(version: str) -> Path | str:
    """A Python of this version that pyenv has, else the version: uv knows where others are."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or "~/.pyenv").expanduser() / "versions"
    return next(iter(sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True)), version)


def run(*argv: object) -> None:
    """Run a command to its end. Raises CalledProcessError."""
    subprocess.run([sys.executable, "-m", *map(str, argv)], check=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
