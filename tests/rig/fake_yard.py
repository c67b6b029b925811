"""A yard in a process of its own over two fake engines, `old` (the incumbent) and `new` (the candidate).

python tests/rig/fake_yard.py --home H --port 8099 --old="--load-s 0.3" --new="--exit-code 1"
"""

import argparse
import copy
import json
import shlex
import sys
from pathlib import Path

from fake_driver import FakeDriver
from pydantic import SecretStr

from engines.driver import Driver, Installation, native_of
from engines.errors import EngineNotFound, SwitchyardError
from engines.notify import NotifySettings
from engines.registry import driver
from engines.settings import Settings
from engines.yard.config import ModelConfig, OverflowConfig, YardConfig
from engines.yard.engine.launch_spec import LaunchSpec
from engines.yard.serve import log_to_terminal, run
from engines.yard.settings import YardSettings
from tasks.evidence.canary import canary_judge, shadow_judge
from tasks.verdicts.limits import CanaryLimits


def not_here(*_: object) -> Installation:
    raise EngineNotFound("it is not on this machine")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--old", default="")
    parser.add_argument("--new", default="")
    parser.add_argument("--native", help="a third engine, `new` without a server")
    parser.add_argument("--old-driver", help="a real engine as `old`")
    parser.add_argument("--old-form", default="auto")
    parser.add_argument("--old-binary", type=Path)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--new-parallel", type=int, help="slots of `new`, where they are others")
    parser.add_argument("--overflow", type=Path, help="a file with how many may wait before `new` takes conversations")
    parser.add_argument("--models", default="m")
    parser.add_argument("--load", default="start", help="when models are loaded")
    parser.add_argument("--pin", default="", help="models that stay loaded, by comma")
    parser.add_argument("--missing", default=None, help="an engine that is not on this machine")
    parser.add_argument("--settings", type=json.loads, default={}, help="YardSettings as JSON, or @file")
    parser.add_argument("--notify", type=NotifySettings.model_validate_json, default=NotifySettings(), help="as JSON")
    parser.add_argument("--accepted", default="", help="what the plan accepts as missing, by comma")
    parser.add_argument("--alias", help="one more name of the model")
    parser.add_argument("--api-key", default=None)
    parser.add_argument("--canary-limits", type=json.loads, default={}, help="CanaryLimits as JSON")
    options = parser.parse_args()
    drivers: dict[str, Driver] = {name: FakeDriver(*shlex.split(getattr(options, name))) for name in ("old", "new")}
    if options.native is not None:
        drivers[native_of("new")] = FakeDriver(*shlex.split(options.native))
    if options.old_driver:
        drivers["old"] = copy.copy(driver(options.old_driver))
    how = {"old": (options.old_form, options.old_binary)} if options.old_driver else {}
    for name, engine in drivers.items():
        engine.name = name
        if name == options.missing:
            engine.find = not_here

    def slots(name: str) -> int:
        return (name == "new" and options.new_parallel) or options.parallel

    def config() -> YardConfig:
        waiting = options.overflow.read_text() if options.overflow else ""
        found = {name: engine.find(*how.get(name, ())) for name, engine in drivers.items() if name != options.missing}
        models = tuple(
            ModelConfig(
                id=model,
                incumbent="old",
                candidate="new",
                aliases=(f"{model}-alias", *filter(None, [options.alias])),
                load=options.load,
                pin=model in options.pin.split(","),
                overflow=OverflowConfig("new", int(waiting)) if waiting else None,
                missing={options.missing: f"{options.missing} was not found"} if options.missing else {},
                specs={
                    name: LaunchSpec.of(
                        installation,
                        model,
                        options.gguf,
                        Settings(parallel=slots(name), context_tokens=4096, threads=1),
                    ).model_copy(update={"engine": name, "kind": name})
                    for name, installation in found.items()
                },
            )
            for model in options.models.split(",")
        )
        settings = YardSettings(port=options.port, **options.settings)
        return YardConfig(
            settings=settings,
            models=models,
            api_key=options.api_key and SecretStr(options.api_key),
            notify=options.notify,
            accepted=frozenset(options.accepted.split(",")),
            judge_canary=canary_judge(CanaryLimits(**options.canary_limits)),
            judge_shadow=shadow_judge(),
        )

    log_to_terminal()
    try:
        run(config, home=options.home, drivers=drivers)
    except SwitchyardError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
