"""What may be stored: plain JSON values, finite numbers, no secrets."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence, Set
from datetime import date, datetime
from enum import Enum
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel, SecretStr

from engines.errors import SwitchyardError

REDACTED = "[redacted]"

# fmt: off
_SECRET_NAMES = frozenset({
    "api_key", "apikey", "api_keys", "x_api_key", "authorization", "proxy_authorization", "token",
    "access_token", "refresh_token", "auth_token", "bearer_token", "hf_token", "hft", "password",
    "passwd", "secret", "client_secret", "cookie", "set_cookie", "private_key",
})
# fmt: on
_SECRET_ENDINGS = ("_api_key", "_password", "_secret", "_auth_token", "_access_token", "_hf_token")
_BEARER = re.compile(r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/=-]{16,}")
_URL_PASSWORD = re.compile(r"(://[^/\s:@]+:)[^/\s@]+(?=@)")


def redact(value: Any) -> Any:
    """A plain JSON copy of `value` in which every secret reads "[redacted]"; an unset one stays None.

    A secret is the value of a key such as `api_key`, `authorization` or `token`, a `SecretStr`, the word after (or
    glued to) a flag such as `--api-key` in an argv, a bearer token or the password of a URL inside any text.
    Models, dataclasses, paths, times, enums and numpy values become what JSON has; keys become text.
    Raises SwitchyardError, with the place, for NaN, infinity and what has no JSON form.
    """
    return _plain(value, "", tokens_are_words=False)


def pack_json(value: Any, *, what: str = "payload") -> bytes:
    """`value` without secrets as zlib-compressed JSON; `what` names it in an error.

    Here a bare `token` is a word of the vocabulary (as in logprobs), not a secret.
    """
    plain = _plain(value, what, tokens_are_words=True)
    return zlib.compress(json.dumps(plain, separators=(",", ":")).encode("ascii"), 6)


def unpack_json(packed: bytes) -> Any:
    """The value that `pack_json` stored."""
    return json.loads(zlib.decompress(packed))


def plan_hash(plan: Any) -> str:
    """SHA-256 (hex) of the plan without its secrets; the order of keys does not matter."""
    text = json.dumps(redact(plan), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def storable_text(text: str) -> str:
    """`text` as any database takes it: lone surrogates and NUL (engines do emit them) become replacement marks."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\x00", "\ufffd")


def _plain(value: Any, where: str, *, tokens_are_words: bool) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, SecretStr):
        return REDACTED
    if isinstance(value, Enum):
        return _plain(value.value, where, tokens_are_words=tokens_are_words)
    if isinstance(value, str):
        return _URL_PASSWORD.sub(r"\1" + REDACTED, _BEARER.sub(r"\1" + REDACTED, str(value)))
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return _finite(float(value), where)
    return _plain_container(value, where, tokens_are_words)


def _plain_container(value: Any, where: str, tokens_are_words: bool) -> Any:
    if isinstance(value, BaseModel):
        # not model_dump(mode="json"): it turns NaN into null without a word
        value = value.model_dump(mode="python")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    elif hasattr(value, "tolist"):  # numpy, which need not be imported to be understood
        return _plain(value.tolist(), where, tokens_are_words=tokens_are_words)
    if isinstance(value, Mapping):
        return _plain_mapping(value, where, tokens_are_words)
    if isinstance(value, Set):
        value = sorted(value, key=str)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return _plain_sequence(value, where, tokens_are_words)
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, PurePath):
        return str(value)
    raise SwitchyardError(f"{where or 'value'}: a {type(value).__name__} has no JSON form; turn it into plain values")


def _plain_mapping(mapping: Mapping[Any, Any], where: str, tokens_are_words: bool) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for key, item in mapping.items():
        name = str(key.value) if isinstance(key, Enum) else str(key)
        word = tokens_are_words and name.lower() == "token"
        # numbers are counts and ids (a token's), and a switch is no secret either
        hidden = not word and not isinstance(item, int | float | None) and _is_secret(name)
        place = f"{where}.{name}" if where else name
        plain[name] = REDACTED if hidden else _plain(item, place, tokens_are_words=tokens_are_words)
    return plain


def _plain_sequence(items: Sequence[Any], where: str, tokens_are_words: bool) -> list[Any]:
    plain: list[Any] = []
    after: str | None = None
    for index, item in enumerate(items):
        if isinstance(item, str):
            plain.append(_plain_argument(item, after))
            after = item
        else:
            plain.append(_plain(item, f"{where}[{index}]", tokens_are_words=tokens_are_words))
            after = None
    return plain


def _plain_argument(item: str, after: str | None) -> str:
    """One word of what may be an argv; `after` is the word before it."""
    flag, equals, _ = item.partition("=")
    if equals and flag.startswith("-") and _is_secret(flag):
        return f"{flag}={REDACTED}"
    if after is not None and after.startswith("-") and _is_secret(after):
        return REDACTED
    if item.startswith("literal:"):  # mistral.rs: --token-source literal:<token>
        return f"literal:{REDACTED}"
    return str(_plain(item, "", tokens_are_words=True))


def _is_secret(name: str) -> bool:
    normal = name.lstrip("-").replace("-", "_").lower()
    return normal in _SECRET_NAMES or normal.endswith(_SECRET_ENDINGS)


def _finite(number: float, where: str) -> float:
    if not math.isfinite(number):
        raise SwitchyardError(f"{where or 'value'} is {number}: store None for what was not measured")
    return number
