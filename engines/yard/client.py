"""The yard of a home, as the command line and the flows reach it: its control socket."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from engines.errors import BadInput, EngineError, SwitchyardError
from engines.yard.orders import FIRST, order_of, too_old, version_needed

Say = Callable[[str], None]
BAD_INPUT = 2  # exit status of `switchyard serve` when the user can fix it
POLL_S = 0.2


def socket_path(home: Path) -> Path:
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
    def __init__(self, home: Path) -> None:
        self._path = socket_path(home)

    def runs(self) -> bool:
        try:
            self.status()
        except SwitchyardError:
            return False
        return True

    def status(self) -> dict[str, Any]:
        return self._get("/status")

    def samples(self, model: str | None = None) -> list[dict[str, Any]]:
        return list(self._get("/samples", **({"model": model} if model else {}))["samples"])

    def order(self, name: str, say: Say = lambda _: None, **body: Any) -> str:
        """Carry out an order; `say` gets each step. Raises BadInput, or SwitchyardError with the yard's own words."""
        fields = order_of(name, body).model_dump(exclude_unset=True)
        needed = version_needed(name, fields)
        # a yard of the first version would carry out what it understands of it
        if needed > FIRST and self.status().get("orders", FIRST) < needed:
            raise SwitchyardError(too_old(name))
        fields["version"] = needed
        with self._http() as http, http.stream("POST", f"/{name}", json=fields) as answer:
            if answer.status_code == httpx.codes.NOT_FOUND:
                raise SwitchyardError(too_old(name))
            answer.raise_for_status()
            for line in answer.iter_lines():
                event = json.loads(line)
                if "error" in event:
                    raise (BadInput if event.get("bad_input") else SwitchyardError)(event["error"])
                if "done" in event:
                    return str(event["done"])
                say(event["step"])
        raise SwitchyardError(f"the yard ended while it carried out `{name}`: see `switchyard status`")

    def _get(self, path: str, **query: str) -> dict[str, Any]:
        with self._http() as http:
            return dict(http.get(path, params=query, timeout=10).raise_for_status().json())

    @contextlib.contextmanager
    def _http(self) -> Iterator[httpx.Client]:
        nobody = f"no yard runs here ({self._path}): start one with `switchyard serve`"
        if not self._path.parent.is_dir():
            raise SwitchyardError(nobody)
        try:
            with short_name(self._path) as name:
                # no TLS on a socket: loading certificates would cost 45 ms of CPU a request
                transport = httpx.HTTPTransport(uds=name, verify=False)
                with httpx.Client(transport=transport, base_url="http://yard", timeout=None) as http:
                    yield http
        except (httpx.ConnectError, FileNotFoundError) as error:
            raise SwitchyardError(nobody) from error
        except httpx.HTTPError as error:
            raise SwitchyardError(f"the yard did not answer: {error or type(error).__name__}") from error


def public_address(reported: str) -> str:
    """Where a program of this host reaches the address that a yard reports: 0.0.0.0 is here as well."""
    return reported.replace("//0.0.0.0:", "//127.0.0.1:").replace("//:::", "//[::1]:")


def wait_until_serving(
    client: YardClient,
    models: Sequence[str],
    ended: Callable[[], int | None] = lambda: None,
    output: Callable[[], str] = lambda: "",
    stall_s: float = 10.0,
    *,
    say: Say,
) -> None:
    """Return when every one of `models` has an engine that serves, or loads with the next request.

    A load has no limit here: the yard itself sees when it stalls. A yard that does not answer has `stall_s` since its
    last line of output, `output()`. Raises BadInput or EngineError with that line.
    """
    moved, words = time.monotonic(), ""
    while True:
        code = ended()
        if code is not None:
            raise (BadInput if code == BAD_INPUT else EngineError)(_last_words(output()))
        loading = _loading(client, models)
        if loading == "":
            return
        say(loading or "the yard is starting")
        if loading is not None or output() != words:
            moved, words = time.monotonic(), output()
        elif time.monotonic() - moved > stall_s:
            raise EngineError(f"the yard did not answer for {stall_s:.0f} s: {_last_words(output())}")
        time.sleep(POLL_S)


def _loading(client: YardClient, models: Sequence[str]) -> str | None:
    """What still keeps a model from being served; "" when nothing does, None when the yard does not answer yet."""
    try:
        routes = {route["id"]: route for route in client.status()["models"]}
    except SwitchyardError:
        return None
    for model_id in models:
        route = routes.get(model_id)
        if route is None:
            raise BadInput(f"the yard does not serve {model_id}: it has {', '.join(routes)}")
        if route["unservable"]:
            raise EngineError(str(route["unservable"]))
        if route["dormant"]:
            continue  # the next request loads it
        for engine in route["engines"]:
            if engine["engine"] == route["serving"] and engine["state"] not in ("ready", "busy"):
                return f"{model_id}: {engine['engine']} is {engine['state']} {engine['loading']}".rstrip()
    return ""


def _last_words(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.partition("error:")[2].strip() for line in lines if line.startswith("error:")]
    return (errors or lines or ["the yard ended without a message"])[-1]
