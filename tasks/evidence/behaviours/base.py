"""What an OpenAI-style server may be asked for, as small functions that prove the request took effect.

A 200 is not support: an engine that drops `stop`, `seed` or `tools` without a word still answers 200. So every
behaviour compares what came back with what the parameter had to change. The prompts ask nothing of the model's
wits: expected texts are taken from the engine's own greedy answers, or forced by a grammar.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, pairwise
from types import MappingProxyType
from typing import Any, Literal

import httpx

from tasks.evidence.behaviours.caller import Caller, Json, Messages, Reply, Streamed, count, user

Kind = Literal["passed", "failed", "not_applicable", "errored"]
Group = Literal[
    "chat", "stream", "usage", "stop", "limits", "sampling", "logprobs", "tools", "json",
    "unicode", "errors", "cancel", "concurrency", "models", "security",
]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What one behaviour did: the kind, a short text of what was seen, and a little of the raw answer."""

    outcome: Kind
    observed: str
    raw: Json = field(default_factory=dict)


@dataclass(frozen=True)
class Behaviour:
    """One registered behaviour: `probe` asks an engine and returns the Outcome."""

    name: str
    claim: str
    group: Group
    required: bool
    probe: Callable[[Asker], Outcome]


def passed(observed: str, **raw: Any) -> Outcome:
    """The claim holds."""
    return Outcome("passed", observed, raw)


def failed(observed: str, **raw: Any) -> Outcome:
    """The claim does not hold."""
    return Outcome("failed", observed, raw)


def not_applicable(observed: str, **raw: Any) -> Outcome:
    """The claim could not be tried here, for the reason observed."""
    return Outcome("not_applicable", observed, raw)


def holds(claim: bool, observed: str, **raw: Any) -> Outcome:
    """`passed` or `failed`, with the same observation either way."""
    return passed(observed, **raw) if claim else failed(observed, **raw)


_registry: dict[str, Behaviour] = {}

COMMON = "Tell me a story."
COMMON_TOKENS = 12


class Asker(Caller):
    """A caller that keeps the answers which several behaviours read, so that each is generated once."""

    @cached_property
    def plain(self) -> Reply:
        """The greedy answer to the common prompt, complete."""
        return self.chat(COMMON, max_tokens=COMMON_TOKENS).served()

    @cached_property
    def bare_stream(self) -> Streamed:
        """The same answer, streamed, without asking for usage."""
        return self.stream(COMMON, max_tokens=COMMON_TOKENS).served()

    @cached_property
    def usage_stream(self) -> Streamed:
        """The same answer, streamed, asking for usage."""
        return self.stream(COMMON, max_tokens=COMMON_TOKENS, stream_options={"include_usage": True}).served()

    @cached_property
    def chunk_gap_s(self) -> float:
        """The mean gap between two content chunks of an undisturbed stream, in seconds; 0 for a single chunk."""
        arrivals = self.bare_stream.arrivals_s
        return (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1) if len(arrivals) > 1 else 0.0

    @cached_property
    def context_tokens(self) -> int | None:
        """The context of one sequence: as the endpoint states, else as llama.cpp's /props or vLLM's model list say."""
        if self.endpoint.context_tokens is not None:
            return self.endpoint.context_tokens
        props = self.get("/props").body
        settings = props.get("default_generation_settings") if isinstance(props, dict) else None
        if isinstance(settings, dict) and isinstance(settings.get("n_ctx"), int):
            return settings["n_ctx"]
        models = self.get("/v1/models").body
        listed = models.get("data") if isinstance(models, dict) else None
        return next((entry["max_model_len"] for entry in listed or [] if entry.get("max_model_len")), None)

    @cached_property
    def ending(self) -> tuple[str, Reply] | None:
        """The first prompt whose greedy answer ends by itself within the limit, with that answer."""
        for prompt in ENDING:
            reply = self.chat(prompt, max_tokens=ENDING_TOKENS)
            if reply.finish == "stop" or MARKERS.search(reply.text):
                return prompt, reply
        return None

    @cached_property
    def repeating(self) -> Reply:
        """The greedy answer to a repeating prompt."""
        return self.chat(REPEATING, max_tokens=16)

    @cached_property
    def tool_growth(self) -> int:
        """By how many tokens the prompt grows when a tool is offered; 0 when the template cannot show tools."""
        return self.prompt_tokens(WEATHER_QUESTION, tools=[WEATHER]) - self.prompt_tokens(WEATHER_QUESTION)

    @cached_property
    def calling(self) -> tuple[list[Json], Reply]:
        """A conversation that makes the model call a tool, if one of two does, and the greedy answer to it."""
        for answered in (False, True):
            turns = weather_turns(answered=answered)
            reply = self.chat(turns, tools=[WEATHER, CLOCK], tool_choice="auto", max_tokens=CALL_TOKENS)
            if reply.status == 200 and (reply.tool_calls or leaks_call(reply.text)):
                break
        return turns, reply.served()

    def prompt_tokens(self, messages: Messages, **params: Any) -> int:
        """Tokens of the rendered prompt, as the engine counts them."""
        return self.chat(messages, **({"max_tokens": 1} | params)).used("prompt_tokens")


def behaviour(
    group: Group, claim: str, *, required: bool = False
) -> Callable[[Callable[[Asker], Outcome]], Callable[[Asker], Outcome]]:
    """Registers a function under its own name; `required` puts it into the set a tool-calling agent needs."""

    def register(probe: Callable[[Asker], Outcome]) -> Callable[[Asker], Outcome]:
        _registry[probe.__name__] = Behaviour(probe.__name__, claim, group, required, probe)
        return probe

    return register


# chat


@behaviour("chat", "a chat request is answered by an assistant message with text", required=True)
def chat_answer(ask: Asker) -> Outcome:
    role, text = ask.plain.message.get("role"), ask.plain.text
    return holds(role == "assistant" and bool(text.strip()), f"role {role}, text {text!r}")


@behaviour("chat", "two answers carry different ids, a creation time and the object name chat.completion")
def chat_ids(ask: Asker) -> Outcome:
    first, second = ask.plain.served().body, ask.chat("Hi", max_tokens=1).served().body
    ids, created, name = (first.get("id"), second.get("id")), first.get("created"), first.get("object")
    good = all(ids) and ids[0] != ids[1] and isinstance(created, int) and name == "chat.completion"
    return holds(good, f"ids {ids}, created {created!r}, object {name!r}")


