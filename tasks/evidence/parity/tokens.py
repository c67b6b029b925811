"""Prompt tokens: do both engines read a prompt as equally many, and if not, is it the tokenizer or the template?

What follows from what: docs/verdicts.md.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence

from engines.client.read_stream import read_usage
from engines.settings import Endpoint
from engines.units import number_of
from tasks.evidence.behaviours.caller import Caller
from tasks.evidence.parity.asking import TIMEOUT_S, Evidence, Progress, chat_body, origin, post
from tasks.evidence.prompts import Prompt
from tasks.verdicts.limits import DEFAULT_LIMITS, PROMPT_TOKENS_SHARE, Limits
from tasks.verdicts.verdict import CheckResult, at_least, not_measured

# without any template: where their token counts differ, the tokenizers differ
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


def measure_prompt_tokens(
    endpoint: Endpoint, prompts: Sequence[Prompt], progress: Progress = lambda _: None
) -> Evidence:
    """The tokens of every prompt with its template, and of raw texts without.

    Counted by `/v1/chat/completions/input_tokens` and `/tokenize` where the engine has them (nothing is generated, and
    the first prompt's count is checked against `usage.prompt_tokens`), else from one-token requests. A prompt that is
    refused is kept with its error. For prompts with tools `tools_shown` says whether the tools changed the count: a
    template without tool support drops them and answers 200. `raw[].ids` are the ids of `/tokenize`, `plain` how many
    it has for the last message alone, `template` is the digest of what `/apply-template` renders; None where the engine
    has none.
    """
    started = time.monotonic()
    counted: dict[str, Evidence] = {}
    with Caller(endpoint, read_timeout_s=TIMEOUT_S) as caller:
        counter = _counter(caller, endpoint, prompts)
        for number, prompt in enumerate(prompts, 1):
            template = _template(caller, endpoint, prompt)
            plain = _plain_tokens(caller, endpoint, prompt)
            counted[prompt.id] = _prompt_tokens(counter, endpoint, prompt) | {"template": template, "plain": plain}
            if number % 10 == 0 or number == len(prompts):
                progress(f"{endpoint.engine}: counted the tokens of {number}/{number_of(len(prompts), 'prompt')}")
        raw = _raw_texts(caller, endpoint)
    return origin(endpoint) | {"prompts": counted, "raw": raw, "seconds": time.monotonic() - started}


TokenCounter = Callable[[Evidence], tuple[int | None, str | None]]


def _counter(caller: Caller, endpoint: Endpoint, prompts: Sequence[Prompt]) -> TokenCounter:
    """How this engine's prompt tokens are counted: without generating, where that agrees with `usage` on one prompt."""

    def by_usage(body: Evidence) -> tuple[int | None, str | None]:
        return _used(caller, "/v1/chat/completions", body)

    def by_count(body: Evidence) -> tuple[int | None, str | None]:
        answer, error = post(caller, "/v1/chat/completions/input_tokens", body)
        tokens = (answer or {}).get("input_tokens")
        return (tokens, None) if isinstance(tokens, int) else (None, error or "no input_tokens in the answer")

    body = chat_body(endpoint, prompts[0], max_tokens=1) if prompts else {}
    tokens = by_count(body)[0] if prompts else None
    return by_count if tokens is not None and tokens == by_usage(body)[0] else by_usage


def _prompt_tokens(count: TokenCounter, endpoint: Endpoint, prompt: Prompt) -> Evidence:
    tokens, error = count(chat_body(endpoint, prompt, max_tokens=1))
    shown = None
    if prompt.tools and tokens is not None:
        bare = prompt.model_copy(update={"tools": None})
        without, _ = count(chat_body(endpoint, bare, max_tokens=1))
        shown = None if without is None else tokens > without
    last = prompt.messages[-1].content
    text = last if isinstance(last, str) else json.dumps(last, ensure_ascii=False)
    preview = text if len(text) <= 48 else f"{text[:47]}…"
    return {"tokens": tokens, "error": error, "tools_shown": shown, "preview": preview}


def _template(caller: Caller, endpoint: Endpoint, prompt: Prompt) -> str | None:
    """The digest of the whole prompt as text; None where the engine does not show it."""
    answer, _ = post(caller, "/apply-template", chat_body(endpoint, prompt, max_tokens=1))
    text = answer.get("prompt") if answer else None
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16] if isinstance(text, str) else None


