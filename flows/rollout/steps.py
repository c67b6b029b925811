"""The steps of a phase that moves traffic, in order; each is recorded before and after.

Killed at any line and started again, a migration asks the yard and the records and resumes: a step that is done is done
again only where the yard reports that its effect is gone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from engines.errors import BadInput, EngineNotFound, SwitchyardError
from engines.yard.client import public_address, wait_until_serving
from flows.evaluation.estimate import rehearsal_s, takes
from flows.experiment_lock import alone
from flows.orchestrator.run import run_journal
from flows.progress import progress
from flows.rollout.canary import canaries
from flows.rollout.model_move import POLL_S, Closed, Do, Judge, Migration, ModelMove, MovePhase, Say
from flows.rollout.orders import Orders
from flows.rollout.phase_one import phase_one
from flows.rollout.yards import Yards, start_detached
from migrations.plan import Plan
from tasks.evidence.next_turn import judge_next_turn, measure_next_turn
from tasks.evidence.rehearsal import Stage, engine_of, judge_rehearsal, measure_rehearsal, one_token
from tasks.records.journal import RunJournal
from tasks.records.store import Records
from tasks.verdicts.verdict import CheckResult, Verdict, not_measured, worst

SUBPROCESS = MovePhase(name="subprocess", kind="migrate", evaluation="phase 1", advice="run `switchyard evaluate`")


def migrate(
    phase: MovePhase,
    plan: Plan,
    yards: Yards,
    records: Records,
    judge: Judge,
    *,
    orders: Orders,
    say: Say = lambda _: None,
    do: Do = lambda _model, _step, work: work(),
    poll_s: float = POLL_S,
    next_turns: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Move the plan's models, or those of `orders`: the outcome as plain JSON.

    `next_turns` has what a move costs a conversation, by model, where that was measured for its approval.

    Raises BadInput and EngineError; whatever is raised, the yard serves.
    """
    orders.checked(plan)
    asked = plan.model_dump(mode="json")
    with alone(yards.home, "a migration"):
        unfinished = records.unfinished(asked, kind=phase.kind)
        with run_journal(records, phase.kind, asked, unfinished=unfinished, say=say) as run:
            shared = Migration(
                phase=phase,
                plan=plan,
                orders=orders,
                yards=yards,
                run=run,
                judge=judge,
                say=say,
                do=do,
                poll_s=poll_s,
                next_turns=next_turns or {},
            )
            moves = [ModelMove(shared, model) for model in orders.chosen(plan)]
            if unfinished is None and all(move.has_moved() for move in moves):
                for move in moves:
                    move.end_as_before()
                return outcome(shared, moves)
            try:
                _move_all(shared, moves)
            except BadInput:
                run.refused()
                raise
            return _concluded(run, moves, outcome(shared, moves))


def outcome(migration: Migration, moves: list[ModelMove]) -> dict[str, Any]:
    """Models with their verdicts, checks, steps and decisions."""
    models = [move.outcome() for move in moves]
    verdict = worst(Verdict(model["verdict"]) for model in models)
    return {
        "run_id": migration.run.known_id,
        "plan": migration.plan.name,
        "phase": migration.phase.name,
        "verdict": verdict.value,
        "models": models,
        "yard_started": migration.yard_started,
    }


def _concluded(run: RunJournal, moves: list[ModelMove], ended: dict[str, Any]) -> dict[str, Any]:
    """The outcome, with the run recorded by its verdict; what is not settled yet is resumed by the next start."""
    verdict = Verdict(ended["verdict"])
    if not run.has_begun:  # refused
        return ended
    for move in moves:
        run.records.drop_checks(run.id, move.id)
        run.put_checks(move.id, move.results.values())
    unsettled = verdict in (Verdict.INCONCLUSIVE, Verdict.ERROR)
    why = next((move.ended["why"] for move in moves if move.ended["verdict"] == verdict), None)
    run.finish("interrupted" if unsettled else "done", verdict=verdict, error=why if unsettled else None)
    return ended


