"""Configuration of a yard: its models with their engines, its settings, its judges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pydantic import SecretStr

from engines.errors import BadInput
from engines.notify import NotifySettings
from engines.yard.engine.launch_spec import LaunchSpec
from engines.yard.settings import Load, YardSettings

# samples, incumbent, candidate -> {"verdict": ..., "why": ..., and what else the status shows}; called in a thread
JudgeCanary = Callable[[Sequence[Mapping[str, Any]], str, str], Mapping[str, Any]]
JudgeShadow = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]]  # the same of pairs of answers


@dataclass(frozen=True)
class OverflowConfig:
    """The engine that takes new conversations of a model while more than `waiting` requests wait for the first."""

    engine: str
    waiting: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model: the engines that may serve it, as found on this machine, and why one was not."""

    id: str
    incumbent: str
    candidate: str
    specs: Mapping[str, LaunchSpec]
    missing: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)  # of engines whose name is not their kind
    aliases: tuple[str, ...] = ()
    engine: str = "auto"
    load: Load = "start"
    pin: bool = False
    overflow: OverflowConfig | None = None


@dataclass(frozen=True, kw_only=True)
class YardConfig:
    """What the yard gets at its start, and again when the plan is reloaded. Raises BadInput."""

    settings: YardSettings
    models: tuple[ModelConfig, ...]
    api_key: SecretStr | None = None
    accepted: frozenset[str] = frozenset()  # what an engine may lack, as in the plan's accepted_unsupported
    notify: NotifySettings = field(default_factory=NotifySettings)
    judge_canary: JudgeCanary | None = None
    judge_shadow: JudgeShadow | None = None

    @cached_property
    def keys(self) -> tuple[bytes, ...]:
        """The keys that clients may send: several are written with commas between them."""
        text = "" if self.api_key is None else self.api_key.get_secret_value()
        return tuple(key.strip().encode("utf-8", "surrogateescape") for key in text.split(",") if key.strip())

    @property
    def renamed(self) -> dict[str, str]:
        """The names of engines that have one now and had none before: a kind stood for the only engine of that kind."""
        kinds = {name: kind for model in self.models for name, kind in model.kinds.items()}
        of_kind = {kind: [name for name in kinds if kinds[name] == kind] for kind in kinds.values()}
        return {kind: names[0] for kind, names in of_kind.items() if kind not in kinds and len(names) == 1}

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.keys:
            raise BadInput("api_key_env: the variable holds no key, only commas; export a key first")
        if not self.settings.on_loopback and self.api_key is None:
            raise BadInput(
                f"yard.host {self.settings.host} can be reached from other machines: set "
                'api_key_env = "SWITCHYARD_API_KEY" in the plan and export that variable, or listen on 127.0.0.1'
            )