def _raw_texts(caller: Caller, endpoint: Endpoint) -> list[Evidence]:
    """The tokens of each raw text; none where `/v1/completions`, in place of `/tokenize`, renders a template too."""
    first = _raw_tokens(caller, endpoint, RAW_TEXTS[0])
    if first["ids"] is None and first["tokens"] is not None:
        chat = {"messages": [{"role": "user", "content": RAW_TEXTS[0]}], "max_tokens": 1, "temperature": 0}
        as_chat, _ = _used(caller, "/v1/chat/completions", {"model": endpoint.model_id, **chat})
        if as_chat == first["tokens"]:
            why = "/v1/completions counts a text like a chat: it renders the template"
            return [{"text": text, "tokens": None, "error": why, "ids": None} for text in RAW_TEXTS]
    return [first, *(_raw_tokens(caller, endpoint, text) for text in RAW_TEXTS[1:])]


def _plain_tokens(caller: Caller, endpoint: Endpoint, prompt: Prompt) -> int | None:
    """The tokens of the last message alone, where `/tokenize` counts them; a generated token would cost too much."""
    text = prompt.messages[-1].content
    ids = _token_ids(caller, endpoint, text) if isinstance(text, str) else None
    return None if ids is None else len(ids)


def _token_ids(caller: Caller, endpoint: Endpoint, text: str) -> list[int] | None:
    # llama.cpp reads `content`, vLLM reads `prompt`
    body = {"model": endpoint.model_id, "content": text, "prompt": text, "add_special": True}
    answer, _ = post(caller, "/tokenize", body)
    ids = answer.get("tokens") if answer else None
    return ids if isinstance(ids, list) and all(isinstance(token, int) for token in ids) else None


def _raw_tokens(caller: Caller, endpoint: Endpoint, text: str) -> Evidence:
    ids = _token_ids(caller, endpoint, text)
    if ids is not None:
        return {"text": text, "tokens": len(ids), "error": None, "ids": ids}
    body = {"model": endpoint.model_id, "prompt": text, "max_tokens": 1, "temperature": 0}
    tokens, error = _used(caller, "/v1/completions", body)
    return {"text": text, "tokens": tokens, "error": error, "ids": None}


def _used(caller: Caller, path: str, body: Evidence) -> tuple[int | None, str | None]:
    """(prompt tokens, None) or (None, why there are none)."""
    answer, error = post(caller, path, body)
    tokens = (read_usage((answer or {}).get("usage")) or {}).get("prompt_tokens")
    return tokens, error or (None if tokens is not None else "no usage.prompt_tokens in the answer")


def judge_prompt_tokens(incumbent: Evidence, candidate: Evidence, limits: Limits = DEFAULT_LIMITS) -> list[CheckResult]:
    """`parity.prompt_tokens`: the share of prompts read as equally many tokens, and, where they are not, the cause.

    Where both engines show the prompt as text, `parity.templates` is the share of those that are equal.

    A prompt that only the candidate refuses counts as unequal; one that the incumbent refuses is left out. When this
    fails, answers need not be measured: they would answer other prompts.
    """
    check, limit = "parity.prompt_tokens", PROMPT_TOKENS_SHARE
    ours = {key: found for key, found in incumbent["prompts"].items() if found["tokens"] is not None}
    theirs = candidate["prompts"]
    asked = [key for key in ours if key in theirs]
    uncounted = [key for key in asked if theirs[key]["tokens"] is None and "usage" in (theirs[key]["error"] or "")]
    if not asked or uncounted:
        why = (
            f"{number_of(len(uncounted), 'answer')} without usage.prompt_tokens"
            if uncounted
            else "no prompt counted by both"
        )
        return [not_measured(check, why, limit=limit, unit="share")]
    unequal = [key for key in asked if ours[key]["tokens"] != theirs[key]["tokens"]]
    refused = len(incumbent["prompts"]) - len(ours)
    note = f"; {refused} that the incumbent refuses left out" if refused else ""
    if unequal:
        why = f"{_cause(incumbent, candidate, unequal)}; {_examples(ours, theirs, unequal, len(asked))}{note}"
    else:
        dropped = sum(found["tools_shown"] is False for found in ours.values())
        note += f"; {dropped} with tools that the template does not show" if dropped else ""
        why = f"{len(asked)} of {number_of(len(asked), 'prompt')} equal{note}"
    share = 1.0 - len(unequal) / len(asked)
    return [at_least(check, share, limit=limit, unit="share", why=why), *_judge_templates(ours, theirs, asked)]