def _move_all(migration: Migration, moves: list[ModelMove]) -> None:
    """Every model as far as it comes; none while a gate is shut."""
    waiting = [move for move in moves if not move.has_moved()]
    entries = {move: precondition(move) for move in waiting}
    closed = [move for move, entry in entries.items() if entry is None]
    if closed:
        for move in moves:
            if move not in waiting:
                move.end_as_before()
            elif move not in closed:
                move.end(Verdict.INCONCLUSIVE, "not moved", "another model's gate is shut: nothing moves")
        return
    migration.run.begin()
    for enter in filter(None, entries.values()):
        enter()
    migration.do("yard", "serves", lambda: ensure_yard(migration, moves))
    for move in moves:
        try:
            _move(move)
        except Closed as shut:
            move.end(move.verdict(), "not moved", str(shut))


def _move(move: ModelMove) -> None:
    do, phase = move.migration.do, move.migration.phase
    if (step := move.step("rollback")) and step.state == "intent":
        move.recall()
        move.roll_back("it was rolling back when it was ended")
    if move.has_moved():
        move.recall()
    else:
        do(move.id, "rehearsal", functools.partial(rehearse, move))
        move.require_open()
        if phase.drills is not None:
            do(move.id, "hang and load cycles", functools.partial(phase.drills, move))
            move.require_open()
        canaries(move)
    do(move.id, "promote", functools.partial(promote, move))


def precondition(move: ModelMove) -> Callable[[], None] | None:
    """What records that the model may move; None where it may not: then its end has why not and what to do."""
    migration, phase = move.migration, move.migration.phase
    if refusal := phase.refusal(move):
        advice = "first `switchyard migrate --phase subprocess`"
        _refuse(move, "phase_2.serves", refusal, f"{refusal}: {advice}")
        return None
    specs = migration.yards.model(move.id).specs
    spec = specs.get(move.candidate)
    if spec is None:
        move.run.begin()
        absent = migration.yards.model(move.id).missing.get(move.candidate)
        raise EngineNotFound(absent or f"{move.candidate} was not found", engine=move.candidate)
    builds = {engine: one.build for engine, one in specs.items()}
    found = phase_one(move.run.records, migration.plan, move.model, spec.version, builds)
    if found.open:
        opened = CheckResult(check=phase.gate_check, verdict=Verdict.PASS, why=found.why)
        return lambda: _enter(move, opened, phase_1_run=found.run_id)
    is_given = move.id in migration.orders.override
    if not is_given and move.decision("override", given=False) is None:
        shut = f"the gate of {phase.evaluation} is shut: {found.why}"
        advice = f"{phase.advice}, or add --override {move.id} --who NAME --reason TEXT"
        _refuse(move, phase.gate_check, shut, f"{shut}; {advice}")
        return None

    def overridden() -> None:
        decided = move.decision("override", given=is_given)
        check = not_measured(phase.gate_check, f"overridden by {decided}; {found.why}", required=False)
        _enter(move, check, override=decided, phase_1_run=found.run_id)

    return overridden


def _enter(move: ModelMove, check: CheckResult, **detail: Any) -> None:
    move.record(check)
    move.put("precondition", "done", **detail)


def _refuse(move: ModelMove, check: str, why: str, what_to_do: str) -> None:
    """A refusal is not recorded: nothing was done."""
    move.results[check] = CheckResult(check=check, verdict=Verdict.FAIL, why=why)
    move.end(Verdict.FAIL, "gate closed", what_to_do)


def ensure_yard(migration: Migration, moves: list[ModelMove]) -> None:
    """Start a yard where none runs; it serves the models when this returns."""
    names = [move.id for move in moves]
    if not migration.client.runs():
        migration.run.put_step("-", "yard", "intent")
        migration.yard_started = start_detached(migration.yards, names, migration.say)
    elif differs := migration.yards.differs():
        raise BadInput(differs)
    else:
        wait_until_serving(migration.client, names, say=migration.say)
    for move in moves:
        engine_of(move.route(), move.candidate)
    pid = migration.client.status()["pid"]
    migration.run.put_step("-", "yard", "done", pid=pid, started=migration.yard_started)


