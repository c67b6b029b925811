"""Where an answer ends: stop strings, the end token, max_tokens, and prompts up to and beyond the context."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from engines.units import number_of
from tasks.evidence.behaviours.base import (
    COMMON,
    COMMON_TOKENS,
    ENDING_TOKENS,
    MARKERS,
    Asker,
    NotApplicable,
    Observation,
    behaviour,
    failed,
    holds,
    refusal,
)
from tasks.evidence.behaviours.caller import count


def stop_word(text: str) -> str:
    """A word of `text`, after its first, at whose first occurrence the text can be cut."""
    words = re.findall(r"[A-Za-z]{3,}", text)
    for word in words[1:]:
        if text.find(word) > len(text) // 4:
            return str(word)
    raise NotApplicable(f"no word to stop at in {text!r}")


def stops(ask: Asker, shape: Callable[[str], Any]) -> Observation:
    """Whether a stop word, given as `shape(word)`, cuts the greedy answer just before it."""
    word = stop_word(ask.plain.text)
    reply = ask.common(stop=shape(word))
    return cut_at(ask, word, reply.text, [reply.finish])


def cut_at(ask: Asker, word: str, text: str, finishes: list[str | None]) -> Observation:
    """Whether `text` is the greedy answer up to `word`, ended once and for the reason stop."""
    expected = ask.plain.text.partition(word)[0]
    good = text.rstrip() == expected.rstrip() and finishes == ["stop"]
    return holds(good, f"stop {word!r}: {text!r}, finish {finishes}; expected {expected!r}")


@behaviour("stop", "a stop string ends the text just before it, with finish reason stop", required=True)
def stop_string(ask: Asker) -> Observation:
    return stops(ask, lambda word: word)


@behaviour("stop", "the last of four stop strings works too", required=True)
def stop_list(ask: Asker) -> Observation:
    return stops(ask, lambda word: ["@@1", "@@2", "@@3", word])


@behaviour("stop", "a fifth stop string, one over OpenAI's limit, works too")
def stop_five(ask: Asker) -> Observation:
    return stops(ask, lambda word: ["@@1", "@@2", "@@3", "@@4", word])


@behaviour("stop", "a stream ends at a stop string and shows no part of it", required=True)
def stop_in_stream(ask: Asker) -> Observation:
    word = stop_word(ask.plain.text)
    stream = ask.stream(COMMON, max_tokens=COMMON_TOKENS, stop=[word]).served()
    return cut_at(ask, word, stream.text, stream.finishes)


@behaviour("stop", "an answer ends at the model's own end token, which is not shown", required=True)
def ends_by_itself(ask: Asker) -> Observation:
    _, reply = ask.ending
    good = reply.finish == "stop" and not MARKERS.search(reply.text)
    return holds(good, f"{reply.text!r}, finish {reply.finish}, {number_of(reply.used('completion_tokens'), 'token')}")


@behaviour("stop", "ignore_eos generates on past the model's own end")
def ignore_eos(ask: Asker) -> Observation:
    prompt, before = ask.ending
    reply = ask.chat(prompt, max_tokens=ENDING_TOKENS, ignore_eos=True)
    tokens = reply.used("completion_tokens")
    good = tokens == ENDING_TOKENS and reply.finish == "length"
    return holds(
        good, f"{number_of(before.used('completion_tokens'), 'token')} without, {tokens} with, finish {reply.finish}"
    )


@behaviour("limits", "max_tokens is the number of tokens that come, with finish reason length", required=True)
def max_tokens(ask: Asker) -> Observation:
    reply = ask.chat(COMMON, max_tokens=5)
    tokens = reply.used("completion_tokens")
    shorter = len(reply.text) < len(ask.plain.text) and ask.plain.text.startswith(reply.text)
    return holds(
        tokens == 5 and reply.finish == "length" and shorter, f"{number_of(tokens, 'token')}, finish {reply.finish}"
    )


@behaviour("limits", "max_completion_tokens limits the answer as max_tokens does", required=True)
def max_completion_tokens(ask: Asker) -> Observation:
    # streamed and left early: an engine that ignores the field would generate until its context is full
    stream = ask.stream(
        COMMON, max_tokens=None, max_completion_tokens=5, stream_options={"include_usage": True}, leave_after=16
    ).served()
    if not stream.finishes:
        return failed(f"still generating after {number_of(len(stream.arrivals_s), 'piece')}")
    tokens = count(stream.usages[-1] if stream.usages else None, "completion_tokens")
    return holds(
        tokens == 5 and stream.finishes == ["length"], f"{number_of(tokens, 'token')}, finish {stream.finishes}"
    )


@behaviour("limits", "max_tokens beyond the context is accepted", required=True)
def max_tokens_beyond_context(ask: Asker) -> Observation:
    asked = 10 * (ask.context_tokens or 100_000)
    stream = ask.stream(COMMON, max_tokens=asked, leave_after=2).served()
    return holds(
        bool(stream.arrivals_s), f"max_tokens {asked}: {number_of(len(stream.arrivals_s), 'piece')} read, then left"
    )


LONG_PROMPT_WORDS = 128
LONG_WORDS = "the cat sat on a mat and then it ran to an old red barn"


def words(number: int) -> str:
    """`number` common words; at least as many tokens in every tokenizer that has no multi-word tokens."""
    cycle = LONG_WORDS.split()
    return " ".join(cycle[place % len(cycle)] for place in range(number))


@behaviour("limits", "a prompt of more than a hundred tokens reaches the model whole", required=True)
def long_prompt(ask: Asker) -> Observation:
    number = min(LONG_PROMPT_WORDS, (ask.context_tokens or 2048) // 3)
    tokens = ask.prompt_tokens(words(number))
    return holds(tokens >= number, f"{number_of(number, 'word')}: {number_of(tokens, 'prompt token')}")


def too_long(ask: Asker) -> str:
    """A prompt of more tokens than the context holds."""
    if ask.context_tokens is None:
        raise NotApplicable("the context is not stated and the engine does not report it")
    return words(ask.context_tokens + 64)


@behaviour("limits", "a prompt longer than the context is refused with 400 and an error to act on", required=True)
def overflow(ask: Asker) -> Observation:
    reply = ask.chat(too_long(ask), max_tokens=1)
    if reply.status == 200:
        return failed(
            f"too long for a context of {ask.context_tokens}: served {number_of(reply.used('prompt_tokens'), 'token')}"
        )
    return holds(reply.status == 400 and bool(reply.error.get("message")), refusal(reply))


@behaviour("limits", "a stream whose prompt is longer than the context is refused before it starts", required=True)
def overflow_stream(ask: Asker) -> Observation:
    stream = ask.stream(too_long(ask), max_tokens=1, leave_after=2)
    if stream.refusal is None:
        return failed(f"200, then {json.dumps(stream.error or stream.chunks[:1])[:160]}")
    return holds(stream.refusal.status == 400 and bool(stream.refusal.error.get("message")), refusal(stream.refusal))
