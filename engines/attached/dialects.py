"""What is known of servers that are attached by their address.

Read, not run here: LocalAI (mudler/LocalAI, core/http), TabbyAPI (theroyallab/tabbyAPI, endpoints/ and common/) and LM
Studio (lmstudio.ai/docs/developer). The others are tried against the servers themselves.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from typing import Any

from engines.mistral_rs.dialect import UNKNOWN
from engines.openai.dialect import Dialect
from engines.openai.paths import CHAT, Paths
from engines.openai.sse import compact

LISTS_MODELS = "/v1/models"
OTHERS = ("/v1/completions", "/v1/embeddings")


class PlainDialect(Dialect):
    """Of a server that follows OpenAI: an error of any shape gets an `error` object."""

    ignores = UNKNOWN  # no OpenAI server has to know the fields that llama.cpp's adds

    def whole(self, status: int, data: bytes) -> tuple[int, bytes]:
        if status < 400:
            return status, data
        said: Any = data.decode("utf-8", "replace")
        with contextlib.suppress(ValueError):
            said = json.loads(data)
        error = said.get("error") if isinstance(said, dict) else None
        if isinstance(error, dict) and "message" in error:
            return status, compact({**said, "error": {**error, "code": error.get("code") or status}})
        if isinstance(said, dict):  # FastAPI's `detail` is a text or a list, Ollama's and LM Studio's `error` a text
            said = next((said[name] for name in ("error", "detail", "message") if said.get(name)), said)
        message = said if isinstance(said, str) else json.dumps(said)
        kind = "invalid_request_error" if status < 500 else "server_error"
        return status, compact({"error": {"message": message or f"HTTP {status}", "type": kind, "code": status}})


class TabbyDialect(PlainDialect):
    """TabbyAPI calls JSON mode `json` (backends read `response_format.type`)."""

    def request(self) -> bytes:
        body = json.loads(super().request())
        if isinstance(asked := body.get("response_format"), dict) and asked.get("type") == "json_object":
            body["response_format"] = {"type": "json"}
        return json.dumps(body).encode()


@dataclass(frozen=True)
class Server:
    """One kind of server: how it speaks, where it answers, and which field of which path has its version.

    `progress_path` is asked while a request is silent; where it counts no tokens, its answer shows life alone.
    """

    dialect: type[Dialect] = PlainDialect
    paths: Paths = field(default_factory=lambda: Paths(generates=frozenset({CHAT, *OTHERS})))
    version: tuple[str, str] | None = None
    progress_path: str = LISTS_MODELS
    is_tried: bool = True


PLAIN = Server()
# the first four speak as their drivers say, where Switchyard has one
SERVERS = {
    "llama.cpp": Server(version=("/props", "build_info")),
    "mistral.rs": PLAIN,
    "ollama": Server(version=("/api/version", "version")),
    "vllm": Server(version=("/version", "version")),
    "localai": Server(version=("/version", "version"), is_tried=False),
    "tabbyapi": Server(dialect=TabbyDialect, is_tried=False),
    "lmstudio": Server(is_tried=False),
}
