"""A yard over one engine and one model.

`python -m engines.yard.single LAUNCH_SPEC_JSON HOME PORT [RESTARTS [LOAD_STALL_S]]`. Engines are measured behind it, as
users will reach them: a native one has no port of its own.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from engines.errors import SwitchyardError
from engines.redaction import RedactingFormatter
from engines.yard.config import ModelConfig, YardConfig
from engines.yard.engine.launch_spec import LaunchSpec
from engines.yard.serve import run
from engines.yard.settings import YardSettings

STOP_S = 2.0


def main() -> None:
    spec, port = LaunchSpec.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8")), int(sys.argv[3])
    restarts = int(sys.argv[4]) if len(sys.argv) > 4 else 0  # without any its end leads to refusals
    stall_s = {"load_stall_s": float(sys.argv[5])} if len(sys.argv) > 5 else {}
    model = ModelConfig(id=spec.model_id, incumbent=spec.engine, candidate=spec.engine, specs={spec.engine: spec})
    settings = YardSettings(
        port=port,
        restarts=restarts,
        restart_window_s=0.001,
        try_again_s=86_400,
        stop_s=STOP_S,
        unknown_model="refuse",
        **stall_s,
    )
    logging.basicConfig(level=logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(RedactingFormatter("%(message)s"))
    try:
        run(lambda: YardConfig(settings=settings, models=(model,)), home=Path(sys.argv[2]))
    except SwitchyardError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
