"""Ollama's OpenAI API in the dialect of llama.cpp's server.

Read at 0.24.0 and 0.32.15 (`openai/openai.go`). Streams are OpenAI's already; what stays different: no `timings`, one
role in every chunk, `temperature` and `top_p` of 1 where a request sets none, and prompts that are cut to fit.
"""

from __future__ import annotations

import contextlib
import json
from typing import ClassVar

from engines.openai.call import GENERATING, Refusal
from engines.openai.dialect import Dialect

LIMITS = ("n_predict", "max_completion_tokens", "max_tokens")  # the first one given counts, as in llama.cpp
# fields of llama.cpp and OpenAI that its structs do not hold
# fmt: off
IGNORED = frozenset((
    "cache_prompt", "chat_template_kwargs", "dry_allowed_length", "dry_base", "dry_multiplier", "dry_penalty_last_n",
    "dry_sequence_breakers", "dynatemp_exponent", "dynatemp_range", "id_slot", "ignore_eos", "logit_bias", "lora",
    "min_keep", "min_p", "mirostat", "mirostat_eta", "mirostat_tau", "n", "n_cache_reuse", "n_discard", "n_indent",
    "n_keep", "n_probs", "parallel_tool_calls", "parse_tool_calls", "post_sampling_probs", "reasoning_format",
    "repeat_last_n", "repeat_penalty", "response_fields", "return_progress", "return_tokens", "samplers",
    "t_max_predict_ms", "timings_per_token", "tool_choice", "top_k", "top_n_sigma", "typical_p", "xtc_probability",
    "xtc_threshold",
))
# fmt: on


class OllamaDialect(Dialect):
    """The limit of an answer under the one name that Ollama reads; errors with their status as `code`."""

    ignores = IGNORED
    words: ClassVar[dict[str, str]] = dict.fromkeys(LIMITS, "max_tokens")

    def request(self) -> bytes:
        """The body in Ollama's words. Raises Refusal for a grammar, which an answer would silently not follow."""
        if self.call.path not in GENERATING:
            return super().request()
        if self.call.body.get("grammar"):
            why = "grammar: Ollama takes no GBNF; ask for a JSON schema in response_format instead"
            raise Refusal(400, why, code="unsupported_parameter")
        body = {name: value for name, value in self.call.body.items() if name not in LIMITS and value is not None}
        limit = next((self.call.body[name] for name in LIMITS if self.call.body.get(name) is not None), None)
        if limit is not None and limit != -1:
            body["max_tokens"] = limit or 1  # 0 is Ollama's word for no limit
        return json.dumps({**body, "model": self._served_name}).encode()

    def whole(self, status: int, data: bytes) -> tuple[int, bytes]:
        """An answer in one piece; an error gets its status as `code`."""
        if status < 400:
            return status, data
        try:
            error = json.loads(data)["error"]
            error = error if isinstance(error, dict) else {"message": str(error), "type": "api_error"}
            with contextlib.suppress(ValueError, KeyError, TypeError):  # that of its llama-server, as text
                error = {**error, **json.loads(error["message"])["error"]}
            return status, json.dumps({"error": {**error, "code": status}}).encode()
        except (ValueError, KeyError, TypeError):
            return status, data
