"""The third engine's program: tests/rig/played_engine.py with llama-server's flags."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent)]

import played_engine  # noqa: E402

played_engine.main()