@behaviour("chat", "the answer names the model that was asked for")
def chat_model_name(ask: Asker) -> Outcome:
    name = ask.plain.served().body.get("model")
    return holds(name == ask.endpoint.model_id, f"model {name!r}, asked for {ask.endpoint.model_id!r}")


@behaviour("chat", "the system message reaches the model", required=True)
def system_message(ask: Asker) -> Outcome:
    return message_reaches_prompt(ask, "system")


@behaviour("chat", "a developer message reaches the model")
def developer_message(ask: Asker) -> Outcome:
    return message_reaches_prompt(ask, "developer")


def message_reaches_prompt(ask: Asker, role: str) -> Outcome:
    """Whether a longer message of `role` makes the prompt longer by about its words."""
    short, extra = "Be kind.", " Also be brief, honest, calm, clear, warm, and exact."
    sizes = [ask.prompt_tokens([{"role": role, "content": text}, user("Hi")]) for text in (short, short + extra)]
    grown = sizes[1] - sizes[0]
    return holds(grown >= len(extra.split()), f"{len(extra.split())} more words: {grown} more prompt tokens")


@behaviour("chat", "earlier turns of a conversation reach the model", required=True)
def multi_turn(ask: Asker) -> Outcome:
    earlier = [user("My cat is called Tom."), {"role": "assistant", "content": "That is a fine name for a cat."}]
    grown = ask.prompt_tokens([*earlier, user("Hi")]) - ask.prompt_tokens([earlier[0], user("Hi")])
    return holds(grown >= 8, f"an assistant turn of 8 words: {grown} more prompt tokens")


@behaviour("chat", "content given as a list of text parts reads like the same plain string", required=True)
def content_parts(ask: Asker) -> Outcome:
    parts = ask.chat([{"role": "user", "content": [{"type": "text", "text": COMMON}]}], max_tokens=COMMON_TOKENS)
    sizes = parts.used("prompt_tokens"), ask.plain.used("prompt_tokens")
    same = sizes[0] == sizes[1] and parts.text == ask.plain.text
    return holds(same, f"prompt tokens {sizes[0]} and {sizes[1]}, texts {parts.text!r} and {ask.plain.text!r}")


@behaviour("chat", "fields the engine does not know (user, metadata, store) change nothing", required=True)
def extra_fields(ask: Asker) -> Outcome:
    extra = {"user": "someone", "metadata": {"a": "b"}, "store": False, "x_unknown": 1}
    text = ask.chat(COMMON, max_tokens=COMMON_TOKENS, **extra).text
    return holds(text == ask.plain.text, f"with {', '.join(extra)}: {text!r}")


@behaviour("chat", "a prompt answered before is answered the same from the prompt cache", required=True)
def cached_prompt(ask: Asker) -> Outcome:
    ask.chat(COMMON + " Make it sad.", max_tokens=1).served()
    again = ask.chat(COMMON, max_tokens=COMMON_TOKENS)
    return holds(again.text == ask.plain.text, f"first {ask.plain.text!r}, later {again.text!r}")


@behaviour("chat", "one connection serves several answers, a stream among them")
def keep_alive(ask: Asker) -> Outcome:
    opened: list[str] = []

    def trace(event: str, _: Json) -> None:
        if event == "connection.connect_tcp.started":
            opened.append(event)

    requests: list[tuple[str, str, Json | None]] = [
        ("GET", "/v1/models", None),
        ("POST", "/v1/chat/completions", ask.body("Hi", max_tokens=1, stream=True)),
        ("GET", "/v1/models", None),
    ]
    with ask.client(ask.endpoint.headers) as http:
        for method, path, body in requests:
            answer = http.request(method, path, json=body, extensions={"trace": trace})
            if answer.status_code != 200:
                return failed(f"HTTP {answer.status_code} on a kept connection")
    return holds(len(opened) == 1, f"3 answers over {len(opened)} connections")


# stream


@behaviour("stream", "a streamed answer comes as server-sent events in several pieces of text", required=True)
def stream_pieces(ask: Asker) -> Outcome:
    stream = ask.bare_stream
    good = "text/event-stream" in stream.content_type and len(stream.arrivals_s) > 1
    return holds(good, f"{len(stream.arrivals_s)} pieces with text, content type {stream.content_type!r}")


@behaviour("stream", "every chunk is JSON with the shape that client libraries read", required=True)
def stream_shape(ask: Asker) -> Outcome:
    for stream in (ask.bare_stream, ask.usage_stream):
        if stream.undecodable:
            return failed(f"not JSON or not UTF-8: {stream.undecodable[0]!r}")
        odd = next((chunk for chunk in stream.chunks if not well_shaped(chunk)), None)
        if odd is not None:
            return failed(f"odd chunk {json.dumps(odd)[:200]}")
    return passed(f"{len(ask.bare_stream.chunks)} and {len(ask.usage_stream.chunks)} chunks")


def well_shaped(chunk: Json) -> bool:
    """Whether `chunk` is a chat.completion.chunk whose choices all have an index and a delta object.

    An empty list of choices is well shaped only beside usage.
    """
    choices = chunk.get("choices")
    if chunk.get("object") != "chat.completion.chunk" or not isinstance(choices, list):
        return False
    if not choices:
        return isinstance(chunk.get("usage"), dict)
    return all(isinstance(choice.get("delta"), dict) and "index" in choice for choice in choices)


@behaviour("stream", "a streamed answer opens with the assistant role", required=True)
def stream_role_first(ask: Asker) -> Outcome:
    first = ask.bare_stream.deltas[0] if ask.bare_stream.deltas else {}
    return holds(first.get("role") == "assistant", f"first delta {json.dumps(first)[:120]}")


@behaviour("stream", "the pieces of a greedy stream join to the text of the complete answer", required=True)
def stream_equals_plain(ask: Asker) -> Outcome:
    texts = ask.bare_stream.text, ask.plain.text
    return holds(texts[0] == texts[1], f"streamed {texts[0]!r}, complete {texts[1]!r}")


@behaviour("stream", "a stream ends with [DONE] and nothing after it", required=True)
def stream_done(ask: Asker) -> Outcome:
    stream = ask.bare_stream
    return holds(stream.done and not stream.after_done, f"[DONE] {stream.done}, {stream.after_done} events after it")


