"""Yards as processes: the one that serves the user, which outlives us, and the rehearsal's, which does not."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from engines.environment import of_child
from engines.notify import NotifySettings
from engines.process import process
from engines.process.serving import free_port
from engines.yard.client import YardClient, wait_until_serving
from engines.yard.config import ModelConfig, YardConfig
from engines.yard.settings import YardSettings
from flows.rollout.yard_config import yard_config
from migrations.plan import Plan, content_hash
from migrations.plan_file import load_plan, plan_path, remember_plan
from tasks.evidence.rehearsal import Stage

STOP_S = 30.0
QUICK: dict[str, Any] = {
    "host": "127.0.0.1",
    "restarts": 1,
    "restart_window_s": 86_400,
    "stop_s": 2,
    "default_model": None,
    "shadow_share": 0,
    "shadow_pairs": None,
    "capture": None,
}
Say = Callable[[str], None]


class Yards:
    """The yards of a plan: `switchyard serve` on the plan's file, and flows.rollout.rehearsal_yard."""

    def __init__(self, plan: Plan, home: Path, path: Path) -> None:
        self.plan, self.home, self._path = plan, home, path
        self.settings = plan.yard
        self.key = plan.api_key(os.environ)

    @cached_property
    def config(self) -> YardConfig:
        """The plan's models with their engines as found on this machine."""
        return yard_config(self.plan)

    def model(self, model_id: str) -> ModelConfig:
        """A model with the launch specs of its engines, and why an engine was not found."""
        return next(model for model in self.config.models if model.id == model_id)

    def differs(self) -> str | None:
        """Why the yard that runs is not one of this plan, by content; None when it is, or when nobody can tell."""
        served = plan_path(None, self.home)
        if not served.is_file() or content_hash(load_plan(served)) == content_hash(self.plan):
            return None
        return f"the yard that runs serves another plan ({served}): stop it with `switchyard stop` and migrate again"

    def serving(self) -> Sequence[str]:
        """The command of the yard that serves the user."""
        return [sys.executable, "-m", "flows.cli", "serve", str(self._path.absolute())]

    def rehearsing(self, home: Path, model_id: str, port: int, hidden: str | None) -> Sequence[str]:
        """The command of a yard of one model, quick to give up on an engine; `hidden` is one that it must not find."""
        settings = YardSettings.model_validate({**self.plan.yard.model_dump(), **QUICK, "port": port})
        model = self.plan.model(model_id).model_copy(update={"overflow": None})  # it is a fallback that is rehearsed
        part = self.plan.model_copy(update={"models": (model,), "yard": settings, "notify": NotifySettings()})
        path = home / "plan.json"
        path.write_text(part.model_dump_json(), encoding="utf-8")
        argv = [sys.executable, "-m", "flows.rollout.rehearsal_yard", str(path), str(home)]
        return [*argv, hidden] if hidden else argv


def take_over(home: Path, path: Path, say: Say) -> str:
    """Have the yard that runs serve the plan at `path` from now on, without dropping a request. Raises BadInput."""
    load_plan(path)
    done = YardClient(home).order("reload", say, plan=str(path.absolute()))
    remember_plan(path, home)
    return done


def start_detached(yards: Yards, models: Sequence[str], say: Say) -> dict[str, Any]:
    """Start a yard that serves `models` and outlives this process: its pid and its log.

    Raises BadInput or EngineError in the yard's own words when it does not come up (its port is taken, say).
    """
    log = yards.home / "logs" / "yard.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    begins = log.stat().st_size if log.exists() else 0
    with log.open("ab") as output:
        # not a child that dies with us: the user's programs talk to it
        yard = subprocess.Popen(
            list(yards.serving()),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=yards.home,
            env=_environment(yards.home),
        )

    def said() -> str:
        with log.open("rb") as file:
            file.seek(begins)
            return file.read().decode("utf-8", "replace")

    wait_until_serving(YardClient(yards.home), models, yard.poll, said, yards.settings.load_stall_s, say=say)
    return {"pid": yard.pid, "log": str(log)}


@contextlib.contextmanager
def stage(
    yards: Yards, model_id: str, hidden: str | None, *, incumbent: str, candidate: str, say: Say = lambda _: None
) -> Iterator[Stage]:
    """A yard for the rehearsal, ready; it dies with us, and its engines with it."""
    home = yards.home / "rehearsal" / ("hidden" if hidden else "killed")
    process.end_orphans(home)
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    port = free_port()
    child = process.start(
        f"rehearsal yard {model_id}",
        list(yards.rehearsing(home, model_id, port, hidden)),
        state_dir=yards.home,
        log_path=home / "yard.log",
        env=_environment(home),
        cwd=home,
    )
    try:
        client = YardClient(home)
        wait_until_serving(
            client, [model_id], child.poll, lambda: "\n".join(child.log_tail()), yards.settings.load_stall_s, say=say
        )
        yield Stage(
            client=client,
            address=f"http://127.0.0.1:{port}",
            key=yards.key,
            model_id=model_id,
            incumbent=incumbent,
            candidate=candidate,
            wait_s=yards.settings.wait_s,
        )
    finally:
        child.stop(grace_s=STOP_S)
        shutil.rmtree(home / "yard" / "slots", ignore_errors=True)


def _environment(home: Path) -> dict[str, str]:
    """Ours, without Prefect's: a yard has nothing to do with it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    # a narrow terminal must not break the yard's lines in its log
    return {**of_child(kept), "SWITCHYARD_HOME": str(home), "COLUMNS": "500"}
