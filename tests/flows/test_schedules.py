"""What runs by itself beside live traffic: said by `up`, without a soak, and not where memory is short."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from played import plan_of
from real_yard import LOCAL
from switchyard_command import command, json_of
from switchyard_up import Up

from flows.schedules import schedule_lines


class PlayedUp(Up):
    """`switchyard up`, its schedules on, over played engines that are loaded on demand."""

    def __init__(self, folder: Any, head: str = "") -> None:
        super().__init__(folder)
        self.plan = plan_of(folder, "m", head=head, tail=f"[yard]\nport = {self.port}")

    def argv(self) -> list[str]:
        return command("up", self.plan, "--prefect-port", self.prefect)

    def checks(self, run: str = "latest") -> dict[str, dict[str, Any]]:
        (model,) = json_of(self.run("report", run, "--json"))["models"]
        return {check["check"]: check for check in model["checks"]}

    def evaluations(self) -> list[dict[str, Any]]:
        return [run for run in json_of(self.run("history", "--json"))["runs"] if run["kind"] == "evaluate"]


@pytest.fixture
def up(tmp_path) -> Iterator[PlayedUp]:
    up = PlayedUp(tmp_path)
    yield up
    up.end()


def test_a_scheduled_evaluation_has_no_soak_and_takes_an_earlier_one(up):
    """Unproven without one; `--resume` adds it; the next night it counts, and the run says whose it is."""
    up.ensure()
    state = up.ended(up.begin("evaluate"))
    (first,) = up.evaluations()
    assert (state["type"], state["name"]) == ("FAILED", first["verdict"]), state
    stability = up.checks()["stability.failures"]
    assert stability["verdict"] == "INCONCLUSIVE"
    assert f"switchyard evaluate --resume {first['run_id']}" in stability["why"]
    assert soaks(up) == 0

    soaked = json_of(up.run("evaluate", "--resume", "latest", "--json"))
    assert soaked["run_id"] == first["run_id"]
    assert (own := soaks(up)) > 0

    state = up.ended(up.begin("evaluate"))
    second, _ = up.evaluations()
    assert state["name"] == second["verdict"], state
    taken = up.checks()["stability.failures"]
    assert f"the soak of run {first['run_id']}" in taken["why"]
    assert taken["verdict"] == up.checks(first["run_id"])["stability.failures"]["verdict"]
    assert second["run_id"] != first["run_id"]
    assert soaks(up) == own


def soaks(up: PlayedUp) -> int:
    with up.records() as records:
        return sum(len(records.list_evidence(run["run_id"], kind="soak")) for run in up.evaluations())


def test_it_is_skipped_where_its_engines_do_not_fit_beside_what_serves(tmp_path):
    """Cancelled with one line on how much is missing; by hand it is measured, with a warning."""
    up = PlayedUp(tmp_path, head="settings = { context_tokens = 2000000000 }")
    try:
        up.ensure()
        asked = {"model": "m", "max_tokens": 2, "messages": [{"role": "user", "content": "Hi"}]}
        answer = httpx.post(f"http://127.0.0.1:{up.port}/v1/chat/completions", json=asked, timeout=60, **LOCAL)
        assert answer.status_code == 200, answer.text
        state = up.ended(up.begin("evaluate"))
        assert state["type"] == "CANCELLED", state
        assert "TiB is missing" in state["message"]
        assert state["message"].startswith("skipped: m on ")
        assert "\n" not in state["message"]
        assert up.evaluations() == []
        by_hand = up.run("evaluate", up.plan, "--json")
        assert "warning: memory is short" in by_hand.stderr
        assert json_of(by_hand)["models"]
    finally:
        up.end()


def test_up_says_what_runs_by_itself_and_how_to_turn_it_off(up):
    up.ensure()
    said = up.said()
    for name, when in (("evaluate", "every night at 03:00"), ("soak", "every 10 min"), ("reconcile", "every 5 min")):
        (line,) = [line for line in said.splitlines() if line.strip().startswith(f"{name}:")]
        assert when in line
        assert "next" in line
    assert "--no-schedules" in said
    assert "no soak" in said


@pytest.mark.parametrize(
    ("now", "zone", "due"),
    [
        (datetime(2026, 11, 28, 1, 30, tzinfo=UTC), "UTC", "next today at 03:00"),
        (datetime(2026, 11, 28, 3, 0, tzinfo=UTC), "UTC", "next tomorrow at 03:00"),
        (datetime(2026, 11, 28, 2, 30, tzinfo=UTC), "Europe/Berlin", "next tomorrow at 03:00"),
        (datetime(2026, 11, 28, 2, 30, tzinfo=UTC), "America/New_York", "next tomorrow at 03:00"),
        (datetime(2026, 11, 28, 6, 30, tzinfo=UTC), "America/New_York", "next today at 03:00"),
    ],
)
def test_the_next_time_is_local(now, zone, due):
    line, *_ = schedule_lines(now, zone=zone, last_evaluation_s=2400)
    assert due in line
    assert zone in line
    assert "the last one took 40 min" in line
