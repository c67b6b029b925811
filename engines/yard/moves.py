"""Moves of a model from one engine to another, and back, without a request failing.

    side by side    candidate up and ready -> commit -> requests in flight end on the old engine -> it stops
    one at a time   hold new requests -> drain -> stop -> memory seen back -> candidate up -> commit -> release

What undoes a move is on the disk before anything changes, and the commit is one rename: killed at any line, the yard
comes back on the last committed route. A candidate that does not come up leaves, or puts back, the old engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Iterator

from engines.errors import BadInput, EngineError, SwitchyardError
from engines.model.free_memory import free_memory
from engines.units import number_of
from engines.yard.client import Say
from engines.yard.config import ModelConfig, YardConfig
from engines.yard.engine.prompt_cache import RestoreBroke
from engines.yard.engine.unit import Unit
from engines.yard.memory_budget import MemoryBudget, fits_beside, memory_back
from engines.yard.orders import (
    CanaryOrder,
    DrainOrder,
    MoveForm,
    PromoteOrder,
    RestoreOrder,
    RetireOrder,
    RollbackOrder,
    ShadowOrder,
    UseOrder,
)
from engines.yard.route import Route
from engines.yard.shadow import Shadow
from engines.yard.state import Canary
from engines.yard.yard import Yard

HOLD_SHARE = 0.8  # of the time that a request may wait
LEAST_LOAD_S = 5.0


class MoveFailed(SwitchyardError):
    """The move was given up; the text has the reason and which engine serves now."""


class Moves:
    """The moves of one yard; one at a time for each model."""

    def __init__(self, yard: Yard, shadow: Shadow, memory_budget: MemoryBudget) -> None:
        self._yard = yard
        self._shadow = shadow
        self._memory_budget = memory_budget

    async def promote(self, order: PromoteOrder, say: Say) -> str:
        """Serve the model by the engine `to`. Raises BadInput, MoveFailed."""
        route, target = self._target(order.model, order.to)
        if lacked := self._yard.lacked(route, target):
            names = ", ".join(f'"path {one.partition(" ")[0]}"' for one in lacked)
            raise BadInput(
                f"{target.engine} has no {', '.join(lacked)}, which clients of {route.model_id} use: they would get "
                f"501. Add {names} to accepted_unsupported in the plan to accept that, and promote again"
            )
        async with self._moving(route, f"promote to {target.engine}", say) as report:
            return await self._move(route, target, report, order.form, undo=route.state.serving)

    async def rollback(self, order: RollbackOrder, say: Say) -> str:
        """Go back to the last good route: the canary taken out, or the engine before the last move."""
        route = self._yard.route_of(order.model)
        if (canary := route.state.canary) is not None:
            return await self.canary(CanaryOrder(model=order.model, to=canary.engine), say)
        if route.state.undo is None:
            raise BadInput(f"nothing to roll back: {route.model_id} was not moved; {route.state.serving} serves it")
        _, target = self._target(order.model, route.state.undo)
        async with self._moving(route, f"roll back to {target.engine}", say) as report:
            before, done = route.serving.engine, await self._move(route, target, report, order.form, undo=None)
            what = f"rolled back from {before} to {target.engine}"
            self._yard.events.note("move", route.model_id, what, engine=target.engine, notify="rollback")
            return done

    async def use(self, order: UseOrder, say: Say) -> str:
        """Choose an engine by hand, or leave the choice to the moves again (`auto`)."""
        route, engine = self._yard.route_of(order.model), order.engine
        if engine != "auto":
            self._target(order.model, engine)
        self._yard.commit(route, selected=engine)
        if engine == "auto":
            return f"{route.model_id}: promote and rollback decide; {route.state.serving} serves"
        return await self.promote(PromoteOrder(model=order.model, to=engine), say)

    async def canary(self, order: CanaryOrder, say: Say) -> str:
        """Let `to` answer a share of the conversations; 0 takes it out again."""
        (route, target), weight = self._target(order.model, order.to), order.weight
        if not 0 <= weight < 1:
            raise BadInput(f"weight {weight} must be at least 0 and below 1; `promote` moves all of it")
        if target.engine == route.state.serving:
            raise BadInput(f"{target.engine} serves {route.model_id} already; a canary is another engine")
        if weight == 0 and route.state.canary is None:
            return f"no canary on {route.model_id}"
        async with self._moving(route, f"canary {target.engine} {weight:g}", say) as report:
            if weight == 0:
                self._yard.commit(route, canary=None)
                report(f"canary out; {target.engine} finishes {number_of(len(target.in_flight), 'request')}")
                if not route.needs(target):  # the fallback stays up
                    await target.idle()
                    await target.stop()
                return f"{route.model_id}: no canary any more; {route.state.serving} serves all of it"
            await self._bring_up_beside(route, target, report)
            self._yard.commit(route, canary=Canary(engine=target.engine, weight=weight, since=time.time()))
            return f"{route.model_id}: {target.engine} answers {weight:.0%} of the conversations"

    async def shadow(self, order: ShadowOrder, say: Say) -> str:
        """Copy a share of the chat requests to `to`, brought up beside; 0 ends that, and the engine."""
        (route, target), share = self._target(order.model, order.to), order.share
        if target is route.serving:
            raise BadInput(f"{target.engine} serves {route.model_id}; copies go to another engine")
        self._shadow.set_share(route, target.engine, share)
        async with self._moving(route, f"shadow on {target.engine} {share:g}", say) as report:
            if share == 0:
                if not (route.needs(target) or (route.state.canary and route.state.canary.engine == target.engine)):
                    await self._end([target], report)
                return f"{route.model_id}: nothing is copied any more"
            await self._bring_up_beside(route, target, report)
        return f"{route.model_id}: {target.engine} gets copies of {share:.0%} of the chat requests"

    async def drain(self, order: DrainOrder, say: Say) -> str:
        """Hold new requests and return when none is in flight (`on`), or take requests again."""
        route = self._yard.route_of(order.model)
        if not order.on:
            route.holding = False
            route.hand_over()
            return f"{route.model_id} takes requests again"
        async with self._moving(route, "drain", say) as report:
            route.holding = True
            report(f"holding new requests; {sum(len(unit.in_flight) for unit in route.units.values())} in flight")
            await asyncio.gather(*(unit.idle() for unit in route.units.values()))
            return f"{route.model_id} is drained; new requests wait until `switchyard drain --off`"

    async def reload(self, config: YardConfig) -> str:
        """Take over another plan without losing a request. Raises BadInput; the old plan stays in force then."""
        old = self._yard.settings
        if (old.host, old.port) != (config.settings.host, config.settings.port):
            raise BadInput("yard.host and yard.port need a restart of the yard; the old plan stays")
        busy = [route for route in self._yard.routes.values() if route.moving]
        if busy:
            raise BadInput(f"{busy[0].model_id} is being moved ({busy[0].moving}); reload when that is done")
        running = {engine for route in self._yard.routes.values() for engine in route.units}
        for kind, name in config.renamed.items():
            if kind in running and name not in running:
                raise BadInput(f"{kind} is called {name} now, which needs a restart of the yard; the old plan stays")
        self._yard.rename(config)
        changes = [await self._reload_model(model) for model in config.models]
        kept = {model.id for model in config.models}
        for route in [route for route in self._yard.routes.values() if route.model_id not in kept]:
            del self._yard.routes[route.model_id]
            await self._end(route.units.values(), lambda _: None)
            await asyncio.to_thread(self._yard.slots.drop, models={route.model_id})
            changes.append(f"{route.model_id} is gone")
        return "plan reloaded: " + ("; ".join(filter(None, changes)) or "limits and names only")

    async def _reload_model(self, model: ModelConfig) -> str:
        route = self._yard.routes.get(model.id)
        if route is None:
            self._memory_budget.admit(await self._yard.add(model))
            return f"{model.id} is new"
        route.apply(model)
        changed = []
        for engine, spec in model.specs.items():
            known = engine in route.units and route.units[engine].spec == spec
            if known or engine in self._yard.state.retired:
                continue
            unit = self._yard.unit(spec)
            before, runs = route.units.get(engine), route.units.get(engine) and route.units[engine].child is not None
            if runs and before is route.serving:
                async with self._moving(route, f"{engine} with its new settings", lambda _: None) as report:
                    await self._move(route, unit, report, "auto", undo=route.state.undo)
            else:
                route.units[engine] = unit
                if before is not None and runs:  # a canary, or an overflow engine
                    await self._end([before], lambda _: None)
                    if route.state.canary is not None and route.state.canary.engine == engine:
                        unit.want()
            changed.append(f"{model.id}: {engine} has new settings")
        state = route.state
        needed = {*model.specs, *model.missing, state.serving, state.undo, state.canary and state.canary.engine}
        for engine in [name for name, unit in route.units.items() if name not in needed and unit.child is None]:
            del route.units[engine]  # of an earlier plan
        return "; ".join(changed)

    async def retire(self, order: RetireOrder, _: Say) -> str:
        """Take an engine out of every route, on the disk first. Raises BadInput while one needs it or is moved."""
        engine = order.engine
        if needs := [need for route in self._yard.routes.values() for need in self._needs(route, engine)]:
            raise BadInput(f"{engine} is still needed: {'; '.join(needs)}")
        self._yard.save(
            self._yard.state.retire(engine, at=time.time(), who=order.who, why=order.why, archive=order.archive)
        )
        for route in self._yard.routes.values():
            if (unit := route.units.pop(engine, None)) is not None:
                await unit.stop()
        await asyncio.to_thread(self._yard.slots.drop, engines={engine})
        self._yard.events.note("move", "-", f"retired by {order.who}: {order.why}", engine=engine)
        return f"{engine} is retired: nothing starts it until `switchyard restore {engine}`"

    async def restore(self, order: RestoreOrder, _: Say) -> str:
        """Have a retired engine back on every route that it was on; it serves when a move, or a person, wants it to."""
        engine = order.engine
        back = self._yard.state.retired.get(engine)
        # searched first: from the save on, nothing may come between
        specs = {name: await self._yard.spec_to_restore(spec) for name, spec in (back.specs if back else {}).items()}
        self._yard.save(self._yard.state.restore(engine))
        for model_id, spec in specs.items():
            if (route := self._yard.routes.get(model_id)) is not None and engine not in route.units:
                route.units[engine] = self._yard.unit(spec)
        self._yard.events.note("move", "-", "restored", engine=engine)
        return f"{engine} is back; `switchyard promote MODEL --to {engine}` makes it serve"

    def _needs(self, route: Route, engine: str) -> Iterator[str]:
        if route.state.serving == engine:  # the state has no route that was never moved
            yield f"{route.model_id} is served by it"
        if route.fallback == engine:
            yield f"it is {route.model_id}'s fallback, in force now"
        if route.moving is not None:
            yield f"{route.model_id} is being moved ({route.moving})"
        if route.overflow is not None and route.overflow.engine == engine:
            yield f"it takes {route.model_id}'s overflow; `switchyard overflow --off` ends that"
        if self._shadow.goes_to(route, engine):
            yield f"it gets copies of {route.model_id}'s requests"

    # --- how

    async def _move(self, route: Route, target: Unit, report: Say, form: MoveForm, *, undo: str | None) -> str:
        old = route.serving
        if old is target:
            if route.state.serving != target.engine:  # the fallback is made the choice
                self._settle(route, target, undo=route.state.undo)
            await self._bring_up(route, target, report)
            return f"{route.model_id} is served by {target.engine} already"
        self._yard.commit(route)  # both specs on the disk before anything changes
        report(f"way back saved: {old.engine} {old.spec.version}")
        if form == "auto":
            beside = target.state.serves or await fits_beside(target, old)
            form = "side-by-side" if beside else "one-at-a-time"
        report(f"moving {form.replace('-', ' ')}")
        if form == "side-by-side":
            await self._side_by_side(route, old, target, report, undo)
        else:
            await self._one_at_a_time(route, old, target, report, undo)
        return f"{route.model_id} is served by {target.engine}"

    async def _side_by_side(self, route: Route, old: Unit, target: Unit, report: Say, undo: str | None) -> None:
        ran_before = target.state.serves
        await self._bring_up(route, target, report)
        held = route.holding
        carries = old.state.serves and target.prompts.key == old.prompts.key != "" and not target.prompts.used
        route.holding = held or (carries and not old.in_flight)
        try:
            self._settle(route, target, undo=undo)
        except SwitchyardError:  # a full disk: nothing was moved
            route.holding = held
            route.hand_over()
            if not ran_before:
                await target.stop()
            raise
        report(f"new requests go to {target.engine}; {old.engine} finishes {len(old.in_flight)}")
        if carries:
            await self._carry_prompts(route, old, target, held=held)
        await self._end([unit for unit in {*route.units.values(), old} if not route.needs(unit)], report)

    async def _one_at_a_time(self, route: Route, old: Unit, target: Unit, report: Say, undo: str | None) -> None:
        # those who wait are given up after wait_s: by then the new engine serves, or the old one does again
        until = time.monotonic() + HOLD_SHARE * self._yard.settings.wait_s
        route.holding = True
        try:
            report(f"holding new requests; {len(old.in_flight)} in flight on {old.engine}")
            within_s = (until - time.monotonic()) / 2
            try:
                async with asyncio.timeout(within_s):
                    await old.idle()
            except TimeoutError:
                raise MoveFailed(
                    f"{route.model_id} stays on {old.engine}: {number_of(len(old.in_flight), 'request')} not done "
                    f"within {within_s:.0f} s, and no longer may others be held; try again when it is quieter"
                ) from None
            held, before = old.stats.vram_bytes, await asyncio.to_thread(free_memory)
            report(f"stopping {old.engine}")
            await old.stop()
            try:
                if old.given_up is not None:  # its memory stays taken: the other may fit beside it, or nothing does
                    report(old.why)
                else:
                    report(await memory_back(held, before, self._yard.settings.memory_back_s))
                left = until - time.monotonic() - 2 * (old.load_s or 0)
                await self._bring_up(route, target, report, min(self._yard.settings.move_s, max(left, LEAST_LOAD_S)))
                self._settle(route, target, undo=undo)
            except BaseException:
                report(f"putting {old.engine} back")
                await target.stop()
                with contextlib.suppress(EngineError):  # then the yard falls back; the move's own reason is reported
                    await old.ready()
                raise
        finally:
            route.holding = False
            route.hand_over()
        report(f"new requests go to {target.engine}")

    async def _carry_prompts(self, route: Route, old: Unit, target: Unit, *, held: bool) -> None:
        """Move what the old engine has cached, once its requests are done, while no other request is under way."""
        try:
            await old.idle()
            if not target.prompts.used:
                route.holding = True
                await old.prompts.save(old.connection)
                with contextlib.suppress(RestoreBroke):  # the target is started again by its supervisor
                    await target.restore_prompts()
        finally:
            route.holding = held
            route.hand_over()

    def _settle(self, route: Route, target: Unit, *, undo: str | None) -> None:
        """The commit: from here on the target serves, after a crash as well."""
        replaced = route.units.get(target.engine)
        route.units[target.engine] = target
        try:
            self._yard.commit(route, serving=target.engine, undo=undo, canary=None, moved_at=time.time())
        except SwitchyardError:
            if replaced is not None:
                route.units[target.engine] = replaced
            raise
        route.fallback = route.unservable = None
        route.unloaded = False
        route.hand_over()

    async def _bring_up(self, route: Route, target: Unit, report: Say, within_s: float | None = None) -> None:
        if target.state.serves:
            return
        report(f"{'asking' if target.spec.url else 'starting'} {target.engine} {target.spec.version}")
        try:
            await target.ready(self._yard.settings.move_s if within_s is None else within_s, first_try=True)
        except EngineError as error:
            if target is not route.serving:
                await target.stop()
            raise MoveFailed(f"{route.model_id} stays on {route.state.serving}: {error}") from error
        report(f"{target.engine} gave its first token after {target.load_s or 0:.1f} s")

    async def _end(self, units: Iterable[Unit], report: Say) -> None:
        for unit in units:
            running = unit.child is not None
            await unit.idle()
            await unit.stop()
            if running:
                what = "runs on, without requests from here" if unit.spec.url else "stopped"  # others run that one
                report(f"{unit.engine} {what}")

    async def _bring_up_beside(self, route: Route, target: Unit, report: Say) -> None:
        if target.state.serves:
            return
        if not await fits_beside(target, route.serving):
            raise MoveFailed(
                f"a canary runs both engines at once, and {target.engine} does not fit beside the one that serves; "
                "`promote` moves one at a time"
            )
        await self._bring_up(route, target, report)

    def _target(self, model: str | None, engine: str | None) -> tuple[Route, Unit]:
        """The route that an order names, and the engine on it: the candidate where it names none."""
        route = self._yard.route_of(model)
        engine = engine or route.candidate
        of_kind = [name for name, unit in route.units.items() if unit.spec.kind == engine]
        if engine not in route.units and len(of_kind) == 1 and engine not in self._yard.state.retired:
            engine = of_kind[0]
        if (gone := self._yard.state.retired.get(engine)) is not None:
            raise BadInput(gone.line(engine))
        if engine not in route.units:
            raise BadInput(
                f"{engine} cannot serve {route.model_id} here: there is {', '.join(route.units)}; "
                "see `switchyard doctor` for what is missing"
            )
        return route, route.units[engine]

    @contextlib.asynccontextmanager
    async def _moving(self, route: Route, what: str, say: Say) -> AsyncIterator[Say]:
        """One move of a model at a time; every step in the event log."""
        if route.moving is not None:
            raise BadInput(f"{route.model_id} is being moved already ({route.moving}); wait until that is done")
        route.moving = what

        def report(step: str) -> None:
            self._yard.events.note("move", route.model_id, step)
            say(step)

        self._yard.events.note("move", route.model_id, f"begin: {what}")
        try:
            yield report
            self._yard.events.note("move", route.model_id, f"done: {what}")
        except BaseException as error:
            self._yard.events.note("incident", route.model_id, f"{what} failed: {error or type(error).__name__}")
            raise
        finally:
            route.moving = None
            self._yard.reconsider(route)
