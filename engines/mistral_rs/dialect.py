"""mistral.rs in the dialect of llama.cpp's server: requests, answers and streams of the wheel's host and the binary.

Clients of llama.cpp must not notice a move. Shapes were read off llama-server b10434 and, for the `mistralrs` binary,
at mistral.rs v0.9.2 (`mistralrs-server-core/src/{openai,chat_completion,completions}.rs`,
`mistralrs-core/src/response.rs`). What stays different:

- no `timings` before the last chunk, no `return_progress`, no `cache_n`; what the engine did not measure is left out;
- the binary's /v1/completions streams hold no usage at all, so there is none even when asked for;
- our own host writes OpenAI's `content: ""` in the role chunk (llama.cpp: null), `logprobs: null` in every choice, no
  `system_fingerprint`, and usage of a streamed text completion only when asked, in a chunk of its own;
- a GBNF `grammar` is refused: an answer that ignores it would look like one that obeys.
"""

from __future__ import annotations

import json
import math
import re
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeGuard

from engines.openai.call import GENERATING, Call, Refusal
from engines.openai.dialect import Dialect, Json
from engines.openai.sse import DONE, DONE_DATA, SseSplitter, compact, read_event, write_event

# what llama-server uses where a request sets nothing (common/common.h, shown by its /props)
SAMPLING = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
# the first one given counts (llama.cpp tools/server/server-task.cpp); -1 is no limit, 0 is answered with one token
LIMITS = ("n_predict", "max_completion_tokens", "max_tokens")
# fields of llama.cpp without a counterpart
# fmt: off
UNKNOWN = frozenset((
    "adaptive_decay", "adaptive_target", "add_generation_prompt", "backend_sampling", "cache_prompt", "chat_format",
    "dry_penalty_last_n", "dynatemp_exponent", "dynatemp_range", "generation_prompt", "grammar", "grammar_lazy",
    "grammar_triggers", "id_slot", "lora", "min_keep", "mirostat", "mirostat_eta", "mirostat_tau", "n_cache_reuse",
    "n_discard", "n_indent", "n_keep", "n_probs", "parse_tool_calls", "post_sampling_probs", "preserved_tokens",
    "reasoning_format", "reasoning_in_content", "repeat_last_n", "response_fields", "return_progress", "return_tokens",
    "samplers", "t_max_predict_ms", "t_max_prompt_ms", "thinking_forced_open", "timings_per_token", "top_n_sigma",
    "typical_p", "xtc_probability", "xtc_threshold",
))
# fmt: on
COUNTING = "/v1/chat/completions/input_tokens"
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    501: "not_supported_error",
    503: "unavailable_error",
}
TOO_LONG = re.compile(r"Prompt sequence length is greater than (\d+)")
# the binary answers 500, or 200 and an error event, to many a request that is itself at fault
CLIENTS_FAULT = re.compile(
    r"Prompt sequence length is greater|max_tokens must be|Number of choices must be|Invalid grammar|empty prompt|"
    r"is not available\. Available|No content was provided|for an image message must be|tool_choice|sub-content|"
    r"cannot be used as a stop token|does not have a chat template"
)


class HostDialect(Dialect):
    """For our own server around the wheel, which speaks OpenAI's shapes and llama.cpp's `timings`, streams included."""

    ignores = UNKNOWN | {"dry_multiplier", "dry_base", "dry_allowed_length", "dry_sequence_breakers"}

    def request(self) -> bytes:
        """The body, with llama.cpp's words in OpenAI's."""
        if self.call.path not in GENERATING and self.call.path != COUNTING:
            return super().request()
        return json.dumps({**without_llama_words(self.call.body), "model": self._served_name}).encode()

    def whole(self, status: int, data: bytes) -> tuple[int, bytes]:
        """An error gets its status as `code`."""
        if status < 400:
            return status, data
        try:
            error = json.loads(data)["error"]
            return status, compact({"error": {**error, "code": status}})
        except (ValueError, KeyError, TypeError):
            return status, data


