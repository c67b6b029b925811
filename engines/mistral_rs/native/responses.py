"""Response bodies and stream chunks in OpenAI's shapes, from the pieces of a generation.

`timings` and `id` beside a log-probability as llama.cpp's server has them, so that one client reads both."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from engines.mistral_rs.native.requests import Json


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Token counts of one generation, and the engine's own clock in ms where it reported one."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None
    prompt_ms: float | None = None
    predicted_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One step of a generation, whatever engine it comes from; `finish` only on the last.

    `starts` holds for each of `logprobs` the UTF-8 byte of the text at which its token begins, -1 for reasoning.
    """

    content: str = ""
    reasoning: str = ""
    logprobs: tuple[Json, ...] = ()
    starts: tuple[int, ...] = ()
    tool_calls: tuple[Json, ...] = ()
    finish: str | None = None
    usage: Usage | None = None


def usage_body(usages: list[Usage], n: int = 1) -> Json:
    """OpenAI's usage over all generations of one request; a prompt with *n* choices is counted once."""
    prompt = sum(usage.prompt_tokens for usage in usages[::n])
    completion = sum(usage.completion_tokens for usage in usages)
    body: Json = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    cached = [usage.cached_tokens for usage in usages if usage.cached_tokens is not None]
    return body | ({"prompt_tokens_details": {"cached_tokens": sum(cached)}} if cached else {})


def timings_body(usages: list[Usage]) -> Json:
    """The engine's clock under llama.cpp's names; what it did not report, or reported as inf or NaN, is left out."""
    body: Json = {
        "cache_n": sum(usage.cached_tokens or 0 for usage in usages),
        "prompt_n": sum(usage.prompt_tokens - (usage.cached_tokens or 0) for usage in usages),
        "predicted_n": sum(usage.completion_tokens for usage in usages),
    }
    for phase in ("prompt", "predicted"):
        times = [getattr(usage, f"{phase}_ms") for usage in usages]
        known = [time for time in times if time is not None and math.isfinite(time) and time >= 0]
        if len(known) == len(times) and known:
            body[f"{phase}_ms"] = total = sum(known)
            if total > 0:
                body[f"{phase}_per_second"] = 1000 * body[f"{phase}_n"] / total
    return body


def token_entry(token: bytes, logprob: float, *, id: int | None = None) -> Json:
    """One token with its log-probability; text leaves out the bytes that are no whole code point, as llama.cpp does."""
    entry: Json = {"token": token.decode("utf-8", "ignore"), "logprob": logprob, "bytes": list(token)}
    return entry if id is None else {"id": id, **entry}


def legacy_logprobs(entries: list[Json], offset: int = 0) -> Json:
    """The log-probabilities of /v1/completions; llama.cpp's `content` list rides along."""
    offsets = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry["token"])
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries],
        "text_offset": offsets,
        "content": entries,
    }


@dataclass(frozen=True, kw_only=True)
class Head:
    """What all chunks of one response share."""

    id: str
    created: int
    model: str
    chat: bool

    def body(self, *, stream: bool, choices: list[Json]) -> Json:
        kind = "text_completion" if not self.chat else "chat.completion.chunk" if stream else "chat.completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def choice(index: int, *, finish: str | None = None, logprobs: Json | None = None, **content: Any) -> Json:
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}


def piece_choice(head: Head, index: int, piece: Piece, offset: int = 0) -> Json | None:
    """The choice that carries a piece's content; None for a piece that holds nothing but its end."""
    if not (piece.content or piece.reasoning or piece.logprobs or piece.tool_calls):
        return None
    entries = list(piece.logprobs)
    if not head.chat:
        return choice(index, text=piece.content, logprobs=legacy_logprobs(entries, offset) if entries else None)
    delta: Json = {}
    if piece.reasoning:
        delta["reasoning_content"] = piece.reasoning
    if piece.content or (entries and not delta):
        delta["content"] = piece.content
    if piece.tool_calls:
        delta["tool_calls"] = list(piece.tool_calls)
    return choice(index, delta=delta, logprobs={"content": entries} if entries else None)


def whole_choice(head: Head, index: int, pieces: list[Piece], echo: str = "") -> Json:
    """One choice of a response that is not streamed, put together from its pieces."""
    content = "".join(piece.content for piece in pieces)
    entries = [entry for piece in pieces for entry in piece.logprobs]
    finish = next((piece.finish for piece in reversed(pieces) if piece.finish), None)
    if not head.chat:
        logprobs = legacy_logprobs(entries, len(echo)) if entries else None
        return choice(index, text=echo + content, finish=finish, logprobs=logprobs)
    calls = [call for piece in pieces for call in piece.tool_calls]
    message: Json = {"role": "assistant", "content": None if calls and not content else content}
    reasoning = "".join(piece.reasoning for piece in pieces)
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [{key: call[key] for key in ("id", "type", "function")} for call in calls]
    logprobs = {"content": entries} if entries else None
    return choice(index, message=message, finish=finish, logprobs=logprobs)
