"""Opening an evaluation: its plan checked, its engines found, the measuring client tested, its run recorded."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import SecretStr

from engines.client.self_test import self_test
from engines.driver import Installation
from engines.errors import BadInput
from engines.home import home as default_home
from engines.model.header import read_header
from engines.process.process import end_orphans
from engines.registry import driver
from engines.settings import NO_FILE
from engines.yard.state import StateFile
from flows.evaluation.judge import required_behaviours
from flows.evaluation.trial import ARMS, QUICK, SELF_TEST_ITL_MS, Bench
from flows.experiment_lock import alone
from flows.orchestrator.run import run_journal
from flows.progress import progress
from migrations.carried import named, no_chat, unsupported
from migrations.plan import Plan
from migrations.plan_file import recorded_plan
from tasks.evidence import compatibility
from tasks.evidence.engine_under_test import Arm
from tasks.evidence.prompts import load_transcripts
from tasks.records.journal import RunJournal
from tasks.records.payload import redact
from tasks.records.store import open_records


@contextlib.contextmanager
def opened(
    plan: Plan,
    resume: str | None,
    *,
    allow_retired: bool = False,
    quick: bool = False,
    command: Sequence[str] = (),
) -> Iterator[tuple[Bench, RunJournal]]:
    """The bench and the journal of its run, which is new, or the one to `resume`; `command` is what repeats it.

    A `quick` run has a kind of its own: it is no evaluation that a gate could rest on.
    """
    home = default_home()
    end_orphans(home)
    if not allow_retired:
        refuse_retired(plan, home)
    installations = checked(plan)
    with alone(home, "an evaluation"), open_records() as records:
        asked, earlier = plan.model_dump(mode="json"), records.find_run(resume) if resume else None
        # read as they were stored: a plan stored by an older version has fewer keys
        if earlier is not None and recorded_plan(earlier.plan) != recorded_plan(redact(asked)):
            why = "was made with another plan; start a new run, or resume it without naming a plan"
            raise BadInput(f"run {earlier.id} {why}")
        with run_journal(records, QUICK if quick else "evaluate", asked, unfinished=earlier, command=command) as run:
            run.begin()
            with progress.get().step("self-test of the measuring client"):  # in a resumed run as well
                budget = dict(self_test(itl_ms=SELF_TEST_ITL_MS))
            records.put_evidence(run.id, "-", "-", "self_test", budget)
            bench = Bench(
                plan=plan,
                records=records,
                run_id=run.id,
                home=home,
                installations=installations,
                error_budget=budget,
                # checked by the engines where the plan's clients send a key; theirs is for the yard, not for engines
                api_key=SecretStr(secrets.token_hex(16)) if plan.api_key_env else None,
                quick=quick,
            )
            yield bench, run


def refuse_retired(plan: Plan, home: Path) -> None:
    """BadInput for an engine of the plan that was retired here: nothing starts it unasked."""
    state = StateFile(home / "yard").read()
    for arm in ARMS:
        if (gone := state.retired.get(getattr(plan, arm).name)) is not None:
            raise BadInput(f"{gone.line(getattr(plan, arm).name)}; or measure it all the same with --allow-retired")


def checked(plan: Plan) -> dict[Arm, Installation]:
    """Both engines as found here. All that can be known to be wrong before anything starts is said now.

    Raises BadInput where no model file can be read (a single one fails its own model), for a behaviour that does not
    exist or a key that is not set; EngineNotFound for an engine that is not here.
    """
    if len(unread := unreadable(plan)) == len(plan.models):
        raise BadInput(next(iter(unread.values())))
    for model in plan.models:
        if model.transcripts is not None:
            load_transcripts(model.transcripts)
    compatibility.known(list(required_behaviours(plan)), "client.requires in the plan")
    plan.api_key(os.environ)
    choices = {arm: getattr(plan, arm) for arm in ARMS}
    found = {arm: choice.find() for arm, choice in choices.items()}
    for arm, one in found.items():
        for own in (choices[arm].own, *(plan.own_args(model.id, one.engine) for model in plan.models)):
            lacks = driver(one.kind).own_args.unknown_to(own, one.flags, one.gone) if one.flags else []
            if lacks:
                fix = f"change the plan's args, or name a build that has {'it' if len(lacks) == 1 else 'them'}"
                build = f"{one.engine} {one.version} ({one.where})"
                raise BadInput(f"{arm}.args: {build} does not take them all: {'; '.join(lacks)}; {fix}")
    return found


def unreadable(plan: Plan) -> dict[str, str]:
    """The models that cannot be measured, each with the reason: no chat model, or a file that cannot be read."""
    found: dict[str, str] = {}
    for model in plan.models:
        try:
            if model.gguf != NO_FILE:
                read_header(model.gguf)
        except BadInput as error:
            found[model.id] = str(error)
        if other := no_chat(plan, model.id):
            found[model.id] = other
    return found


def introduction(plan: Plan, installations: Mapping[Arm, Installation]) -> list[str]:
    """The engines, the models and what the candidate does not support: printed before anything is launched."""
    lines = [
        f"{arm}: {found.engine} {found.version} ({found.form}: {found.where})" for arm, found in installations.items()
    ]
    lines.append(f"models: {', '.join(model.id for model in plan.models)}")
    lines += [f"{name} cannot be measured: {why}" for name, why in unreadable(plan).items()]
    candidate = installations["candidate"]
    for model in plan.models:
        for one in unsupported(plan, model.id, candidate):
            if named(one) not in plan.accepted_unsupported:
                lines.append(f"not supported by the candidate: {one}")
    return list(dict.fromkeys(lines))
