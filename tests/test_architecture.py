"""Imports point right: flows -> migrations -> tasks -> engines."""

import subprocess
import sys
from pathlib import Path


def test_imports_point_right():
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        cwd=root,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "imports point right KEPT" in done.stdout
