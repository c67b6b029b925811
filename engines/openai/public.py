"""How an engine meets clients that have no key, and pages of other origins: the yard answers them in the same way."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from engines.environment import is_loopback

ALL, LOCAL = "*", "localhost"


@dataclass(frozen=True)
class Public:
    """`open` paths need no key. `origins`: ALL, LOCAL, or a list by commas; '' sends no CORS header at all."""

    open: frozenset[str] = frozenset()
    origins: str = ""
    methods: str = "GET, POST, DELETE, OPTIONS"
    headers: str = "*"
    credentials: bool = True

    def cors(self, origin: str | None, *, preflight: bool = False) -> dict[str, str]:
        """The CORS headers of an answer to a page of `origin`."""
        if not self.origins:
            return {}
        found: dict[str, str] = {}
        if allowed := self._allowed(origin):
            found["Access-Control-Allow-Origin"] = allowed
            if allowed != ALL:
                found["Vary"] = "Origin"
        if preflight:
            found |= {
                "Access-Control-Allow-Credentials": "true" if self.credentials else "false",
                "Access-Control-Allow-Methods": self.methods,
                "Access-Control-Allow-Headers": self.headers,
            }
        return found

    def _allowed(self, origin: str | None) -> str:
        if self.origins == ALL:
            return (origin or "") if self.credentials else ALL
        if self.origins == LOCAL:
            return origin if origin is not None and _is_local(origin) else ""
        listed = [one.strip() for one in self.origins.split(",")]
        return origin if origin in listed and origin is not None else ""


def _is_local(origin: str) -> bool:
    try:
        host = urlsplit(origin).hostname
    except ValueError:
        return False
    return host is not None and is_loopback(host)