class BinaryDialect(Dialect):
    """For the `mistralrs` binary: requests, errors, answers and streams all have to change."""

    changes_streams = True
    ignores = UNKNOWN
    words: ClassVar[Mapping[str, str]] = {"repeat_penalty": "repetition_penalty"}

    def __init__(self, call: Call, served_name: str, model_id: str = "", *, context_tokens: int | None = None) -> None:
        super().__init__(call, served_name, model_id, context_tokens=context_tokens)
        options = call.body.get("stream_options")
        self._wants_usage = isinstance(options, dict) and options.get("include_usage") is True
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._splitter = SseSplitter()
        self._opened: set[object] = set()
        self._usage_chunk: Json | None = None
        self._commented = False
        self._started = False

    def request(self) -> bytes:
        """The body in the binary's words. Raises Refusal 501 for what has no counterpart there."""
        path = self.call.path
        if path == "/v1/embeddings":
            return super().request()
        if path not in GENERATING:
            raise Refusal(
                501,
                f"{path}: mistralrs does not tokenize over HTTP; it counts tokens in the usage of an answer only",
                kind="not_supported_error",
                code="not_supported",
            )
        return json.dumps({**self._in_its_words(), "model": self._served_name}).encode()

    def _in_its_words(self) -> Json:
        return for_binary(self.call.path, without_llama_words(self.call.body))

    def whole(self, status: int, data: bytes) -> tuple[int, bytes]:
        """llama.cpp's answer with the binary's content; an error gets an `error` object and the status that fits."""
        if status >= 400:
            return error_of(status, data)
        try:
            body = json.loads(data)
        except ValueError:
            return status, data
        if not isinstance(body, dict) or "error" in body:
            return status, data
        changed = body | ({"model": self._model_id} if "model" in body else {})
        if isinstance(body.get("choices"), list):
            changed |= {"id": self._id, "choices": [self._whole_choice(choice) for choice in body["choices"]]}
        usage = body.get("usage")
        if isinstance(usage, dict):
            changed["usage"] = usage_of(usage)
            if "choices" in body:
                changed["timings"] = timings_of(usage)
        return status, compact(changed)

    def event(self, chunk: bytes) -> bytes:
        return b"".join(map(self._event, self._splitter.feed(chunk)))

    def rest(self) -> bytes:
        held, self._splitter.rest = self._splitter.rest, b""
        return self._event(held) if held.strip() else b""

    def _event(self, event: bytes) -> bytes:
        name, data = read_event(event)
        if event.startswith(b":") and not self._started and not self._commented:
            self._commented = True  # one comment less keeps nobody waiting, and an error behind it can still be a 400
            return b""
        if self.early_error is not None:
            return b""
        if name or not data or not all(line.startswith(b"data:") for line in event.splitlines()):
            return event + b"\n\n"
        if data == DONE_DATA:
            owed, self._usage_chunk = self._usage_chunk, None
            return (write_event(owed) if owed else b"") + DONE
        if not data.startswith(b"{"):  # an error is raw text up to 0.9.2
            return self._failed(data.decode("utf-8", "replace"))
        try:
            body = json.loads(data)
        except ValueError:
            return event + b"\n\n"
        if isinstance(body.get("error"), dict):
            return self._failed(str(body["error"].get("message")))
        if not isinstance(body.get("choices"), list):
            return event + b"\n\n"
        self._started = True
        return b"".join(map(write_event, self._chunks(body)))

    def _failed(self, message: str) -> bytes:
        """An error in the stream: an answer of its own when nothing came before it, as llama.cpp has it."""
        status, body = error_of(500, compact({"message": message}))
        if not self._started:
            self.early_error = status, body
            return b""
        self.error = message
        return b"data: " + body + b"\n\n"

    def _chunks(self, body: Json) -> Iterator[Json]:
        choices = body["choices"]
        head = {key: value for key, value in body.items() if key not in ("choices", "usage") and value is not None}
        head |= {"id": self._id, "model": self._model_id}
        changed = [{**head, "choices": [one]} for choice in choices for one in self._choices(choice)]
        usage = body.get("usage")
        if isinstance(usage, dict):
            timings = {"timings": timings_of(usage)}
            if self._wants_usage:
                self._usage_chunk = {**head, "choices": [], "usage": usage_of(usage), **timings}
            elif changed:
                changed[-1] |= timings
        yield from changed
        if self._usage_chunk and all(isinstance(one, dict) and one.get("finish_reason") for one in choices):
            yield self._usage_chunk
            self._usage_chunk = None

    def _choices(self, choice: Any) -> Iterator[Any]:
        if not isinstance(choice, dict):
            yield choice
            return
        index, finish = choice.get("index", 0), choice.get("finish_reason")
        logprobs = self._logprobs(choice.get("logprobs"))
        if "text" in choice:
            if choice["text"] or logprobs:
                yield {"text": choice["text"], "index": index, "logprobs": logprobs, "finish_reason": None}
            if finish:
                yield {"text": "", "index": index, "logprobs": None, "finish_reason": finish}
            return
        if index not in self._opened:
            self._opened.add(index)
            yield {"finish_reason": None, "index": index, "delta": {"role": "assistant", "content": None}}
        delta = {key: value for key, value in (choice.get("delta") or {}).items() if key != "role" and value}
        if delta or logprobs:
            changed: Json = {"finish_reason": None, "index": index, "delta": delta or {"content": ""}}
            yield changed | ({"logprobs": logprobs} if logprobs else {})
        if finish:
            yield {"finish_reason": finish, "index": index, "delta": {}}
            if finish in ("error", "canceled"):
                self.error = f"the engine ended the generation: {finish}"

    def _whole_choice(self, choice: Any) -> Any:
        if not isinstance(choice, dict):
            return choice
        logprobs = self._logprobs(choice.get("logprobs"))
        if "text" in choice:
            return {**choice, "logprobs": logprobs}
        message = {key: value for key, value in (choice.get("message") or {}).items() if value or key == "content"}
        if "tool_calls" in message:
            message["tool_calls"] = [
                {key: value for key, value in call.items() if key != "index"} if isinstance(call, dict) else call
                for call in message["tool_calls"]
            ]
        changed = {key: value for key, value in choice.items() if key != "logprobs"} | {"message": message}
        return changed | ({"logprobs": logprobs} if logprobs else {})

    def _logprobs(self, logprobs: Any) -> Json | None:
        return logprobs_of(logprobs)


