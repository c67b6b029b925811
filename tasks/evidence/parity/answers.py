"""Greedy answers with logprobs, and how far an engine is from itself.

The logprobs asked for are the model's own. llama-server returns the softmax of the raw logits at temperature 0 too
(b10434: the same numbers as at temperature 1), unless `post_sampling_probs` is set; mistral.rs does the same.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from engines.client.read_stream import read_usage
from engines.settings import Endpoint
from tasks.evidence.behaviours.caller import Caller
from tasks.evidence.parity.asking import TIMEOUT_S, Evidence, Progress, chat_body, origin, post
from tasks.evidence.parity.compare import compare_answers
from tasks.evidence.prompts import Prompt


def measure_answers(
    endpoint: Endpoint,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = 64,
    top_logprobs: int = 20,
    progress: Progress = lambda _: None,
) -> Evidence:
    """Greedy answers, one at a time, with the `top_logprobs` most likely tokens at every position.

    Each answer: id, prompt, text, tool_calls, finish_reason, prompt/completion/cached tokens, error, and `positions`,
    a list of [text, logprob, id or None, [[text, logprob, id or None], ...]] in nats. The engine's prompt cache is
    left as it is, as in service; `cached_tokens` is what it took from there, where the engine reports it.
    """
    started = time.monotonic()
    answers = []
    with Caller(endpoint, read_timeout_s=TIMEOUT_S) as caller:
        for number, prompt in enumerate(prompts, 1):
            answers.append(_answer(caller, endpoint, prompt, max_tokens, top_logprobs))
            progress(f"{endpoint.engine}: answer {number}/{len(prompts)} ({prompt.id})")
    asked = {"max_tokens": max_tokens, "top_logprobs": top_logprobs, "temperature": 0, "cache": "engine default"}
    return origin(endpoint) | asked | {"answers": answers, "seconds": time.monotonic() - started}


def measure_floor(
    endpoint: Endpoint,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = 64,
    top_logprobs: int = 20,
    parallel: int = 3,
    progress: Progress = lambda _: None,
) -> Evidence:
    """How far the engine is from itself: a later repeat, a repeat at once (cached prefix), and `parallel` at a time.

    For each of `repeat`, `cached`, `parallel` the summary of `compare_answers` against the first run. None of them is
    zero in general: batch size and cache change the order of additions (llama.cpp#7052, #6950).
    """
    started = time.monotonic()
    first, cached = [], []
    with Caller(endpoint, read_timeout_s=TIMEOUT_S) as caller:

        def ask(prompt: Prompt) -> Evidence:
            return _answer(caller, endpoint, prompt, max_tokens, top_logprobs)

        for prompt in prompts:
            first.append(ask(prompt))
            cached.append(ask(prompt))
            progress(f"{endpoint.engine}: self-noise, {prompt.id} twice")
        repeat = [ask(prompt) for prompt in prompts]
        progress(f"{endpoint.engine}: self-noise, {parallel} at a time")
        with ThreadPoolExecutor(parallel) as pool:
            together = list(pool.map(ask, prompts))
    kept = ("exact_match_share", "positions", "top1_agreement", "mean_kld", "p99_kld", "max_kld", "errors")
    floor: Evidence = {}
    for name, run in {"repeat": repeat, "cached": cached, "parallel": together}.items():
        comparison = compare_answers({"answers": first}, {"answers": run})
        floor[name] = {key: comparison[key] for key in kept}
    return origin(endpoint) | floor | {"prompts": len(prompts), "seconds": time.monotonic() - started}


def _answer(caller: Caller, endpoint: Endpoint, prompt: Prompt, max_tokens: int, top_logprobs: int) -> Evidence:
    body = chat_body(endpoint, prompt, max_tokens=max_tokens) | {"logprobs": True, "top_logprobs": top_logprobs}
    found, error = post(caller, "/v1/chat/completions", body)
    answer = found or {}
    choice = (answer.get("choices") or [{}])[0]
    message = choice.get("message") or {}
    usage = read_usage(answer.get("usage")) or {}
    return {
        "id": prompt.id,
        "prompt": prompt.text[-400:],
        "text": message.get("content") or "",
        "reasoning": message.get("reasoning_content") or message.get("reasoning") or "",
        "tool_calls": [call.get("function") for call in message.get("tool_calls") or []],
        "finish_reason": choice.get("finish_reason"),
        **{name: usage.get(name) for name in ("prompt_tokens", "completion_tokens", "cached_tokens")},
        "positions": _positions(choice.get("logprobs")),
        "error": error,
    }


def _positions(logprobs: Any) -> list[list[Any]]:
    """[text, logprob, id, top] for each generated token, from OpenAI's shape or mistral.rs' variant of it.

    mistral.rs puts the id where OpenAI has the text, the text into `bytes`, and no id beside the generated token
    itself: that one is found among its top tokens. vLLM shows the last token of a character made of several as the
    whole of it, as llama.cpp does, and those before it as empty texts: they are left out.
    """
    content = logprobs.get("content") if isinstance(logprobs, dict) else logprobs
    positions = []
    for entry in content or []:
        top = [_token(other) for other in entry.get("top_logprobs") or []]
        text, logprob, token_id = _token(entry)
        if token_id is None:
            same = [other[2] for other in top if other[0] == text and other[1] == logprob]
            token_id = same[0] if len(same) == 1 else None
        positions.append([text, logprob, token_id, top])
    return [position for position in positions[:-1] if position[0]] + positions[-1:]


def _token(entry: Evidence) -> list[Any]:
    """[text, logprob, id or None]; bytes that are no whole character become U+FFFD."""
    token, raw = entry.get("token"), entry.get("bytes")
    decoded = bytes(raw or []).decode("utf-8", "replace") if not isinstance(raw, str) else raw
    if isinstance(token, int):
        return [decoded, entry["logprob"], token]
    return [decoded if isinstance(raw, list) else token, entry["logprob"], entry.get("id")]
