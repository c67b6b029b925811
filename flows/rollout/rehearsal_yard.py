"""A yard for the rehearsal of the fallback: `python -m flows.rollout.rehearsal_yard PLAN_JSON HOME [HIDDEN_ENGINE]`.

It is a yard like any other, over one model. An engine that is to be hidden was chosen for the model and is missing, as
it would be after its removal from this machine.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from engines.errors import SwitchyardError
from engines.yard.config import YardConfig
from engines.yard.serve import log_to_terminal, run
from flows.rollout.yard_config import yard_config
from migrations.plan import Plan


def without(config: YardConfig, engine: str) -> YardConfig:
    """`config` as it is on a machine that lacks `engine`, which was chosen for every model."""
    models = tuple(
        dataclasses.replace(
            model,
            engine=engine,
            specs={name: spec for name, spec in model.specs.items() if name != engine},
            missing={**model.missing, engine: f"{engine} is hidden for the rehearsal"},
        )
        for model in config.models
    )
    return dataclasses.replace(config, models=models)


def main() -> None:
    """Serve until a signal stops it."""
    plan = Plan.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    hidden = sys.argv[3] if len(sys.argv) > 3 else None

    def read_config() -> YardConfig:
        config = yard_config(plan)
        return without(config, hidden) if hidden else config

    log_to_terminal()
    try:
        run(read_config, home=Path(sys.argv[2]))
    except SwitchyardError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
