"""Whether a model's memory under an engine fits this machine.

Every figure is low / expected / high with its reason. What cannot be sized is `unknown`, never "fits".
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from engines.errors import BadInput
from engines.model.free_memory import Device, FreeMemory, free_memory
from engines.model.header import Header
from engines.model.memory import MemoryCase, Part, why_unsized
from engines.registry import driver, is_attached
from engines.settings import EngineArgs, Settings
from engines.units import size

FitVerdict = Literal["fits", "tight", "unknown", "does not fit"]
WORSE: tuple[FitVerdict, ...] = ("fits", "tight", "unknown", "does not fit")


@dataclass(frozen=True)
class Need:
    """What all parts on one device take together, in bytes, beside what is free there."""

    device: Device
    low: int
    expected: int
    high: int
    free: int | None
    mapped: int = 0  # of what is expected: in the page cache, the rest is private

    @property
    def verdict(self) -> FitVerdict:
        if self.free is None:
            return "unknown"
        if self.high <= self.free:
            return "fits"
        return "tight" if self.expected <= self.free else "does not fit"

    def __str__(self) -> str:
        if self.free is None:
            return f"{self.device.upper()}: needs {size(self.expected)}, how much is free cannot be read"
        mapped = f", {size(self.mapped)} of it mapped" if self.mapped else ""
        numbers = f"needs {size(self.expected)}{mapped} (up to {size(self.high)}), {size(self.free)} free"
        return f"{self.device.upper()} {self.verdict}: {numbers}"


@dataclass(frozen=True)
class Fit:
    """Whether a model fits under an engine: the verdict, its reason, and the figures that it rests on."""

    engine: str
    verdict: FitVerdict
    why: str
    context_tokens: int | None
    parts: tuple[Part, ...] = ()
    needs: tuple[Need, ...] = ()
    notes: tuple[str, ...] = ()
    correction: float | None = None

    def as_dict(self) -> dict[str, Any]:
        fields = asdict(self)
        return {**fields, **{name: list(fields[name]) for name in ("parts", "needs", "notes")}}


def estimate(
    header: Header,
    settings: Settings,
    engine: str,
    context_tokens: int | None = None,
    *,
    own: EngineArgs | None = None,
    memory: FreeMemory | None = None,
    correction: float | None = None,
) -> Fit:
    """Whether the model fits under `engine` with `settings` and its `own` flags, against `memory` (default: free now).

    `context_tokens` is for all sequences together; without it the setting counts, then the trained context.
    `correction` is a stored ratio of measured to expected bytes: it moves the expected figure, and widens the range.
    """
    if is_attached(engine):
        return Fit(engine, "fits", "attached: it takes nothing of this machine that others did not give it", None)
    asked = driver(engine)
    if context_tokens is not None and context_tokens < 1:
        raise BadInput(f"context_tokens is {context_tokens}; a context has one token or more")
    if correction is not None and not (math.isfinite(correction) and correction > 0):
        raise BadInput(f"correction is {correction}, not a ratio above zero")
    free = memory or free_memory()
    context = context_tokens or settings.context_tokens or header.context_length
    why = why_unsized(header)
    if why is None and settings.gpu_layers and free.vram_bytes is None:
        why = f"gpu_layers is {settings.gpu_layers}, but the memory of no GPU can be read here"
    if why is not None or context is None:
        why = why or "neither the settings nor the header name a context length"
        return Fit(engine, "unknown", why, context, notes=header.notes, correction=correction)
    # an engine takes the whole GPU when no number of layers is set; one more than the model has: the output too
    wanted = header.n_layers + 1 if settings.gpu_layers is None else settings.gpu_layers
    gpu_layers = 0 if free.vram_bytes is None else min(wanted, header.n_layers + 1)
    case = MemoryCase(header, settings, context, gpu_layers, free, own or EngineArgs())
    parts = tuple(part for part in asked.memory_parts(case) if part.high)
    needs = tuple(_needs(parts, free, correction))
    verdict: FitVerdict = max((need.verdict for need in needs), key=WORSE.index, default="unknown")
    notes = [*header.notes]
    if header.context_length and context > header.context_length * settings.sequences:
        notes.append(f"{context:,} tokens are more than the trained context of {header.context_length:,} per sequence")
    if free.n_gpus > 1:
        notes.append(f"the free VRAM of {free.n_gpus} GPUs is added up; each must hold its own share")
    if gpu_layers and settings.gpu_layers is None:
        notes.append("gpu_layers is not set: counted as the whole model on the GPU")
    notes += asked.memory_notes(case)
    return Fit(engine, verdict, "; ".join(map(str, needs)), context, parts, needs, tuple(notes), correction)


def _needs(parts: tuple[Part, ...], free: FreeMemory, correction: float | None) -> list[Need]:
    needs = []
    devices: tuple[Device, ...] = ("ram", "vram")
    for device in devices:
        here = [part for part in parts if part.device == device]
        low, expected, high = (sum(getattr(part, level) for part in here) for level in ("low", "expected", "high"))
        if correction is not None:
            expected = math.ceil(expected * correction)
            low, high = min(low, expected), max(high, expected)
        if here:
            mapped = sum(part.expected for part in here if part.kind == "mapped")
            needs.append(Need(device, low, expected, high, free.of(device), mapped))
    return needs
