"""The yard's benchmark keeps up with the yard: it comes up, calls and streams pass, and additions are told rightly."""

from pathlib import Path

import httpx
import pytest

from benchmarks import yard, yard_peers
from engines.client.self_test import reference_server


def test_reference_server_answers_what_the_yard_asks_before_it_serves() -> None:
    """Health, the list of models, and one token in one piece."""
    with reference_server() as endpoint, httpx.Client(base_url=endpoint.base_url, trust_env=False) as http:
        assert http.get("/health").status_code == 200
        assert http.get("/v1/models").json()["data"][0]["id"] == "reference-server"
        answer = http.post("/v1/chat/completions", json={"messages": [], "max_tokens": 1}).json()
    assert answer["usage"]["completion_tokens"] == 1
    assert answer["choices"][0]["message"]["content"].isdigit()


def test_loads_pass_through_the_yard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls and streams come through the real yard over the reference server, none of them fails."""
    monkeypatch.setattr(yard, "REQUESTS", {2: 6})
    monkeypatch.setattr(yard, "TOKENS", (4, 6))
    monkeypatch.setattr(yard, "FRONTIER", (1, 2))
    monkeypatch.setattr(yard, "FRONTIER_S", 0.2)
    monkeypatch.setattr(yard, "FRONTIER_MS", (1, 600_000))
    with yard_peers.the_yard(tmp_path) as (through, direct):
        assert through.base_url != direct.base_url
        calls = yard.run_calls(through.base_url, 16, through.pids)
        streams = yard.run_streams(through.base_url, 2, through.pids)
        frontier = yard.run_frontier(through.base_url)
    assert calls["rps"] > 0
    assert frontier["600000 ms"] > 0
    assert frontier["600000 ms"] >= frontier["1 ms"]
    assert streams["failed"] == 0
    assert 0 < streams["arrivals"] <= 1


def test_what_a_way_adds_is_its_median_less_the_direct_one() -> None:
    """Medians of the rounds, and the direct way's subtracted."""
    rows = [
        {"way": way, "load": ("streams", 8), "ttft_p50": value}
        for way, values in {"direct": (50.0, 52.0, 51.0), "yard": (53.0, 90.0, 52.0)}.items()
        for value in values
    ]
    found = yard.Findings(rows)
    assert found.ways == ["direct", "yard"]
    assert found.added("yard", "ttft_p50", "streams", 8) == 2.0
