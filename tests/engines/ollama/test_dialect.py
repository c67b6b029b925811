"""Requests of llama.cpp's clients in Ollama's words, and its errors in llama.cpp's."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engines.ollama.dialect import OllamaDialect
from engines.openai.call import Refusal, parse

CHAT = "/v1/chat/completions"


def sent(**body: Any) -> dict[str, Any]:
    """What Ollama gets for a chat request with these fields."""
    call = parse(CHAT, json.dumps({"messages": [], "model": "alias", **body}).encode())
    found: dict[str, Any] = json.loads(OllamaDialect(call, "m").request())
    return found


@pytest.mark.parametrize(
    ("asked", "limit"),
    [
        ({}, None),
        ({"max_completion_tokens": 5}, 5),  # Ollama reads max_tokens alone
        ({"n_predict": 7, "max_tokens": 9}, 7),
        ({"max_tokens": -1}, None),
        ({"max_tokens": 0}, 1),  # no limit to Ollama, one token to llama.cpp
        ({"max_tokens": None, "max_completion_tokens": 3}, 3),
    ],
)
def test_the_limit_of_an_answer_has_one_name(asked: dict[str, Any], limit: int | None) -> None:
    """An answer without its limit would fill the context."""
    body = sent(**asked)
    assert body.get("max_tokens") == limit
    assert {"n_predict", "max_completion_tokens"}.isdisjoint(body)


def test_the_model_has_the_name_that_it_was_imported_under() -> None:
    """Whatever alias the client used; other fields stay."""
    assert sent(seed=3) == {"messages": [], "model": "m", "seed": 3}


def test_a_grammar_is_refused() -> None:
    """An answer that ignores it would look like one that follows."""
    with pytest.raises(Refusal, match="grammar: Ollama takes no GBNF"):
        sent(grammar='root ::= "a"')


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (
            {"error": {"message": "no", "type": "invalid_request_error", "param": None, "code": None}},
            {"message": "no", "type": "invalid_request_error", "param": None, "code": 400},
        ),
        (
            {
                "error": {
                    "message": '{"error":{"code":400,"message":"no","type":"t","n_ctx":8}}',
                    "type": "x",
                    "code": None,
                }
            },
            {"message": "no", "type": "t", "code": 400, "n_ctx": 8},
        ),
        ({"error": "no"}, {"message": "no", "type": "api_error", "code": 400}),
    ],
)
def test_an_error_has_its_status_as_code(answer: dict[str, Any], error: dict[str, Any]) -> None:
    """As llama.cpp's clients read it."""
    dialect = OllamaDialect(parse(CHAT, b"{}"), "m")
    assert json.loads(dialect.whole(400, json.dumps(answer).encode())[1]) == {"error": error}
    assert dialect.whole(502, b"<html>") == (502, b"<html>")
    assert dialect.whole(200, b"{}") == (200, b"{}")