def _judge_templates(ours: Evidence, theirs: Evidence, asked: list[str]) -> list[CheckResult]:
    shown = {key: (ours[key].get("template"), theirs[key].get("template")) for key in asked}
    both = {key: one == other for key, (one, other) in shown.items() if one and other}
    if not both:
        return []
    differ = [ours[key]["preview"] for key, equal in both.items() if not equal]
    why = f"{len(both) - len(differ)} of {number_of(len(both), 'prompt')} are rendered to the same text"
    why += f"; not {differ[0]!r}" if differ else ""
    share = 1.0 - len(differ) / len(both)
    return [at_least("parity.templates", share, limit=PROMPT_TOKENS_SHARE, unit="share", why=why)]


def _examples(ours: Evidence, theirs: Evidence, unequal: list[str], asked: int) -> str:
    """Refusals once with their words, then up to three prompts with both counts."""
    refused = [key for key in unequal if theirs[key]["tokens"] is None]
    counted = [key for key in unequal if theirs[key]["tokens"] is not None]
    parts = []
    if refused:
        words = theirs[refused[0]]["error"][:160]
        parts.append(f"{len(refused)} of {number_of(asked, 'prompt')} refused by the candidate ({words})")
    if counted:
        shown = (
            f"{ours[k]['preview']!r}: {ours[k]['tokens']} vs {number_of(theirs[k]['tokens'], 'token')}"
            for k in counted[:3]
        )
        parts.append(f"{len(counted)} of {number_of(asked, 'prompt')} differ: {'; '.join(shown)}")
    return "; ".join(parts)


NOT_KNOWN = "cause: tokenizer or chat template, not known which"


def _cause(incumbent: Evidence, candidate: Evidence, unequal: Sequence[str]) -> str:
    """Tokenizer or template: from the prompts that differ, as text and without a template, else from the raw texts."""
    pairs = [(incumbent["prompts"][key], candidate["prompts"][key]) for key in unequal]
    texts = [(ours.get("template"), theirs.get("template")) for ours, theirs in pairs]
    if shown := [one == other for one, other in texts if one and other]:
        same = "cause: tokenizer (both render these prompts to the same text)"
        return same if all(shown) else "cause: chat template (these prompts are rendered to other texts)"
    both = zip(incumbent["raw"], candidate["raw"], strict=True)
    raw = [(ours, theirs) for ours, theirs in both if None not in (ours["tokens"], theirs["tokens"])]
    more = {theirs["tokens"] - ours["tokens"] for ours, theirs in raw}
    start = next(iter(more)) if len(more) == 1 else 0
    plain = [(ours.get("plain"), theirs.get("plain")) for ours, theirs in pairs]
    known = [(one, other) for one, other in plain if one is not None and other is not None]
    if other := [(one, two) for one, two in known if two - one != start]:
        counts = f"{other[0][0]} vs {number_of(other[0][1], 'token')}"
        return f"cause: tokenizer, without a template {len(other)} of {len(known)} differ as well, one by {counts}"
    if known and not start:
        return f"cause: chat template (without it {len(known)} of {len(known)} are read alike)"
    if len(more) > 1:
        ours, theirs = next((ours, theirs) for ours, theirs in raw if ours["tokens"] != theirs["tokens"])
        return (
            f"cause: tokenizer, raw {ours['text']!r} is {ours['tokens']} vs {number_of(theirs['tokens'], 'token')} "
            "(an explicit tokenizer.json for the candidate may fix it)"
        )
    if start and all(theirs["tokens"] == ours["tokens"] + start for ours, theirs in pairs if theirs["tokens"]):
        return f"cause: start token ({start:+d} on every raw text, whatever its length)"
    return f"{NOT_KNOWN} ({number_of(len(raw), 'raw text')} read alike)" if more == {0} else NOT_KNOWN
