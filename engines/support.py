"""What an engine can load, and what a user can do where one cannot."""

from __future__ import annotations

from collections.abc import Mapping

from engines.model.header import Header
from engines.model.loads import Loads
from engines.registry import driver


def loads(engine: str, header: Header, *, version: str | None = None) -> Loads:
    """Whether `engine` at `version` (None: not known) loads the model; BadInput for an unknown engine."""
    asked = driver(engine)
    if header.kind != "model":
        return Loads("no", f"the file holds a {header.kind}, not a model")
    return asked.loads(header, version)


def alternatives(answers: Mapping[str, Loads], *, incumbent: str, fits: bool = True) -> list[str]:
    """What a user can do when an engine (`answers`, by name) does not load the model, or it does not fit."""
    blocked = [answer for answer in answers.values() if answer.answer != "yes"]
    if not blocked and fits:
        return []
    choices = [] if fits else ["a smaller quantization of the same model: the weights are the largest part"]
    choices += [choice for answer in blocked for choice in answer.alternatives]
    choices.append(f"stay on {incumbent}, with supervision that asks for a token rather than for /health")
    if blocked:
        choices.append("another engine that knows it: Ollama takes the GGUF, vLLM the original safetensors")
    return choices
