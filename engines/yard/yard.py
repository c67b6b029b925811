"""The yard: all models, their routes and engines.

It keeps engines up, and falls back to the other engine when one cannot be kept up. It imports neither Prefect nor a
database: it works when both are gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from engines.driver import Driver, native_of
from engines.errors import BadInput
from engines.notify import Event, Notifier
from engines.openai.call import Call, Refusal
from engines.openai.paths import Kind
from engines.openai.public import Public
from engines.process.process import end_orphans
from engines.redaction import redacted_text
from engines.registry import driver
from engines.settings import EngineArgs, Serve
from engines.units import number_of
from engines.yard.capture import RequestCapture
from engines.yard.config import ModelConfig, YardConfig
from engines.yard.engine.connection import EngineConnection, FrameConnection, HttpConnection
from engines.yard.engine.in_flight import InFlight
from engines.yard.engine.launch_spec import LaunchSpec, relocated
from engines.yard.engine.slot_store import SlotStore
from engines.yard.engine.unit import Unit
from engines.yard.event_log import EventLog
from engines.yard.metrics import LiveSample, Metrics
from engines.yard.route import Route
from engines.yard.state import ModelState, StateFile, YardState
from engines.yard.usage import SAVE_S, Usage

SAMPLES = 5000  # live requests remembered for the judgement of a canary


class Yard:
    """Everything between the public port and the engines."""

    def __init__(self, config: YardConfig, *, home: Path, drivers: Mapping[str, Driver] | None = None) -> None:
        self.settings = config.settings
        self.home = home
        self.folder = home / "yard"
        self.log = logging.getLogger("switchyard.yard")
        self.metrics = Metrics()
        self.routes: dict[str, Route] = {}
        self.samples: dict[str, deque[LiveSample]] = {}
        self.started_at = time.time()
        self.stopping = False
        self.config = config
        self.judge_canary, self.judge_shadow = config.judge_canary, config.judge_shadow
        self.canary_verdicts: dict[str, dict[str, Any]] = {}  # the last judgement of each model's canary
        self.look_at_canaries = asyncio.Event()
        self.capture = RequestCapture(None, 0)
        self.names: dict[str, str] = {}  # of models, aliases included, and the id of each
        self._driver: Callable[[str], Driver] = drivers.__getitem__ if drivers else driver
        self.public = self._public_of(config)
        self.usage = Usage(home)
        self.slots = SlotStore(self.folder / "slots", lambda: self.settings.prompt_cache_mib)
        self._notifier = Notifier(config.notify, self.log)
        self._engine_key = SecretStr(secrets.token_hex(16))  # nobody reaches an engine but through the yard

    # --- from start to stop

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only yard of this home while the block runs. Raises BadInput when another one is."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self.folder / "lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.seek(0)
                raise BadInput(
                    f"a yard runs here already (pid {lock.read().strip() or 'unknown'}): see `switchyard status`"
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    async def open(self) -> None:
        """Read the routes as last committed; no engine is started yet."""
        self.events = EventLog(self.folder, self.log, incident=self.metrics.incidents.inc, notify=self._notify)
        for ended in await asyncio.to_thread(end_orphans, self.home):
            self.events.note("yard", "-", f"ended a process left behind by a yard that was killed: {ended}")
        self._file = StateFile(self.folder)
        self.state, problem = self._file.load()
        if problem:
            self.events.note("incident", "-", problem)
        named = self.state.renamed(self.config.renamed)
        if named != self.state:
            self._file.save(named)
            self.state = named
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self.slots.drop, engines=self.state.retired)
        self.capture = self._open_capture()
        for model in self.config.models:
            await self.add(model)

    def bring_up(self, route: Route) -> None:
        """Start the engines that the route needs; returns at once."""
        route.unloaded = False
        if route.units:
            route.serving.want()
        if (canary := route.state.canary) is not None and canary.engine in route.units:
            route.units[canary.engine].want()

    async def stop(self) -> None:
        """Give requests in flight `stop_s`; then end every engine."""
        self.stopping = True
        for route in self.routes.values():
            route.unservable = "Switchyard is stopping"
            route.hand_over()
        units = [unit for route in self.routes.values() for unit in route.units.values()]
        until = time.monotonic() + self.settings.stop_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.stop_s):
                await asyncio.gather(*(unit.idle() for unit in units))
        await asyncio.gather(*(unit.stop(save_s=until - time.monotonic()) for unit in units))
        await asyncio.to_thread(self.capture.close)
        self.usage.save()

    def _open_capture(self) -> RequestCapture:
        settings = self.settings
        path = None if settings.capture is None else self.folder / settings.capture
        return RequestCapture(path, settings.capture_mib * 2**20, self.note_problem)

    async def keep_usage(self) -> None:
        """Write what clients use from time to time; until cancelled."""
        while True:
            await asyncio.sleep(SAVE_S)
            await asyncio.to_thread(self.usage.save)

    def lacked(self, route: Route, target: Unit) -> list[str]:
        """Paths in use that the serving engine has and `target` lacks, without those that the plan accepts."""
        has, accepted = route.serving.paths.has, self.config.accepted
        return [
            f"{path} ({number_of(n, 'request')})"
            for path, n in self.usage.paths.items()
            if has(path) and not target.paths.has(path) and f"path {path}" not in accepted
        ]

    def _public_of(self, config: YardConfig) -> Public:
        """What the incumbent shows clients without a key and pages of other origins, whichever engine serves now."""
        models = {model.id: model for model in config.models}
        model = models.get(config.settings.default_model or "", config.models[0])
        spec = model.specs.get(model.incumbent)
        kind = model.kinds.get(model.incumbent, model.incumbent)
        return self._driver(kind).public(EngineArgs() if spec is None else spec.own)

    def _notify(self, event: Event, model: str, what: str, engine: str) -> None:
        self._notifier.note(event, model, what, engine)

    def note_problem(self, what: str) -> None:
        """Note an incident from a thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self.events.note, "incident", "-", what)

    async def add(self, model: ModelConfig) -> Route:
        """Add a model with its route and engines. One whose engine is not here is served by the other one."""
        specs = dict(model.specs)
        for engine, spec in self._route_state(model).specs.items():
            if engine not in specs and engine not in self.state.retired:
                specs[engine] = await self._relocated(spec)
        route = Route(model, self._route_state(model), self.settings.max_waiting)
        route.units |= {engine: self.unit(spec) for engine, spec in specs.items() if engine not in self.state.retired}
        self.routes[model.id] = route
        self.samples[model.id] = deque(maxlen=SAMPLES)
        self.names |= {name: model.id for name in (model.id, *model.aliases)}
        for engine, why in model.missing.items():
            if engine not in route.units:
                self.events.note("incident", model.id, why, engine=engine)
        if route.state.serving not in route.units:
            gone = self.state.retired.get(route.state.serving)
            self._fall_back(route, route.state.serving, "is retired" if gone else "is not on this machine")
        return route

    def _route_state(self, model: ModelConfig) -> ModelState:
        """The route as last committed; a model that is new here is served by its incumbent, or the engine chosen."""
        known = self.state.models.get(model.id)
        if known is not None and model.engine in ("auto", known.serving):
            return known
        if known is not None:
            return known.model_copy(update={"serving": model.engine, "undo": known.serving, "selected": model.engine})
        chosen = model.incumbent if model.engine == "auto" else model.engine
        return ModelState(serving=chosen, selected=model.engine, specs=dict(model.specs))

    def unit(self, spec: LaunchSpec) -> Unit:
        note = partial(self.events.note, model=spec.model_id, engine=spec.engine)

        def reconsider(_: Unit) -> None:
            if (route := self.routes.get(spec.model_id)) is not None:
                self.reconsider(route)

        unit = Unit(
            spec,
            self._driver(spec.kind),
            self.settings,
            home=self.home,
            key=self._engine_key,
            connect=self._connection,
            store=self.slots,
            note=lambda kind, what: note(kind, what=what),
            changed=reconsider,
            transition=lambda _, new: note("state", what=f"{new.state}: {new.why}"),
            incident=lambda _, why: note("incident", what=why),
        )
        unit.gap = self.metrics.gap(spec.model_id, spec.engine)
        return unit

    async def _relocated(self, spec: LaunchSpec) -> LaunchSpec:
        found, line = await asyncio.to_thread(relocated, spec, self._driver(spec.kind))
        if line:
            self.events.note("yard" if found != spec else "incident", spec.model_id, line, engine=spec.engine)
        return found

    async def spec_to_restore(self, spec: LaunchSpec) -> LaunchSpec:
        """The spec of a retired engine: as found at the yard's start, else where this machine has it now."""
        for model in self.config.models:
            if model.id == spec.model_id and spec.engine in model.specs:
                return model.specs[spec.engine]
        return await self._relocated(spec)

    def _connection(self, spec: LaunchSpec, serve: Serve) -> EngineConnection:
        if spec.form == "native":
            return FrameConnection(serve.host, serve.port, self._engine_key)
        return HttpConnection(serve.base_url, serve.settings.api_key)

    # --- what changes by itself

    def reconsider(self, route: Route) -> None:
        """Fall back from an engine that cannot be kept up (a move under way decides itself); hand requests over."""
        if self.stopping:
            return
        canary = route.state.canary
        if canary is not None and canary.engine in route.units and route.units[canary.engine].budget.exhausted:
            self.look_at_canaries.set()
        unit = route.serving
        if unit.state.serves:
            route.unservable = None
        elif unit.budget.exhausted and route.moving is None and route.unservable is None:
            self._fall_back(route, unit.engine, unit.why)
        route.hand_over()

    def _give_up(self, route: Route, unit: Unit) -> None:
        """Refuse requests with the reason, and try all engines again in a while: none can be kept up."""
        why = f"no engine can serve {route.model_id}: {unit.engine}: {unit.why}".replace("\n", " ")
        route.unservable = redacted_text(why)
        self.events.note("incident", route.model_id, route.unservable, engine=unit.engine)

        def try_again() -> None:
            if self.routes.get(route.model_id) is route and route.unservable is not None and not self.stopping:
                if all(each.given_up for each in route.units.values()):
                    asyncio.get_running_loop().call_later(self.settings.try_again_s, try_again)
                    return
                route.fallback = route.unservable = None
                for each in route.units.values():
                    each.budget.reset()
                route.serving.want()

        asyncio.get_running_loop().call_later(self.settings.try_again_s, try_again)

    def _fall_back(self, route: Route, engine: str, why: str) -> None:
        """Have another engine serve until a person, or a move, decides otherwise; the committed route stays as it is.

        Native falls back to the same engine as a subprocess, and what else fails to the incumbent. Nothing falls back
        to native: what keeps an engine from coming up hardly spares the form that nothing stands between.
        """
        native = native_of(route.candidate)
        first = (route.candidate, route.incumbent) if engine == native else (route.incumbent, route.candidate)
        able = [name for name, unit in route.units.items() if not unit.budget.exhausted]
        others = (name for name in (*first, *able) if name in able and name not in (engine, native))
        other = next(others, None)
        if other is None:
            self._give_up(route, route.units[engine])
            return
        route.fallback = other
        what = f"fallback to {other}: {engine} {why}"
        self.events.note("incident", route.model_id, what, engine=engine, notify="fallback")
        route.units[other].want(restores=False)

    def save(self, everything: YardState) -> None:
        """Change routes, on the disk first. Raises SwitchyardError and changes nothing when it cannot be written."""
        self._file.save(everything)
        before, self.state = self.state.models, everything
        for model_id, route in self.routes.items():
            state = everything.models.get(model_id, route.state)
            if state != before.get(model_id):  # else the route keeps what the plan chose for it, which is not stored
                route.state = state

    def commit(self, route: Route, **changes: Any) -> None:
        """Change one route, as `save` does."""
        specs = {engine: unit.spec for engine, unit in route.units.items()}
        state = route.state.model_copy(update={"specs": specs, **changes})
        self.save(self.state.with_model(route.model_id, state))
        route.state = state
        route.hand_over()

    # --- what requests ask

    def only_looks(self, method: str, path: str) -> bool:
        """True for a request that any path takes, and for one that ends a client's own request."""
        units = (unit for route in self.routes.values() for unit in route.units.values())
        return method in ("GET", "HEAD") or (method == "DELETE" and any(path in unit.paths.cancels for unit in units))

    def change_of(self, path: str) -> str:
        """Why a request that would alter an engine is refused; '' for any other."""
        units = (unit for route in self.routes.values() for unit in route.units.values())
        return next(filter(None, (unit.paths.change(path) for unit in units)), "")

    def kind_of(self, path: str) -> tuple[Kind, str]:
        """What a request to a path does on any engine here, and the path's usual spelling."""
        for route in self.routes.values():
            for unit in route.units.values():
                if (kind := unit.paths.kind(path)) != "unlisted":
                    return kind, unit.paths.spelled(path)
        return "unlisted", path

    def route_for(self, name: str | None) -> Route:
        """The route of a model by any of its names. Refusal 404 where the plan wants unknown names refused."""
        if name is not None and name in self.names:
            return self.routes[self.names[name]]
        if name is not None and self.settings.unknown_model == "refuse":
            known = ", ".join(self.routes)
            raise Refusal(404, f"the model '{name}' does not exist; there are: {known}", code="model_not_found")
        return self.routes[self.settings.default_model or next(iter(self.routes))]

    def route_of(self, model_id: str | None) -> Route:
        """The route that an order names; the only one where it names none. BadInput lists the models."""
        if model_id is None and len(self.routes) == 1:
            return next(iter(self.routes.values()))
        if model_id not in self.names:
            what = "name the model" if model_id is None else f"no model '{model_id}' here"
            raise BadInput(f"{what}: there are {', '.join(self.routes)}")
        return self.routes[self.names[model_id]]

    def rename(self, config: YardConfig) -> None:
        """Take over what changes without any engine: limits, names, the key."""
        before = self.settings.capture, self.settings.capture_mib
        if config.notify != self.config.notify:
            self._notifier = Notifier(config.notify, self.log)
        self.config, self.settings, self.public = config, config.settings, self._public_of(config)
        for route in self.routes.values():
            route.max_waiting = config.settings.max_waiting
            for unit in route.units.values():
                unit.apply(config.settings)
        self.judge_canary, self.judge_shadow = config.judge_canary, config.judge_shadow
        if before != (self.settings.capture, self.settings.capture_mib):
            self.capture, old = self._open_capture(), self.capture
            self._loop.run_in_executor(None, old.close)
        self.names = {name: model.id for model in config.models for name in (model.id, *model.aliases)}

    def served(
        self,
        route: Route,
        unit: Unit,
        call: Call,
        running: InFlight,
        error: str | None,
        *,
        arrived: float,
        client_error: bool = False,
    ) -> None:
        """Count an answered request, and remember it for the judgement of a canary, by the engine's own times."""
        gap_s, conversation = running.gap_s, ""
        if route.state.canary:  # a name that does not hold its text
            told = call.conversation().encode("utf-8", "surrogatepass")
            conversation = hashlib.blake2b(told, digest_size=8).hexdigest()
        sample = LiveSample(
            at=time.time(),
            engine=unit.engine,
            conversation=conversation,
            prompt_tokens=running.prompt_tokens,
            ok=error is None,
            error=error and redacted_text(error),
            empty=error is None and running.first is None and call.stream,
            ttft_ms=running.ttft_ms if call.stream else None,
            tpot_ms=gap_s * 1000 if call.stream and gap_s is not None else None,
            cached_share=running.cached_share,
        )
        self.samples[route.model_id].append(sample)
        self.metrics.served(route.model_id, sample, running, arrived, client_error=client_error)
        unit.prompts.served(call, running)

    def note_loss(self, route: Route, unit: Unit, why: str, *, retried: bool) -> None:
        """Count a request that an engine's end took with it, before anything of its answer had reached the client."""
        self.metrics.lost.labels(route.model_id, unit.engine).inc()
        lost = LiveSample(time.time(), unit.engine, "", 0, False, f"lost: {why}", False, None, None)
        self.samples[route.model_id].append(lost)  # what became of the request is another engine's sample
        what = f"engine dropped a request; {'retrying' if retried else 'giving up'}: {why}"
        self.events.note("incident", route.model_id, what, engine=unit.engine)
