"""What a GGUF file says about text: its chat template, its tokens as bytes, its special tokens.

Read here rather than with the `gguf` package, whose reader builds a NumPy view of every array entry: over ten seconds
for a vocabulary of 262 144 tokens. Layout: ggml `docs/gguf.md`.
"""

from __future__ import annotations

import datetime
import json
import mmap
import struct
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engines.errors import BadInput
from engines.model.header import template_shows_tools

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
CONTROL_TOKEN = 3


class _Cursor:
    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def scalar(self, kind: int) -> Any:
        layout = _SCALARS[kind]
        (value,) = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return value

    def string(self) -> str:
        (length,) = struct.unpack_from("<Q", self.data, self.at)
        start = self.at + 8
        self.at = start + length
        return self.data[start : self.at].decode("utf-8", "replace")

    def array(self) -> list[Any]:
        kind, count = self.scalar(4), self.scalar(10)
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        if kind == _ARRAY:
            return [self.array() for _ in range(count)]
        layout = f"<{count}{_SCALARS[kind][1]}"
        values = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return list(values)

    def value(self) -> Any:
        kind = self.scalar(4)
        return self.string() if kind == _STRING else self.array() if kind == _ARRAY else self.scalar(kind)


def read_metadata(path: Path) -> dict[str, Any]:
    """The key-value pairs of the GGUF file at *path*; BadInput when it is missing or no GGUF of version 2 or 3."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _metadata(_Cursor(data), path)
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise BadInput(f"{path}: cannot be read as GGUF ({error}); check the file") from error


def _metadata(cursor: _Cursor, path: Path) -> dict[str, Any]:
    magic, version = cursor.scalar(4), cursor.scalar(4)
    if magic != 0x46554747 or version not in (2, 3):
        raise BadInput(f"{path}: no GGUF of version 2 or 3; check the file")
    cursor.scalar(10)
    pairs = cursor.scalar(10)
    return {cursor.string(): cursor.value() for _ in range(pairs)}


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, the other way round (openai/gpt-2 `src/encoder.py`)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + at): byte for at, byte in enumerate(rest)}


_BYTE_OF = _byte_of_character()


class Vocabulary:
    """Token ids as bytes, exactly: also of tokens that hold a part of one code point."""

    def __init__(self, metadata: dict[str, Any]) -> None:
        self.tokens: list[str] = metadata.get("tokenizer.ggml.tokens", [])
        self._types: list[int] = metadata.get("tokenizer.ggml.token_type", [])
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
        self._specials = {
            "bos_token": vocabulary.special("bos"),
            "eos_token": vocabulary.special("eos"),
            "unk_token": vocabulary.special("unknown"),
        }
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self._template = environment.from_string(source)

    @property
    def shows_tools(self) -> bool:
        """True when the template puts tools into the prompt."""
        return bool(template_shows_tools(self.source))

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


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _refuse(reason: str) -> None:
    raise TemplateError(reason)