@behaviour("stream", "a stream names its finish reason once, after the last piece of text", required=True)
def stream_finish_once(ask: Asker) -> Outcome:
    choices = ask.bare_stream.choices
    ends = [place for place, choice in enumerate(choices) if choice.get("finish_reason")]
    texts = [place for place, choice in enumerate(choices) if (choice.get("delta") or {}).get("content")]
    good = len(ends) == 1 and ask.bare_stream.finishes == ["length"] and (not texts or texts[-1] <= ends[0])
    return holds(good, f"finish reasons {ask.bare_stream.finishes} at chunks {ends} of {len(choices)}")


@behaviour("stream", "all chunks of one stream carry the same id")
def stream_one_id(ask: Asker) -> Outcome:
    ids = {chunk.get("id") for chunk in ask.bare_stream.chunks}
    return holds(len(ids) == 1 and None not in ids, f"{len(ids)} ids in {len(ask.bare_stream.chunks)} chunks")


# usage


@behaviour("usage", "prompt and completion tokens add up to the total", required=True)
def usage_adds_up(ask: Asker) -> Outcome:
    prompt, completion, total = (ask.plain.used(f"{part}_tokens") for part in ("prompt", "completion", "total"))
    good = prompt > 0 and completion > 0 and prompt + completion == total
    return holds(good, f"{prompt} + {completion} = {total}")


@behaviour("usage", "a stream that asks for usage gets the numbers of the complete answer", required=True)
def usage_in_stream(ask: Asker) -> Outcome:
    usages = ask.usage_stream.usages
    if not usages:
        return failed("no chunk carries usage")
    keys = ("prompt_tokens", "completion_tokens")
    streamed, plain = [count(usages[-1], key) for key in keys], [ask.plain.used(key) for key in keys]
    return holds(streamed == plain, f"streamed {streamed}, complete {plain} (prompt, completion)")


@behaviour("usage", "a stream that does not ask for usage gets none")
def usage_only_when_asked(ask: Asker) -> Outcome:
    carrying = len(ask.bare_stream.usages)
    return holds(carrying == 0, f"{carrying} of {len(ask.bare_stream.chunks)} chunks carry usage unasked")


# stop


