"""The yard's state as `/health`, `/v1/models`, `switchyard status` and the page show it; changes nothing."""

from __future__ import annotations

import os
from typing import Any

from engines.redaction import redacted, redacted_text
from engines.settings import safe_id
from engines.yard.engine.unit import Unit
from engines.yard.overflow import Overflow
from engines.yard.route import Route
from engines.yard.shadow import Shadow
from engines.yard.yard import Yard


class Status:
    def __init__(self, yard: Yard, shadow: Shadow, overflow: Overflow) -> None:
        self._yard = yard
        self._shadow = shadow
        self._overflow = overflow

    def explain(self, route: Route) -> str:
        """Why a request would not be served now, in one line."""
        if self._yard.stopping:
            return "Switchyard is stopping"
        if route.unservable is not None:
            return route.unservable
        unit = route.serving
        if route.holding:
            return f"{route.model_id} is {route.moving or 'being unloaded'}; requests wait"
        if route.unloaded:
            return f"{route.model_id} is not loaded; the first request loads it"
        detail = f" ({unit.loading})" if unit.state == "loading" and unit.loading else ""
        return redacted_text(f"{route.model_id}: {unit.engine} is {unit.state}{detail}: {unit.why}".replace("\n", " "))

    def models(self) -> list[dict[str, Any]]:
        """Each name by which clients ask; an id that only stands for a name with other characters is none of them."""
        names = self._yard.names.items()
        stand_ins = {model_id for name, model_id in names if name != model_id and safe_id(name) == model_id}
        return [
            {
                "id": name,
                "object": "model",
                "created": int(self._yard.started_at),
                "owned_by": "switchyard",
                "meta": {"n_ctx": self._yard.routes[model_id].serving.context_tokens},
            }
            for name, model_id in names
            if name not in stand_ins
        ]

    def health_of(self, route: Route) -> dict[str, Any]:
        """What `/health` adds to its status."""
        unit = route.serving
        return {
            "model": route.model_id,
            "engine": unit.engine,
            "state": "unloaded" if route.unloaded else str(unit.state),
            "why": self.explain(route) if route.unloaded else redacted_text(unit.why),
            "fallback": route.fallback is not None,
        }

    def status(self) -> dict[str, Any]:
        """Everything, for `switchyard status` and the page; without secrets."""
        shown = {
            "pid": os.getpid(),
            "since": self._yard.started_at,
            "address": f"http://{self._yard.settings.host}:{self._yard.settings.port}",
            "retired": {engine: gone.line(engine) for engine, gone in self._yard.state.retired.items()},
            "models": [self._route_status(route) for route in self._yard.routes.values()],
            "capture": self._yard.capture.status(),
            "usage": self._yard.usage.status(),
            "incidents": list(self._yard.events.incidents),
            "events": list(self._yard.events.recent),
        }
        return {key: redacted(value) for key, value in shown.items()}

    def _route_status(self, route: Route) -> dict[str, Any]:
        canary, last = route.state.canary, self._yard.canary_verdicts.get(route.model_id)
        judged = last if last and canary and last["since"] == canary.since else {}
        return {
            "id": route.model_id,
            "serving": route.serving.engine if route.units else None,
            "committed": route.state.serving,
            "selected": route.state.selected,
            "fallback": route.fallback,
            "undo": route.state.undo,
            "canary": {**canary.model_dump(), **judged} if canary else None,
            "last_canary": last if canary is None else None,
            "shadow": self._shadow.status(route),
            "overflow": self._overflow.status(route),
            "waiting": route.waiting,
            "holding": route.holding,
            "moving": route.moving,
            "unservable": route.unservable,
            "load": route.load,
            "pin": route.pin,
            "dormant": route.unloaded,  # the key that commands of the first version read
            "engines": [self._unit_status(unit) for unit in route.units.values()],
        }

    def _unit_status(self, unit: Unit) -> dict[str, Any]:
        child, last = None if unit.spec.url else unit.child, unit.transitions[-1] if unit.transitions else None
        return {
            "engine": unit.engine,
            "kind": unit.spec.kind,
            "version": unit.spec.version,
            "build": unit.spec.build,
            "form": unit.spec.form,
            "state": str(unit.state),
            "why": unit.why,
            "since": last.at if last else None,
            "loading": unit.loading if unit.state == "loading" else "",
            "pid": child.pid if child else None,
            "argv": child.argv if child else None,
            "log": str(child.log.path) if child else None,
            "memory_bytes": unit.stats.memory_bytes,
            "vram_bytes": unit.stats.vram_bytes,
            "memory_series": list(unit.stats.memory_series),
            "ttft_ms_series": list(unit.stats.ttft_ms_series),
            "tokens_per_s": unit.stats.tokens_per_s,
            "in_flight": len(unit.in_flight),
            "load_s": unit.load_s,
            "device": vars(unit.device),
            "restarts": unit.restarts,
            "prompts": unit.prompts.status(),
            "drift": unit.drift,
            "context_tokens": unit.context_tokens,
            "ignored_fields": self._yard.usage.ignored(unit.ignores),
        }