class OldBinaryDialect(BinaryDialect):
    """For the binary before 0.9.1: its log-probabilities are of base 10, and log10 of raw logits at temperature 0.

    From those no probability follows: the sum over the vocabulary is missing. A greedy request that asks for some is
    sent as one at temperature 1 that leaves the best token alone: the same tokens, each with its probability, and no
    other token's (mistralrs-core 0.8.1, `sampler.rs`).
    """

    def _in_its_words(self) -> Json:
        body = super()._in_its_words()
        is_asked = body.get("logprobs") not in (None, False)
        greedy = {"temperature": 1, "top_k": 1, "top_p": 1, "min_p": 0}
        return body | greedy if is_asked and body.get("temperature") == 0 else body

    def _logprobs(self, logprobs: Any) -> Json | None:
        found = super()._logprobs(logprobs)
        for entry in found["content"] if found else []:
            for one in (entry, *entry["top_logprobs"]):
                if _is_number(one["logprob"]):
                    one["logprob"] *= math.log(10)
        return found


def without_llama_words(body: Json) -> Json:
    """A request to llama.cpp in mistral.rs's words, llama.cpp's defaults stated. Refusal 400 for a GBNF grammar."""
    grammar = body.get("grammar")
    if isinstance(grammar, str) and grammar.strip():
        raise Refusal(
            400,
            "grammar: this engine does not know llama.cpp's GBNF; ask for a JSON schema in response_format instead",
            code="unsupported_parameter",
        )
    # null means "not set" to llama.cpp, and is a type error to others
    plain = {key: value for key, value in body.items() if value is not None and key not in UNKNOWN}
    if isinstance(grammar, dict):  # mistral.rs's own: {"type": "regex", "value": ...}
        plain["grammar"] = grammar
    limit = next((plain[name] for name in LIMITS if name in plain), None)
    plain = {key: value for key, value in plain.items() if key not in LIMITS}
    if not _is_number(limit):
        plain |= {"max_tokens": limit} if limit is not None else {}
    elif int(limit) != -1:
        plain["max_tokens"] = int(limit) or 1
    if "repeat_penalty" in plain:
        plain.setdefault("repetition_penalty", plain.pop("repeat_penalty"))
    if plain.get("stream") is not True:
        plain.pop("stream_options", None)
    temperature, top_k = plain.get("temperature"), plain.get("top_k")
    if _is_number(temperature) and temperature <= 0:
        return {**plain, "temperature": 0} | ({"top_k": 1} if "top_k" in plain else {})
    full = {**SAMPLING, **plain}
    if _is_number(top_k) and top_k <= 0:  # all tokens
        del full["top_k"]
    return full


def for_binary(path: str, body: Json) -> Json:
    """A plain request as the binary reads it, strictly typed. Raises Refusal 400 for a grammar beside a schema."""
    body = {**body}
    schema = _schema_of(body)
    if schema is not None and "grammar" in body:
        raise Refusal(400, "grammar: cannot be combined with a JSON schema")
    if schema is not None and path == "/v1/completions":
        body["grammar"] = {"type": "json_schema", "value": schema}
    elif schema is not None:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    if isinstance(body.get("messages"), list):
        body["messages"] = [_message(message) for message in body["messages"]]
    bias = body.get("logit_bias")
    if isinstance(bias, list):
        body["logit_bias"] = {str(one[0]): one[1] for one in bias if isinstance(one, list) and len(one) == 2}
    if path == "/v1/completions":
        prompt, logprobs = body.get("prompt"), body.get("logprobs")
        if isinstance(prompt, list) and len(prompt) == 1:
            body["prompt"] = prompt[0]
        if isinstance(logprobs, bool):
            del body["logprobs"]
            body |= {"logprobs": 1} if logprobs else {}
    return body