def stop_word(text: str) -> str:
    """A word of `text`, after its first, at whose first occurrence the text can be cut; empty when there is none."""
    words = re.findall(r"[A-Za-z]{3,}", text)
    return next((word for word in words[1:] if text.find(word) > len(text) // 4), "")


def stops(ask: Asker, shape: Callable[[str], Any]) -> Outcome:
    """Whether a stop word, given as `shape(word)`, cuts the greedy answer just before it."""
    word = stop_word(ask.plain.text)
    if not word:
        return not_applicable(f"no word to stop at in {ask.plain.text!r}")
    cut = ask.chat(COMMON, max_tokens=COMMON_TOKENS, stop=shape(word))
    expected = ask.plain.text.partition(word)[0]
    good = cut.text.rstrip() == expected.rstrip() and cut.finish == "stop"
    return holds(good, f"stop {word!r}: {cut.text!r}, finish {cut.finish}; expected {expected!r}")


@behaviour("stop", "a stop string ends the text just before it, with finish reason stop", required=True)
def stop_string(ask: Asker) -> Outcome:
    return stops(ask, lambda word: word)


@behaviour("stop", "the last of four stop strings works too", required=True)
def stop_list(ask: Asker) -> Outcome:
    return stops(ask, lambda word: ["@@1", "@@2", "@@3", word])


@behaviour("stop", "a fifth stop string, one over OpenAI's limit, works too")
def stop_five(ask: Asker) -> Outcome:
    return stops(ask, lambda word: ["@@1", "@@2", "@@3", "@@4", word])


@behaviour("stop", "a stream ends at a stop string and shows no part of it", required=True)
def stop_in_stream(ask: Asker) -> Outcome:
    word = stop_word(ask.plain.text)
    if not word:
        return not_applicable(f"no word to stop at in {ask.plain.text!r}")
    stream = ask.stream(COMMON, max_tokens=COMMON_TOKENS, stop=[word]).served()
    expected = ask.plain.text.partition(word)[0]
    good = stream.text.rstrip() == expected.rstrip() and stream.finishes == ["stop"]
    return holds(good, f"stop {word!r}: {stream.text!r}, finish {stream.finishes}; expected {expected!r}")


ENDING = ("Count: one, two, three,", "Say: ok", "What is 2 + 2? Answer with one number.")
ENDING_TOKENS = 24
MARKERS = re.compile(r"<\|?[a-z_]*(?:im_end|im_start|eot|end_of_turn|endoftext)[a-z_]*\|?>|</s>")


@behaviour("stop", "an answer ends at the model's own end token, which is not shown", required=True)
def ends_by_itself(ask: Asker) -> Outcome:
    found = ask.ending
    if found is None:
        return not_applicable(f"no answer to {len(ENDING)} prompts ended within {ENDING_TOKENS} tokens")
    reply = found[1]
    good = reply.finish == "stop" and not MARKERS.search(reply.text)
    return holds(good, f"{reply.text!r}, finish {reply.finish}, {reply.used('completion_tokens')} tokens")


@behaviour("stop", "ignore_eos generates on past the model's own end")
def ignore_eos(ask: Asker) -> Outcome:
    found = ask.ending
    if found is None:
        return not_applicable(f"no answer to {len(ENDING)} prompts ended within {ENDING_TOKENS} tokens")
    before, reply = found[1].used("completion_tokens"), ask.chat(found[0], max_tokens=ENDING_TOKENS, ignore_eos=True)
    tokens = reply.used("completion_tokens")
    good = tokens == ENDING_TOKENS and reply.finish == "length"
    return holds(good, f"{before} tokens without, {tokens} with, finish {reply.finish}")


# limits


@behaviour("limits", "max_tokens is the number of tokens that come, with finish reason length", required=True)
def max_tokens(ask: Asker) -> Outcome:
    reply = ask.chat(COMMON, max_tokens=5)
    tokens = reply.used("completion_tokens")
    shorter = len(reply.text) < len(ask.plain.text) and ask.plain.text.startswith(reply.text)
    return holds(tokens == 5 and reply.finish == "length" and shorter, f"{tokens} tokens, finish {reply.finish}")


@behaviour("limits", "max_completion_tokens limits the answer as max_tokens does", required=True)
def max_completion_tokens(ask: Asker) -> Outcome:
    # streamed and left early: an engine that ignores the field would generate until its context is full
    stream = ask.stream(
        COMMON, max_tokens=None, max_completion_tokens=5, stream_options={"include_usage": True}, leave_after=16
    ).served()
    if not stream.finishes:
        return failed(f"still generating after {len(stream.arrivals_s)} pieces")
    tokens = count(stream.usages[-1] if stream.usages else None, "completion_tokens")
    return holds(tokens == 5 and stream.finishes == ["length"], f"{tokens} tokens, finish {stream.finishes}")


@behaviour("limits", "max_tokens beyond the context is accepted", required=True)
def max_tokens_beyond_context(ask: Asker) -> Outcome:
    asked = 10 * (ask.context_tokens or 100_000)
    stream = ask.stream(COMMON, max_tokens=asked, leave_after=2).served()
    return holds(bool(stream.arrivals_s), f"max_tokens {asked}: {len(stream.arrivals_s)} pieces read, then left")


LONG_PROMPT_WORDS = 128
LONG_WORDS = "the cat sat on a mat and then it ran to an old red barn"


def words(number: int) -> str:
    """`number` common words; at least as many tokens in every tokenizer that has no multi-word tokens."""
    cycle = LONG_WORDS.split()
    return " ".join(cycle[place % len(cycle)] for place in range(number))


@behaviour("limits", "a prompt of more than a hundred tokens reaches the model whole", required=True)
def long_prompt(ask: Asker) -> Outcome:
    number = min(LONG_PROMPT_WORDS, (ask.context_tokens or 2048) // 3)
    tokens = ask.prompt_tokens(words(number))
    return holds(tokens >= number, f"{number} words: {tokens} prompt tokens")


@behaviour("limits", "a prompt longer than the context is refused with 400 and an error to act on", required=True)
def overflow(ask: Asker) -> Outcome:
    if ask.context_tokens is None:
        return not_applicable("the context is not stated and the engine does not tell")
    number = ask.context_tokens + 64
    reply = ask.chat(words(number), max_tokens=1)
    if reply.status == 200:
        return failed(f"{number} words for a context of {ask.context_tokens}: served {reply.used('prompt_tokens')}")
    return holds(reply.status == 400 and bool(reply.error.get("message")), refusal(reply))


@behaviour("limits", "a stream whose prompt is longer than the context is refused before it starts", required=True)
def overflow_stream(ask: Asker) -> Outcome:
    if ask.context_tokens is None:
        return not_applicable("the context is not stated and the engine does not tell")
    stream = ask.stream(words(ask.context_tokens + 64), max_tokens=1, leave_after=2)
    if stream.refusal is None:
        return failed(f"200, then {json.dumps(stream.error or stream.chunks[:1])[:160]}")
    return holds(stream.refusal.status == 400 and bool(stream.refusal.error.get("message")), refusal(stream.refusal))


def refusal(reply: Reply) -> str:
    """The status of a refusal, whether its body has an `error` object, and the words."""
    shape = "error body" if reply.error else "no error object"
    return f"HTTP {reply.status}, {shape}: {reply.error_text}"


# sampling


@behaviour("sampling", "temperature 0 gives the same text twice", required=True)
def greedy_repeats(ask: Asker) -> Outcome:
    again = ask.chat(COMMON, max_tokens=COMMON_TOKENS).text
    return holds(again == ask.plain.text, f"{ask.plain.text!r} and {again!r}")


@behaviour("sampling", "a high temperature gives different texts", required=True)
def temperature_varies(ask: Asker) -> Outcome:
    texts: list[str] = []
    while len(texts) < 4 and len(set(texts)) < 2:
        texts.append(ask.chat(COMMON, temperature=1.5).text)
    return holds(len(set(texts)) > 1, f"{len(texts)} answers at temperature 1.5: {len(set(texts))} texts")


@behaviour("sampling", "the same seed repeats a sampled text, another seed changes it")
def seed(ask: Asker) -> Outcome:
    first, again = (ask.chat(COMMON, temperature=1.0, seed=7).text for _ in range(2))
    if first != again:
        return failed(f"seed 7 twice: {first!r} and {again!r}")
    other = ask.chat(COMMON, temperature=1.0, seed=8).text
    return holds(first != other, f"seed 7 twice {first!r}, seed 8 {other!r}")


@behaviour("sampling", "a tiny top_p leaves only the most likely token at any temperature")
def top_p(ask: Asker) -> Outcome:
    return samples_greedily(ask, top_p=0.0001)


@behaviour("sampling", "top_k 1 leaves only the most likely token at any temperature")
def top_k(ask: Asker) -> Outcome:
    return samples_greedily(ask, top_k=1)


def samples_greedily(ask: Asker, **params: Any) -> Outcome:
    """Whether `params` make a hot sampler return the greedy text."""
    text = ask.chat(COMMON, temperature=1.5, **params).text
    return holds(ask.plain.text.startswith(text) and bool(text), f"{params}: {text!r}, greedy {ask.plain.text!r}")


@behaviour("sampling", "logit_bias -100 bans a token")
def logit_bias(ask: Asker) -> Outcome:
    reply = ask.chat(COMMON, max_tokens=1, logprobs=True, top_logprobs=1)
    if reply.status != 200:
        reply = ask.chat(COMMON, max_tokens=1)
    token = token_id(ask, reply)
    if token is None:
        return not_applicable("the engine does not tell the id of a token")
    banned = ask.chat(COMMON, max_tokens=1, logit_bias={str(token): -100}).text
    return holds(reply.text != banned, f"without token {token}: {banned!r} instead of {reply.text!r}")


def token_id(ask: Asker, reply: Reply) -> int | None:
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


REPEATING: list[Json] = [
    user("Sing: la"), {"role": "assistant", "content": "la la la la la la"},
    user("Sing: la"),
]  # fmt: skip


@behaviour("sampling", "frequency_penalty changes a repeating text")
def frequency_penalty(ask: Asker) -> Outcome:
    return penalised(ask, frequency_penalty=2.0)


@behaviour("sampling", "presence_penalty changes a repeating text")
def presence_penalty(ask: Asker) -> Outcome:
    return penalised(ask, presence_penalty=2.0)


def penalised(ask: Asker, **penalty: float) -> Outcome:
    """Whether `penalty` changes the greedy continuation of a repeating prompt."""
    free, held = ask.repeating.text, ask.chat(REPEATING, max_tokens=16, **penalty).text
    return holds(free != held, f"without {free!r}, with {held!r}")


@behaviour("sampling", "n = 2 gives two choices with text")
def two_choices(ask: Asker) -> Outcome:
    reply = ask.chat(COMMON, n=2, temperature=1.0).served()
    texts = [(choice.get("message") or {}).get("content") for choice in reply.body.get("choices") or []]
    return holds(len(texts) == 2 and all(texts), f"{len(texts)} choices: {texts}")


# logprobs


def logprob_entries(holder: Json) -> list[Json]:
    """The per-token entries of a choice's `logprobs.content`; empty when they are not in that place."""
    content = (holder.get("logprobs") or {}).get("content")
    return content if isinstance(content, list) else []


def spells(entries: list[Json], text: str) -> bool:
    """Whether the entries' tokens, joined, are `text`, and each logprob is a number not above 0."""
    numbers = all(isinstance(entry.get("logprob"), int | float) and entry["logprob"] <= 1e-6 for entry in entries)
    return numbers and "".join(str(entry.get("token")) for entry in entries).strip() == text.strip()


@behaviour("logprobs", "logprobs come one a token, at most 0, and their tokens spell the text")
def logprobs(ask: Asker) -> Outcome:
    reply = ask.chat(COMMON, logprobs=True)
    entries, tokens = logprob_entries(reply.choice), reply.used("completion_tokens")
    first = json.dumps(entries[:1] or reply.choice.get("logprobs"))[:160]
    return holds(len(entries) == tokens > 0 and spells(entries, reply.text), f"{len(entries)} for {tokens}: {first}")


@behaviour("logprobs", "top_logprobs gives that many alternatives, likeliest first, of probability 1 at most")
def top_logprobs(ask: Asker) -> Outcome:
    entries = logprob_entries(ask.chat(COMMON, max_tokens=4, logprobs=True, top_logprobs=3).choice)
    if not entries:
        return failed("no logprobs.content")
    odd = next((entry for entry in entries if not ranked(entry, 3)), None)
    return holds(odd is None, f"{len(entries)} tokens, 3 alternatives each" if odd is None else json.dumps(odd)[:200])


def ranked(entry: Json, number: int) -> bool:
    """Whether an entry's alternatives are `number` texts, sorted, led by the greedy choice, and sum to 1 at most."""
    top = entry.get("top_logprobs") or []
    if len(top) != number or not all(isinstance(alternative.get("token"), str) for alternative in top):
        return False
    values = [alternative["logprob"] for alternative in top]
    falling = all(left >= right for left, right in pairwise(values))
    return falling and sum(2.718281828459045**value for value in values) <= 1.001 and top[0]["token"] == entry["token"]


@behaviour("logprobs", "a stream carries logprobs in the shape of the complete answer")
def logprobs_in_stream(ask: Asker) -> Outcome:
    stream = ask.stream(COMMON, logprobs=True).served()
    entries = [entry for choice in stream.choices for entry in logprob_entries(choice)]
    return holds(bool(entries) and spells(entries, stream.text), f"{len(entries)} entries for {stream.text!r}")


# tools

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather in a city", "parameters": CITY},
}
CLOCK = {"type": "function", "function": {"name": "get_time", "description": "The time in a city", "parameters": CITY}}
WEATHER_QUESTION = "What is the weather in Paris?"
CALL_TOKENS = 48


def call(city: str, call_id: str) -> Json:
    """An assistant turn that calls get_weather for `city`."""
    function = {"name": "get_weather", "arguments": json.dumps({"city": city})}
    return {
        "role": "assistant", "content": None,
        "tool_calls": [{"id": call_id, "type": "function", "function": function}],
    }  # fmt: skip


def result(text: str, call_id: str) -> Json:
    """A tool turn that answers the call `call_id`."""
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def weather_turns(*, answered: bool) -> list[Json]:
    """A conversation with two calls made before, which lets a small model make the third by copying.

    `answered` puts a result after each call, as OpenAI's API demands; without results more models copy.
    """
    turns: list[Json] = []
    for city, weather, call_id in (("Oslo", "rain", "call00001"), ("Rome", "sun", "call00002")):
        turns += [user(f"What is the weather in {city}?"), call(city, call_id)]
        turns += [result(weather, call_id)] if answered else []
    return [*turns, user(WEATHER_QUESTION)]


def leaks_call(text: str) -> bool:
    """Whether `text` holds the markup of a call that the engine should have parsed."""
    return "tool_call" in text or '"arguments"' in text


def no_tools(ask: Asker) -> Outcome | None:
    """`not_applicable` when the rendered prompt does not change with tools, else None."""
    if ask.tool_growth > 0:
        return None
    return not_applicable(f"prompt tokens grow by {ask.tool_growth} when a tool is offered: the template shows none")


def call_fault(calls: list[Json], name: str = "get_weather") -> str:
    """What is wrong with the first of `calls`: empty when it names `name` with the arguments of its schema."""
    if not calls:
        return "no tool call"
    function = calls[0].get("function") or {}
    if function.get("name") != name or not calls[0].get("id"):
        return f"name {function.get('name')!r}, id {calls[0].get('id')!r}"
    try:
        arguments = json.loads(function["arguments"])
    except (KeyError, TypeError, ValueError):
        return f"arguments are not JSON text: {function.get('arguments')!r}"
    if not isinstance(arguments, dict) or not isinstance(arguments.get("city"), str):
        return f"arguments lack the required city: {arguments!r}"
    return ""


@behaviour("tools", "tools that are offered are shown to the model", required=True)
def tools_shown(ask: Asker) -> Outcome:
    return no_tools(ask) or passed(f"one tool adds {ask.tool_growth} prompt tokens")


def no_call(text: str) -> Outcome:
    """`failed` when `text` is a call that was not parsed; `not_applicable` when the model made none."""
    return failed(f"the call stayed text: {text!r}") if leaks_call(text) else not_applicable(f"no call: {text!r}")


@behaviour("tools", "a call the model writes by itself comes as tool_calls, not as text", required=True)
def tool_choice_auto(ask: Asker) -> Outcome:
    if skipped := no_tools(ask):
        return skipped
    reply = ask.calling[1]
    if not reply.tool_calls:
        return no_call(reply.text)
    fault = call_fault(reply.tool_calls)
    return holds(
        not fault and reply.finish == "tool_calls",
        fault or f"{json.dumps(reply.tool_calls[0])[:160]}, finish {reply.finish}",
    )


@behaviour("tools", "a streamed call joins to one call with JSON arguments", required=True)
def tool_call_streamed(ask: Asker) -> Outcome:
    if skipped := no_tools(ask):
        return skipped
    stream = ask.stream(ask.calling[0], tools=[WEATHER, CLOCK], max_tokens=CALL_TOKENS).served()
    if not stream.tool_pieces:
        return no_call(stream.text)
    fault = call_fault(joined_calls(stream.tool_pieces))
    good = not fault and stream.finishes == ["tool_calls"] and not stream.text.strip()
    seen = f"{len(stream.tool_pieces)} pieces, finish {stream.finishes}, text beside it {stream.text!r}"
    return holds(good, f"{fault}; {seen}" if fault else seen)


def joined_calls(pieces: list[Json]) -> list[Json]:
    """The calls that streamed `pieces` add up to, as a client joins them: by index, arguments appended."""
    calls: dict[int, Json] = {}
    for piece in pieces:
        function = piece.get("function") or {}
        whole = calls.setdefault(piece.get("index", 0), {"id": None, "function": {"name": "", "arguments": ""}})
        whole["id"] = piece.get("id") or whole["id"]
        whole["function"]["name"] += function.get("name") or ""
        whole["function"]["arguments"] += function.get("arguments") or ""
    return [calls[index] for index in sorted(calls)]


@behaviour("tools", "tool_choice required yields a call with the arguments of the schema")
def tool_choice_required(ask: Asker) -> Outcome:
    return forced_call(ask, "required", "get_weather", tools=[WEATHER])


@behaviour("tools", "a named tool is the one that is called")
def tool_choice_named(ask: Asker) -> Outcome:
    return forced_call(ask, {"type": "function", "function": {"name": "get_time"}}, "get_time", tools=[WEATHER, CLOCK])


def forced_call(ask: Asker, choice: str | Json, name: str, *, tools: list[Json]) -> Outcome:
    """Whether `choice` yields a call of `name` although the question does not ask for it."""
    if skipped := no_tools(ask):
        return skipped
    reply = ask.chat("Hello! Paris is nice.", tools=tools, tool_choice=choice, max_tokens=CALL_TOKENS)
    fault = call_fault(reply.tool_calls, name)
    return holds(not fault, f"{fault}; text {reply.text!r}" if fault else json.dumps(reply.tool_calls[0])[:160])


@behaviour("tools", "tool_choice none yields text and no call", required=True)
def tool_choice_none(ask: Asker) -> Outcome:
    if skipped := no_tools(ask):
        return skipped
    reply = ask.chat(ask.calling[0], tools=[WEATHER, CLOCK], tool_choice="none", max_tokens=16)
    return holds(not reply.tool_calls and bool(reply.text), f"{len(reply.tool_calls)} calls, text {reply.text!r}")


@behaviour("tools", "parallel_tool_calls false yields one call at most")
def one_call_at_a_time(ask: Asker) -> Outcome:
    if skipped := no_tools(ask):
        return skipped
    tools = [WEATHER, CLOCK]
    reply = ask.chat(ask.calling[0], tools=tools, parallel_tool_calls=False, max_tokens=2 * CALL_TOKENS)
    if not reply.tool_calls:
        return not_applicable(f"no call: {reply.text!r}")
    return holds(len(reply.tool_calls) == 1, f"{len(reply.tool_calls)} calls")


@behaviour("tools", "a tool's result is accepted and reaches the model", required=True)
def tool_round_trip(ask: Asker) -> Outcome:
    long = "rain with strong wind from the north and a cold night ahead"
    sizes = [
        ask.prompt_tokens([user(WEATHER_QUESTION), call("Paris", "call00001"), result(text, "call00001")])
        for text in ("rain", long)
    ]
    grown, more = sizes[1] - sizes[0], len(long.split()) - 1
    return holds(grown >= more, f"{more} more words in the result: {grown} more prompt tokens")


@behaviour("tools", "an assistant turn with tool calls and null content is accepted", required=True)
def null_content(ask: Asker) -> Outcome:
    turns = [user(WEATHER_QUESTION), call("Paris", "call00001"), result("rain", "call00001"), user("Thanks")]
    reply = ask.chat(turns, max_tokens=4, tools=[WEATHER])
    return holds(bool(reply.served().message), f"answered {reply.text!r}")


# json

CODES = ["zebra-7", "zebra-8"]
CODE_SCHEMA = {
    "type": "object", "properties": {"code": {"type": "string", "enum": CODES}},
    "required": ["code"], "additionalProperties": False,
}  # fmt: skip


def schema_format(schema: Json) -> Json:
    """`response_format` for answers that follow `schema`."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


def follows(text: str, allowed: list[str]) -> bool:
    """Whether `text` is {"code": one of `allowed`} and nothing else."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict) and list(value) == ["code"] and value["code"] in allowed


@behaviour("json", "json_schema yields JSON that follows the schema, which no model would write unasked", required=True)
def json_schema(ask: Asker) -> Outcome:
    reply = ask.chat("Hi", response_format=schema_format(CODE_SCHEMA), max_tokens=32)
    return holds(follows(reply.text, CODES), f"{reply.text!r}, finish {reply.finish}")


@behaviour("json", "a stream under json_schema joins to JSON that follows the schema", required=True)
def json_schema_stream(ask: Asker) -> Outcome:
    stream = ask.stream("Hi", response_format=schema_format(CODE_SCHEMA), max_tokens=32).served()
    return holds(follows(stream.text, CODES), f"{stream.text!r}, finish {stream.finishes}")


@behaviour("json", "json_object yields a JSON object")
def json_object(ask: Asker) -> Outcome:
    reply = ask.chat("Name a colour as JSON.", response_format={"type": "json_object"}, max_tokens=24)
    try:
        good = isinstance(json.loads(reply.text), dict)
    except ValueError:
        # cut at the limit: then all there is to see is that it set out as an object
        good = reply.finish == "length" and re.match(r'\s*\{\s*("|$)', reply.text) is not None
    return holds(good, f"{reply.text!r}, finish {reply.finish}")


@behaviour("json", "a schema that is none is refused")
def bad_schema(ask: Asker) -> Outcome:
    reply = ask.chat("Hi", response_format=schema_format({"type": "no-such-type"}), max_tokens=4)
    return holds(400 <= reply.status < 500, refusal(reply) if reply.status != 200 else f"served {reply.text!r}")


# unicode

WIDE = "日本語🙂é"


@behaviour("unicode", "characters of several bytes survive the pieces of a stream", required=True)
def unicode_stream(ask: Asker) -> Outcome:
    schema = CODE_SCHEMA | {"properties": {"code": {"type": "string", "enum": [WIDE]}}}
    stream = ask.stream("Hi", response_format=schema_format(schema), max_tokens=48).served()
    if stream.undecodable:
        return failed(f"not UTF-8: {stream.undecodable[0]!r}")
    if not re.match(r'\s*\{\s*"code"', stream.text):
        return not_applicable(f"the engine could not be made to write them: {stream.text!r}")
    return holds(follows(stream.text, [WIDE]), f"{stream.text!r} in {len(stream.arrivals_s)} pieces")


ECHO: list[Json] = [
    user("Repeat: 日🙂"), {"role": "assistant", "content": "日🙂"},
    user("Repeat: 日本🙂"),
]  # fmt: skip


@behaviour("unicode", "a greedy answer in CJK and emoji is the same streamed and complete", required=True)
def unicode_equals_plain(ask: Asker) -> Outcome:
    plain, stream = ask.chat(ECHO), ask.stream(ECHO).served()
    # the token limit may fall inside a character: engines then show U+FFFD or nothing
    texts = [text.rstrip("�") for text in (stream.text, plain.text)]
    if texts[1].isascii() and texts[0].isascii():
        return not_applicable(f"the model answered in ASCII: {plain.text!r}")
    good = texts[0] == texts[1] and "�" not in texts[0]
    return holds(good, f"streamed {stream.text!r}, complete {plain.text!r}")


@behaviour("unicode", "escaped and plain Unicode in a request are the same prompt", required=True)
def unicode_request(ask: Asker) -> Outcome:
    body = ask.body("Translate: naïve 日本 🙂", max_tokens=4)
    replies = [
        ask.post("/v1/chat/completions", json.dumps(body, ensure_ascii=escaped).encode()) for escaped in (True, False)
    ]
    sizes = [reply.used("prompt_tokens") for reply in replies]
    good = sizes[0] == sizes[1] and replies[0].text == replies[1].text
    return holds(good, f"prompt tokens {sizes[0]} and {sizes[1]}, texts {[reply.text for reply in replies]}")


# errors


@behaviour("errors", "a refused request says why in error.message and error.type", required=True)
def error_body(ask: Asker) -> Outcome:
    reply = ask.post("/v1/chat/completions", {"model": ask.endpoint.model_id, "messages": 5})
    if reply.status == 200:
        return failed("messages: 5 was served")
    good = all(isinstance(reply.error.get(key), str) and reply.error[key] for key in ("message", "type"))
    return holds(good, refusal(reply))


@behaviour("errors", "a field of the wrong type is refused with 400")
def wrong_type(ask: Asker) -> Outcome:
    reply = ask.chat("Hi", temperature="hot", max_tokens=1)
    return holds(reply.status == 400, refusal(reply) if reply.status != 200 else f"served {reply.text!r}")


@behaviour("errors", "a body that is not JSON is refused with 400")
def bad_json(ask: Asker) -> Outcome:
    reply = ask.post("/v1/chat/completions", b'{"model": ')
    return holds(reply.status == 400, refusal(reply))


@behaviour("errors", "an unknown model is refused with 404")
def unknown_model(ask: Asker) -> Outcome:
    reply = ask.chat("Hi", model="no-such-model", max_tokens=1)
    return holds(reply.status == 404, refusal(reply) if reply.status != 200 else "served by its own model")


@behaviour("errors", "an unknown route is answered with 404")
def unknown_route(ask: Asker) -> Outcome:
    reply = ask.get("/v1/no-such-route")
    return holds(reply.status == 404, refusal(reply))


@behaviour("errors", "an empty conversation is refused or served, not a server error")
def empty_messages(ask: Asker) -> Outcome:
    reply = ask.chat([], max_tokens=1)
    return holds(reply.status < 500, refusal(reply) if reply.status != 200 else f"served {reply.text!r}")


@behaviour("errors", "a good request right after refused ones is answered as before", required=True)
def error_leaves_no_trace(ask: Asker) -> Outcome:
    refused = [
        ask.post("/v1/chat/completions", body).status
        for body in (b"[", {"messages": 5}, ask.body("Hi", response_format=5, max_tokens=1))
    ]
    text = ask.chat(COMMON, max_tokens=COMMON_TOKENS).text
    return holds(text == ask.plain.text, f"after {refused}: {text!r}")


# cancel

LEFT_TOKENS = 200
LEAVING = "Write a very long story about a king, with many chapters."
GAUGE = re.compile(
    r"^(?:llamacpp:requests_processing|mistralrs_sequences_running|vllm:num_requests_running)(?:\{.*\})? (\S+)$",
    re.MULTILINE,
)


def running(ask: Asker) -> float | None:
    """Requests the engine says it is working on, from /metrics; None where it does not say."""
    values = GAUGE.findall(ask.get("/metrics").raw)
    return sum(float(value) for value in values) if values else None


def seconds_for_one_token(ask: Asker) -> float:
    """How long one token takes to come, waiting included."""
    started = time.monotonic()
    ask.chat("Hi", max_tokens=1).served()
    return time.monotonic() - started


def freed(ask: Asker, idle_s: float, to_go_s: float) -> Outcome:
    """Whether the engine took up the next request well before the abandoned one, `to_go_s` long, could be through.

    With several slots the next request need not wait, so the engine's own gauge of running requests is read too,
    once a second at most: polling llama-server faster hides that a client left.
    """
    waited_s, to_go_s = max(seconds_for_one_token(ask) - idle_s, 0), max(to_go_s, 0)
    seen = f"next token {waited_s:.2f} s later than when idle; the abandoned answer had {to_go_s:.1f} s to go"
    if to_go_s > 1.0 and waited_s > to_go_s / 2:
        return failed(seen)
    deadline = time.monotonic() + max(2.0, to_go_s / 2 - waited_s)
    while (busy := running(ask)) and time.monotonic() < deadline:
        time.sleep(1.0)
    return holds(not busy, f"{seen}; running requests: {'not told' if busy is None else int(busy)}")


@behaviour("cancel", "a client that leaves a stream frees the engine for the next request", required=True)
def cancel_stream(ask: Asker) -> Outcome:
    idle_s, left_after = seconds_for_one_token(ask), 3
    stream = ask.stream(LEAVING, max_tokens=LEFT_TOKENS, ignore_eos=True, leave_after=left_after).served()
    if stream.finishes:
        return not_applicable(f"the answer ended after {len(stream.arrivals_s)} pieces")
    return freed(ask, idle_s, (LEFT_TOKENS - left_after) * ask.chunk_gap_s)


@behaviour("cancel", "a client that leaves a complete answer unread frees the engine")
def cancel_plain(ask: Asker) -> Outcome:
    idle_s, whole_s = seconds_for_one_token(ask), LEFT_TOKENS * ask.chunk_gap_s
    patience_s = max(0.2, whole_s / 8)
    body = ask.body(LEAVING, max_tokens=LEFT_TOKENS, ignore_eos=True)
    try:
        with ask.client(ask.endpoint.headers) as http:
            http.post("/v1/chat/completions", json=body, timeout=httpx.Timeout(10.0, read=patience_s))
    except httpx.ReadTimeout:
        return freed(ask, idle_s, whole_s - patience_s)
    return not_applicable(f"the answer came within {patience_s:.1f} s")


# concurrency


def all_at_once(ask: Asker, prompts: list[str]) -> list[str]:
    """The greedy texts of `prompts`, sent at the same time; the last one is streamed."""

    def text(place: int) -> str:
        if place == len(prompts) - 1:
            return ask.stream(prompts[place]).served().text
        return ask.chat(prompts[place]).text

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(text, range(len(prompts))))


def shared_prefix(left: str, right: str) -> int:
    """How many characters two texts share from their start."""
    return next((place for place, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]),
                min(len(left), len(right)))  # fmt: skip


