"""What runs by itself beside live traffic: said by `up`, without a soak, and not where memory is short."""

from __future__ import annotations

import asyncio
import contextlib
import html
import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from played import plan_of, played
from prefect.settings import PREFECT_API_URL, temporary_settings
from real_yard import LOCAL
from stored_nights import store_nights
from switchyard_command import command, json_of
from switchyard_up import LONG_S, Up
from waiting import until
from webhook import webhook

from engines.errors import BadInput
from engines.home import host
from flows.orchestrator.notifications import put_notifications
from flows.schedules import schedule_lines
from flows.upgrade import compared_at_night
from migrations.plan import Upgrade
from migrations.plan_file import load_plan
from tasks.evidence.nights import NIGHT


class PlayedUp(Up):
    """`switchyard up`, its schedules on, over played engines that are loaded on demand."""

    def __init__(self, folder: Any, head: str = "") -> None:
        super().__init__(folder)
        self.plan = plan_of(folder, "m", head=head, tail=f"[yard]\nport = {self.port}")

    def argv(self) -> list[str]:
        return command("up", self.plan, "--prefect-port", self.prefect)

    def serve(self) -> None:
        """One answer, for which its engine is started."""
        asked = {"model": "m", "max_tokens": 2, "messages": [{"role": "user", "content": "Hi"}]}
        answer = httpx.post(f"http://127.0.0.1:{self.port}/v1/chat/completions", json=asked, timeout=60, **LOCAL)
        assert answer.status_code == 200, answer.text

    def checks(self, run: str = "latest") -> dict[str, dict[str, Any]]:
        (model,) = json_of(self.run("report", run, "--json"))["models"]
        return {check["check"]: check for check in model["checks"]}

    def evaluations(self) -> list[dict[str, Any]]:
        return [run for run in json_of(self.run("history", "--json"))["runs"] if run["kind"] == "evaluate"]


@contextlib.contextmanager
def played_up(folder: Any, prefect: Any, **parts: Any) -> Iterator[PlayedUp]:
    """One with a plan of these parts, to be started; it has ended when the block ends."""
    up = PlayedUp(folder, **parts)
    prefect.put_database(up.home)
    try:
        yield up
    finally:
        up.end()


@pytest.fixture(scope="module")
def up(tmp_path_factory, prefect_of_all) -> Iterator[PlayedUp]:
    with played_up(tmp_path_factory.mktemp("up"), prefect_of_all) as up:
        yield up


@pytest.fixture
def make_up(tmp_path, prefect_of_all) -> Iterator[Any]:
    """Makes one with a plan of its own."""
    with contextlib.ExitStack() as stack:
        yield lambda **parts: stack.enter_context(played_up(tmp_path, prefect_of_all, **parts))


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


def test_it_is_skipped_where_its_engines_do_not_fit_beside_what_serves(make_up):
    """Cancelled with one line on how much is missing; by hand it is measured, with a warning."""
    up = make_up(head="settings = { context_tokens = 2000000000 }")
    up.ensure()
    up.serve()
    state = up.ended(up.begin("evaluate"))
    assert state["type"] == "CANCELLED", state
    assert "TiB is missing" in state["message"]
    assert state["message"].startswith("skipped: m on ")
    assert "\n" not in state["message"]
    assert up.evaluations() == []
    by_hand = up.run("evaluate", up.plan, "--json")
    assert "warning: memory is short" in by_hand.stderr
    assert json_of(by_hand)["models"]


def test_up_says_what_runs_by_itself_and_how_to_turn_it_off(up):
    up.ensure()
    said = up.said()
    for name, when in (("evaluate", "every night at 03:00"), ("soak", "every 10 min"), ("reconcile", "every 5 min")):
        (line,) = [line for line in said.splitlines() if line.strip().startswith(f"{name}:")]
        assert when in line
        assert "next" in line
    assert "--no-schedules" in said
    assert "no soak" in said


def test_a_watched_build_is_compared_at_night_once_and_nothing_moves(make_up, tmp_path):
    """Where the plan says what to watch: the verdict is on record, and the plan of the upgrade lies beside the plan."""
    new = played(tmp_path / "new", "llama-server")
    new.with_name("build").write_text("2 (abcdef1)")
    new.with_name("libllama.so").write_text("another")
    up = make_up()
    up.plan.write_text(f'{up.plan.read_text()}\n[upgrade]\nwatch = "{new}"\n')
    up.ensure()
    assert "upgrade-check: every night at 05:00" in up.said()
    state = up.ended(up.begin("upgrade-check"))
    (run,) = up.evaluations()
    assert run["plan"].endswith("-upgrade")
    assert state["name"] == run["verdict"], state
    assert soaks(up) == 0
    (file,) = up.plan.parent.glob("plan.upgrade-*.toml")
    assert load_plan(file).candidate.name == "llama.cpp@abcdef1"
    assert [route["committed"] for route in up.yard.status()["models"]] == ["llama.cpp"]
    state = up.ended(up.begin("upgrade-check"))
    assert (state["type"], state["name"]) == ("COMPLETED", "no new build"), state
    assert "llama.cpp@abcdef1 is compared already" in state["message"]
    assert len(up.evaluations()) == 1


