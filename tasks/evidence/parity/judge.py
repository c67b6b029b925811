"""Does the candidate read and answer like the incumbent? In order of cost: prompt tokens, answers, noise, parameters.

`measure_*` ask one engine over HTTP and return plain JSON-able evidence; `compare_answers` and `judge_*` are pure.
Greedy text differs between two sound engines on the same weights, so text equality is reported and not gated: what is
gated is each engine's distribution at every position up to, and including, the first different token.

The logprobs asked for are the model's own. llama-server returns the softmax of the raw logits at temperature 0 too
(b10434: the same numbers as at temperature 1), unless `post_sampling_probs` is set; mistral.rs does the same.
"""

from __future__ import annotations

import json
import math
import random
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean, median
from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict, Field

from engines.redaction import redacted_text
from engines.settings import Endpoint
from tasks.evidence.prompts import Prompt
from tasks.verdicts.statistics import percentile, wilson
from tasks.verdicts.verdict import CheckResult, Verdict, at_least, at_most, not_measured

Evidence = dict[str, Any]
Progress = Callable[[str], None]

TIMEOUT_S = 600.0
"""A CPU build can need minutes for a long prompt; slow is another check's business."""

RAW_TEXTS = (
    "The capital of France is",
    "Hello, world! It's 7:05 o'clock.",
    "   three spaces,\ttab\n\nand two newlines\n",
    "def area(r):\n    return 3.14159 * r ** 2\n",
    "1234567890 0.1 1e-9 0x1F",
    "Größe, naïve, œuvre, Zażółć gęślą jaźń",
    "Москва, Αθήνα, Ελλάδα",
    "東京は今日も晴れです。北京今天下雨。",
    "مرحبا بالعالم שלום नमस्ते สวัสดี",
    "👨‍👩‍👧‍👦 🇩🇪 👍🏽 cafe\u0301",
)
"""Texts without any template: where their token counts differ, the tokenizers differ."""