def unmixed(ask: Asker, alone: Mapping[str, str]) -> Outcome:
    """Whether each prompt of `alone`, asked together with the others, gets its own answer again.

    Batching may change the arithmetic a little, so the answer must be nearest to its own one, not equal to it.
    """
    together = dict(zip(alone, all_at_once(ask, list(alone)), strict=True))
    for prompt, text in together.items():
        nearest = max(alone, key=lambda other: (shared_prefix(alone[other], text), other == prompt))
        if not text or nearest != prompt:
            return failed(f"{prompt!r} got {text!r}, alone {alone[prompt]!r}")
    equal = sum(alone[prompt] == text for prompt, text in together.items())
    return passed(f"{len(together)} answers, {equal} of them the same as alone")


@behaviour("concurrency", "three requests at once all get their own answers", required=True)
def three_at_once(ask: Asker) -> Outcome:
    prompts = ["Hello!", "What is the capital of France?", "Write a poem about the deep blue sea."]
    return distinct_or_skip(ask, {prompt: ask.chat(prompt).text for prompt in prompts})


@behaviour("concurrency", "three prompts of equal length at once all get their own answers", required=True)
def equal_lengths_at_once(ask: Asker) -> Outcome:
    by_length: dict[int, dict[str, str]] = {}
    for word in ("dogs", "music", "water", "trees", "books"):
        reply = ask.chat(f"Tell me about {word}.")
        group = by_length.setdefault(reply.used("prompt_tokens"), {})
        group[f"Tell me about {word}."] = reply.text
        if len(group) == 3:
            return distinct_or_skip(ask, group)
    return not_applicable(f"no three prompts of equal length: {sorted(by_length)}")


