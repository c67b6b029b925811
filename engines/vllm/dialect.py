"""vLLM in the dialect of llama.cpp's server, as seen with 0.32.0."""

from __future__ import annotations

import json

from engines.attached.dialects import PlainDialect
from engines.mistral_rs.dialect import UNKNOWN, without_llama_words
from engines.openai.call import GENERATING


class VllmDialect(PlainDialect):
    """llama.cpp's words and defaults in vLLM's."""

    ignores = UNKNOWN | {"dry_multiplier", "dry_base", "dry_allowed_length", "dry_sequence_breakers"}

    def request(self) -> bytes:
        if self.call.path not in GENERATING:
            return super().request()
        return json.dumps({**without_llama_words(self.call.body), "model": self._served_name}).encode()
