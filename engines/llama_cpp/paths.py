"""Paths of llama-server (`tools/server/server.cpp`), as builds of 2026 answer them."""

from __future__ import annotations

from dataclasses import replace

from engines.openai.paths import COUNTS_TOKENS, SHORT, Paths

_SLOTS = "the yard saves and restores the slots itself, around a move"
_FIXED = "what the engine serves is written in the plan; change it there"
_ACTS = "it lets the model or a web page act on this machine"

PATHS = Paths(
    generates=frozenset(
        {
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/messages",
            "/v1/responses",
            "/responses",
            "/completion",
            "/completions",
            "/infill",
            "/v1/embeddings",
            "/embedding",
            "/embeddings",
            "/v1/rerank",
            "/v1/reranking",
            "/rerank",
            "/reranking",
            "/v1/audio/transcriptions",
            "/audio/transcriptions",
        }
    ),
    reads=frozenset(
        {
            "/tokenize",
            "/detokenize",
            "/apply-template",
            COUNTS_TOKENS,
            "/v1/messages/count_tokens",
            "/v1/responses/input_tokens",
            "/responses/input_tokens",
            "/v1/streams/lookup",  # the web UI takes a stream up again where it was left
        }
    ),
    changes={
        "/slots/": _SLOTS,
        "/props": _FIXED,
        "/lora-adapters": _FIXED,
        "/models/load": _FIXED,
        "/models/unload": _FIXED,
        "/v1/chat/completions/control": "it steers another client's request",
        "/tools": _ACTS,
        "/cors-proxy": _ACTS,
    },
    same=SHORT,
    pages=frozenset({"/", "/index.html"}),
    polled=frozenset({"/slots"}),
    cancels=frozenset({"/v1/stream"}),
    keyless=True,
    kept=("x-conversation-id", "/v1/stream?conv_id="),
)
SLOTS_BY_CLIENT = replace(
    PATHS,
    reads=PATHS.reads | {"/slots/"},
    changes={path: why for path, why in PATHS.changes.items() if path != "/slots/"},
)
