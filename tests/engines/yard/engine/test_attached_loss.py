"""An attached engine has no process whose end could be seen: a request that it lost is the sign."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from engines.settings import Settings
from engines.yard.engine.in_flight import InFlight
from engines.yard.engine.liveness import Liveness
from engines.yard.settings import YardSettings


def liveness(url: str) -> Liveness:
    spec: Any = SimpleNamespace(url=url, settings=Settings(), served_name=lambda _: "m")
    parts: Any = (None, YardSettings(), None, set(), None)
    drift: Any = None
    return Liveness(
        0,
        spec,
        *parts,
        {},
        holds_prompt=lambda: False,
        drift=drift,
        drifted=print,
        wake=lambda: None,
        free=lambda: None,
    )


@pytest.mark.parametrize(
    ("url", "lost", "doubted"), [("http://a", True, True), ("http://a", False, False), ("", True, False)]
)
def test_what_it_lost_is_not_retried_there_at_once(url: str, lost: bool, doubted: bool) -> None:
    """Its retry would be lost as well, and the client get 502 where the other engine could serve."""
    one, running = liveness(url), InFlight(1, None, None)
    running.generates, running.failure, running.lost = True, "ClientConnectorError", lost
    one.request_done(running)
    assert one.doubted is doubted
