"""vLLM in the dialect of llama.cpp's server, as seen with 0.32.0."""

from __future__ import annotations

import json

from engines.attached.dialects import PlainDialect
from engines.mistral_rs.dialect import UNKNOWN, without_llama_words
from engines.openai.call import GENERATING


class VllmDialect(PlainDialect):
    """llama.cpp's words and defaults in vLLM's.

    A limit above the whole context is refused there with 400; one above what the prompt leaves is clamped, as
    llama.cpp clamps both. A text without a limit ends there after 16 tokens, one whose limit is null with the context.
    """

    ignores = UNKNOWN | {"dry_multiplier", "dry_base", "dry_allowed_length", "dry_sequence_breakers"}

    def request(self) -> bytes:
        if self.call.path not in GENERATING:
            return super().request()
        body = {**without_llama_words(self.call.body), "model": self._served_name}
        limit = body.get("max_tokens")
        if limit is None and self.call.path == "/v1/completions":
            body["max_tokens"] = None
        elif self._context_tokens and isinstance(limit, int):
            body["max_tokens"] = min(limit, self._context_tokens)
        return json.dumps(body).encode()
