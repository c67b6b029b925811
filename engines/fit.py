"""Whether a model's memory under an engine fits this machine.

Every figure is low / expected / high with its reason. What cannot be sized is `unknown`, never "fits".
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from engines.errors import BadInput
from engines.model.free_memory import Device, FreeMemory, free_memory
from engines.model.header import Header
from engines.model.memory import CELL_PADDING, MemoryCase, Part, why_unsized
from engines.registry import driver, is_attached
from engines.settings import EngineArgs, KvType, Settings
from engines.units import size

FORMULAS = 2  # another number with other formulas: what was learned of the old ones corrects nothing
FitVerdict = Literal["fits", "tight", "unknown", "does not fit"]
WORSE: tuple[FitVerdict, ...] = ("fits", "tight", "unknown", "does not fit")
SEQUENCES = (1, 4)  # of the table of largest contexts, beside the plan's own number
KV_TYPES: tuple[KvType, ...] = ("f16", "q8_0")  # likewise
UNTRAINED_CONTEXT = 1 << 20  # where the header does not say how long a context the model was trained for


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
    hosted: bool = False,
) -> Fit:
    """Whether the model fits under `engine` with `settings` and its `own` flags, against `memory` (default: free now).

    `context_tokens` is for all sequences together; without it the setting counts, then the trained context.
    `correction` is a stored ratio of measured to expected bytes: it moves the expected figure, and widens the range.
    `hosted`: the engine is a wheel in a Python process of ours.
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
    case = MemoryCase(header, settings, context, gpu_layers, free, own or EngineArgs(), hosted)
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


@dataclass(frozen=True)
class Largest:
    """The largest contexts, in tokens of all sequences together, in which a model fits under an engine.

    At `fits_tokens` the upper figure is within the free memory, at `tight_tokens` the expected one; None: the smallest
    context is too large already. `needs` are those at `fits_tokens`, else at the smallest context.
    """

    parallel: int
    kv_types: tuple[str, str]  # of K and V
    gpu_layers: int | None
    fits_tokens: int | None
    tight_tokens: int | None
    trained_tokens: int | None  # more is of no use
    needs: tuple[Need, ...]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "kv_types": list(self.kv_types), "needs": [asdict(need) for need in self.needs]}


def largest_contexts(
    header: Header,
    settings: Settings,
    engine: str,
    *,
    own: EngineArgs | None = None,
    memory: FreeMemory | None = None,
    correction: float | None = None,
    hosted: bool = False,
) -> list[Largest]:
    """The largest contexts with `settings`, then with other numbers of sequences and types of the KV cache.

    Beside a GPU that does not hold every layer at the context of `settings`, also with as many layers as it does.
    What the engine refuses, and what makes no difference to it, is left out. Empty where memory cannot be sized.
    """
    own, free = own or EngineArgs(), memory or free_memory()

    def sized(settings: Settings) -> Fit:
        return estimate(header, settings, engine, own=own, memory=free, correction=correction, hosted=hosted)

    if is_attached(engine) or sized(_with(settings, context_tokens=1)).verdict == "unknown":
        return []
    has_gpu, found = free.vram_bytes is not None, list[Largest]()
    for parallel in dict.fromkeys((settings.parallel, *SEQUENCES)):
        for kv_type in dict.fromkeys((KV_TYPES[0], settings.kv_type or KV_TYPES[0], *KV_TYPES)):
            asked = _with(settings, parallel=parallel, kv_type=kv_type)
            if driver(engine).clashes(asked, own):
                continue
            for one in _by_layers(header, asked, sized) if has_gpu else [asked]:
                largest = _largest(header, one, sized, kv_types(engine, one, own), has_gpu=has_gpu)
                if not any(_same_but_for_kv_type(largest, other) for other in found):
                    found.append(largest)
    return found


def kv_types(engine: str, settings: Settings, own: EngineArgs) -> tuple[str, str]:
    """Types of K and V; apart where the engine's own flags say so (only llama.cpp has such)."""
    flags, neutral = driver(engine).own_args.flags(own), settings.kv_type
    apart = [flags[name].values[0] if name in flags else None for name in ("--cache-type-k", "--cache-type-v")]
    default = "f16" if any(apart) else neutral or "f16"
    return apart[0] or default, apart[1] or default


def _by_layers(header: Header, settings: Settings, sized: Callable[[Settings], Fit]) -> Iterator[Settings]:
    """`settings` and, where they do not fit, the same with the most layers on the GPU that do."""
    yield settings
    asked = _with(settings, context_tokens=settings.context_tokens or header.context_length or UNTRAINED_CONTEXT)
    most = header.n_layers + 1 if settings.gpu_layers is None else min(settings.gpu_layers, header.n_layers + 1)
    for layers in range(most, -1, -1):
        if sized(_with(asked, gpu_layers=layers)).verdict == "fits":
            if layers < most:
                yield _with(settings, gpu_layers=layers)
            return


def _largest(
    header: Header, settings: Settings, sized: Callable[[Settings], Fit], kv: tuple[str, str], *, has_gpu: bool
) -> Largest:
    trained = header.context_length * settings.sequences if header.context_length else None
    step, most = CELL_PADDING * settings.sequences, trained or UNTRAINED_CONTEXT
    contexts = [*range(step, most, step), most]

    def at(context: int) -> Fit:
        # set, since some engines take all the memory where no context is
        return sized(_with(settings, context_tokens=context))

    n_fits = bisect_left(contexts, True, key=lambda context: at(context).verdict != "fits")
    n_tight = bisect_left(contexts, True, key=lambda context: at(context).verdict == "does not fit")
    return Largest(
        parallel=settings.parallel,
        kv_types=kv,
        gpu_layers=settings.gpu_layers if has_gpu else None,
        fits_tokens=contexts[n_fits - 1] if n_fits else None,
        tight_tokens=contexts[n_tight - 1] if n_tight else None,
        trained_tokens=trained,
        needs=at(contexts[max(n_fits, 1) - 1]).needs,
    )


def _with(settings: Settings, **changed: object) -> Settings:
    return settings.model_copy(update=changed)


def _same_but_for_kv_type(one: Largest, other: Largest) -> bool:
    return replace(one, kv_types=other.kv_types) == other
