"""The server around the model: errors, cancelling, concurrency, routes and the key."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile

import httpx

from engines.units import number_of
from tasks.evidence.behaviours.base import (
    Asker,
    NotApplicable,
    Observation,
    behaviour,
    failed,
    holds,
    passed,
    refusal,
)
from tasks.evidence.behaviours.sampling import tokenized


@behaviour("errors", "a refused request says why in error.message and error.type", required=True)
def error_body(ask: Asker) -> Observation:
    reply = ask.post("/v1/chat/completions", {"model": ask.endpoint.model_id, "messages": 5})
    words = [reply.error.get(key) for key in ("message", "type")]
    good = reply.status != 200 and all(isinstance(word, str) and word for word in words)
    return holds(good, refusal(reply))


@behaviour("errors", "a field of the wrong type is refused with 400")
def wrong_type(ask: Asker) -> Observation:
    reply = ask.chat("Hi", temperature="hot", max_tokens=1)
    return holds(reply.status == 400, refusal(reply))


@behaviour("errors", "a body that is not JSON is refused with 400")
def bad_json(ask: Asker) -> Observation:
    reply = ask.post("/v1/chat/completions", b'{"model": ')
    return holds(reply.status == 400, refusal(reply))


@behaviour("errors", "an unknown model is refused with 404")
def unknown_model(ask: Asker) -> Observation:
    reply = ask.chat("Hi", model="no-such-model", max_tokens=1)
    return holds(reply.status == 404, refusal(reply))


@behaviour("errors", "an unknown route is answered with 404")
def unknown_route(ask: Asker) -> Observation:
    reply = ask.get("/v1/no-such-route")
    return holds(reply.status == 404, refusal(reply))


@behaviour("errors", "an empty conversation is refused or served, not a server error")
def empty_messages(ask: Asker) -> Observation:
    reply = ask.chat([], max_tokens=1)
    observed = f"served {reply.text!r}" if reply.status == 200 else refusal(reply)  # a 200 without choices: Malformed
    return holds(reply.status < 500, observed)


@behaviour("errors", "a good request right after refused ones is answered as before", required=True)
def error_leaves_no_trace(ask: Asker) -> Observation:
    refused = [
        ask.post("/v1/chat/completions", body).status
        for body in (b"[", {"messages": 5}, ask.body("Hi", response_format=5, max_tokens=1))
    ]
    text = ask.common().text
    return holds(text == ask.plain.text, f"after {refused}: {text!r}")


LEFT_TOKENS = 200
LEAVING = "Write a very long story about a king, with many chapters."
GAUGE = re.compile(
    r"^(?:llamacpp:requests_processing|mistralrs_sequences_running|vllm:num_requests_running)(?:\{.*\})? (\S+)$",
    re.MULTILINE,
)


def running(ask: Asker) -> float | None:
    """Requests in progress by the engine's /metrics; None where it does not report them."""
    values = GAUGE.findall(ask.get("/metrics").raw)
    return sum(float(value) for value in values) if values else None


def seconds_for_one_token(ask: Asker) -> float:
    """How long one token takes to come, waiting included."""
    started = time.monotonic()
    ask.chat("Hi", max_tokens=1).served()
    return time.monotonic() - started


def freed(ask: Asker, idle_s: float, to_go_s: float) -> Observation:
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
    return holds(not busy, f"{seen}; running requests: {'not reported' if busy is None else int(busy)}")


@behaviour("cancel", "a client that leaves a stream frees the engine for the next request", required=True)
def cancel_stream(ask: Asker) -> Observation:
    idle_s, left_after = seconds_for_one_token(ask), 3
    stream = ask.stream(LEAVING, max_tokens=LEFT_TOKENS, ignore_eos=True, leave_after=left_after).served()
    if stream.finishes:
        raise NotApplicable(f"the answer ended after {number_of(len(stream.arrivals_s), 'piece')}")
    return freed(ask, idle_s, (LEFT_TOKENS - left_after) * ask.chunk_gap_s)


