"""The `switchyard` command with a third engine: `python tests/rig/third_engine/switchyard.py ARG ...`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parents[3])]

    from third_engine.driver import ThirdEngine

    from engines import registry

    registry.DRIVERS[ThirdEngine.name] = ThirdEngine()  # the one line

    from flows.cli.app import main  # after the line, as the command would find it

    main()
