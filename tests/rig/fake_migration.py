"""A migration over fake engines in a process of its own, and the yards that it starts; `spec.json` says which.

python tests/rig/fake_migration.py migrate|native SPEC [ORDERS_JSON]     prints the outcome; all engines are fakes
python tests/rig/fake_migration.py yard SPEC HOME PORT [HIDDEN]
"""

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # a child of Switchyard: its script's folder is not on the path

from fake_driver import FakeDriver

from engines.driver import native_of
from engines.errors import BadInput, SwitchyardError
from engines.settings import Settings
from engines.yard.config import ModelConfig, YardConfig
from engines.yard.engine.launch_spec import LaunchSpec
from engines.yard.serve import log_to_terminal, run
from engines.yard.settings import YardSettings
from flows.rollout.rehearsal_yard import without
from flows.rollout.yards import QUICK, Yards
from migrations.plan import Plan
from migrations.plan_file import build_plan
from tasks.verdicts.verdict import CheckResult, Verdict, at_most

OLD, NEW = "llama.cpp", "mistral.rs"
NATIVE = native_of(NEW)
EXIT = {"PASS": 0, "FAIL": 3, "INCONCLUSIVE": 4, "ERROR": 5}


class Spec:
    """The file: home, port, gguf, habits of both engines, parts of the plan."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.told: dict[str, Any] = json.loads(path.read_text())
        self.home = Path(self.told["home"])

    @property
    def plan(self) -> Plan:
        models = [{"id": "m", "gguf": self.told["gguf"]}]
        engines = {"incumbent": {"engine": OLD}, "candidate": {"engine": NEW}}
        yard = {"port": self.told["port"], "load_stall_s": 20, "memory_back_s": 2}
        return build_plan({"models": models, **engines, "yard": yard, **self.told.get("plan", {})})

    def driver(self, engine: str) -> FakeDriver:
        fake = FakeDriver(*self.told.get(engine, []))
        fake.name = engine
        return fake

    def config(self, settings: YardSettings) -> YardConfig:
        recipes = {
            engine: LaunchSpec.of(
                self.driver(engine).find(), "m", Path(self.told["gguf"]), Settings(parallel=4, context_tokens=512)
            )
            for engine in (OLD, NEW, NATIVE)
        }
        model = ModelConfig(id="m", incumbent=OLD, candidate=NEW, specs=recipes)
        return YardConfig(settings=settings, models=(model,), api_key=None)


class FakeYards(Yards):
    """The yards of a spec."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec.plan, spec.home, spec.path)
        self._spec = spec
        self.config = spec.config(self.settings)

    def differs(self) -> str | None:
        return None

    def serving(self) -> Sequence[str]:
        return [*self._yard(), str(self.home), str(self.settings.port)]

    def rehearsing(self, home: Path, model_id: str, port: int, hidden: str | None) -> Sequence[str]:
        return [*self._yard(), str(home), str(port), *([hidden] if hidden else [])]

    def _yard(self) -> list[str]:
        return [sys.executable, __file__, "yard", str(self._spec.path)]


def judge(samples: Sequence[Mapping[str, Any]], incumbent: str, candidate: str) -> list[CheckResult]:
    """No failed request on the candidate, and ten answers before a verdict."""
    ours = [sample for sample in samples if sample["engine"] == candidate]
    failed = sum(not sample["ok"] for sample in ours)
    if not failed and len(ours) < 10:
        return [CheckResult(check="canary.failed", verdict=Verdict.INCONCLUSIVE, why=f"{len(ours)} answers")]
    return [at_most("canary.failed", failed, limit=0, unit="requests")]


def migrate(spec: Spec, told: str, *, native: bool) -> None:
    # here, not above: the yards, which are many, would load Prefect for nothing
    from flows.native_phase import NATIVE as NATIVE_PHASE
    from flows.native_phase import native_plan
    from flows.rollout.orders import Orders
    from flows.rollout.steps import SUBPROCESS
    from flows.rollout.steps import migrate as moved
    from tasks.records.store import open_records

    orders = Orders.model_validate_json(told)
    with open_records(spec.home / "switchyard.db") as records:
        say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
        phase, plan = (NATIVE_PHASE, native_plan(spec.plan)) if native else (SUBPROCESS, spec.plan)
        outcome = moved(phase, plan, FakeYards(spec), records, judge, orders=orders, say=say, poll_s=0.2)
    print(json.dumps(outcome))
    sys.exit(EXIT[outcome["verdict"]])


def yard(spec: Spec, home: Path, port: int, hidden: str | None) -> None:
    quick = QUICK if home != spec.home else {}
    settings = YardSettings.model_validate({**spec.plan.yard.model_dump(), **quick, "port": port})

    def config() -> YardConfig:
        told = spec.config(settings)
        told = dataclasses.replace(told, models=told.models)
        return without(told, hidden) if hidden else told

    log_to_terminal()
    run(config, home=home, drivers={engine: spec.driver(engine) for engine in (OLD, NEW, NATIVE)})


def main() -> None:
    what, path, *rest = sys.argv[1:]
    spec = Spec(Path(path))
    try:
        if what == "yard":
            yard(spec, Path(rest[0]), int(rest[1]), rest[2] if len(rest) > 2 else None)
        else:
            migrate(spec, rest[0] if rest else "{}", native=what == "native")
    except SwitchyardError as error:
        print(f"error: {error}", file=sys.stderr)
        os._exit(2 if isinstance(error, BadInput) else 5)


if __name__ == "__main__":
    main()
