"""How an engine's requests and answers are brought to the shapes of llama.cpp's server, which clients expect."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from engines.openai.call import Call

Json = dict[str, Any]


class Dialect:
    """One request and its answer in llama.cpp's own dialect: only the model's name is changed.

    `context_tokens` is what one sequence holds, where that is known.

    `error` is what a stream reported as an error after it had begun; `early_error`, status and body, what it reported
    instead of beginning: it is sent to the client as an answer in one piece.
    """

    changes_streams = False
    ignores: frozenset[str] = frozenset()  # fields of llama.cpp's requests that the engine does not act on
    words: ClassVar[Mapping[str, str]] = {}  # its own names of such fields, where they differ

    def __init__(self, call: Call, served_name: str, model_id: str = "", *, context_tokens: int | None = None) -> None:
        self.call = call
        self.error: str | None = None
        self.early_error: tuple[int, bytes] | None = None
        self._served_name = served_name
        self._model_id = model_id or served_name
        self._context_tokens = context_tokens

    def request(self) -> bytes:
        """The body for the engine. Raises Refusal for what the engine cannot do."""
        if self.call.model == self._served_name or self.call.content_type:
            return self.call.raw
        return json.dumps({**self.call.body, "model": self._served_name}).encode()

    def whole(self, status: int, data: bytes) -> tuple[int, bytes]:
        """An answer in one piece, as the client gets it."""
        return status, data

    def event(self, chunk: bytes) -> bytes:
        """What can be passed on of a stream once `chunk` has arrived."""
        return chunk

    def rest(self) -> bytes:
        """What is still held back of a stream that has ended."""
        return b""
