"""The yard of a home, as the command line and the flows reach it: its control socket."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from engines.errors import BadInput, SwitchyardError

Say = Callable[[str], None]


def socket_path(home: Path) -> Path:
    """Where the yard of this home listens for orders."""
    return home / "yard" / "control.sock"


@contextlib.contextmanager
def short_name(path: Path) -> Iterator[str]:
    """A name for `path` that fits into the 107 bytes of a socket's address, however deep the home lies."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


class YardClient:
    """The yard of a home, as the command line and the flows see it."""

    def __init__(self, home: Path) -> None:
        self._path = socket_path(home)

    def runs(self) -> bool:
        """True when it answers."""
        try:
            self.status()
        except SwitchyardError:
            return False
        return True

    def status(self) -> dict[str, Any]:
        """Everything it tells of itself."""
        return self._get("/status")

    def samples(self, model: str | None = None) -> list[dict[str, Any]]:
        """Its latest live requests of a model, oldest first."""
        found: list[dict[str, Any]] = self._get("/samples", **({"model": model} if model else {}))["samples"]
        return found

    def order(self, name: str, say: Say = lambda _: None, **body: Any) -> str:
        """Carry out an order; `say` gets each step. Raises BadInput, or SwitchyardError with the yard's own words."""
        with self._http() as http, self._reachable(), http.stream("POST", f"/{name}", json=body) as answer:
            for line in answer.iter_lines():
                event = json.loads(line)
                if "error" in event:
                    raise (BadInput if event.get("bad_input") else SwitchyardError)(event["error"])
                if "done" in event:
                    return str(event["done"])
                say(event["step"])
        raise SwitchyardError(f"the yard went away while it carried out `{name}`: see `switchyard status`")

    def _get(self, path: str, **query: str) -> dict[str, Any]:
        with self._http() as http, self._reachable():
            found: dict[str, Any] = http.get(path, params=query, timeout=10).raise_for_status().json()
            return found

    @contextlib.contextmanager
    def _http(self) -> Iterator[httpx.Client]:
        if not self._path.parent.is_dir():
            raise SwitchyardError(f"no yard runs here ({self._path}): start one with `switchyard serve`")
        with (
            short_name(self._path) as name,
            httpx.Client(transport=httpx.HTTPTransport(uds=name), base_url="http://yard", timeout=None) as http,
        ):
            yield http

    @contextlib.contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except (httpx.ConnectError, FileNotFoundError) as error:
            raise SwitchyardError(f"no yard runs here ({self._path}): start one with `switchyard serve`") from error
        except httpx.HTTPError as error:
            raise SwitchyardError(f"the yard did not answer: {error or type(error).__name__}") from error
