"""What an engine can load, and what a user can do where one cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from engines.model.header import Header
from engines.model.loads import Loads
from engines.registry import driver


def loads(engine: str, header: Header, *, version: str | None = None, own_tokenizer: bool = False) -> Loads:
    """Whether `engine` at `version` (None: not known) loads the model; BadInput for an unknown engine.

    `own_tokenizer`: it is given a tokenizer.json instead of the tokenizer in the file.
    """
    answer = driver(engine).loads(header, version)
    if own_tokenizer and answer.by_tokenizer:
        return replace(answer, answer="unknown", why=f"{answer.why}; the tokenizer.json was not looked into")
    return answer


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
