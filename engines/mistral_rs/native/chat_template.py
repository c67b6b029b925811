"""Text metadata of a GGUF file: its chat template, its tokens as bytes, its special tokens."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engines.model.template import template_shows_tools

CONTROL_TOKEN = 3
# GPT-2's printable stand-ins for the 256 bytes, the other way round (openai/gpt-2 `src/encoder.py`)
_PLAIN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_REST = [byte for byte in range(256) if byte not in _PLAIN]
_BYTE_OF = {chr(byte): byte for byte in _PLAIN} | {chr(256 + at): byte for at, byte in enumerate(_REST)}


class Vocabulary:
    """Token ids as bytes, exactly: also of tokens that hold a part of one code point."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.tokens: Sequence[str] = metadata.get("tokenizer.ggml.tokens", [])
        self._types: Sequence[int] = metadata.get("tokenizer.ggml.token_type", [])
        self._byte_level = metadata.get("tokenizer.ggml.model") == "gpt2"
        self._metadata = metadata

    def special(self, name: str) -> str:
        """Text of the "bos", "eos" or "unknown" token; empty where the model has none."""
        token = self._metadata.get(f"tokenizer.ggml.{name}_token_id")
        return self.tokens[token] if isinstance(token, int) and token < len(self.tokens) else ""

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes that token id *token* stands for; None outside the vocabulary."""
        if not 0 <= token < len(self.tokens):
            return None
        text = self.tokens[token]
        if token < len(self._types) and self._types[token] == CONTROL_TOKEN:
            return text.encode()
        if self._byte_level:
            return b"".join(bytes([_BYTE_OF[c]]) if c in _BYTE_OF else c.encode() for c in text)
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes([int(text[3:5], 16)])
        return text.replace("▁", " ").encode()


class TemplateRefused(ValueError):
    """The model's chat template does not accept these messages; the text is the template's own reason."""


class ChatTemplate:
    """A model's Jinja chat template, rendered as transformers' `apply_chat_template` does, in Jinja's sandbox."""

    def __init__(self, source: str, vocabulary: Vocabulary) -> None:
        self.source = source
        self.shows_tools = bool(template_shows_tools(source))
        self._specials = {
            "bos_token": vocabulary.special("bos"),
            "eos_token": vocabulary.special("eos"),
            "unk_token": vocabulary.special("unknown"),
        }
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, ensure_ascii=False, indent=None, **_: json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self._template = environment.from_string(source)

    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None, extra: dict[str, Any]) -> str:
        """The prompt for *messages*, ending where the assistant's turn begins; TemplateRefused with the reason."""
        if not self.source:
            raise TemplateRefused(
                "this model has no chat template: serve it with --chat-template FILE, or use /v1/completions"
            )
        try:
            return self._template.render(
                messages=messages, tools=tools, add_generation_prompt=True, **(self._specials | extra)
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise TemplateRefused(f"the chat template refused the messages: {error}") from error


def _refuse(reason: str) -> None:
    raise TemplateError(reason)
