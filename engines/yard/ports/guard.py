"""Who may ask the yard what: host names, keys, pages of other origins."""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Mapping

from multidict import CIMultiDict

from engines.environment import is_loopback, plain_host
from engines.openai.call import Refusal
from engines.yard.ports.http_request import Request, Response
from engines.yard.yard import Yard

ALWAYS_OPEN = frozenset({"/health", "/v1/health"})
CHALLENGE = {"WWW-Authenticate": 'Basic realm="Switchyard", charset="UTF-8"'}
ANY_HOST = "*"


def is_for_people(path: str) -> bool:
    """True for the yard's own pages, which a browser opens."""
    return path == "/yard" or path.startswith("/yard/")


def is_of_an_engine(path: str) -> bool:
    """True for what the incumbent answered too, in place of which the yard is."""
    return path != "/metrics" and not is_for_people(path)


class Guard:
    def __init__(self, yard: Yard) -> None:
        self._yard = yard

    def check_host(self, request: Request) -> None:
        """Raise Refusal 403 for a name that is not ours: a page may have its own name point to this machine."""
        settings, hosts = self._yard.settings, request.headers.getall("Host", [])
        if not settings.on_loopback and not settings.allowed_hosts:
            return  # it is reached by names that nobody can list; a key guards it
        if len(hosts) > 1 or not all(map(self._is_allowed, hosts)):
            name = ", ".join(hosts)[:100]
            why = f"the yard does not answer to the name '{name}': list it in yard.allowed_hosts of the plan"
            raise Refusal(403, why, kind="permission_error", code="host_not_allowed")

    def _is_allowed(self, host: str) -> bool:
        allowed = self._yard.settings.allowed_hosts
        name, _, port = host.rpartition(":")
        name = plain_host(name if name and (port.isdigit() or not port) else host)
        return is_loopback(name) or name in allowed or ANY_HOST in allowed

    def has_key(self, request: Request) -> bool:
        """True when it brings one of the keys, or none is needed."""
        if not (keys := self._yard.config.keys):
            return True
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "basic" and is_for_people(request.path):  # browsers add it by themselves: nowhere else
            offered = _password(token)
        else:
            offered = token.strip() if scheme.lower() == "bearer" else request.headers.get("X-Api-Key", "")
        sent = offered.encode("utf-8", "surrogateescape")
        return any([hmac.compare_digest(sent, key) for key in keys])

    def may_pass(self, request: Request) -> bool:
        """True for a request with a key, and for one to a path that the incumbent shows everybody."""
        if self.has_key(request) or request.path in ALWAYS_OPEN:
            return True
        return request.method in ("GET", "HEAD") and request.path in self._yard.public.open

    def cors(self, request: Request) -> Mapping[str, str]:
        """The headers that let a page of another origin read the answer where the incumbent lets it."""
        return self._yard.public.cors(request.headers.get("Origin")) if is_of_an_engine(request.path) else {}

    def preflight(self, request: Request) -> Response | None:
        """The answer to a browser that asks what it may send; None for any other request."""
        if request.method != "OPTIONS" or not is_of_an_engine(request.path):
            return None
        headers = self._yard.public.cors(request.headers.get("Origin"), preflight=True)
        kind = {"Content-Type": "text/html; charset=utf-8"}
        return Response(headers=CIMultiDict({**kind, **headers})) if headers else None


def _password(token: str) -> str:
    try:
        return base64.b64decode(token.strip(), validate=True).decode().partition(":")[2]
    except (binascii.Error, ValueError):
        return ""