def rehearse(move: ModelMove) -> None:
    """The fallback tried on a yard of its own, unless it was with just these engines."""
    migration, limits = move.migration, move.migration.plan.limits
    versions = {engine: spec.version for engine, spec in migration.yards.model(move.id).specs.items()}
    if decided := move.decision("without-rehearsal", given=migration.orders.without_rehearsal):
        move.record(not_measured("rehearsal", f"left out by {decided}", required=False))
        move.put("rehearsal", "done", left_out=decided)
        return

    def judge(seen: dict[str, Any]) -> list[CheckResult]:
        drills = judge_rehearsal(seen, kill_detect_s=limits.kill_detect_s, recover_s=limits.recover_s)
        return drills + ([judge_next_turn(seen["next_turn"])] if "next_turn" in seen else [])

    move.drill("rehearsal", "both", lambda: _rehearsed(move), judge, versions=versions)


def _rehearsed(move: ModelMove) -> dict[str, Any]:
    yards, incumbent = move.migration.yards, move.migration.incumbent
    if incumbent not in yards.model(move.id).specs:
        absent = yards.model(move.id).missing.get(incumbent, "it was not found")
        return {"not_rehearsed": f"there is no fallback on this machine: {incumbent}: {absent}"}
    form, why = move.room()
    move.say(why)
    if form:
        progress.get().note(f"{move.id}: the rehearsal {takes(rehearsal_s(move.migration.plan, move.model))}")
    else:
        advice = "free some memory, or add --without-rehearsal --who NAME --reason TEXT"
        return {"not_rehearsed": f"{why}; {advice}"}
    attached = bool(yards.model(move.id).specs[move.candidate].url)

    seen = measure_rehearsal(
        move.stage(),
        candidate=move.candidate,
        form=form,
        is_attached=attached,
        before_kills=lambda stage: {"next_turn": _next_turn(move, stage, form)},
        say=move.say,
    )
    return {**seen, "room": why}


def _next_turn(move: ModelMove, stage: Stage, form: str) -> dict[str, Any]:
    """What the move costs a conversation: as it was measured for the approval, else measured now."""
    known = move.migration.next_turns.get(move.id)
    return known if known is not None else measure_next_turn(stage, form=form, say=move.say)


def promote(move: ModelMove) -> None:
    """All traffic on the candidate, proven by a last real token; else the incumbent is put back."""
    before, step = move.settled(), move.step("promote")
    if move.is_on_candidate(before) and (step is None or step.state == "done"):
        move.end_as_before()
        return
    if not move.is_on_candidate(before):
        move.put("promote", "intent", undo=before["committed"])
        try:
            move.client.order("promote", move.say, model=move.id, to=move.candidate)
        except SwitchyardError as error:
            move.take_canary_out()
            move.record(CheckResult(check="promote.move", verdict=Verdict.ERROR, why=str(error)))
            move.put("promote", "failed", why=str(error))
            raise Closed(str(error)) from error
    yards, address = move.migration.yards, public_address(move.client.status()["address"])
    token = one_token(address, move.id, yards.key, wait_s=yards.settings.wait_s)
    route = move.route()
    serves = token["answered"] and move.is_on_candidate(route) and route["fallback"] is None
    why = f"one real token in {token['took_s']:.2f} s" if token["answered"] else f"no token: {token['error']}"
    why += f"; {route['serving']} serves"
    move.record(CheckResult(check="promote.token", verdict=Verdict.PASS if serves else Verdict.FAIL, why=why))
    if not serves:
        move.roll_back(why)
    move.put("promote", "done", token=token, serving=route["serving"], undo=route["undo"])
    move.end(Verdict.PASS, "promoted", why)