def distinct_or_skip(ask: Asker, alone: Mapping[str, str]) -> Outcome:
    """`unmixed`, or `not_applicable` when two answers alone are the same and a mix-up could not be seen."""
    if any(left == right for left, right in combinations(alone.values(), 2)):
        return not_applicable(f"answers alone are not distinct: {list(alone.values())}")
    return unmixed(ask, alone)


# models and other routes


@behaviour("models", "/v1/models lists the model by the id that requests use", required=True)
def models_list(ask: Asker) -> Outcome:
    listed = [entry.get("id") for entry in ask.get("/v1/models").served().body.get("data") or []]
    return holds(ask.endpoint.model_id in listed, f"listed: {listed}")


OPEN_TEXT = "Once upon a time there was a"


@behaviour("models", "/v1/completions continues a text without the chat template")
def completions_route(ask: Asker) -> Outcome:
    body = {"model": ask.endpoint.model_id, "prompt": OPEN_TEXT, "max_tokens": 4, "temperature": 0}
    reply = ask.post("/v1/completions", body)
    text, sizes = reply.choice.get("text"), (reply.used("prompt_tokens"), ask.prompt_tokens(OPEN_TEXT))
    return holds(bool(text) and sizes[0] < sizes[1], f"{text!r}; prompt tokens {sizes[0]}, as a chat {sizes[1]}")


