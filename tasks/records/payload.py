"""What may be stored: plain JSON values, finite numbers, no secrets."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence, Set
from datetime import date, datetime
from enum import Enum
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel, SecretStr

from engines.errors import SwitchyardError
from engines.redaction import REDACTED, is_secret_name, redacted_text, redacted_word
from tasks.verdicts.limits import RENAMED_KEYS


def redact(value: Any) -> Any:
    """A plain JSON copy of `value` in which every secret reads "[redacted]"; an unset one stays None.

    A secret is a `SecretStr`, the value of a key such as `api_key`, `authorization` or `token`, and what
    `engines.redaction` finds in any text or command line.
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
    """SHA-256 (hex) of the plan without its secrets; the order of keys and their renaming do not matter."""
    text = json.dumps(with_old_keys(redact(plan)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def with_old_keys(plan: Any) -> Any:
    """A plan's JSON form under the keys of its first version, by which it has been hashed ever since."""
    if not isinstance(plan, dict):
        return plan
    named = {
        table: {RENAMED_KEYS[table].get(key, key): item for key, item in plan[table].items()}
        for table in RENAMED_KEYS
        if isinstance(plan.get(table), dict)
    }
    return {RENAMED_KEYS[""].get(key, key): item for key, item in (plan | named).items()}


def storable_text(text: str) -> str:
    """`text` without secrets, as any database takes it: lone surrogates and NUL become replacement marks."""
    return redacted_text(text).encode("utf-8", "replace").decode("utf-8").replace("\x00", "\ufffd")


def _plain(value: Any, where: str, *, tokens_are_words: bool) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, SecretStr):
        return REDACTED
    if isinstance(value, Enum):
        return _plain(value.value, where, tokens_are_words=tokens_are_words)
    if isinstance(value, str):
        return redacted_text(str(value))
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise SwitchyardError(f"{where or 'value'} is {float(value)}: store None for what was not measured")
        return float(value)
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
        hidden = not word and not isinstance(item, int | float | None) and is_secret_name(name)
        place = f"{where}.{name}" if where else name
        plain[name] = REDACTED if hidden else _plain(item, place, tokens_are_words=tokens_are_words)
    return plain


def _plain_sequence(items: Sequence[Any], where: str, tokens_are_words: bool) -> list[Any]:
    plain: list[Any] = []
    after: str | None = None
    for index, item in enumerate(items):
        if isinstance(item, str):
            plain.append(redacted_word(str(item), after))
            after = item
        else:
            plain.append(_plain(item, f"{where}[{index}]", tokens_are_words=tokens_are_words))
            after = None
    return plain