@behaviour("cancel", "a client that leaves a complete answer unread frees the engine")
def cancel_plain(ask: Asker) -> Observation:
    idle_s, whole_s = seconds_for_one_token(ask), LEFT_TOKENS * ask.chunk_gap_s
    patience_s = max(0.2, whole_s / 8)
    body = ask.body(LEAVING, max_tokens=LEFT_TOKENS, ignore_eos=True)
    try:
        with ask.client(ask.endpoint.headers) as http:
            http.post("/v1/chat/completions", json=body, timeout=httpx.Timeout(10.0, read=patience_s))
    except httpx.ReadTimeout:
        return freed(ask, idle_s, whole_s - patience_s)
    raise NotApplicable(f"the answer came within {patience_s:.1f} s")


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
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def unmixed(ask: Asker, alone: Mapping[str, str]) -> Observation:
    """Whether each prompt of `alone`, asked together with the others, gets its own answer again.

    Batching may change the arithmetic a little, so the answer must be nearest to its own one, not equal to it. A mix-up
    of two equal answers could not be seen: NotApplicable.
    """
    if len(set(alone.values())) < len(alone):
        raise NotApplicable(f"answers alone are not distinct: {list(alone.values())}")
    together = dict(zip(alone, all_at_once(ask, list(alone)), strict=True))
    for prompt, text in together.items():
        nearest = max(alone, key=lambda other: (shared_prefix(alone[other], text), other == prompt))
        if not text or nearest != prompt:
            return failed(f"{prompt!r} got {text!r}, alone {alone[prompt]!r}")
    equal = sum(alone[prompt] == text for prompt, text in together.items())
    return passed(f"{number_of(len(together), 'answer')}, {equal} of them the same as alone")


@behaviour("concurrency", "three requests at once all get their own answers", required=True)
def three_at_once(ask: Asker) -> Observation:
    prompts = ["Hello!", "What is the capital of France?", "Write a poem about the deep blue sea."]
    return unmixed(ask, {prompt: ask.chat(prompt).text for prompt in prompts})


@behaviour("concurrency", "three prompts of equal length at once all get their own answers", required=True)
def equal_lengths_at_once(ask: Asker) -> Observation:
    by_length: dict[int, dict[str, str]] = {}
    for word in ("dogs", "music", "water", "trees", "books"):
        reply = ask.chat(f"Tell me about {word}.")
        group = by_length.setdefault(reply.used("prompt_tokens"), {})
        group[f"Tell me about {word}."] = reply.text
        if len(group) == 3:
            return unmixed(ask, group)
    raise NotApplicable(f"no three prompts of equal length: {sorted(by_length)}")


@behaviour("models", "/v1/models lists the model by the id that requests use", required=True)
def models_list(ask: Asker) -> Observation:
    listed = [entry.get("id") for entry in ask.get("/v1/models").served().body.get("data") or []]
    return holds(ask.endpoint.model_id in listed, f"listed: {listed}")


OPEN_TEXT = "Once upon a time there was a"


@behaviour("models", "/v1/completions continues a text without the chat template")
def completions_route(ask: Asker) -> Observation:
    body = {"model": ask.endpoint.model_id, "prompt": OPEN_TEXT, "max_tokens": 4, "temperature": 0}
    reply = ask.post("/v1/completions", body)
    text, sizes = reply.choice.get("text"), (reply.used("prompt_tokens"), ask.prompt_tokens(OPEN_TEXT))
    return holds(bool(text) and sizes[0] < sizes[1], f"{text!r}; prompt tokens {sizes[0]}, as a chat {sizes[1]}")


@behaviour("models", "/tokenize gives the token ids of a text")
def tokenize_route(ask: Asker) -> Observation:
    once, twice = (len(tokenized(ask, text)) for text in ("one two", "one two one two"))
    return holds(0 < once < twice, f"{once} and {number_of(twice, 'id')}")


@behaviour("models", "/props reports the context of one sequence")
def props_route(ask: Asker) -> Observation:
    reply = ask.get("/props")
    settings = reply.body.get("default_generation_settings") if isinstance(reply.body, dict) else None
    context = settings.get("n_ctx") if isinstance(settings, dict) else None
    return holds(isinstance(context, int), f"HTTP {reply.status}, n_ctx {context}")


@behaviour("models", "/health answers 200 without a key", required=True)
def health_route(ask: Asker) -> Observation:
    with ask.client({}) as http:
        status = http.get("/health").status_code
    return holds(status == 200, f"HTTP {status}")


@behaviour("models", "/metrics gives counters in Prometheus' text form")
def metrics_route(ask: Asker) -> Observation:
    reply = ask.get("/metrics")
    series = re.findall(r"^[a-zA-Z_:][\w:]*(?:\{.*\})? -?[\d.eE+-]+", reply.raw, re.MULTILINE)
    return holds(reply.status == 200 and bool(series), f"HTTP {reply.status}, {len(series)} series")


@behaviour("security", "without the key, or with a wrong one, nothing is generated: 401", required=True)
def key_enforced(ask: Asker) -> Observation:
    if ask.endpoint.api_key is None:
        raise NotApplicable("no key is set")
    statuses = []
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        with ask.client(headers) as http:
            statuses.append(http.post("/v1/chat/completions", json=ask.body("Hi", max_tokens=1)).status_code)
    return holds(statuses == [401, 401], f"without a key HTTP {statuses[0]}, with a wrong one HTTP {statuses[1]}")
