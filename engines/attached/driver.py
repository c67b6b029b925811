"""Driver for a server that others run: attached by its address, never started, stopped or signalled.

`dialects.py` has what is known of each kind of server. One that Switchyard also starts itself (llama.cpp, say) speaks
as its own driver says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from engines.attached.dialects import Server
from engines.driver import Driver, Form, Installation, Installer
from engines.environment import key_in
from engines.errors import BadInput, EngineNotFound
from engines.model.header import Header
from engines.model.loads import Loads
from engines.model.memory import MemoryCase, Part
from engines.openai.dialect import Dialect
from engines.openai.paths import Paths
from engines.openai.public import Public
from engines.own_args import OwnArgs
from engines.settings import EngineArgs, Serve, Settings

ASK_S = 5.0
UNKNOWN = "unknown"  # the version of a server that reports none
# what holds for an attached server as well
PASSED_ON = frozenset({"api_key", "parallel"})  # the yard sends the key, and no more requests at a time than this


class Attached:
    """A server that others run; `like` is the driver of the engine that it is, where that has one."""

    installer = Installer(pip=())
    own_args = OwnArgs()

    def __init__(self, name: str, server: Server, like: Driver | None = None) -> None:
        self.name = name
        self._server, self._like = server, like
        self.progress_path = like.progress_path if like else server.progress_path
        self.sees_prompt_progress = like.sees_prompt_progress if like else False
        self.probe_is_neutral = like.probe_is_neutral if like else True

    def find(self, form: Form = "auto", binary: Path | None = None) -> Installation:
        raise BadInput(f"{self.name} is attached by its address: name `url` in the plan")

    def attach(self, url: str, key_env: str = "") -> Installation:
        """The server at `url`, without asking it anything."""
        kind = self.name
        return Installation(kind, "attached", (), UNKNOWN, where=url, kind=kind, url=url, key_env=key_env)

    def reached(self, found: Installation) -> Installation:
        """The same with the version that the server reports, if any. Raises EngineNotFound where nobody answers."""
        key = key_in(found.key_env)
        headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}
        path, field = self._server.version or ("/v1/models", "")
        try:
            with httpx.Client(base_url=found.url, headers=headers, timeout=ASK_S, trust_env=False) as http:
                answer = http.get(path)
        except httpx.HTTPError as error:
            why = f"{found.engine}: nothing answers at {found.url}: {str(error) or type(error).__name__}"
            raise EngineNotFound(f"{why}; start the server there, or change `url`", engine=found.engine) from error
        version = None
        with contextlib.suppress(ValueError, AttributeError):
            version = answer.json().get(field)
        return replace(found, version=str(version or found.version))

    def argv(self, installation: Installation, serve: Serve) -> list[str]:
        return []

    def environment(self, installation: Installation, serve: Serve, base: Mapping[str, str]) -> dict[str, str]:
        return {}

    def loads(self, header: Header, version: str | None = None) -> Loads:
        """Yes: whoever runs it has loaded a model; `launch` asks it for a token of that."""
        return Loads("yes", "attached: which file it loaded is not known, one token of it is asked for before all else")

    def clashes(self, settings: Settings, own: EngineArgs) -> list[str]:
        return []

    def memory_parts(self, case: MemoryCase) -> list[Part]:
        """None of ours: whoever runs it has given it its memory."""
        return []

    def memory_notes(self, case: MemoryCase) -> list[str]:
        return []

    def unsupported(self, installation: Installation, serve: Serve) -> list[str]:
        """Every setting that is asked for: whoever started the server has decided on it."""
        plain = Settings()
        asked = [name for name, value in serve.settings if value not in (None, getattr(plain, name))]
        why = f"decided by whoever started {installation.url}; nothing is passed to it"
        found = [f"{name}: {why}" for name in asked if name not in PASSED_ON]
        if installation.is_overheard:
            found.append(f"encryption: prompts, answers and the key go to {installation.url} unencrypted")
        if not self._server.is_tried:
            speaks = self.name.partition(":")[2]
            found.append(f"dialect: {speaks} was read in its sources, and never run with Switchyard")
        return found

    def cache_budget(self, settings: Settings) -> str:
        return "not known, it is attached"

    def progress(self, answer: bytes) -> tuple[int, ...]:
        return self._like.progress(answer) if self._like else ()

    def served_name(self, installation: Installation, model_id: str) -> str:
        return self._like.served_name(_as_binary(installation), model_id) if self._like else model_id

    def paths(self, installation: Installation, own: EngineArgs) -> Paths:
        if self._like is None:
            return self._server.paths
        return replace(self._like.paths(_as_binary(installation), own), slots=None)  # others keep its prompts

    def public(self, own: EngineArgs) -> Public:
        return self._like.public(own) if self._like else Public()

    def dialect(self, installation: Installation) -> type[Dialect]:
        return self._like.dialect(_as_binary(installation)) if self._like else self._server.dialect

    def neutral_body(self) -> dict[str, object] | None:
        """That of what it is; of a plain server nothing is known."""
        return self._like.neutral_body() if self._like else None


def plain_url(text: str) -> str:
    """The address in `text`, without `/v1`. Raises BadInput for what is none, or holds more."""
    try:
        parts, _ = urlsplit(text), urlsplit(text).port
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadInput('url is no address: write "http://HOST:PORT" or "https://HOST"')
    if "@" in parts.netloc or parts.query or parts.fragment:  # not shown: it may be a key
        raise BadInput("url holds more than an address: a key belongs in a variable that `api_key_env` names")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1').rstrip('/')}"


def _as_binary(installation: Installation) -> Installation:
    """The form in which the engine's own driver knows a server of its own."""
    return replace(installation, form="binary")