class ParityLimits(BaseModel):
    """What still counts as the same behaviour; each default with its reason."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt_tokens_share: float = Field(1.0, gt=0, le=1, description="another token count is another prompt")
    top1_agreement: float = Field(
        0.97, gt=0, le=1, description="llama.cpp vs mistral.rs on one GGUF: 0.9765; Q3_K_M vs FP16: 0.896"
    )
    top1_lower_bound: float = Field(
        0.95, gt=0, le=1, description="one-sided 95 % Wilson bound, so that few positions do not pass by luck"
    )
    mean_kld: float = Field(
        0.005, gt=0, description="nats; Q5_K_M vs FP16 is 0.0047: a swap on equal weights stays under that"
    )
    floor_factor: float = Field(
        3.0, ge=1, description="an engine cannot be nearer to another than to itself; 3 times allows for its spread"
    )
    p99_kld: float = Field(0.05, gt=0, description="nats; two engines on one GGUF: 0.015; Q3_K_M has this as its mean")
    tie_gap_nats: float = Field(
        0.5, gt=0, description="rounding turns near ties over: 0.00 to 0.23 nats seen between two sound engines"
    )
    unexplained_divergences: int = Field(0, ge=0, description="one that is no near tie wants a person to look")
    excess_degenerate: int = Field(0, ge=0, description="garbage is a broken kernel or template, however rare")
    min_positions: int = Field(100, ge=1, description="a 99th percentile of fewer is only their maximum")
    length_margin: float = Field(0.10, gt=0, description="length drives latency and cost; 10 % either way is noticed")
    length_required_from: int = Field(
        200, ge=2, description="prompts from which the length ratio gates; its interval is wider than 10 % before"
    )


# --- prompt tokens ---------------------------------------------------------------------------------------------------


def measure_prompt_tokens(
    endpoint: Endpoint, prompts: Sequence[Prompt], progress: Progress = lambda _: None, *, timeout_s: float = TIMEOUT_S
) -> Evidence:
    """The tokens of every prompt with its template, and of raw texts without.

    Counted by `/v1/chat/completions/input_tokens` and `/tokenize` where the engine has them (nothing is generated, and
    the first prompt's count is checked against `usage.prompt_tokens`), else from one-token requests. A prompt that is
    refused is kept with its error. For prompts with tools `tools_shown` says whether the tools changed the count: a
    template without tool support drops them and answers 200. `raw[].ids` are the ids of `/tokenize`, None where the
    engine has none.
    """
    started = time.monotonic()
    counted: dict[str, Evidence] = {}
    with _client(endpoint, timeout_s) as http:
        counter = _counter(http, endpoint, prompts)
        for number, prompt in enumerate(prompts, 1):
            counted[prompt.id] = _prompt_tokens(counter, endpoint, prompt)
            if number % 10 == 0 or number == len(prompts):
                progress(f"{endpoint.engine}: counted the tokens of {number}/{len(prompts)} prompts")
        raw = [_raw_tokens(http, endpoint, text) for text in RAW_TEXTS]
    return _origin(endpoint) | {"prompts": counted, "raw": raw, "seconds": time.monotonic() - started}


TokenCounter = Callable[[Evidence], tuple[int | None, str | None]]


def _counter(http: httpx.Client, endpoint: Endpoint, prompts: Sequence[Prompt]) -> TokenCounter:
    """How this engine's prompt tokens are counted: without generating, where that agrees with `usage` on one prompt."""

    def by_usage(body: Evidence) -> tuple[int | None, str | None]:
        return _counted(http, "/v1/chat/completions", body)

    def by_count(body: Evidence) -> tuple[int | None, str | None]:
        answer, error = _post(http, "/v1/chat/completions/input_tokens", body)
        tokens = (answer or {}).get("input_tokens")
        return (tokens, None) if isinstance(tokens, int) else (None, error or "no input_tokens in the answer")

    if not prompts:
        return by_usage
    body = _chat_body(endpoint, prompts[0], max_tokens=1)
    tokens, _ = by_count(body)
    return by_count if tokens is not None and tokens == by_usage(body)[0] else by_usage


def _prompt_tokens(count: TokenCounter, endpoint: Endpoint, prompt: Prompt) -> Evidence:
    tokens, error = count(_chat_body(endpoint, prompt, max_tokens=1))
    shown = None
    if prompt.tools and tokens is not None:
        bare = prompt.model_copy(update={"tools": None})
        without, _ = count(_chat_body(endpoint, bare, max_tokens=1))
        shown = None if without is None else tokens > without
    return {"tokens": tokens, "error": error, "tools_shown": shown, "preview": _preview(prompt)}


def _raw_tokens(http: httpx.Client, endpoint: Endpoint, text: str) -> Evidence:
    # llama.cpp reads `content`, vLLM reads `prompt`
    body = {"model": endpoint.model_id, "content": text, "prompt": text, "add_special": True}
    answer, _ = _post(http, "/tokenize", body)
    ids = answer.get("tokens") if answer else None
    if isinstance(ids, list) and all(isinstance(token, int) for token in ids):
        return {"text": text, "tokens": len(ids), "error": None, "ids": ids}
    body = {"model": endpoint.model_id, "prompt": text, "max_tokens": 1, "temperature": 0}
    tokens, error = _counted(http, "/v1/completions", body)
    return {"text": text, "tokens": tokens, "error": error, "ids": None}


def _counted(http: httpx.Client, path: str, body: Evidence) -> tuple[int | None, str | None]:
    """(prompt tokens, None) or (None, why there are none)."""
    answer, error = _post(http, path, body)
    if answer is None:
        return None, error
    tokens = _usage(answer, "prompt_tokens")
    return (tokens, None) if tokens is not None else (None, "no usage.prompt_tokens in the answer")


# --- answers ---------------------------------------------------------------------------------------------------------


def measure_answers(
    endpoint: Endpoint,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = 64,
    top_logprobs: int = 20,
    timeout_s: float = TIMEOUT_S,
    progress: Progress = lambda _: None,
) -> Evidence:
    """Greedy answers, one at a time, with the `top_logprobs` most likely tokens at every position.

    Each answer: id, prompt, text, tool_calls, finish_reason, prompt/completion/cached tokens, error, and `positions`,
    a list of [text, logprob, id or None, [[text, logprob, id or None], ...]] in nats. The engine's prompt cache is
    left as it is, as in service; `cached_tokens` says what it took from there, where the engine tells.
    """
    started = time.monotonic()
    answers = []
    with _client(endpoint, timeout_s) as http:
        for number, prompt in enumerate(prompts, 1):
            answers.append(_answer(http, endpoint, prompt, max_tokens, top_logprobs))
            progress(f"{endpoint.engine}: answer {number}/{len(prompts)} ({prompt.id})")
    return _answers(endpoint, answers, max_tokens, top_logprobs, time.monotonic() - started)


def measure_floor(
    endpoint: Endpoint,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = 64,
    top_logprobs: int = 20,
    parallel: int = 3,
    timeout_s: float = TIMEOUT_S,
    progress: Progress = lambda _: None,
) -> Evidence:
    """How far the engine is from itself: a later repeat, a repeat at once (cached prefix), and `parallel` at a time.

    For each of `repeat`, `cached`, `parallel` the summary of `compare_answers` against the first run. None of them is
    zero in general: batch size and cache change the order of additions (llama.cpp#7052, #6950).
    """
    started = time.monotonic()
    first, cached = [], []
    with _client(endpoint, timeout_s) as http:

        def ask(prompt: Prompt) -> Evidence:
            return _answer(http, endpoint, prompt, max_tokens, top_logprobs)

        for prompt in prompts:
            first.append(ask(prompt))
            cached.append(ask(prompt))
            progress(f"{endpoint.engine}: self-noise, {prompt.id} twice")
        repeat = [ask(prompt) for prompt in prompts]
        progress(f"{endpoint.engine}: self-noise, {parallel} at a time")
        with ThreadPoolExecutor(parallel) as pool:
            together = list(pool.map(ask, prompts))
    runs = {"repeat": repeat, "cached": cached, "parallel": together}
    base = _answers(endpoint, first, max_tokens, top_logprobs, 0.0)
    floor = {name: _noise(base, _answers(endpoint, run, max_tokens, top_logprobs, 0.0)) for name, run in runs.items()}
    return _origin(endpoint) | floor | {"prompts": len(prompts), "seconds": time.monotonic() - started}


def _noise(first: Evidence, again: Evidence) -> Evidence:
    """The numbers of one self-comparison that a floor needs."""
    comparison = compare_answers(first, again)
    kept = ("exact_match_share", "positions", "top1_agreement", "mean_kld", "p99_kld", "max_kld", "errors")
    return {key: comparison[key] for key in kept}


def _answers(
    endpoint: Endpoint, answers: list[Evidence], max_tokens: int, top_logprobs: int, seconds: float
) -> Evidence:
    asked = {"max_tokens": max_tokens, "top_logprobs": top_logprobs, "temperature": 0, "cache": "engine default"}
    return _origin(endpoint) | asked | {"answers": answers, "seconds": seconds}


def _answer(http: httpx.Client, endpoint: Endpoint, prompt: Prompt, max_tokens: int, top_logprobs: int) -> Evidence:
    body = _chat_body(endpoint, prompt, max_tokens=max_tokens) | {"logprobs": True, "top_logprobs": top_logprobs}
    found, error = _post(http, "/v1/chat/completions", body)
    answer = found or {}
    choice = (answer.get("choices") or [{}])[0]
    message = choice.get("message") or {}
    calls = [call.get("function") for call in message.get("tool_calls") or []]
    return {
        "id": prompt.id,
        "prompt": prompt.text[-400:],
        "text": message.get("content") or "",
        "reasoning": message.get("reasoning_content") or message.get("reasoning") or "",
        "tool_calls": calls,
        "finish_reason": choice.get("finish_reason"),
        "prompt_tokens": _usage(answer, "prompt_tokens"),
        "completion_tokens": _usage(answer, "completion_tokens"),
        "cached_tokens": ((answer.get("usage") or {}).get("prompt_tokens_details") or {}).get("cached_tokens"),
        "positions": _positions(choice.get("logprobs")),
        "error": error,
    }


def _positions(logprobs: Any) -> list[list[Any]]:
    """[text, logprob, id, top] for each generated token, from OpenAI's shape or mistral.rs' variant of it.

    mistral.rs puts the id where OpenAI has the text, the text into `bytes`, and no id beside the generated token
    itself: that one is found among its top tokens.
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
    return positions


def _token(entry: Evidence) -> list[Any]:
    """[text, logprob, id or None]; bytes that are no whole character become U+FFFD."""
    token, raw = entry.get("token"), entry.get("bytes")
    if isinstance(token, int):
        return [raw if isinstance(raw, str) else _decoded(raw), entry["logprob"], token]
    text = _decoded(raw) if isinstance(raw, list) else token
    return [text, entry["logprob"], entry.get("id")]


def _decoded(raw: list[int] | None) -> str:
    return bytes(raw or []).decode("utf-8", "replace")


# --- comparison ------------------------------------------------------------------------------------------------------


def compare_answers(incumbent: Evidence, candidate: Evidence, *, tie_gap_nats: float = 0.5) -> Evidence:
    """Two `measure_answers`, prompt by prompt: top-1 agreement, KLD, delta-p, divergences, texts, lengths.

    Positions run up to and including the first different token; after it the contexts differ and nothing is compared.
    Prompts that the engines read as different numbers of tokens are listed and left out of the positions. A divergence
    is explained iff the incumbent holds the candidate's token less than `tie_gap_nats` under its own; as the
    second-best token is at least as near, its top two are then a near tie. `explained` is None where neither engine
    shows the logprobs at the difference.
    """
    theirs = {answer["id"]: answer for answer in candidate["answers"]}
    pairs = [(answer, theirs[answer["id"]]) for answer in incumbent["answers"] if answer["id"] in theirs]
    sound = [(ours, other) for ours, other in pairs if not ours["error"] and not other["error"]]
    aligned = [pair for pair in sound if pair[0]["prompt_tokens"] == pair[1]["prompt_tokens"]]
    match = _Match(aligned)
    walks = [_walk(ours, other, match) for ours, other in aligned]
    steps = [step for walk in walks for step in walk.steps]
    hidden = sum(walk.hidden for walk in walks)
    divergences = [
        _divergence(ours, other, walk, tie_gap_nats)
        for (ours, other), walk in zip(aligned, walks, strict=True)
        if walk.diverged is not None
    ]
    return {
        "prompts": len(incumbent["answers"]),
        "prompts_compared": len(aligned),
        "prompt_tokens_differ": [ours["id"] for ours, other in sound if (ours, other) not in aligned],
        "errors": [
            f"{ours['id']}: {ours['error'] or other['error']}" for ours, other in pairs if (ours, other) not in sound
        ],
        "matched_by": match.by,
        "tie_gap_nats": tie_gap_nats,
        **_position_numbers(steps, hidden, sum(not walk.unseen for walk in walks if walk.diverged), len(divergences)),
        "hidden_positions": hidden,
        "divergences": divergences,
        "median_divergence_position": median(d["position"] for d in divergences) if divergences else None,
        **_text_numbers(sound),
    }


def _position_numbers(steps: list[tuple[float, float]], hidden: int, seen: int, diverged: int) -> Evidence:
    """Agreement, KLD (nats) and delta-p over all compared positions; None without any.

    `hidden` tokens agree (their text does) but have no KLD; of the `diverged` positions `seen` have one.
    """
    if not steps:
        return dict.fromkeys(
            ("top1_agreement", "top1_low", "top1_high", "mean_kld", "p99_kld", "max_kld", "rms_delta_p")
        ) | {
            "positions": 0,
            "same_top1": 0,
        }
    klds = [kld for kld, _ in steps]
    same = len(steps) - seen + hidden
    trials = same + diverged
    low, high = wilson(same, trials, 0.90)  # both ends of the two-sided 90 %: one-sided 95 % each
    return {
        "positions": len(steps),
        "same_top1": same,
        "top1_agreement": same / trials,
        "top1_low": low,
        "top1_high": high,
        "mean_kld": fmean(klds),
        "p99_kld": percentile(klds, 0.99),
        "max_kld": max(klds),
        "rms_delta_p": math.sqrt(fmean(delta * delta for _, delta in steps)),
    }


class _Match:
    """How tokens of both engines are told to be the same: by id on one vocabulary, else by text.

    By text, the end of the answer is one token whatever its name: llama.cpp shows it as an empty text, mistral.rs as
    `<|im_end|>`; tokens that share a text (parts of characters do) are one outcome.
    """

    def __init__(self, pairs: Sequence[tuple[Evidence, Evidence]]) -> None:
        ours, theirs = _vocabulary(a for a, _ in pairs), _vocabulary(b for _, b in pairs)
        shared = [ours[i] == theirs[i] for i in ours.keys() & theirs.keys() if _readable(ours[i], theirs[i])]
        complete = all(p[2] is not None for pair in pairs for answer in pair for p in answer["positions"])
        self.by = "id" if complete and shared and fmean(shared) > 0.99 else "text"
        self.ends = {""} | {
            answer["positions"][-1][0]
            for pair in pairs
            for answer in pair
            if answer["positions"] and answer["finish_reason"] == "stop" and not answer["text"].endswith(_last(answer))
        }

    def key(self, token: list[Any]) -> Any:
        """What two tokens have in common when they are the same."""
        if self.by == "id":
            return token[2]
        return "" if token[0] in self.ends else token[0]

    def top(self, position: list[Any]) -> dict[Any, float]:
        """Probability by key of the tokens shown at one position, the generated one among them."""
        shown: dict[Any, float] = {}
        listed = (
            position[3] if any(self.key(t) == self.key(position) for t in position[3]) else [position, *position[3]]
        )
        for token in listed:
            shown[self.key(token)] = shown.get(self.key(token), 0.0) + math.exp(min(0.0, token[1]))
        return shown

    def same(self, ours: list[Any], theirs: list[Any]) -> bool:
        """Both engines generated this token; by id, whole characters must agree too (llama.cpp shows them joined)."""
        if self.key(ours) != self.key(theirs):
            return False
        return self.by == "text" or ours[0] == theirs[0] or not _readable(ours[0], theirs[0])


def _vocabulary(answers: Iterable[Evidence]) -> dict[int, str]:
    tokens = (token for answer in answers for position in answer["positions"] for token in position[3])
    return {token[2]: token[0] for token in tokens if token[2] is not None}


def _readable(*texts: str) -> bool:
    """Whole characters on both sides, neither a special token nor a part of a character."""
    return all(text and "\ufffd" not in text and not text.startswith("<") for text in texts)


def _last(answer: Evidence) -> str:
    return str(answer["positions"][-1][0])


@dataclass(frozen=True)
class _Walk:
    """(KLD, delta-p) by position, tokens passed unseen, and the first difference; `unseen`: it has no step."""

    steps: list[tuple[float, float]]
    hidden: int
    diverged: tuple[int, int] | None = None
    unseen: bool = False
    gap: float | None = None
    choice_gap: float | None = None


def _walk(incumbent: Evidence, candidate: Evidence, match: _Match) -> _Walk:
    """(KLD, delta-p) at each position both engines show, and where the first different token is.

    llama.cpp shows one entry, that of the last token, for a character made of several tokens; mistral.rs shows each
    token as U+FFFD. Where the texts agree, the walk goes on behind the character and counts what it passed as hidden.
    """
    ours, theirs = incumbent["positions"], candidate["positions"]
    steps: list[tuple[float, float]] = []
    i = j = hidden = 0
    while i < len(ours) and j < len(theirs):
        if not match.same(ours[i], theirs[j]):
            passed = _past_character(incumbent, candidate, i, j)
            if passed is None:
                return _diverged(_Walk(steps, hidden), incumbent, candidate, (i, j), match)
            hidden += passed[0] - i + passed[1] - j
            i, j = passed
        steps.append(_step(match, ours[i], theirs[j]))
        i, j = i + 1, j + 1
    # llama.cpp lists the end of the answer as a position of its own, our host of mistral.rs does not: no difference
    left = [position for position in ours[i:] if position[0] not in match.ends]
    left_there = [position for position in theirs[j:] if position[0] not in match.ends]
    ended_early = (left and candidate["finish_reason"] != "length") or (
        left_there and incumbent["finish_reason"] != "length"
    )
    end = _Walk(steps, hidden)
    return replace(end, diverged=(i, j), unseen=True) if ended_early and ours and theirs else end


def _diverged(walk: _Walk, incumbent: Evidence, candidate: Evidence, at: tuple[int, int], match: _Match) -> _Walk:
    """The end of a walk at different tokens, with the incumbent's gaps there.

    Where the difference lies within a character that one engine shows as one entry, the other's nearest tie within that
    character stands in for both gaps, and the position has no KLD.
    """
    ours, theirs = incumbent["positions"], candidate["positions"]
    i, j = at
    if _hides(ours[i]) or _hides(theirs[j]):
        shown = [] if _hides(theirs[j]) else _parts(theirs, j)
        shown = shown if _hides(ours[i]) else _parts(ours, i)
        gap = min(map(_tie_gap, shown), default=None)
        return replace(walk, diverged=at, unseen=True, gap=gap, choice_gap=gap)
    walk.steps.append(_step(match, ours[i], theirs[j]))
    top = match.top(ours[i])
    chosen, least = top[match.key(ours[i])], min(top.values())
    second = max((p for key, p in top.items() if key != match.key(ours[i])), default=least)
    # a token that the incumbent does not list is under the last one that it lists
    other = top.get(match.key(theirs[j]), least)
    return replace(walk, diverged=at, gap=_nats(chosen, second), choice_gap=_nats(chosen, other))


def _hides(position: list[Any]) -> bool:
    """The entry shows a whole character, but its token is only the last part of it (llama.cpp joins the parts)."""
    return "\ufffd" not in position[0] and any(t[2] == position[2] and "\ufffd" in t[0] for t in position[3])


def _parts(positions: list[list[Any]], start: int) -> list[list[Any]]:
    """The entry at `start`, with the parts of a character that follow when it is one."""
    end = start + 1
    while end < len(positions) and "\ufffd" in positions[start][0] and "\ufffd" in positions[end][0]:
        end += 1
    return positions[start:end]


def _tie_gap(position: list[Any]) -> float:
    """Nats between the two best tokens; infinite where fewer are listed."""
    best = sorted((token[1] for token in position[3]), reverse=True)
    return best[0] - best[1] if len(best) > 1 else math.inf


def _nats(larger: float, smaller: float) -> float:
    return math.log(max(larger, 1e-12) / max(smaller, 1e-12))


def _past_character(incumbent: Evidence, candidate: Evidence, i: int, j: int) -> tuple[int, int] | None:
    """Indices of the last token of the character that one engine shows whole and the other in parts; None if unlike."""
    ours, theirs = incumbent["positions"], candidate["positions"]
    if "\ufffd" in theirs[j][0] and "\ufffd" not in ours[i][0]:
        last = _end_of_parts(ours, i, theirs, j, candidate["text"])
        return None if last is None else (i, last)
    if "\ufffd" in ours[i][0] and "\ufffd" not in theirs[j][0]:
        last = _end_of_parts(theirs, j, ours, i, incumbent["text"])
        return None if last is None else (last, j)
    return None


def _end_of_parts(whole: list[list[Any]], at: int, parts: list[list[Any]], start: int, parts_text: str) -> int | None:
    """Where in `parts` the text of `whole[at]` ends: same last id, and the other engine's text has it at that place."""
    text, _, token_id, _ = whole[at]
    offset = sum(len(position[0]) for position in whole[:at])
    if token_id is None or not text or not parts_text.startswith(text, offset):
        return None
    for index in range(start, min(len(parts), start + 4 * len(text))):  # UTF-8 has at most 4 bytes a character
        if "\ufffd" not in parts[index][0]:
            return None
        if parts[index][2] == token_id:
            return index
    return None


def _step(match: _Match, ours: list[Any], theirs: list[Any]) -> tuple[float, float]:
    """(KLD in nats, delta-p of the incumbent's token) at one position."""
    shown, other = match.top(ours), match.top(theirs)
    filled, tail = fill_missing(shown, other)
    return kld(shown, filled, tail), filled[match.key(ours)] - shown[match.key(ours)]


def fill_missing(shown: dict[Any, float], other: dict[Any, float]) -> tuple[dict[Any, float], float]:
    """The other engine's probabilities of the `shown` tokens and of all the rest, as near to `shown` as can be.

    A token that the other engine does not list has there at most the least probability it lists; what the other lists
    beyond `shown` belongs to the rest. Within these bounds the unknown masses are those with the smallest KLD (each a
    common multiple of the incumbent's, clipped at its bound), so the KLD from them is a lower bound of the true one.
    """
    missing = [key for key in shown if key not in other]
    free = max(0.0, 1.0 - sum(other[key] for key in shown if key in other))
    if not missing:
        return {key: other[key] for key in shown}, free
    cap = min(other.values(), default=1.0)
    floor = min(free, sum(p for key, p in other.items() if key not in shown))
    rest = max(0.0, 1.0 - sum(shown.values()))

    def spread(multiple: float) -> tuple[list[float], float]:
        return [min(cap, multiple * shown[key]) for key in missing], max(floor, multiple * rest)

    low, high = 0.0, 1e6
    for _ in range(80):
        middle = (low + high) / 2
        masses, tail = spread(middle)
        low, high = (middle, high) if sum(masses) + tail < free else (low, middle)
    masses, _ = spread(low)
    tail = max(0.0, free - sum(masses))
    return {key: other.get(key, 0.0) for key in shown} | dict(zip(missing, masses, strict=True)), tail


def kld(shown: dict[Any, float], filled: dict[Any, float], tail: float) -> float:
    """sum p ln(p/q) in nats over the incumbent's listed tokens and one bucket for all the others; never negative.

    p is the incumbent's. The bucket makes it a lower bound of the KLD over the whole vocabulary, by which llama.cpp's
    perplexity tool defines it (llama.cpp#5081); with 20 tokens listed they differ little.
    """
    least = 1e-12
    terms = [p * math.log(p / max(filled[key], least)) for key, p in shown.items() if p > 0]
    rest = max(0.0, 1.0 - sum(shown.values()))
    if rest > least:
        terms.append(rest * math.log(rest / max(tail, least)))
    return max(0.0, sum(terms))


def _divergence(incumbent: Evidence, candidate: Evidence, walk: _Walk, tie_gap_nats: float) -> Evidence:
    assert walk.diverged is not None
    i, j = walk.diverged
    gap = walk.choice_gap
    return {
        "prompt": incumbent["id"],
        "position": i,
        "gap_nats": walk.gap,
        "choice_gap_nats": gap,
        "explained": None if gap is None else gap < tie_gap_nats,
        "incumbent_token": incumbent["positions"][i][0] if i < len(incumbent["positions"]) else None,
        "candidate_token": candidate["positions"][j][0] if j < len(candidate["positions"]) else None,
        "incumbent_text": incumbent["text"],
        "candidate_text": candidate["text"],
    }


def _text_numbers(pairs: Sequence[tuple[Evidence, Evidence]]) -> Evidence:
    """Shares over whole answers: equal texts, finish reasons, lengths, degenerate ones."""
    alike = [(a, b) for a, b in pairs if a["text"] == b["text"] and a["tool_calls"] == b["tool_calls"]]
    ours = {a["id"]: _degenerate_answer(a) for a, _ in pairs}
    theirs = {b["id"]: _degenerate_answer(b) for _, b in pairs}
    return {
        "exact_match_share": len(alike) / len(pairs) if pairs else None,
        "finish_reason_agreement": _share(a["finish_reason"] == b["finish_reason"] for a, b in pairs),
        "finish_reasons": {
            "incumbent": _tally(a["finish_reason"] for a, _ in pairs),
            "candidate": _tally(b["finish_reason"] for _, b in pairs),
            "differ_on_equal_text": [
                f"{a['id']}: {a['finish_reason']} vs {b['finish_reason']}"
                for a, b in alike
                if a["finish_reason"] != b["finish_reason"]
            ],
        },
        "length": _length_ratio([(a["completion_tokens"], b["completion_tokens"]) for a, b in pairs]),
        "degenerate": {
            "incumbent": {key: why for key, why in ours.items() if why},
            "candidate": {key: why for key, why in theirs.items() if why},
        },
    }


def _tally(reasons: Iterable[str | None]) -> dict[str, int]:
    return dict(Counter(str(reason) for reason in reasons))


def _share(claims: Iterable[bool]) -> float | None:
    kept = list(claims)
    return sum(kept) / len(kept) if kept else None


def _length_ratio(lengths: list[tuple[int | None, int | None]]) -> Evidence:
    """Candidate's mean tokens over the incumbent's with a 95 % bootstrap interval over prompts (fixed seed)."""
    known = [(a, b) for a, b in lengths if a and b is not None]
    if len(known) < 2:
        return {"prompts": len(known), "ratio": None, "low": None, "high": None}

    def ratio(sample: Sequence[tuple[int, int]]) -> float:
        return sum(b for _, b in sample) / sum(a for a, _ in sample)

    rng = random.Random(20)
    resampled = [ratio(rng.choices(known, k=len(known))) for _ in range(2000)]
    low, high = percentile(resampled, 0.025), percentile(resampled, 0.975)
    return {"prompts": len(known), "ratio": ratio(known), "low": low, "high": high}


# --- degenerate text -------------------------------------------------------------------------------------------------

LOOP = "loop"


def _degenerate_answer(answer: Evidence) -> str | None:
    if answer["tool_calls"]:
        return None
    # tokens that are parts of characters all look alike, so only whole ones can be counted
    tokens = [position[0] for position in answer["positions"]]
    whole = tokens if tokens and not any("\ufffd" in token for token in tokens) else None
    return degenerate(answer["text"] or answer["reasoning"], whole, prompt=answer["prompt"])


def degenerate(text: str, tokens: Sequence[str] | None = None, *, prompt: str = "") -> str | None:
    """Why `text` is no answer at all, or None: empty, garbage characters, a loop, scripts nobody asked for.

    Reasons that begin with "loop" come from small models by themselves; the others mean something is broken.
    `tokens` are the generated tokens' texts, words otherwise. Says nothing on whether an answer is good or true.
    """
    bare = text.strip().rstrip("\ufffd")  # an answer cut at its token limit may end within a character
    if not bare:
        return "empty"
    units = list(tokens) if tokens else _units(bare)
    return _garbage(bare) or _wordless(bare) or _foreign(bare, prompt) or _loops(bare, units)


def _units(text: str) -> list[str]:
    """Words, or characters where the script has no spaces."""
    words = text.split()
    return words if len(words) * 12 >= len(text) else list(text)


def _garbage(text: str) -> str | None:
    bad = sum(
        c == "\ufffd" or (unicodedata.category(c) in {"Cc", "Cn", "Co", "Cs"} and c not in "\n\r\t") for c in text
    )
    share = bad / len(text)
    return f"{share:.0%} replacement, control or unassigned characters" if share > 0.10 else None


def _wordless(text: str) -> str | None:
    content = any(c.isalnum() or unicodedata.category(c) in {"So", "Sm", "Sc"} for c in text)
    return f"no letters in {len(text)} characters" if len(text) >= 8 and not content else None


def _foreign(text: str, prompt: str) -> str | None:
    """Letters of three or more scripts that the prompt does not use, beside Latin, as more than a fifth of all."""
    letters = Counter(_script(c) for c in text if c.isalpha())
    expected = {_script(c) for c in prompt if c.isalpha()} | {"LATIN"}
    foreign = {script: n for script, n in letters.items() if script not in expected and n >= 2}
    if len(foreign) >= 3 and sum(foreign.values()) > 0.2 * sum(letters.values()):
        return f"mixed scripts: {', '.join(sorted(foreign))}"
    return None


def _script(letter: str) -> str:
    """The script by the first word of the character's name; Chinese and Japanese are one."""
    name = unicodedata.name(letter, "UNKNOWN").split()[0]
    return "CJK" if name in {"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "FULLWIDTH", "HALFWIDTH"} else name


def _loops(text: str, units: list[str]) -> str | None:
    run = max((len(found.group()) for found in re.finditer(r"(\S)\1*", text)), default=0)
    if run >= 24 and run >= 0.3 * len(text):
        return f"{LOOP}: one character {run} times"
    for period in range(1, len(units) // 4 + 1):
        covered = _covered_by_tail(units, period)
        if covered >= max(12, 4 * period, len(units) // 2):
            return f"{LOOP}: {' '.join(units[-period:])[:40]!r} {covered // period} times"
    if len(units) >= 24 and len(set(units)) < 0.15 * len(units):
        return f"{LOOP}: {len(set(units))} different of {len(units)} tokens"
    return None


def _covered_by_tail(units: list[str], period: int) -> int:
    """How many of the last units repeat with this period; a last, incomplete round counts."""
    covered = period
    while covered < len(units) and units[-covered - 1] == units[-covered - 1 + period]:
        covered += 1
    return covered


# --- silently ignored parameters ------------------------------------------------------------------------------------

WISH = "Write a short story about a lighthouse and its keeper."
SCHEMA = {
    "type": "object",
    "properties": {"zq": {"type": "integer"}},
    "required": ["zq"],
    "additionalProperties": False,
}


def measure_ignored_parameters(
    endpoint: Endpoint, *, timeout_s: float = TIMEOUT_S, progress: Progress = lambda _: None
) -> Evidence:
    """For parameters beyond OpenAI's: what was sent, whether it had its effect (None: cannot tell), and what was seen.

    OpenAI's own are among the compatibility battery's behaviours: `with_behaviours` adds them. A 200 proves nothing:
    engines drop parameters they do not know. So each probe sends one parameter and looks for what it must change. A
    refusal is no silence: effect None, and its text. Whether a probe can show an effect depends on the model, so the
    incumbent's result is the yardstick.
    """
    with _client(endpoint, timeout_s) as http:
        probe = _Probe(http, endpoint)
        found: Evidence = {}
        for name, look in _PROBES.items():
            try:
                found[name] = look(probe)
            except _NoAnswerError as refusal:
                found[name] = {"sent": refusal.sent, "effect": None, "observed": str(refusal)}
            progress(f"{endpoint.engine}: parameter {name}: {_effect_word(found[name]['effect'])}")
    return _origin(endpoint) | {"parameters": found}


def _effect_word(effect: bool | None) -> str:
    return {True: "took effect", False: "had no effect", None: "cannot tell"}[effect]


class _NoAnswerError(Exception):
    """A probe's request was refused or failed; `sent` is what it carried."""

    def __init__(self, message: str, sent: Evidence) -> None:
        super().__init__(message)
        self.sent = sent


class _Probe:
    """Asks one engine the same wish with one parameter changed; greedy unless told otherwise."""

    def __init__(self, http: httpx.Client, endpoint: Endpoint) -> None:
        self.http, self.endpoint = http, endpoint

    def ask(self, wish: str = WISH, **sent: Any) -> Evidence:
        """The parsed answer; _NoAnswerError with the refusal's text otherwise."""
        body = {"model": self.endpoint.model_id, "messages": [{"role": "user", "content": wish}]}
        answer, error = _post(self.http, "/v1/chat/completions", body | {"temperature": 0, "max_tokens": 16} | sent)
        if answer is None or not answer.get("choices"):
            raise _NoAnswerError(error or "no choices in the answer", sent)
        return answer

    def text(self, wish: str = WISH, **sent: Any) -> str:
        """The first choice's text."""
        return str(self.ask(wish, **sent)["choices"][0]["message"].get("content") or "")

    @cached_property
    def greedy(self) -> Evidence:
        """The plain greedy answer with logprobs, asked once."""
        return self.ask(logprobs=True, top_logprobs=5)

    @cached_property
    def longer(self) -> str:
        """The plain greedy text, long enough for words to come again; asked once."""
        return self.text(max_tokens=40)

    @property
    def greedy_text(self) -> str:
        """What the engine says when nothing special is asked."""
        return str(self.greedy["choices"][0]["message"].get("content") or "")


def _seen(sent: Evidence, effect: bool | None, observed: str) -> Evidence:
    return {"sent": sent, "effect": effect, "observed": observed}


def _changes_greedy(**sent: Any) -> Callable[[_Probe], Evidence]:
    """A probe for what must change a greedy text in which words come again."""

    def look(probe: _Probe) -> Evidence:
        plain, text = probe.longer, probe.text(max_tokens=40, **sent)
        return _seen(sent, plain != text, f"without {plain[-40:]!r}, with {text[-40:]!r}")

    return look


def _makes_greedy(**sent: Any) -> Callable[[_Probe], Evidence]:
    """A probe for what must leave only the best token at a high temperature."""

    def look(probe: _Probe) -> Evidence:
        hot = probe.text(temperature=2.0, seed=11)
        if hot == probe.greedy_text:
            return _seen(sent, None, "a high temperature alone changes nothing here")
        text = probe.text(temperature=2.0, seed=11, **sent)
        return _seen(sent, text == probe.greedy_text, f"greedy {probe.greedy_text[:40]!r}, got {text[:40]!r}")

    return look


_PROBES: dict[str, Callable[[_Probe], Evidence]] = {
    "repeat_penalty": _changes_greedy(repeat_penalty=1.8),
    "repetition_penalty": _changes_greedy(repetition_penalty=1.8),
    "min_p": _makes_greedy(min_p=0.999),
}

BEHAVIOUR_OF = {
    "max_tokens": "max_tokens",
    "temperature": "temperature_varies",
    "seed": "seed",
    "stop": "stop_string",
    "logit_bias": "logit_bias",
    "n": "two_choices",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "top_p": "top_p",
    "top_k": "top_k",
    "stream_options.include_usage": "usage_in_stream",
    "logprobs": "logprobs",
    "response_format.json_object": "json_object",
    "response_format.json_schema": "json_schema",
    "ignore_eos": "ignore_eos",
}
"""OpenAI's own parameters and the API behaviour that proves each one's effect."""


def with_behaviours(parameters: Evidence, compatibility: Evidence) -> Evidence:
    """What `measure_ignored_parameters` found, and what the compatibility battery's behaviours prove beside it."""
    found = dict(parameters["parameters"])
    for name, behaviour in BEHAVIOUR_OF.items():
        seen = compatibility["behaviours"].get(behaviour)
        if seen is not None:
            refused = seen["observed"].startswith("HTTP ")
            effect = {"passed": True, "failed": None if refused else False}.get(seen["outcome"])
            found[name] = {"sent": {}, "effect": effect, "observed": seen["observed"]}
    return parameters | {"parameters": found}


# --- verdicts --------------------------------------------------------------------------------------------------------

DEFAULT_LIMITS = ParityLimits()


def judge_parity(
    tokens_incumbent: Evidence,
    tokens_candidate: Evidence,
    answers_incumbent: Evidence | None = None,
    answers_candidate: Evidence | None = None,
    *,
    floors: Sequence[Evidence] = (),
    ignored_incumbent: Evidence | None = None,
    ignored_candidate: Evidence | None = None,
    required_parameters: Sequence[str] = (),
    limits: ParityLimits = DEFAULT_LIMITS,
) -> list[CheckResult]:
    """All parity checks for which there is evidence; the cheap gate first."""
    results = judge_prompt_tokens(tokens_incumbent, tokens_candidate, limits)
    if answers_incumbent and answers_candidate:
        comparison = compare_answers(answers_incumbent, answers_candidate, tie_gap_nats=limits.tie_gap_nats)
        results += judge_answers(comparison, floors, limits)
    if ignored_incumbent and ignored_candidate:
        results += judge_ignored_parameters(ignored_incumbent, ignored_candidate, required_parameters)
    return results


def judge_prompt_tokens(
    incumbent: Evidence, candidate: Evidence, limits: ParityLimits = DEFAULT_LIMITS
) -> list[CheckResult]:
    """`parity.prompt_tokens`: the share of prompts read as equally many tokens, and, where they are not, the cause.

    A prompt that only the candidate refuses counts as unequal; one that the incumbent refuses is left out. When this
    fails, answers need not be measured: they would answer other prompts.
    """
    check, limit = "parity.prompt_tokens", limits.prompt_tokens_share
    ours = {key: found for key, found in incumbent["prompts"].items() if found["tokens"] is not None}
    theirs = candidate["prompts"]
    asked = [key for key in ours if key in theirs]
    uncounted = [key for key in asked if theirs[key]["tokens"] is None and "usage" in (theirs[key]["error"] or "")]
    if not asked or uncounted:
        why = f"{len(uncounted)} answers without usage.prompt_tokens" if uncounted else "no prompt counted by both"
        return [not_measured(check, why, limit=limit, unit="share")]
    unequal = [key for key in asked if ours[key]["tokens"] != theirs[key]["tokens"]]
    share = 1.0 - len(unequal) / len(asked)
    refused = len(incumbent["prompts"]) - len(ours)
    note = f"; {refused} that the incumbent refuses left out" if refused else ""
    if not unequal:
        dropped = sum(found["tools_shown"] is False for found in ours.values())
        note += f"; {dropped} with tools that the template does not show" if dropped else ""
        return [
            at_least(check, share, limit=limit, unit="share", why=f"{len(asked)} of {len(asked)} prompts equal{note}")
        ]
    why = f"{_cause(incumbent, candidate)}; {_examples(ours, theirs, unequal, len(asked))}{note}"
    return [at_least(check, share, limit=limit, unit="share", why=why)]


def _examples(ours: Evidence, theirs: Evidence, unequal: list[str], asked: int) -> str:
    """Refusals once with their words, then up to three prompts with both counts."""
    refused = [key for key in unequal if theirs[key]["tokens"] is None]
    counted = [key for key in unequal if theirs[key]["tokens"] is not None]
    parts = []
    if refused:
        parts.append(
            f"{len(refused)} of {asked} prompts refused by the candidate ({theirs[refused[0]]['error'][:160]})"
        )
    if counted:
        shown = [
            f"{ours[key]['preview']!r}: {ours[key]['tokens']} vs {theirs[key]['tokens']} tokens" for key in counted[:3]
        ]
        parts.append(f"{len(counted)} of {asked} prompts differ: {'; '.join(shown)}")
    return "; ".join(parts)


def _cause(incumbent: Evidence, candidate: Evidence) -> str:
    """Tokenizer or template, from the texts that no template touches."""
    counts = [
        (ours, theirs)
        for ours, theirs in zip(incumbent["raw"], candidate["raw"], strict=True)
        if ours["tokens"] is not None and theirs["tokens"] is not None
    ]
    if not counts:
        return "cause unknown, tokenizer or template (raw texts were not counted by both engines)"
    differences = {theirs["tokens"] - ours["tokens"] for ours, theirs in counts}
    if differences == {0}:
        return f"cause: chat template ({len(counts)} of {len(counts)} raw texts are read alike)"
    if len(differences) == 1:
        return f"cause: start token ({differences.pop():+d} on every raw text, whatever its length)"
    ours, theirs = next((ours, theirs) for ours, theirs in counts if ours["tokens"] != theirs["tokens"])
    return (
        f"cause: tokenizer, raw {ours['text']!r} is {ours['tokens']} vs {theirs['tokens']} tokens "
        "(an explicit tokenizer.json for the candidate may mend it)"
    )


def judge_answers(
    comparison: Evidence, floors: Sequence[Evidence] = (), limits: ParityLimits = DEFAULT_LIMITS
) -> list[CheckResult]:
    """The checks on a `compare_answers`, with the engines' own noise (`measure_floor` of each) as the least limit."""
    return [
        _judge_top1(comparison, limits),
        *_judge_kld(comparison, floors, limits),
        _judge_divergences(comparison, limits),
        _judge_degenerate(comparison, limits),
        _judge_finish(comparison),
        _judge_length(comparison, limits),
        _judge_exact(comparison),
    ]


def _basis(comparison: Evidence) -> str:
    """How much was compared; what could not be compared comes first."""
    differ, errors = len(comparison["prompt_tokens_differ"]), len(comparison["errors"])
    first = f"{differ} prompts read as other tokens and left out; " if differ else ""
    first += f"{errors} prompts failed ({comparison['errors'][0][:80]}); " if errors else ""
    return f"{first}{comparison['positions']} positions of {comparison['prompts_compared']} prompts"


def _judge_top1(comparison: Evidence, limits: ParityLimits) -> CheckResult:
    check, share = "parity.top1_agreement", comparison["top1_agreement"]
    if share is None:
        return not_measured(
            check, f"no logprobs to compare: {_basis(comparison)}", limit=limits.top1_agreement, unit="share"
        )
    low, high = comparison["top1_low"], comparison["top1_high"]
    why = f"{share:.2%} on {_basis(comparison)}, 95 % bounds {low:.2%} and {high:.2%}"
    enough = share >= limits.top1_agreement and low >= limits.top1_lower_bound
    verdict = Verdict.PASS if enough else Verdict.INCONCLUSIVE
    if high < limits.top1_agreement:
        verdict = Verdict.FAIL
    if verdict is Verdict.INCONCLUSIVE:
        why += f": too few positions (wanted {limits.top1_agreement:.0%}, lower bound {limits.top1_lower_bound:.0%})"
    return CheckResult(check=check, verdict=verdict, value=share, limit=limits.top1_agreement, unit="share", why=why)


def _judge_kld(comparison: Evidence, floors: Sequence[Evidence], limits: ParityLimits) -> list[CheckResult]:
    results = []
    for name, least in (("mean_kld", limits.mean_kld), ("p99_kld", limits.p99_kld)):
        noise = [floor[run][name] for floor in floors for run in ("repeat", "cached", "parallel")]
        own = max((value for value in noise if value is not None), default=0.0)
        # the fixed p99 limit is far over any mean that passes: it does not move with the floor
        limit = max(least, limits.floor_factor * own) if name == "mean_kld" else least
        value, check = comparison[name], f"parity.{name}"
        why = (
            f"{_basis(comparison)}; own noise {own:.2g}" if floors else f"{_basis(comparison)}; own noise not measured"
        )
        if value is None or (value <= limit and comparison["positions"] < limits.min_positions):
            why += f"; {limits.min_positions} positions wanted"
            results.append(not_measured(check, why, limit=limit, unit="nats").model_copy(update={"value": value}))
        else:
            results.append(at_most(check, value, limit=limit, unit="nats", why=why))
    return results


def _judge_divergences(comparison: Evidence, limits: ParityLimits) -> CheckResult:
    check, limit = "parity.explained_divergences", limits.unexplained_divergences
    if not comparison["positions"]:
        return not_measured(check, f"no logprobs to compare: {_basis(comparison)}", limit=limit, unit="divergences")
    found = comparison["divergences"]
    unexplained = [d for d in found if d["explained"] is False]
    unseen = [d for d in found if d["explained"] is None]
    why = f"{len(found)} divergences, {len(found) - len(unexplained) - len(unseen)} on near ties"
    why += f", {len(unseen)} where the logprobs are not shown" if unseen else ""
    if unexplained:
        shown = "; ".join(
            f"{d['prompt']} at {d['position']}: {d['incumbent_token']!r} vs {d['candidate_token']!r}, "
            f"{d['choice_gap_nats']:.2f} nats apart"
            for d in unexplained[:3]
        )
        why += f"; unexplained: {shown}"
    if len(unseen) * 2 > len(found) and len(unexplained) <= limit:
        return not_measured(check, f"{why}: most cannot be told", limit=limit, unit="divergences")
    return at_most(check, len(unexplained), limit=limit, unit="divergences", why=why)


def _judge_degenerate(comparison: Evidence, limits: ParityLimits) -> CheckResult:
    """Broken text may not appear more often; loops, which small models make by themselves, not significantly so."""
    check, limit = "parity.degenerate", limits.excess_degenerate
    if comparison["exact_match_share"] is None:
        return not_measured(check, "no answers by both engines", limit=limit, unit="answers")
    ours, theirs = comparison["degenerate"]["incumbent"], comparison["degenerate"]["candidate"]
    gained, lost = _discordant(ours, theirs, loops=False)
    loops_gained, loops_lost = _discordant(ours, theirs, loops=True)
    excess = len(gained) - len(lost)
    why = f"{len(theirs)} of the candidate's answers, {len(ours)} of the incumbent's"
    if gained:
        why += f"; new: {'; '.join(f'{key}: {theirs[key]}' for key in gained[:3])}"
    if loops_gained or loops_lost:
        why += f"; loops only in the candidate {len(loops_gained)}, only in the incumbent {len(loops_lost)}"
    if _sign_test(len(loops_gained), len(loops_lost)) < 0.05:
        excess += len(loops_gained) - len(loops_lost)
        why += " (p < 0.05)"
    return at_most(check, max(0, excess), limit=limit, unit="answers", why=why)


def _discordant(ours: dict[str, str], theirs: dict[str, str], *, loops: bool) -> tuple[list[str], list[str]]:
    """Prompts degenerate in this way with the candidate only, and with the incumbent only."""
    gained = [key for key, why in theirs.items() if key not in ours and why.startswith(LOOP) == loops]
    lost = [key for key, why in ours.items() if key not in theirs and why.startswith(LOOP) == loops]
    return gained, lost


def _sign_test(gained: int, lost: int) -> float:
    """Probability of `gained` or more out of all discordant pairs if both sides were as likely."""
    n = gained + lost
    return sum(math.comb(n, k) for k in range(gained, n + 1)) / 2**n


def _judge_finish(comparison: Evidence) -> CheckResult:
    """A reason the incumbent never gives is a new word to clients; equal text must end for the same reason."""
    check, reasons = "parity.finish_reason", comparison["finish_reasons"]
    if comparison["exact_match_share"] is None:
        return not_measured(check, "no answers by both engines", limit=0, unit="answers")
    known = set(reasons["incumbent"]) | {"stop", "length", "tool_calls"}
    strange = {reason: n for reason, n in reasons["candidate"].items() if reason not in known}
    differ = reasons["differ_on_equal_text"]
    why = f"same reason in {comparison['finish_reason_agreement']:.0%} of all answers"
    why += f"; equal text, other reason: {'; '.join(differ[:3])}" if differ else ""
    why += f"; unknown reasons {strange}" if strange else ""
    return at_most(check, len(differ) + sum(strange.values()), limit=0, unit="answers", why=why)


def _judge_length(comparison: Evidence, limits: ParityLimits) -> CheckResult:
    check, length = "parity.mean_length_ratio", comparison["length"]
    required = length["prompts"] >= limits.length_required_from
    if length["ratio"] is None:
        return not_measured(
            check, "completion tokens of fewer than 2 answers", limit=1 + limits.length_margin, required=False
        )
    inside = 1 / (1 + limits.length_margin), 1 + limits.length_margin
    low, high = length["low"], length["high"]
    verdict = Verdict.INCONCLUSIVE
    if inside[0] <= low and high <= inside[1]:
        verdict = Verdict.PASS
    elif high < inside[0] or low > inside[1]:
        verdict = Verdict.FAIL
    why = f"{length['ratio']:.3f}, 95 % interval {low:.3f} to {high:.3f} over {length['prompts']} prompts"
    return CheckResult(
        check=check, verdict=verdict, value=length["ratio"], limit=inside[1], unit="ratio", why=why, required=required
    )


def _judge_exact(comparison: Evidence) -> CheckResult:
    check, share = "parity.exact_match", comparison["exact_match_share"]
    if share is None:
        return not_measured(check, "no answers by both engines", unit="share", required=False)
    why = f"{share:.0%} of the answers are equal to the letter; reported only, sound engines differ on near ties"
    return CheckResult(check=check, verdict=Verdict.PASS, value=share, unit="share", why=why, required=False)


def judge_ignored_parameters(
    incumbent: Evidence, candidate: Evidence, required_parameters: Sequence[str] = ()
) -> list[CheckResult]:
    """`parity.ignored_parameters`: those that the incumbent honours and the candidate does not.

    Gates only on `required_parameters`, the ones that the user's requests rely on; one of these that the incumbent
    does not honour either is no regression.
    """
    check, ours, theirs = "parity.ignored_parameters", incumbent["parameters"], candidate["parameters"]
    lost = [name for name, found in ours.items() if found["effect"] and not theirs.get(name, {}).get("effect")]
    gating = [name for name in lost if name in required_parameters]
    wanted = [name for name in required_parameters if name not in ours]
    if wanted:
        return [
            not_measured(
                check, f"no probe for {', '.join(wanted)}; known: {', '.join(ours)}", limit=0, unit="parameters"
            )
        ]
    unclear = [name for name in gating if theirs.get(name, {}).get("effect") is None]
    words = "; ".join(f"{name}: {theirs.get(name, {}).get('observed', 'not probed')}"[:100] for name in lost)
    why = f"honoured by the incumbent only: {words}" if lost else "all that the incumbent honours"
    required = bool(required_parameters)
    if not gating:
        verdict = Verdict.FAIL if lost and not required else Verdict.PASS
        value = len(gating) if required else len(lost)
        return [
            CheckResult(
                check=check, verdict=verdict, value=value, limit=0, unit="parameters", why=why, required=required
            )
        ]
    why = f"relied on: {', '.join(gating)}" + (f" ({len(unclear)} refused or unclear)" if unclear else "") + f"; {why}"
    return [at_most(check, len(gating), limit=0, unit="parameters", why=why)]


# --- the wire --------------------------------------------------------------------------------------------------------


def _client(endpoint: Endpoint, timeout_s: float) -> httpx.Client:
    return httpx.Client(base_url=endpoint.base_url, headers=endpoint.headers, timeout=timeout_s, trust_env=False)


def _chat_body(endpoint: Endpoint, prompt: Prompt, *, max_tokens: int) -> Evidence:
    return {"model": endpoint.model_id, "max_tokens": max_tokens, "temperature": 0} | prompt.body


def _post(http: httpx.Client, path: str, body: Evidence) -> tuple[Evidence | None, str | None]:
    """(parsed answer, None) or (None, what went wrong in one line)."""
    try:
        reply = http.post(path, json=body)
    except httpx.HTTPError as error:
        return None, f"{type(error).__name__}: {error}"
    if reply.status_code != 200:
        return None, f"HTTP {reply.status_code}: {redacted_text(' '.join(reply.text.split()))[:160]}"
    try:
        answer = reply.json()
    except ValueError:
        return None, f"200 without JSON: {redacted_text(reply.text)[:80]!r}"
    if not isinstance(answer, dict):
        return None, f"200 without a JSON object: {redacted_text(reply.text)[:80]!r}"
    return answer, None


def _usage(answer: Evidence, key: str) -> int | None:
    count = (answer.get("usage") or {}).get(key)
    return count if isinstance(count, int) else None


def _origin(endpoint: Endpoint) -> Evidence:
    return {"engine": endpoint.engine, "version": endpoint.version, "model_id": endpoint.model_id}


def _preview(prompt: Prompt) -> str:
    last = prompt.messages[-1].content
    text = last if isinstance(last, str) else json.dumps(last, ensure_ascii=False)
    return text if len(text) <= 48 else f"{text[:47]}…"
