"""A yard in a process of its own over two fake engines, `old` (the incumbent) and `new` (the candidate).

python tests/fake_yard.py --home H --port 8099 --old="--load-s 0.3" --new="--exit-code 1"
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from fake_driver import FakeDriver
from pydantic import SecretStr

from engines.errors import SwitchyardError
from engines.settings import Settings
from engines.yard.recipe import Recipe
from engines.yard.serve import run
from engines.yard.settings import YardSettings
from engines.yard.yard import ModelConfig, YardConfig
from flows.serve import log_to_terminal


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--old", default="")
    parser.add_argument("--new", default="")
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--models", default="m")
    parser.add_argument("--missing", default=None, help="an engine that is not on this machine")
    parser.add_argument("--settings", type=json.loads, default={}, help="YardSettings as JSON, or @file")
    parser.add_argument("--api-key", default=None)
    options = parser.parse_args()
    drivers = {name: FakeDriver(*shlex.split(getattr(options, name))) for name in ("old", "new")}
    for name, driver in drivers.items():
        driver.name = name

    def config() -> YardConfig:
        found = {name: driver.find() for name, driver in drivers.items() if name != options.missing}
        models = tuple(
            ModelConfig(
                id=model,
                incumbent="old",
                candidate="new",
                aliases=(f"{model}-alias",),
                missing={options.missing: f"{options.missing} was not found"} if options.missing else {},
                recipes={
                    name: Recipe.of(
                        installation, model, options.gguf, Settings(parallel=options.parallel, context_tokens=4096)
                    ).model_copy(update={"engine": name})
                    for name, installation in found.items()
                },
            )
            for model in options.models.split(",")
        )
        settings = YardSettings(port=options.port, **options.settings)
        return YardConfig(settings=settings, models=models, api_key=options.api_key and SecretStr(options.api_key))

    log_to_terminal()
    try:
        run(config, home=options.home, drivers=drivers)
    except SwitchyardError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