def _schema_of(body: Json) -> Any:
    """The JSON schema that a request asks for, taken out of it; None for plain text, or what the engine must judge."""
    own, wanted = body.pop("json_schema", None), body.get("response_format")
    if not isinstance(wanted, dict):
        return own
    if wanted.get("type") == "text":
        body.pop("response_format")  # to the binary it excludes a grammar
        return own
    if wanted.get("type") == "json_object":  # the binary has it since 0.8.19, and never with a schema
        body.pop("response_format")
        return wanted.get("schema") or own or {"type": "object"}
    described = wanted.get("json_schema")
    if wanted.get("type") != "json_schema" or not isinstance(described, dict) or "schema" not in described:
        return None
    body.pop("response_format")
    return described["schema"]


def _message(message: Any) -> Any:
    """Text parts as one string, joined as llama.cpp joins them: the binary takes parts from a user alone."""
    parts = message.get("content") if isinstance(message, dict) else None
    if not isinstance(parts, list) or not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        return message
    return {**message, "content": "\n".join(str(part.get("text", "")) for part in parts)}


def error_of(status: int, data: bytes) -> tuple[int, bytes]:
    """llama.cpp's error for one of the binary's: `{"message": ...}`, `{"error": {"message": ...}}` or plain text."""
    message = data.decode("utf-8", "replace").strip()
    try:
        body = json.loads(data)
        inner = body.get("error") if isinstance(body, dict) else None
        message = str((inner if isinstance(inner, dict) else body)["message"])
    except (ValueError, KeyError, TypeError):
        pass
    if status in (413, 415, 422) or (status == 500 and CLIENTS_FAULT.search(message)):
        status = 413 if status == 413 else 400
    error: Json = {"code": status, "message": message or f"HTTP {status}", "type": KINDS.get(status, "server_error")}
    if too_long := TOO_LONG.search(message):
        error |= {"type": "exceed_context_size_error", "n_ctx": int(too_long[1])}
    return status, compact({"error": error})


def usage_of(usage: Json) -> Json:
    """OpenAI's part of the binary's usage."""
    names = ("completion_tokens", "prompt_tokens", "total_tokens", "prompt_tokens_details")
    return {name: usage[name] for name in names if usage.get(name) is not None}


def timings_of(usage: Json) -> Json:
    """llama.cpp's `timings` out of the binary's usage, whose times are seconds; what it did not measure is left out.

    It measures whole ms: a time of 0 has no speed. Its prompt tokens include those that its prefix cache held.
    """
    timings: Json = {}
    for phase, count, seconds, speed in (
        ("prompt", "prompt_tokens", "total_prompt_time_sec", "avg_prompt_tok_per_sec"),
        ("predicted", "completion_tokens", "total_completion_time_sec", "avg_compl_tok_per_sec"),
    ):
        n, time_s, per_second = (_measured(usage.get(name)) for name in (count, seconds, speed))
        timings |= {f"{phase}_n": n} if n is not None else {}
        timings |= {f"{phase}_ms": time_s * 1000} if time_s is not None else {}
        timings |= {f"{phase}_per_token_ms": time_s * 1000 / n} if time_s and n else {}
        timings |= {f"{phase}_per_second": per_second} if per_second else {}
    return timings


def _measured(value: Any) -> float | None:
    return value if _is_number(value) and math.isfinite(value) and value >= 0 else None


def logprobs_of(logprobs: Any) -> Json | None:
    """llama.cpp's log-probabilities: the binary has a bare token in chunks, and an id as the `token` of a top one."""
    if not isinstance(logprobs, dict):
        return None
    entries = logprobs.get("content", [logprobs])
    return {"content": [_token(entry) for entry in entries if isinstance(entry, dict)]} if entries else None


def _token(entry: Json) -> Json:
    # what top_k, top_p or min_p left out has no logarithm: null
    tops = [
        _top(top) for top in entry.get("top_logprobs") or [] if isinstance(top, dict) and _is_number(top["logprob"])
    ]
    raw = entry.get("bytes")
    text = entry.get("token", "")
    own: Json = {"token": text, "bytes": raw if isinstance(raw, list) else list(str(text).encode())}
    same = next((top["id"] for top in tops if top.get("bytes") == own["bytes"] and "id" in top), None)
    known = {} if same is None else {"id": same}
    return {**known, **own, "logprob": entry.get("logprob"), "top_logprobs": tops}


def _top(top: Json) -> Json:
    if not isinstance(top.get("token"), int):
        return top
    text = top.get("bytes")  # a string here
    named: Json = {"token": text, "bytes": list(text.encode())} if isinstance(text, str) else {}
    return {"id": top["token"], **named, "logprob": top.get("logprob")}


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
