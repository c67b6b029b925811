"""How parity asks an engine: one request, and its answer as plain evidence or what went wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import httpx

from engines.errors import BadInput
from engines.settings import Endpoint
from tasks.evidence.behaviours.caller import Caller, Malformed, Refused
from tasks.evidence.prompts import Prompt

Evidence = dict[str, Any]
Progress = Callable[[str], None]
TIMEOUT_S = 600.0  # a CPU build can need minutes for a long prompt


def chat_body(endpoint: Endpoint, prompt: Prompt, *, max_tokens: int) -> Evidence:
    """A greedy chat request of `prompt`."""
    return {"model": endpoint.model_id, "max_tokens": max_tokens, "temperature": 0} | prompt.body


def post(caller: Caller, path: str, body: Evidence) -> tuple[Evidence | None, str | None]:
    """(parsed answer, None) or (None, what went wrong in one line)."""
    try:
        return caller.post(path, body).served().body, None
    except httpx.HTTPError as error:
        return None, f"{type(error).__name__}: {error}"
    except (Refused, Malformed) as error:
        return None, str(error)


def by_id(answers: Iterable[Evidence]) -> dict[str, Evidence]:
    """The answers by their prompt; BadInput where one is answered twice, as it would count twice."""
    found: dict[str, Evidence] = {}
    for answer in answers:
        if answer["id"] in found:
            raise BadInput(f"two answers to prompt {answer['id']}: each is counted once")
        found[answer["id"]] = answer
    return found


def origin(endpoint: Endpoint) -> Evidence:
    """Which engine the evidence is of."""
    return {"engine": endpoint.engine, "version": endpoint.version, "model_id": endpoint.model_id}
