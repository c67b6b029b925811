"""One request in OpenAI's API: what the yard reads of it, and how it is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engines.openai.paths import ENDS

BYTES_PER_TOKEN = 3  # of a request's JSON; only to guess how long a prompt may take
LEAST_TOKENS = 32
DEEPEST = 200  # levels of a body; whatever walks through it later needs some of the interpreter's 1000 for each
LLAMA_CPP_PREFILL = re.compile(rb'"prompt_n":\s*(\d+)[^}]*?"prompt_ms":\s*(\d+(?:\.\d+)?)')
MISTRAL_RS_PREFILL = re.compile(rb'"avg_prompt_tok_per_sec":\s*(\d+(?:\.\d+)?)')
PROMPT_TOKENS = re.compile(rb'"prompt_tokens":\s*(\d+)')
COMPUTED_TOKENS = re.compile(rb'"prompt_n":\s*(\d+)')  # llama.cpp's timings, without what lay in its cache
CACHED_TOKENS = re.compile(rb'"(?:cache_n|cached_tokens)":\s*(\d+)')
GENERATING = frozenset({"/v1/chat/completions", "/v1/completions"})
NO_CONVERSATION = "null"  # of a request without messages and prompt
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Refusal(Exception):
    """An answer that is an error, as OpenAI's API words it."""

    def __init__(
        self, status: int, message: str, *, kind: str = "", code: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": None, "code": self.code}}


@dataclass(frozen=True)
class Call:
    """One request: where to, its JSON, and what of it steers the yard."""

    path: str
    raw: bytes
    body: dict[str, Any]
    content_type: str = ""  # of a body that is no JSON

    @property
    def model(self) -> str | None:
        name = self.body.get("model")
        return name if isinstance(name, str) else None

    @property
    def generates_text(self) -> bool:
        return self.path in ENDS

    @property
    def stream(self) -> bool:
        return self.generates_text and self.body.get("stream") is True

    def with_defaults(self, fields: Mapping[str, Any]) -> Call:
        """The same with `fields` where the client does not set them; null is not set."""
        body = {**fields, **{name: value for name, value in self.body.items() if value is not None}}
        return Call(self.path, json.dumps(body).encode(), body)

    @property
    def prompt_tokens(self) -> int:
        return len(self.raw) // BYTES_PER_TOKEN + 1

    def conversation(self) -> str:
        """What stays the same during a conversation: its key or user where given, else how it begins."""
        for key in ("prompt_cache_key", "conversation", "user"):
            value = self.body.get(key)
            if isinstance(value, str) and value:
                return f"{key}:{value}"
        messages = self.body.get("messages")
        if isinstance(messages, list):
            beginning = [m for m in messages if isinstance(m, dict) and m.get("role") in ("system", "developer")][:1]
            beginning += [m for m in messages if isinstance(m, dict) and m.get("role") == "user"][:1]
            return json.dumps([message.get("content") for message in beginning], sort_keys=True, default=str)
        return json.dumps(self.body.get("prompt"), default=str)[:512]


def reported_prefill_rate(answer: bytes) -> float | None:
    """Tokens/s at which the engine read the prompt, out of its own timings; what lay in its cache is not among them.

    `answer` is the end of a stream, or a whole answer: llama.cpp's `timings`, or mistral.rs' `usage.avg_*`. Where that
    does not say how much was cached, the whole prompt counts as read. None where it reports nothing, or so few tokens
    that the figure is mostly overhead.
    """
    if (timings := LLAMA_CPP_PREFILL.search(answer)) is not None:
        tokens, seconds = int(timings[1]), float(timings[2]) / 1000
        return tokens / seconds if tokens >= LEAST_TOKENS and seconds > 0 else None
    rate, whole, cached = (find.search(answer) for find in (MISTRAL_RS_PREFILL, PROMPT_TOKENS, CACHED_TOKENS))
    n_prompt = int(whole[1]) if whole else 0
    n_read = n_prompt - (int(cached[1]) if cached else 0)
    return float(rate[1]) * n_read / n_prompt or None if rate and n_read >= LEAST_TOKENS else None


def reported_cached(answer: bytes) -> tuple[int, int] | None:
    """Tokens of the prompt that lay in the engine's cache, and all of them, out of the end of its answer."""
    cached = CACHED_TOKENS.search(answer)
    computed, whole = COMPUTED_TOKENS.search(answer), PROMPT_TOKENS.search(answer)
    if cached is None or (computed is None and whole is None):
        return None
    n_cached = int(cached[1])
    n_prompt = n_cached + int(computed[1]) if computed is not None else int(whole[1]) if whole is not None else 0
    return (min(n_cached, n_prompt), n_prompt) if n_prompt else None


def parse(path: str, raw: bytes, content_type: str = "") -> Call:
    """The request; Refusal 400 when its body is not a JSON object in UTF-8. A form (multipart) is not read."""
    if content_type.lower().startswith("multipart/"):
        return Call(path, raw, {}, content_type)
    try:
        body = STRICT_JSON.decode(raw.decode("utf-8-sig"))
        if SURROGATE.search(raw):
            json.dumps(body, ensure_ascii=False).encode()  # half a surrogate pair is no character
        if raw.count(b"[") + raw.count(b"{") > DEEPEST and _is_deeper(body, DEEPEST):
            raise ValueError(f"it is nested deeper than {DEEPEST} levels")
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the request body is not valid JSON: {why_no_json(error)}") from None
    if not isinstance(body, dict):
        raise Refusal(400, "the request body must be a JSON object")
    if "model" in body and not isinstance(body["model"], str | None):
        raise Refusal(400, "model must be a string")
    if "stream" in body and not isinstance(body["stream"], bool | None):
        raise Refusal(400, "stream must be true or false")
    return Call(path, raw, body)


def _is_deeper(value: Any, levels: int) -> bool:
    level = [value]
    for _ in range(levels):
        inside = (each.values() if isinstance(each, dict) else each for each in level)
        level = [one for items in inside for one in items if isinstance(one, dict | list)]
    return bool(level)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is beyond what a number can hold")
    return number


def why_no_json(error: Exception) -> str:
    """What reading a text as JSON raised, in words for whoever wrote it."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is no UTF-8"
    if isinstance(error, UnicodeEncodeError):
        return "a surrogate without its other half"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


STRICT_JSON = json.JSONDecoder(parse_constant=_no_number, parse_float=_number)
