"""Sampling parameters and logprobs."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

from engines.units import number_of
from tasks.evidence.behaviours.base import (
    COMMON,
    REPEATING,
    Asker,
    NotApplicable,
    Observation,
    behaviour,
    failed,
    holds,
)
from tasks.evidence.behaviours.caller import ApiReply, Json


@behaviour("sampling", "temperature 0 gives the same text twice", required=True)
def greedy_repeats(ask: Asker) -> Observation:
    again = ask.common().text
    return holds(again == ask.plain.text, f"{ask.plain.text!r} and {again!r}")


@behaviour("sampling", "a high temperature gives different texts", required=True)
def temperature_varies(ask: Asker) -> Observation:
    texts: list[str] = []
    while len(texts) < 4 and len(set(texts)) < 2:
        texts.append(ask.chat(COMMON, temperature=1.5).text)
    return holds(
        len(set(texts)) > 1,
        f"{number_of(len(texts), 'answer')} at temperature 1.5: {number_of(len(set(texts)), 'text')}",
    )


@behaviour("sampling", "the same seed repeats a sampled text, another seed changes it")
def seed(ask: Asker) -> Observation:
    first, again = (ask.chat(COMMON, temperature=1.0, seed=7).text for _ in range(2))
    if first != again:
        return failed(f"seed 7 twice: {first!r} and {again!r}")
    other = ask.chat(COMMON, temperature=1.0, seed=8).text
    return holds(first != other, f"seed 7 twice {first!r}, seed 8 {other!r}")


@behaviour("sampling", "a tiny top_p leaves only the most likely token at any temperature")
def top_p(ask: Asker) -> Observation:
    return samples_greedily(ask, top_p=0.0001)


@behaviour("sampling", "top_k 1 leaves only the most likely token at any temperature")
def top_k(ask: Asker) -> Observation:
    return samples_greedily(ask, top_k=1)


def samples_greedily(ask: Asker, **params: Any) -> Observation:
    """Whether `params` make a hot sampler return the greedy text."""
    text = ask.chat(COMMON, temperature=1.5, **params).text
    return holds(ask.plain.text.startswith(text) and bool(text), f"{params}: {text!r}, greedy {ask.plain.text!r}")


@behaviour("sampling", "logit_bias -100 bans a token")
def logit_bias(ask: Asker) -> Observation:
    reply = ask.chat(COMMON, max_tokens=1, logprobs=True, top_logprobs=1)
    if reply.status != 200:
        reply = ask.chat(COMMON, max_tokens=1)
    token = token_id(ask, reply)
    if token is None:
        raise NotApplicable("the engine does not show the id of a token")
    banned = ask.chat(COMMON, max_tokens=1, logit_bias={str(token): -100}).text
    return holds(reply.text != banned, f"without token {token}: {banned!r} instead of {reply.text!r}")


def token_id(ask: Asker, reply: ApiReply) -> int | None:
    """The id of the only token in `reply`: from its logprobs, else from the engine's /tokenize."""
    entry = next(iter(logprob_entries(reply.choice)), {})
    top = (entry.get("top_logprobs") or [{}])[0]
    for candidate in (entry.get("id"), entry.get("token_id"), top.get("id"), top.get("token")):
        if isinstance(candidate, int):
            return candidate
    tokens = tokenized(ask, reply.text)
    return tokens[-1] if tokens else None


def tokenized(ask: Asker, text: str) -> list[int]:
    """Token ids by POST /tokenize, in llama.cpp's and vLLM's spelling at once; empty when there is no such route."""
    reply = ask.post("/tokenize", {"content": text, "model": ask.endpoint.model_id, "prompt": text})
    tokens = reply.body.get("tokens") if reply.status == 200 and isinstance(reply.body, dict) else None
    return tokens if isinstance(tokens, list) and all(isinstance(token, int) for token in tokens) else []


@behaviour("sampling", "frequency_penalty changes a repeating text")
def frequency_penalty(ask: Asker) -> Observation:
    return penalised(ask, frequency_penalty=2.0)


@behaviour("sampling", "presence_penalty changes a repeating text")
def presence_penalty(ask: Asker) -> Observation:
    return penalised(ask, presence_penalty=2.0)


def penalised(ask: Asker, **penalty: float) -> Observation:
    """Whether `penalty` changes the greedy continuation of a repeating prompt."""
    free, held = ask.repeating.text, ask.chat(REPEATING, max_tokens=16, **penalty).text
    return holds(free != held, f"without {free!r}, with {held!r}")


@behaviour("sampling", "n = 2 gives two choices with text")
def two_choices(ask: Asker) -> Observation:
    reply = ask.chat(COMMON, n=2, temperature=1.0).served()
    texts = [(choice.get("message") or {}).get("content") for choice in reply.body.get("choices") or []]
    return holds(len(texts) == 2 and all(texts), f"{number_of(len(texts), 'choice')}: {texts}")


def logprob_entries(holder: Json) -> list[Json]:
    """The per-token entries of a choice's `logprobs.content`; empty when they are not in that place."""
    content = (holder.get("logprobs") or {}).get("content")
    return content if isinstance(content, list) else []


def spells(entries: list[Json], text: str) -> bool:
    """Whether the entries' tokens, joined, are `text`, and each logprob is a number not above 0."""
    numbers = all(isinstance(entry.get("logprob"), int | float) and entry["logprob"] <= 1e-6 for entry in entries)
    return numbers and "".join(str(entry.get("token")) for entry in entries).strip() == text.strip()


@behaviour("logprobs", "logprobs come one a token, at most 0, and their tokens spell the text")
def logprobs(ask: Asker) -> Observation:
    reply = ask.chat(COMMON, logprobs=True)
    entries, tokens = logprob_entries(reply.choice), reply.used("completion_tokens")
    first = json.dumps(entries[:1] or reply.choice.get("logprobs"))[:160]
    return holds(len(entries) == tokens > 0 and spells(entries, reply.text), f"{len(entries)} for {tokens}: {first}")


@behaviour("logprobs", "top_logprobs gives that many alternatives, likeliest first, of probability 1 at most")
def top_logprobs(ask: Asker) -> Observation:
    entries = logprob_entries(ask.chat(COMMON, max_tokens=4, logprobs=True, top_logprobs=3).choice)
    if not entries:
        return failed("no logprobs.content")
    odd = next((entry for entry in entries if not ranked(entry, 3)), None)
    return holds(
        odd is None,
        f"{number_of(len(entries), 'token')}, 3 alternatives each" if odd is None else json.dumps(odd)[:200],
    )


def ranked(entry: Json, number: int) -> bool:
    """Whether an entry's alternatives are `number` texts, sorted, led by the greedy choice, and sum to 1 at most."""
    top = entry.get("top_logprobs") or []
    if len(top) != number or not all(isinstance(alternative.get("token"), str) for alternative in top):
        return False
    values = [alternative["logprob"] for alternative in top]
    falling = all(left >= right for left, right in pairwise(values))
    return falling and sum(2.718281828459045**value for value in values) <= 1.001 and top[0]["token"] == entry["token"]


@behaviour("logprobs", "a stream carries logprobs in the shape of the complete answer")
def logprobs_in_stream(ask: Asker) -> Observation:
    stream = ask.stream(COMMON, logprobs=True).served()
    entries = [entry for choice in stream.choices for entry in logprob_entries(choice)]
    return holds(
        bool(entries) and spells(entries, stream.text), f"{number_of(len(entries), 'entry')} for {stream.text!r}"
    )