def test_what_drifts_over_the_nights_is_notified_once(make_up, tmp_path):
    """By the night that shows it; every later one, `status`, `history` and the report have it on record."""
    up = make_up()
    program, told = tmp_path / "tell.py", tmp_path / "told"
    program.write_text("import sys\nopen(sys.argv[1], 'a').write(sys.stdin.read() + '\\n')\n")
    teller = json.dumps([sys.executable, "-I", str(program), str(told)])
    more = f'[notify]\nevents = ["drift"]\ncommand = {teller}\n[limits]\nforeign_cpu = 1.0'  # however busy it is here
    up.plan.write_text(f"{up.plan.read_text()}\n{more}\n")
    up.ensure()
    up.ended(up.begin("evaluate"))
    with up.records() as records:
        first = records.find_run(up.evaluations()[0]["run_id"])
        (night,) = records.list_evidence(first.id, kind=NIGHT)
        now = {arm: figures["ttft_ms"] for arm, figures in night.payload.items()}
        # a hundred times as fast until two nights ago
        values = {arm: [{"ttft_ms": ms / 100}] * 40 + [{"ttft_ms": ms}] * 2 for arm, ms in now.items()}
        store_nights(records, first.plan, values, environment=night.environment, until=first.started_at)
    assert not told.exists()
    for _ in range(2):
        up.ended(up.begin("evaluate"))
    (said,) = [json.loads(line) for line in told.read_text().splitlines()]
    assert (said["event"], said["model"]) == ("drift", "m")
    assert said["what"].count("TTFT, median, up ") == 2
    changes = json_of(up.run("status", "--json"))["drift"]
    assert [one["what"] for one in changes if one["metric"] == "ttft_ms"] == said["what"].split("; ")
    assert changes == json_of(up.run("history", "--json"))["drift"]
    for shows in ("status", "history"):
        assert f"drift: {changes[0]['what']}" in up.run(shows).stdout
    report = json_of(up.run("report", changes[0]["run_id"], "--json"))["report"]
    assert changes[0]["what"] in html.unescape(Path(report).read_text())


def test_what_happens_is_sent_by_a_block_of_prefect(make_up):
    """`up` says what to do where there is no such block; one that is there is told of an engine that was killed."""
    up, named = make_up(), {"automations": {"name": {"any_": [f"switchyard: notifications of {host()}"]}}}
    up.plan.write_text(f'{up.plan.read_text()}\n[notify]\nprefect_block = "custom-webhook/team"\n')
    up.ensure()
    assert "warning: notify.prefect_block: Prefect has no block custom-webhook/team" in up.said()
    assert up.api("automations/filter", named) == []
    with webhook() as (url, taken):
        kind = up.api("block_types/slug/custom-webhook")["id"]
        (schema, *_) = up.api("block_schemas/filter", {"block_schemas": {"block_type_id": {"any_": [kind]}}})
        data = {"name": "team", "url": url, "json_data": {"title": "{{subject}}", "text": "{{body}}"}}
        block = {"name": "team", "data": data, "block_type_id": kind, "block_schema_id": schema["id"]}
        up.api("block_documents/", block)
        up.end()

        up.ensure()
        assert "warning:" not in up.said()
        (made,) = up.api("automations/filter", named)
        assert made["enabled"]
        up.serve()
        psutil.Process(up.route()["engines"][0]["pid"]).kill()
        until(lambda: taken, "the notification", LONG_S)
    assert taken[0]["title"] == "Switchyard: incident"
    assert taken[0]["text"].startswith(f"Switchyard on {host()}: m (llama.cpp): incident: ")
    assert up.events("prefect.automation.action.failed") == []
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{up.prefect}/api"}):
        assert asyncio.run(put_notifications(None)) is None
    assert up.api("automations/filter", named) == []


@pytest.mark.parametrize(
    ("watch", "said"), [("", "the plan has no [upgrade] watch"), ("{serving}", "is the build that serves as llama.cpp")]
)
def test_without_a_new_build_nothing_is_measured(watch, said, tmp_path, monkeypatch):
    monkeypatch.setenv("SWITCHYARD_HOME", str(tmp_path / "home"))
    plan = load_plan(plan_of(tmp_path, "m"))
    watch = watch.format(serving=plan.incumbent.binary)
    outcome = compared_at_night(plan.model_copy(update={"upgrade": Upgrade(watch=watch)}), tmp_path / "plan.toml")
    assert (outcome["result"], outcome["verdict"]) == ("no new build", "PASS")
    assert said in outcome["why"]


def test_what_is_watched_is_a_path_or_a_wheel(tmp_path):
    """A relative path would depend on the caller's directory."""
    plan_of(tmp_path, "m", tail='[upgrade]\nwatch = "build/llama-server"\n')
    with pytest.raises(BadInput, match=r"upgrade.watch.*'build/llama-server' is neither an absolute path"):
        load_plan(tmp_path / "plan.toml")


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