@behaviour("models", "/tokenize gives the token ids of a text")
def tokenize_route(ask: Asker) -> Outcome:
    once, twice = (len(tokenized(ask, text)) for text in ("one two", "one two one two"))
    return holds(0 < once < twice, f"{once} and {twice} ids")


@behaviour("models", "/props tells the context of one sequence")
def props_route(ask: Asker) -> Outcome:
    reply = ask.get("/props")
    settings = reply.body.get("default_generation_settings") if isinstance(reply.body, dict) else None
    context = settings.get("n_ctx") if isinstance(settings, dict) else None
    return holds(isinstance(context, int), f"HTTP {reply.status}, n_ctx {context}")


@behaviour("models", "/health answers 200 without a key", required=True)
def health_route(ask: Asker) -> Outcome:
    with ask.client({}) as http:
        status = http.get("/health").status_code
    return holds(status == 200, f"HTTP {status}")


@behaviour("models", "/metrics gives counters in Prometheus' text form")
def metrics_route(ask: Asker) -> Outcome:
    reply = ask.get("/metrics")
    series = re.findall(r"^[a-zA-Z_:][\w:]*(?:\{.*\})? -?[\d.eE+-]+", reply.raw, re.MULTILINE)
    return holds(reply.status == 200 and bool(series), f"HTTP {reply.status}, {len(series)} series")


# security


@behaviour("security", "without the key, or with a wrong one, nothing is generated: 401", required=True)
def key_enforced(ask: Asker) -> Outcome:
    if ask.endpoint.api_key is None:
        return not_applicable("no key is set")
    statuses = []
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        with ask.client(headers) as http:
            statuses.append(http.post("/v1/chat/completions", json=ask.body("Hi", max_tokens=1)).status_code)
    return holds(statuses == [401, 401], f"without a key HTTP {statuses[0]}, with a wrong one HTTP {statuses[1]}")


BEHAVIOURS: Mapping[str, Behaviour] = MappingProxyType(_registry)
DEFAULT_REQUIRED: frozenset[str] = frozenset(name for name, entry in BEHAVIOURS.items() if entry.required)
